//! The CUDA compiler, for machines without one, and the check that needs it: every kernel compiles for every
//! architecture, and what launches them passes the lints. No GPU and no driver are needed.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use crate::project::Project;
use crate::tasks::{cache_dir, cargo_root, run};

/// What compiling takes, from the Python registry. Drivers of CUDA 13.0 are the oldest that load the result.
const PACKAGES: [&str; 5] = [
    "nvidia-cuda-nvcc==13.0.*",
    "nvidia-cuda-crt==13.0.*",
    "nvidia-nvvm==13.0.*",
    "nvidia-cuda-runtime==13.0.*",
    "nvidia-cuda-cccl==13.0.*",
];

/// `cargo fetch-nvcc`: the compiler alone, kept in the cache folder.
pub fn fetch() -> Result<()> {
    let home = ensure()?;
    println!("export CUDA_HOME={}", home.display());
    Ok(())
}

/// The folder that `CUDA_HOME` names; fetched if it is not there.
fn ensure() -> Result<PathBuf> {
    let folder = cache_dir()?.join("nvcc");
    let home = folder.join("nvidia/cu13");
    if home.join("bin/nvcc").exists() && folder.join("complete").exists() {
        return Ok(home);
    }
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    fs::create_dir_all(&folder)?;
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "--disable-pip-version-check", "install"])
        .args(["--quiet", "--no-deps", "--only-binary=:all:", "--target"])
        .arg(&folder)
        .args(PACKAGES);
    run("`python3 -m pip install` (fetches the CUDA compiler)", pip)?;
    fs::write(folder.join("complete"), "")?;
    Ok(home)
}

/// Compile the kernels for every architecture, lint what launches them, then the backend's side of them and candle's own
/// kernels, for one architecture.
pub fn check_kernels(project: &Project) -> Result<()> {
    let home = ensure()?;
    let clippy = |package: &str| {
        let args = ["clippy", "--package", package, "--features", "cuda"];
        let more = ["--all-targets", "--locked", "--", "-D", "warnings"];
        let mut clippy = cargo_root(project, &[&args[..], &more[..]].concat())?;
        clippy.env("CUDA_HOME", &home);
        clippy.env_remove("CUDA_COMPUTE_CAP");
        anyhow::Ok(clippy)
    };
    run("cargo clippy", clippy("ott-kernels")?)?;
    let mut backend = clippy("ott-backend")?;
    // candle asks `nvcc` on the path, and a GPU unless it is told what one would answer.
    let path = std::env::var_os("PATH").unwrap_or_default();
    let paths = std::iter::once(home.join("bin")).chain(std::env::split_paths(&path));
    backend.env("PATH", std::env::join_paths(paths)?);
    backend.env("CUDA_COMPUTE_CAP", "90");
    run("cargo clippy", backend)
}
