//! The published crates: found in cargo's own cache, else fetched by cargo; always checked against their hash.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{bail, Context, Result};
use sha2::{Digest, Sha256};

use crate::project::{Project, Upstream};

/// Unpacks each crate to `into/NAME/`.
pub fn unpack(project: &Project, crates: &[Upstream], into: &Path) -> Result<()> {
    if crates.iter().any(|c| in_cache(project, c).is_none()) {
        fetch(project, crates)?;
    }
    for upstream in crates {
        let archive = in_cache(project, upstream).with_context(|| {
            format!(
                "cargo fetched {}, but no archive under {} has the SHA-256 {} that patches/upstream.toml \
                 asks for. A vendored or altered registry cannot serve the host: use the Rust registry \
                 or a mirror of it.",
                upstream.stem(),
                project.cargo_home.join("registry/cache").display(),
                upstream.sha256
            )
        })?;
        unpack_one(upstream, &archive, into)?;
    }
    Ok(())
}

/// The archive's bytes, if a registry's cache holds them with the right hash.
pub fn in_cache(project: &Project, upstream: &Upstream) -> Option<Vec<u8>> {
    let file = format!("{}.crate", upstream.stem());
    let registries = fs::read_dir(project.cargo_home.join("registry/cache")).ok()?;
    registries
        .filter_map(|registry| fs::read(registry.ok()?.path().join(&file)).ok())
        .find(|archive| hex(&Sha256::digest(archive)) == upstream.sha256)
}

fn unpack_one(upstream: &Upstream, archive: &[u8], into: &Path) -> Result<()> {
    let mut tar = tar::Archive::new(flate2::read::GzDecoder::new(archive));
    tar.set_preserve_mtime(false);
    tar.unpack(into)
        .with_context(|| format!("unpacking {}", upstream.stem()))?;
    fs::rename(into.join(upstream.stem()), into.join(&upstream.name))
        .with_context(|| format!("{} holds no folder of its name", upstream.stem()))
}

/// Lets cargo fetch the crates with the user's own configuration: mirrors, proxies, offline.
///
/// The throw-away package starts from the host's lock file, so that what comes along (the crates'
/// dependencies) is what the build of the host needs next.
fn fetch(project: &Project, crates: &[Upstream]) -> Result<()> {
    let dir = project.beside_host("fetch");
    remove_dir(&dir)?;
    fs::create_dir_all(dir.join("src"))?;
    let mut manifest = String::from(
        "[workspace]\n\n[package]\nname = \"fetch\"\nversion = \"0.0.0\"\nedition = \"2021\"\n\n[dependencies]\n",
    );
    for upstream in crates {
        manifest += &format!("{} = \"={}\"\n", upstream.name, upstream.version);
    }
    fs::write(dir.join("Cargo.toml"), manifest)?;
    fs::write(dir.join("src/lib.rs"), "")?;
    let lock = project.root.join("integration-tests/Cargo.lock");
    if lock.exists() {
        fs::copy(lock, dir.join("Cargo.lock"))?;
    }
    eprintln!("Fetching mistral.rs and its dependencies from the Rust registry");
    let status = Command::new(cargo())
        .current_dir(&dir)
        .args(["fetch", "--target", &host_target()?])
        .status()
        .context("starting cargo")?;
    remove_dir(&dir)?;
    if !status.success() {
        let stems: Vec<_> = crates.iter().map(Upstream::stem).collect();
        bail!(
            "cargo could not fetch {} from the Rust registry (its words are above). Check the network, or \
             run once where there is one: cargo keeps what it fetched.",
            stems.join(", ")
        );
    }
    Ok(())
}

/// The cargo that runs us.
pub fn cargo() -> PathBuf {
    std::env::var_os("CARGO").map_or_else(|| PathBuf::from("cargo"), PathBuf::from)
}

fn host_target() -> Result<String> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(rustc)
        .arg("-vV")
        .output()
        .context("starting rustc")?;
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .find_map(|line| line.strip_prefix("host: ").map(str::to_string))
        .context("`rustc -vV` names no host")
}

/// Lower-case hex.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Removes a folder if it is there.
pub fn remove_dir(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("removing {}", dir.display()))
        }
        _ => Ok(()),
    }
}
