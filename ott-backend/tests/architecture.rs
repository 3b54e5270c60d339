//! The rooms of `src` and the one direction in which data flows (`docs/architecture.md`): reads the
//! sources and fails on an edge that points left.

use std::fs;
use std::path::{Path, PathBuf};

/// Left to right: a room uses rooms to its left and itself.
const ROOMS: [&str; 13] = [
    "error",
    "config",
    "pack",
    "layout",
    "quantize",
    "weigh",
    "rotate",
    "cpu",
    "cache",
    "attention",
    "prompt",
    "report",
    "backend",
];
/// The only files that may hold `unsafe`.
const UNSAFE: [&str; 6] = [
    "backend/cuda/tensor.rs",
    "cpu/compiled.rs",
    "cpu/avx2.rs",
    "cpu/avx512.rs",
    "cpu/neon.rs",
    "prompt/gemm.rs",
];
/// Crates that only the seam has heard of.
const HOST: [&str; 2] = ["candle_core", "mistralrs_kv_backend"];
/// Lines of a file without its tests.
const LINES: usize = 400;
const LINES_OF_AN_ISA: usize = 600;

/// A source file: its path below `src` with `/`, and its text without comments and tests.
struct Source {
    path: String,
    code: String,
}

impl Source {
    fn room(&self) -> &str {
        let first = self.path.split('/').next().unwrap_or(&self.path);
        first.strip_suffix(".rs").unwrap_or(first)
    }

    fn has_word(&self, word: &str) -> bool {
        let part = |c: char| !c.is_alphanumeric() && c != '_';
        self.code.split(part).any(|w| w == word)
    }
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = vec![];
    walk(&root, &mut files);
    let source = |file: PathBuf| {
        let path = file.strip_prefix(&root).unwrap();
        let parts: Vec<_> = path.iter().map(|p| p.to_str().unwrap()).collect();
        Source {
            path: parts.join("/"),
            code: code_of(&fs::read_to_string(&file).unwrap()),
        }
    };
    files.into_iter().map(source).collect()
}

fn walk(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            walk(&path, files);
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
    files.sort();
}

/// Without comments and without what follows `#[cfg(test)]` (tests stand last).
fn code_of(text: &str) -> String {
    let code = text.split("#[cfg(test)]").next().unwrap_or(text);
    let lines = code
        .lines()
        .map(|line| line.split("//").next().unwrap_or(line));
    lines.collect::<Vec<_>>().join("\n")
}

/// Rooms named in `crate::room` and `crate::{room::.., room}`.
fn rooms_used(code: &str) -> Vec<String> {
    let name = |s: &str| -> String {
        s.chars()
            .take_while(|c| c.is_alphanumeric() || *c == '_')
            .collect()
    };
    let mut used = vec![];
    for rest in code.split("crate::").skip(1) {
        match rest.strip_prefix('{') {
            None => used.push(name(rest)),
            Some(group) => {
                let (mut depth, mut item) = (0, String::new());
                for c in group.chars() {
                    match c {
                        '}' if depth == 0 => break,
                        '{' => depth += 1,
                        '}' => depth -= 1,
                        ',' if depth == 0 => used.push(name(std::mem::take(&mut item).trim())),
                        _ => {}
                    }
                    if c != ',' || depth > 0 {
                        item.push(c);
                    }
                }
                used.push(name(item.trim()));
            }
        }
    }
    used.retain(|room| !room.is_empty());
    used
}

#[test]
fn edges_are_found() {
    let code = "use crate::layout::PageLayout;\nuse crate::{cache::{Pool, Row}, pack};\ncrate::cpu::best()";
    assert_eq!(rooms_used(code), ["layout", "cache", "pack", "cpu"]);
    assert_eq!(code_of("a // crate::b\n#[cfg(test)]\nmod t {}").trim(), "a");
}

#[test]
fn data_flows_one_way() {
    let place = |room: &str| ROOMS.iter().position(|r| *r == room);
    let mut edges = 0;
    for source in sources().iter().filter(|s| s.path != "lib.rs") {
        let own = place(source.room());
        let own =
            own.unwrap_or_else(|| panic!("{} is in none of the rooms {ROOMS:?}", source.path));
        for used in rooms_used(&source.code) {
            let Some(used_at) = place(&used) else {
                panic!(
                    "{} uses crate::{used}, which is no room of {ROOMS:?}",
                    source.path
                );
            };
            assert!(
                used_at <= own,
                "{} uses `{used}`, a room to its right",
                source.path
            );
            edges += 1;
        }
    }
    assert!(edges > 20, "only {edges} edges found: is `src` read?");
}

/// The flow drawn in `lib.rs` is the one that holds.
#[test]
fn the_front_door_tells_the_same_order() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs");
    let text = fs::read_to_string(path).unwrap();
    let flow = text.lines().find(|line| line.contains("config ->"));
    let rooms = flow
        .expect("a drawn flow")
        .trim_start_matches("//!")
        .split("->");
    let told: Vec<&str> = rooms.map(str::trim).filter(|r| ROOMS.contains(r)).collect();
    let mut sorted = told.clone();
    sorted.sort_by_key(|room| ROOMS.iter().position(|r| r == room));
    assert_eq!(told, sorted, "told in `lib.rs`, and as it holds");
}

#[test]
fn only_the_seam_has_heard_of_the_host() {
    let sources = sources();
    let heard = |s: &&Source| HOST.iter().any(|name| s.has_word(name));
    for source in sources.iter().filter(heard) {
        let seam = source.room() == "backend" || source.path == "lib.rs";
        assert!(seam, "{} names one of {HOST:?}", source.path);
    }
    assert!(sources.iter().filter(heard).count() > 0);
}

#[test]
fn unsafe_stays_where_it_is_allowed() {
    for source in sources() {
        let allowed = UNSAFE.contains(&source.path.as_str());
        assert!(
            allowed || !source.has_word("unsafe"),
            "{} has unsafe code",
            source.path
        );
    }
}

#[test]
fn files_stay_small() {
    for source in sources() {
        let isa = UNSAFE.contains(&source.path.as_str());
        let budget = if isa { LINES_OF_AN_ISA } else { LINES };
        let lines = source.code.lines().count();
        assert!(
            lines <= budget,
            "{} has {lines} lines, {budget} are allowed",
            source.path
        );
    }
}
