//! Where things are: the checkout, the patches, the host; and what `upstream.toml` and `series` say.

use std::path::{Path, PathBuf};

use anyhow::{bail, Context, Result};

/// One published crate of the host.
#[derive(Clone, Debug, PartialEq)]
pub struct Upstream {
    pub name: String,
    pub version: String,
    /// SHA-256 of the published archive, in hex, as the registry's index and `Cargo.lock` have it.
    pub sha256: String,
}

impl Upstream {
    /// `NAME-VERSION`: the archive's stem and the folder inside it.
    pub fn stem(&self) -> String {
        format!("{}-{}", self.name, self.version)
    }
}

/// A checkout of this project and the tree in which its host is materialised.
#[derive(Clone, Debug)]
pub struct Project {
    /// The checkout.
    pub root: PathBuf,
    /// `patches/`.
    pub patches: PathBuf,
    /// The materialised host, git-ignored: `integration-tests/host`.
    pub host: PathBuf,
    /// Cargo's home, whose registry cache holds the published archives.
    pub cargo_home: PathBuf,
}

impl Project {
    /// The checkout this tool was built from; `OTT_HOST_DIR` puts the host elsewhere.
    pub fn here() -> Result<Self> {
        // At run time cargo says which checkout it runs for; two checkouts may share one build of this tool.
        let manifest = std::env::var_os("CARGO_MANIFEST_DIR")
            .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
        let root = manifest
            .parent()
            .context("patches/ lies in the checkout")?
            .to_path_buf();
        let host = match std::env::var_os("OTT_HOST_DIR") {
            Some(dir) => std::path::absolute(dir)?,
            None => root.join("integration-tests/host"),
        };
        Ok(Self {
            patches: root.join("patches"),
            host,
            cargo_home: cargo_home()?,
            root,
        })
    }

    /// The crates that are patched.
    pub fn patched(&self) -> Result<Vec<Upstream>> {
        self.upstream("patched")
    }

    /// The crates that are used as published, and materialised for upstream's own tests only.
    pub fn unpatched(&self) -> Result<Vec<Upstream>> {
        self.upstream("unpatched")
    }

    /// The host's version.
    pub fn version(&self) -> Result<String> {
        let (_, version) = self.upstream_toml()?;
        Ok(version)
    }

    fn upstream_toml(&self) -> Result<(toml::Table, String)> {
        let path = self.upstream_path();
        let toml: toml::Table = read(&path)?
            .parse()
            .with_context(|| format!("{} is not TOML", path.display()))?;
        let version = toml
            .get("version")
            .and_then(|v| v.as_str())
            .with_context(|| format!("{} names no `version`", path.display()))?
            .to_string();
        Ok((toml, version))
    }

    fn upstream_path(&self) -> PathBuf {
        self.patches.join("upstream.toml")
    }

    fn upstream(&self, table: &str) -> Result<Vec<Upstream>> {
        let (toml, version) = self.upstream_toml()?;
        let Some(crates) = toml.get(table).and_then(|t| t.as_table()) else {
            return Ok(Vec::new());
        };
        crates
            .iter()
            .map(|(name, sha256)| {
                let sha256 = sha256
                    .as_str()
                    .filter(|s| s.len() == 64 && s.bytes().all(|b| b.is_ascii_hexdigit()));
                Ok(Upstream {
                    name: name.clone(),
                    version: version.clone(),
                    sha256: sha256
                        .with_context(|| {
                            format!(
                                "{}: {name} needs a SHA-256 in hex",
                                self.upstream_path().display()
                            )
                        })?
                        .to_string(),
                })
            })
            .collect()
    }

    /// The patches' file names, in the order in which they are applied.
    pub fn series(&self) -> Result<Vec<String>> {
        let path = self.patches.join("series");
        let mut names: Vec<String> = Vec::new();
        for line in read(&path)?.lines() {
            let name = line.split('#').next().unwrap_or_default().trim();
            if name.is_empty() {
                continue;
            }
            if names.iter().any(|n| n == name) {
                bail!("{} lists {name} twice: keep one", path.display());
            }
            if !name.ends_with(".patch") || name.contains(['/', '\\']) {
                bail!(
                    "{}: `{name}` is not the name of a .patch file in patches/",
                    path.display()
                );
            }
            names.push(name.to_string());
        }
        Ok(names)
    }

    /// A patch of the series.
    pub fn patch_path(&self, name: &str) -> PathBuf {
        self.patches.join(name)
    }

    /// The changes to the published manifests; apart, because a git checkout's manifests differ.
    pub fn manifests_path(&self) -> PathBuf {
        self.patches.join("manifests/registry.patch")
    }

    /// `host.<what>`, beside the host: on the same file system, and git-ignored like it.
    pub fn beside_host(&self, what: &str) -> PathBuf {
        let mut name = self.host.file_name().unwrap_or_default().to_os_string();
        name.push(".");
        name.push(what);
        self.host.with_file_name(name)
    }
}

/// Reads a text file; the error names it.
pub fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))
}

fn cargo_home() -> Result<PathBuf> {
    if let Some(home) = std::env::var_os("CARGO_HOME") {
        return Ok(std::path::absolute(home)?);
    }
    let home = std::env::home_dir().context("there is no home folder: set CARGO_HOME")?;
    Ok(home.join(".cargo"))
}
