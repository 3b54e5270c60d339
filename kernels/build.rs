//! Compiles `cuda/*.cu` for every architecture, if the feature `cuda` is on: one fat binary each.
//!
//! nvcc is looked for in `CUDA_HOME`, `CUDA_PATH` and `PATH`. `CUDA_COMPUTE_CAP` (as 80, 86, 89 or 90) builds for one
//! architecture only.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Sources, and how they round: codes must be equal bit for bit to the CPU's, so that `seal` may not contract products
/// and sums; weights below the smallest normal number may be 0 in attention.
const SOURCES: [(&str, &str); 6] = [
    ("probe", "--fmad=true"),
    ("count", "--fmad=true"),
    ("store", "--fmad=true"),
    ("seal", "--fmad=false"),
    ("decode", "--fmad=true"),
    ("decode_mma", "--ftz=true"),
];
/// Machine code for each; PTX of the last for what comes after.
const ARCHITECTURES: [&str; 4] = ["80", "86", "89", "90"];

fn main() {
    println!("cargo:rerun-if-changed=cuda");
    println!("cargo:rerun-if-env-changed=CUDA_HOME");
    println!("cargo:rerun-if-env-changed=CUDA_PATH");
    println!("cargo:rerun-if-env-changed=CUDA_COMPUTE_CAP");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    if let Err(message) = compile() {
        println!("cargo:warning={message}");
        std::process::exit(1);
    }
}

fn compile() -> Result<(), String> {
    let nvcc = nvcc();
    let out = std::env::var_os("OUT_DIR").map(PathBuf::from);
    let out = out.ok_or("cargo sets OUT_DIR")?;
    let jobs = SOURCES.map(|(name, rounding)| {
        let mut command = Command::new(&nvcc);
        command
            .args(["-std=c++17", "-O3", "-Werror", "all-warnings", "-fatbin"])
            .arg(rounding)
            .args(targets())
            .arg("-o")
            .arg(out.join(format!("{name}.fatbin")))
            .arg(format!("cuda/{name}.cu"));
        (name, command.spawn())
    });
    for (name, job) in jobs {
        let mut job = job.map_err(|error| {
            format!(
                "nvcc does not start ({}: {error}): install the CUDA toolkit, or set CUDA_HOME to one, \
                 or fetch the compiler alone with `cargo fetch-nvcc`",
                nvcc.display()
            )
        })?;
        let status = job.wait().map_err(|error| error.to_string())?;
        if !status.success() {
            return Err(format!("nvcc could not compile cuda/{name}.cu: {status}"));
        }
    }
    Ok(())
}

fn nvcc() -> PathBuf {
    ["CUDA_HOME", "CUDA_PATH"]
        .iter()
        .filter_map(std::env::var_os)
        .map(|home| Path::new(&home).join("bin/nvcc"))
        .find(|nvcc| nvcc.exists())
        .unwrap_or_else(|| PathBuf::from("nvcc"))
}

fn targets() -> Vec<String> {
    let code = |a: &str| format!("-gencode=arch=compute_{a},code=sm_{a}");
    if let Ok(only) = std::env::var("CUDA_COMPUTE_CAP") {
        return vec![code(&only)];
    }
    let last = ARCHITECTURES[ARCHITECTURES.len() - 1];
    let ptx = format!("-gencode=arch=compute_{last},code=compute_{last}");
    ARCHITECTURES.iter().map(|a| code(a)).chain([ptx]).collect()
}
