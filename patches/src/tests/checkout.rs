//! A checkout of this project in a temporary folder, whose host is one tiny crate.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::check::check;
use crate::project::Project;
use crate::refresh::refresh;
use crate::registry::hex;
use crate::setup::setup;

pub const LIB: &str = "tiny/src/lib.rs";
pub const OTHER: &str = "tiny/src/other.rs";

/// A checkout whose host is one crate, `tiny`, with two patches that each change a line of `LIB`.
pub struct Checkout {
    pub project: Project,
    _dir: TempDir,
}

impl Checkout {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().to_path_buf();
        let project = Project {
            patches: root.join("patches"),
            host: root.join("integration-tests/host"),
            cargo_home: root.join("cargo"),
            root,
        };
        fs::create_dir_all(&project.patches).unwrap();
        let sha256 = publish(&project.cargo_home.join("registry/cache/index"));
        let toml = format!("version = \"0.1.0\"\n[patched]\ntiny = \"{sha256}\"\n");
        fs::write(project.patches.join("upstream.toml"), toml).unwrap();
        fs::write(
            project.patches.join("series"),
            "# order\nfirst.patch\nsecond.patch\n",
        )
        .unwrap();
        let checkout = Self { project, _dir: dir };
        checkout.write_patch("first", 1, "line 1", "first line");
        checkout.write_patch("second", 17, "line 20", "second line");
        checkout
    }

    /// A patch of one line of `LIB`, whose hunk starts at line `start`.
    pub fn write_patch(&self, name: &str, start: usize, old: &str, new: &str) {
        let context = |range: std::ops::Range<usize>| -> String {
            range.map(|i| format!(" line {i}\n")).collect()
        };
        let (before, after) = match start {
            1 => (String::new(), context(2..5)),
            _ => (context(17..20), String::new()),
        };
        let diff = format!(
            "diff --git a/{LIB} b/{LIB}\n--- a/{LIB}\n+++ b/{LIB}\n@@ -{start},4 +{start},4 @@{}\n\
             {before}-{old}\n+{new}\n{after}",
            if start == 1 { "" } else { " line 16" }
        );
        let header = format!(
            "Subject: {name} change\nApplies-to: tiny 0.1.0\nForwarded: no\nReason: a test\n\
             Last-Update: 2020-01-01\n\nProse stays.\n\nTo test: this\n\n"
        );
        fs::write(self.patch_path(name), header + &diff).unwrap();
    }

    pub fn patch_path(&self, name: &str) -> PathBuf {
        self.project.patches.join(format!("{name}.patch"))
    }

    pub fn patch(&self, name: &str) -> String {
        fs::read_to_string(self.patch_path(name)).unwrap()
    }

    pub fn setup(&self) -> anyhow::Result<()> {
        setup(&self.project, false)
    }

    pub fn refresh(&self, name: Option<&str>) -> anyhow::Result<()> {
        refresh(&self.project, name)
    }

    pub fn check(&self) -> anyhow::Result<()> {
        check(&self.project)
    }

    pub fn host(&self, path: &str) -> String {
        fs::read_to_string(self.project.host.join(path)).unwrap()
    }

    /// Replaces text in the host's tree.
    pub fn edit(&self, old: &str, new: &str) {
        let text = self.host(LIB);
        assert!(text.contains(old));
        fs::write(self.project.host.join(LIB), text.replacen(old, new, 1)).unwrap();
    }

    pub fn modified(&self, path: &str) -> SystemTime {
        let metadata = fs::metadata(self.project.host.join(path)).unwrap();
        metadata.modified().unwrap()
    }
}

/// Puts `tiny`'s archive into a registry's cache; returns its hash.
fn publish(cache: &Path) -> String {
    let lines: String = (1..=20).map(|i| format!("line {i}\n")).collect();
    let files = [
        ("Cargo.toml", "[package]\nname = \"tiny\"\n"),
        ("src/lib.rs", &lines),
        ("src/other.rs", "other\n"),
    ];
    let gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    let mut tar = tar::Builder::new(gzip);
    for (path, text) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o644);
        let path = format!("tiny-0.1.0/{path}");
        tar.append_data(&mut header, path, text.as_bytes()).unwrap();
    }
    let archive = tar.into_inner().unwrap().finish().unwrap();
    fs::create_dir_all(cache).unwrap();
    fs::write(cache.join("tiny-0.1.0.crate"), &archive).unwrap();
    hex(&Sha256::digest(&archive))
}
