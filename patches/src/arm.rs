//! The inner loops for Arm, on any machine: compiled if Rust has the target, run if there is an emulator.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use crate::project::Project;
use crate::tasks::{cargo_root, run};

const TARGET: &str = "aarch64-unknown-linux-musl";
/// What `.cargo/config.toml` runs tests with.
const EMULATOR: &str = "qemu-aarch64";

/// Runs the conformance suite and the library's own tests as an Arm machine would; says so aloud where it cannot.
pub fn check(project: &Project) -> Result<()> {
    let rustc = Command::new("rustc").args(["--print", "sysroot"]).output();
    let sysroot = String::from_utf8(rustc.context("starting rustc")?.stdout)?;
    let libraries = Path::new(sysroot.trim()).join("lib/rustlib").join(TARGET);
    if !libraries.is_dir() {
        println!("SKIPPED: Rust has no {TARGET} here; `rustup target add {TARGET}` installs it.");
        return Ok(());
    }
    let emulator = Command::new(EMULATOR)
        .arg("--version")
        .stdout(Stdio::null())
        .status();
    if emulator.is_ok_and(|status| status.success()) {
        let args = ["test-arm", "--locked", "--lib", "--test", "conformance"];
        return run("cargo test-arm", cargo_root(project, &args)?);
    }
    println!("Compiled only: there is no {EMULATOR} here (Debian's package qemu-user).");
    let args = [
        "test-arm",
        "--locked",
        "--lib",
        "--test",
        "conformance",
        "--no-run",
    ];
    run("cargo test-arm", cargo_root(project, &args)?)
}
