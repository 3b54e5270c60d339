//! Faults put into `src/blocks.rs` on purpose: `load.rs`, compiled with each of them, must fail. They are what the CUDA cache
//! once did: a block given up while another row reads it, state that moves before the bytes exist, a page that two rows make,
//! a fault that takes the prefix along.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const FAULTS: [(&str, &str, &str); 4] = [
    (
        "a block is given up while another row has it in its window",
        "if self.blocks[block].holders == 0 && !made.contains(&block) {",
        "if !made.contains(&block) {",
    ),
    (
        "a page counts before all layers have it",
        "            seal(&wave)?;\n            for made in wave {",
        "            for made in &wave {\n                self.blocks[made.table[made.pages_before]].page = true;\n            }\n            seal(&wave)?;\n            for made in wave {",
    ),
    (
        "each row makes the pages that it needs",
        "if !self.is_page(block) && !wave_of.contains_key(&block) {",
        "if !self.is_page(block) {",
    ),
    (
        "a row with a fault empties blocks that can be hit",
        "                self.undo(written);\n                continue;",
        "                self.undo(written);\n                (0..self.blocks.len()).filter(|b| self.blocks[*b].holders > 0).collect::<Vec<_>>().into_iter().for_each(|b| self.clear(b));\n                continue;",
    ),
];

/// Compile `load.rs` with `blocks`; the program.
fn compiled(folder: &Path, blocks: &str) -> PathBuf {
    let load = include_str!("load.rs");
    fs::create_dir_all(folder).expect("a folder");
    let module = "\n#[allow(dead_code)]\nmod ott_kernels {\n    pub mod blocks;\n}\n";
    fs::write(folder.join("main.rs"), [load, module].concat()).expect("written");
    fs::create_dir_all(folder.join("ott_kernels")).expect("a folder");
    fs::write(folder.join("ott_kernels/blocks.rs"), blocks).expect("written");
    let program = folder.join("load");
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".into());
    let mut rustc = Command::new(rustc);
    rustc.args([
        "--test",
        "--edition",
        "2021",
        "-C",
        "opt-level=2",
        "-A",
        "warnings",
        "-o",
    ]);
    rustc.arg(&program).arg(folder.join("main.rs"));
    let output = rustc.output().expect("rustc starts");
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words}");
    program
}

#[test]
fn faults_in_the_life_of_blocks_are_found() {
    let source = include_str!("../src/blocks.rs");
    let root = std::env::temp_dir().join(format!("ott-teeth-{}", std::process::id()));
    let run = |name: &str, blocks: &str| {
        let program = compiled(&root.join(name), blocks);
        let output = Command::new(program)
            .args(["--exact", "no_request_reads_tokens_that_are_not_its_own"])
            .output()
            .expect("starts");
        output.status.success()
    };
    assert!(run("none", source), "without a fault");
    for (i, (fault, code, broken)) in FAULTS.into_iter().enumerate() {
        assert_eq!(
            source.matches(code).count(),
            1,
            "{fault}: the code has changed"
        );
        let found = !run(&i.to_string(), &source.replace(code, broken));
        assert!(found, "not found: {fault}");
        println!("found: {fault}");
    }
    fs::remove_dir_all(root).expect("removed");
}
