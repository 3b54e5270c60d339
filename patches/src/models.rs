//! SEAM: the models the demo and the tests use; another hand writes this file.

use std::path::PathBuf;

/// The path of the model `name`, fetched and prepared if it is not in the cache.
pub fn ensure(name: &str) -> anyhow::Result<PathBuf> {
    anyhow::bail!("no model named {name} can be fetched yet: name one of yours with `-m`")
}
