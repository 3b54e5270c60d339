//! Running other programs for the user: what runs, where, how long it took, and where builds are kept.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};

use crate::git::Git;
use crate::project::Project;
use crate::registry::cargo;

/// What is built in the host's workspace. One selection for build, tests and demo, so that cargo unifies
/// features once and compiles the host once.
const HOST_PACKAGES: [&str; 6] = [
    "--package",
    "integration-tests",
    "--package",
    "mistralrs-cli",
    "--features",
    "mistralrs-cli/ott",
];
const HOST_BUILD: [&str; 3] = ["build", "--release", "--bins"];
const HOST_TEST: [&str; 4] = ["test", "--release", "--test", "it"];
/// Upstream's own tests of the crates that the patches change most, and those of the command line.
const UPSTREAM_TEST: [&str; 9] = [
    "test",
    "--release",
    "--lib",
    "--bin",
    "mistralrs",
    "--package",
    "mistralrs-core",
    "--package",
    "mistralrs-quant",
];
/// All but the three that ask a model hub.
const OFFLINE: [&str; 7] = [
    "--",
    "--skip",
    "gguf_tokenizer::tests::test_encode_decode_gpt2",
    "--skip",
    "gguf_tokenizer::tests::test_encode_decode_llama",
    "--skip",
    "tiktoken::tests::test_tiktoken_conversion",
];

/// Where what is expensive outlives a checkout: `OTT_CACHE_DIR`, else the user's cache folder.
pub fn cache_dir() -> Result<PathBuf> {
    let set = |name: &str| {
        std::env::var_os(name)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    };
    let dir = match (set("OTT_CACHE_DIR"), set("XDG_CACHE_HOME")) {
        (Some(dir), _) => dir,
        (None, Some(cache)) => cache.join("ott-mistralrs"),
        (None, None) => std::env::home_dir()
            .context("there is no home folder: set OTT_CACHE_DIR")?
            .join(".cache/ott-mistralrs"),
    };
    Ok(std::path::absolute(dir)?)
}

/// The target directory of every build of the host.
pub fn host_target() -> Result<PathBuf> {
    Ok(cache_dir()?.join("target"))
}

/// `cargo ARGS` in the root workspace.
pub fn cargo_root(project: &Project, args: &[&str]) -> Result<Command> {
    command(&project.root, args)
}

/// Builds the host's binaries and ours.
pub fn cargo_host_build(project: &Project) -> Result<Command> {
    cargo_host(project, &[&HOST_BUILD[..], &HOST_PACKAGES[..]].concat())
}

/// Builds the published host, which the patched one must equal when no backend is chosen.
pub fn cargo_pristine_build(project: &Project) -> Result<Command> {
    let folder = project.root.join("integration-tests/pristine");
    let mut cargo = command(&folder, &["build", "--release", "--locked"])?;
    cargo.env("CARGO_TARGET_DIR", host_target()?);
    Ok(cargo)
}

/// Runs our tests of the patched host.
pub fn cargo_host_test(project: &Project) -> Result<Command> {
    cargo_host(project, &[&HOST_TEST[..], &HOST_PACKAGES[..]].concat())
}

/// Runs upstream's own tests, and those that the patches add to them.
pub fn cargo_upstream_test(project: &Project) -> Result<Command> {
    let args = [&UPSTREAM_TEST[..], &HOST_PACKAGES[..], &OFFLINE[..]];
    cargo_host(project, &args.concat())
}

fn cargo_host(project: &Project, args: &[&str]) -> Result<Command> {
    let mut cargo = command(&project.root.join("integration-tests"), args)?;
    cargo.env("CARGO_TARGET_DIR", host_target()?);
    // What `mistralrs --version` says; builds and tests are told the same, so that nothing is built twice.
    if let Ok(revision) = Git::at(&project.root).line(&["rev-parse", "--short", "HEAD"]) {
        cargo.env("MISTRALRS_REVISION", revision);
    }
    Ok(cargo)
}

fn command(dir: &Path, args: &[&str]) -> Result<Command> {
    let mut cargo = Command::new(cargo());
    cargo.current_dir(dir).args(args);
    // What `cargo run` tells us about ourselves must not reach the builds we start.
    for (name, _) in std::env::vars_os() {
        let of_ours = [
            "CARGO_PKG_",
            "CARGO_MANIFEST_",
            "CARGO_CRATE_",
            "CARGO_BIN_",
            "CARGO_PRIMARY_",
        ];
        if of_ours
            .iter()
            .any(|prefix| name.to_string_lossy().starts_with(prefix))
        {
            cargo.env_remove(name);
        }
    }
    if let Some(path) = library_path() {
        cargo.env("LD_LIBRARY_PATH", path);
    }
    Ok(cargo)
}

/// The library path without the folders of our own build, which `cargo run` put in front.
fn library_path() -> Option<OsString> {
    let all = std::env::var_os("LD_LIBRARY_PATH")?;
    let exe = std::env::current_exe().ok()?;
    let own = exe.parent()?;
    std::env::join_paths(std::env::split_paths(&all).filter(|path| !path.starts_with(own))).ok()
}

/// Runs a program to its end, its output going straight to the user.
pub fn run(what: &str, mut command: Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("starting {}", command.get_program().to_string_lossy()))?;
    if !status.success() {
        bail!("{what} failed ({status}); its own words are above");
    }
    Ok(())
}

/// Named steps, timed, the first failure ending the run.
#[derive(Default)]
pub struct Steps {
    done: Vec<(String, Duration)>,
}

impl Steps {
    /// Runs a step; a failure prints the summary and names the step.
    pub fn step(&mut self, name: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
        println!("\n==> {name}");
        let start = Instant::now();
        let result = work();
        self.done.push((name.to_string(), start.elapsed()));
        if result.is_err() {
            self.summary("FAILED");
        }
        result.with_context(|| format!("step `{name}`"))
    }

    /// Prints every step with its time.
    pub fn summary(&self, last: &str) {
        println!();
        for (i, (name, time)) in self.done.iter().enumerate() {
            let verdict = if i + 1 == self.done.len() { last } else { "ok" };
            println!("{verdict:>8}  {:>8.1} s  {name}", time.as_secs_f32());
        }
        let total: Duration = self.done.iter().map(|(_, time)| *time).sum();
        println!("{:>8}  {:>8.1} s", "total", total.as_secs_f32());
    }
}
