//! The CUDA compiler, for machines without one, and the check that needs it: every kernel compiles for every
//! architecture, and what launches them passes the lints. No GPU and no driver are needed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::project::Project;
use crate::tasks::{cache_dir, cargo_root, run};

/// What compiling takes, from the Python registry, by version and SHA-256: it is run here.
const REQUIREMENTS: &str = include_str!("../nvcc-requirements.txt");

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
    // The marker holds what was installed: other pins are installed anew.
    let installed = fs::read_to_string(folder.join("complete")).unwrap_or_default();
    if home.join("bin/nvcc").exists() && installed == REQUIREMENTS {
        return Ok(home);
    }
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    fs::create_dir_all(&folder)?;
    let pip = pip(&folder, REQUIREMENTS)?;
    run("`python3 -m pip install` (fetches the CUDA compiler)", pip)?;
    fs::write(folder.join("complete"), REQUIREMENTS)?;
    Ok(home)
}

/// The installer, which refuses what has another hash than the requirements say, or none.
fn pip(folder: &Path, requirements: &str) -> Result<Command> {
    let pins = folder.join("requirements.txt");
    fs::write(&pins, requirements)?;
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "--disable-pip-version-check", "install"])
        .args(["--quiet", "--no-deps", "--only-binary=:all:"])
        .arg("--require-hashes")
        .arg("--target")
        .arg(folder)
        .arg("--requirement")
        .arg(pins);
    Ok(pip)
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

#[cfg(test)]
mod tests {
    use std::process::Stdio;

    use super::*;

    /// Packages with their versions, and the hashes of each.
    fn pins() -> Vec<(&'static str, Vec<&'static str>)> {
        let mut pins: Vec<(&str, Vec<&str>)> = Vec::new();
        for line in REQUIREMENTS.lines().filter(|line| !line.starts_with('#')) {
            let line = line.trim_end_matches(" \\");
            match (line.trim().strip_prefix("--hash=sha256:"), pins.last_mut()) {
                (Some(hash), Some(pin)) => pin.1.push(hash),
                _ => pins.push((line, Vec::new())),
            }
        }
        pins
    }

    #[test]
    fn everything_that_is_run_is_pinned() {
        let pins = pins();
        assert_eq!(pins.len(), 5);
        for (package, hashes) in pins {
            let version = package.split_once("==").map(|(_, version)| version);
            let exact = version.is_some_and(|v| v.starts_with("13.0.") && !v.contains('*'));
            assert!(exact, "{package}");
            let is_hash =
                |hash: &&str| hash.len() == 64 && hash.chars().all(|c| c.is_ascii_hexdigit());
            // One for each architecture.
            assert!(hashes.len() == 2 && hashes.iter().all(is_hash), "{package}");
        }
    }

    /// The smallest of the packages, installed with its hash, with another one and without.
    #[test]
    fn a_package_with_another_hash_is_refused() -> Result<()> {
        let folder = std::env::temp_dir().join(format!("nvcc-pins-{}", std::process::id()));
        fs::create_dir_all(&folder)?;
        let install = |requirements: &str| -> Result<String> {
            let mut pip = pip(&folder, requirements)?;
            let done = pip.arg("--upgrade").stdout(Stdio::null()).output()?;
            let said = String::from_utf8_lossy(&done.stderr).into_owned();
            Ok(if done.status.success() {
                String::new()
            } else {
                said
            })
        };
        let (package, hashes) = pins().swap_remove(1);
        let with = |hashes: &[&str]| {
            let hash = |hash: &&str| format!(" --hash=sha256:{hash}");
            let all: String = hashes.iter().map(hash).collect();
            format!("{package}{all}\n")
        };
        let right = install(&with(&hashes))?;
        if !right.is_empty() && !right.contains("HASH") {
            eprintln!("SKIPPED: {package} cannot be installed here: {right}");
            return Ok(());
        }
        assert_eq!(right, "");
        let other = "0".repeat(64);
        let wrong = install(&with(&[&other]))?;
        assert!(wrong.contains("DO NOT MATCH THE HASHES"), "{wrong}");
        let none = install(&with(&[]))?;
        assert!(none.contains("--require-hashes"), "{none}");
        fs::remove_dir_all(&folder)?;
        Ok(())
    }
}
