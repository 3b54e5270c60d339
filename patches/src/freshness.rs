//! Tells cargo the truth about which sources changed since the host was last built in the shared target folder.
//!
//! Cargo goes by times. A fresh clone is all new to it, and another checkout's older files look built when
//! they aren't. So a ledger beside the build keeps, for each source, its hash and the time at which that
//! content was first seen; a file with the same content gets that time back, any other gets the present.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::project::Project;
use crate::registry::hex;
use crate::tasks::{cargo_root, host_target, run};

/// The path dependencies of the host's workspace, whose builds do not depend on where the checkout lies.
const SOURCES: [&str; 3] = [
    "integration-tests/host",
    "ott-backend",
    "patches/mistralrs-kv-backend",
];
/// The workspace's own package knows its path (tests name files by it): built anew for each checkout.
const OWN: &str = "integration-tests";
const CHECKOUT: &str = "checkout";

/// The root workspace's packages: tests know the path of the checkout that built them.
const ROOT: [&str; 5] = [
    "kv-load",
    "ott-backend",
    "ott-kernels",
    "ott-patches",
    "mistralrs-kv-backend",
];

/// Forgets what another checkout built of the root workspace in a target folder that both use: its tests would look for
/// their snapshots there.
pub fn forget_moved(project: &Project) -> Result<()> {
    let set = std::env::var_os("CARGO_TARGET_DIR").filter(|dir| !dir.is_empty());
    let target = set.map_or_else(|| project.root.join("target"), PathBuf::from);
    let (stamp, here) = (target.join("ott-checkout"), project.root.to_string_lossy());
    if fs::read_to_string(&stamp).is_ok_and(|last| last == here) {
        return Ok(());
    }
    let packages = ROOT.iter().flat_map(|name| ["--package", name]);
    let args: Vec<&str> = std::iter::once("clean").chain(packages).collect();
    run("cargo clean", cargo_root(project, &args)?)?;
    fs::create_dir_all(&target)?;
    fs::write(&stamp, &*here).with_context(|| format!("writing {}", stamp.display()))
}

/// Brings the sources' times in line with the build in the host's target folder.
pub fn restore(project: &Project) -> Result<()> {
    restore_in(&project.root, &host_target()?.join("ott-sources"))
}

fn restore_in(root: &Path, ledger: &Path) -> Result<()> {
    let old = read_ledger(ledger);
    let here = root.to_string_lossy().into_owned();
    // Within one checkout the files' times are the truth already; they are only written down.
    let moved = old
        .get(CHECKOUT)
        .map(|(path, _)| PathBuf::from(path))
        .filter(|path| path != root);
    let now = SystemTime::now();
    let mut new = BTreeMap::from([(CHECKOUT.to_string(), (here, now))]);
    for path in sources(root)? {
        let name = path.strip_prefix(root)?.to_string_lossy().into_owned();
        let hash = hex(&Sha256::digest(fs::read(&path)?));
        let mut time = modified(&path)?;
        if let Some(last) = &moved {
            time = match old.get(&name) {
                // Unless that checkout's file was edited and built meanwhile, which its time betrays.
                Some((known, seen))
                    if *known == hash
                        && modified(&last.join(&name)).map_or(true, |t| t == *seen) =>
                {
                    *seen
                }
                _ => now,
            };
            set_time(&path, time)?;
        }
        new.insert(name, (hash, time));
    }
    if moved.is_some() {
        for path in own(root)? {
            set_time(&path, now)?;
        }
    }
    write_ledger(ledger, &new)
}

fn sources(root: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for source in SOURCES {
        list(&root.join(source), &mut files)?;
    }
    Ok(files)
}

fn own(root: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for folder in ["src", "tests", "benches"] {
        list(&root.join(OWN).join(folder), &mut files)?;
    }
    Ok(files)
}

/// Hash and time by name; under `CHECKOUT`, the path of the checkout that was last built.
type Ledger = BTreeMap<String, (String, SystemTime)>;

fn read_ledger(path: &Path) -> Ledger {
    let text = fs::read_to_string(path).unwrap_or_default();
    let entry = |line: &str| {
        let mut fields = line.split('\t');
        let (hash, nanos, name) = (fields.next()?, fields.next()?, fields.next()?);
        let time = UNIX_EPOCH + Duration::from_nanos(nanos.parse().ok()?);
        Some((name.to_string(), (hash.to_string(), time)))
    };
    text.lines().filter_map(entry).collect()
}

fn write_ledger(path: &Path, ledger: &Ledger) -> Result<()> {
    let lines: String = ledger
        .iter()
        .map(|(name, (hash, time))| {
            let nanos = time
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default()
                .as_nanos();
            format!("{hash}\t{nanos}\t{name}\n")
        })
        .collect();
    fs::create_dir_all(path.parent().context("the ledger lies in a folder")?)?;
    fs::write(path, lines).with_context(|| format!("writing {}", path.display()))
}

fn modified(path: &Path) -> Result<SystemTime> {
    Ok(fs::metadata(path)?.modified()?)
}

fn set_time(path: &Path, time: SystemTime) -> Result<()> {
    if modified(path)? == time {
        return Ok(());
    }
    let set = File::options()
        .append(true)
        .open(path)
        .and_then(|file| file.set_modified(time));
    set.with_context(|| format!("setting the time of {}", path.display()))
}

fn list(dir: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Ok(());
    };
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default();
        if name == ".git" || name == "target" {
            continue;
        }
        if path.is_dir() {
            list(&path, files)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_checkout_is_as_fresh_as_its_content() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = dir.path().join("target/ott-sources");
        let checkout = |name: &str, text: &str| {
            let root = dir.path().join(name);
            fs::create_dir_all(root.join("ott-backend/src")).unwrap();
            fs::write(root.join("ott-backend/src/same.rs"), "same").unwrap();
            fs::write(root.join("ott-backend/src/other.rs"), text).unwrap();
            root
        };
        let (one, two) = (checkout("one", "1"), checkout("two", "2"));
        let file =
            |root: &Path, name: &str| modified(&root.join("ott-backend/src").join(name)).unwrap();

        restore_in(&one, &ledger).unwrap();
        let built = file(&one, "same.rs");
        restore_in(&two, &ledger).unwrap();
        assert_eq!(
            file(&two, "same.rs"),
            built,
            "the same content keeps its time"
        );
        assert!(file(&two, "other.rs") > built, "other content is new");
        let rebuilt = file(&two, "other.rs");
        restore_in(&one, &ledger).unwrap();
        assert!(
            file(&one, "other.rs") > rebuilt,
            "the first checkout's file is not what was built last"
        );
    }
}
