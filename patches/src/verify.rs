//! `cargo verify`: everything that must hold, cheapest first.

use anyhow::Result;

use crate::arm;
use crate::check::check;
use crate::freshness;
use crate::models;
use crate::nvcc;
use crate::program::program;
use crate::project::Project;
use crate::setup::setup;
use crate::tasks::{
    cargo_host_build, cargo_host_test, cargo_pristine_build, cargo_root, cargo_upstream_test, run,
    Steps,
};

/// Runs all steps, or with `fast` those that need no build of the host.
pub fn verify(project: &Project, fast: bool) -> Result<()> {
    let mut steps = Steps::default();
    steps.step("setup", || setup(project, false))?;
    steps.step("patches", || check(project))?;
    steps.step("format", || {
        run(
            "cargo fmt",
            cargo_root(project, &["fmt", "--all", "--check"])?,
        )?;
        for (folder, package) in [
            ("integration-tests", "integration-tests"),
            ("integration-tests/pristine", "pristine"),
        ] {
            let mut ours = cargo_root(project, &["fmt", "--check", "--package", package])?;
            ours.current_dir(project.root.join(folder));
            run("cargo fmt", ours)?;
        }
        Ok(())
    })?;
    steps.step("lints", || {
        let args = [
            "clippy",
            "--workspace",
            "--all-targets",
            "--locked",
            "--",
            "-D",
            "warnings",
        ];
        run("cargo clippy", cargo_root(project, &args)?)
    })?;
    steps.step("CUDA kernels, compiled", || nvcc::check_kernels(project))?;
    steps.step("unit tests", || {
        freshness::forget_moved(project)?;
        run(
            "cargo test",
            cargo_root(project, &["test", "--workspace", "--locked"])?,
        )
    })?;
    steps.step("inner loops for Arm", || arm::check(project))?;
    steps.step("instructions of the inner loops", || {
        let mut count = cargo_root(project, &["count-instructions", "--locked"])?;
        count.env("RUSTFLAGS", "-C target-cpu=x86-64");
        run("cargo count-instructions", count)
    })?;
    if !fast {
        steps.step("build of the patched host", || {
            freshness::restore(project)?;
            run("the build of the host", cargo_host_build(project)?)
        })?;
        steps.step("upstream's own tests", || {
            run("cargo test", cargo_upstream_test(project)?)
        })?;
        steps.step("build of the published host", || {
            run("the build of the host", cargo_pristine_build(project)?)
        })?;
        steps.step("model", || models::ensure("smollm2-135m").map(drop))?;
        steps.step("integration tests", || {
            run("cargo test", cargo_host_test(project)?)
        })?;
        steps.step("benchmark, in short", || {
            program(project, "bench-kv", &["--quick".to_string()])
        })?;
        steps.step("evaluation, in short", || {
            program(project, "eval-kv", &["--quick".to_string()])
        })?;
    }
    steps.summary("ok");
    Ok(())
}
