//! Measurements of one kind, kept as JSON as soon as each is there.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::de::DeserializeOwned;
use serde::Serialize;

/// A list that is written after each addition, if there is a folder.
pub struct Kept<T> {
    path: Option<PathBuf>,
    all: Vec<T>,
}

impl<T: Serialize + DeserializeOwned> Kept<T> {
    /// What earlier runs left in `folder` as `name`.
    pub fn open(folder: Option<&Path>, name: &str) -> Result<Self> {
        let path = folder.map(|folder| folder.join(name));
        let mut all = Vec::new();
        if let Some(path) = &path {
            std::fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
            if path.exists() {
                all = serde_json::from_str(&std::fs::read_to_string(path)?)
                    .with_context(|| format!("{} is not ours", path.display()))?;
            }
        }
        Ok(Self { path, all })
    }

    pub fn all(&self) -> &[T] {
        &self.all
    }

    /// Keep and write.
    pub fn add(&mut self, one: T) -> Result<()> {
        self.all.push(one);
        if let Some(path) = &self.path {
            std::fs::write(path, serde_json::to_string_pretty(&self.all)?)?;
        }
        Ok(())
    }

    /// Write a text beside it.
    pub fn write(&self, name: &str, text: &str) -> Result<()> {
        if let Some(path) = &self.path {
            std::fs::write(path.with_file_name(name), text)?;
        }
        Ok(())
    }
}

/// The name of a model: its file's.
pub fn model_name(model: &Path) -> String {
    model
        .file_stem()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}
