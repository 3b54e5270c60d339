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

/// Compile the kernels for every architecture and lint what launches them.
pub fn check_kernels(project: &Project) -> Result<()> {
    let args = [
        "clippy",
        "--package",
        "ott-kernels",
        "--features",
        "cuda",
        "--all-targets",
        "--locked",
        "--",
        "-D",
        "warnings",
    ];
    let mut clippy = cargo_root(project, &args)?;
    clippy.env("CUDA_HOME", ensure()?);
    clippy.env_remove("CUDA_COMPUTE_CAP");
    run("cargo clippy", clippy)
}
