//! Registered backends: filled once by the application, read by [`KvBackendSpec::parse`].
//!
//! [`KvBackendSpec::parse`]: crate::KvBackendSpec::parse

use std::sync::{Arc, PoisonError, RwLock};

use crate::KvBackendProvider;

static PROVIDERS: RwLock<Vec<Arc<dyn KvBackendProvider>>> = RwLock::new(Vec::new());

/// Make a backend available by name. Applications call this early in `main`; libraries never do.
///
/// # Errors
/// If the name is taken or is not made of `a-z`, `0-9`, `-` and `_`.
pub fn register(provider: Arc<dyn KvBackendProvider>) -> anyhow::Result<()> {
    let name = provider.name();
    let valid = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '_';
    if name.is_empty() || !name.chars().all(valid) {
        anyhow::bail!("`{name}` is no valid name for a KV-cache backend: use a-z, 0-9, - and _");
    }
    let mut providers = PROVIDERS.write().unwrap_or_else(PoisonError::into_inner);
    if providers.iter().any(|p| p.name() == name) {
        anyhow::bail!("a KV-cache backend named `{name}` is registered already");
    }
    providers.push(provider);
    Ok(())
}

/// Names of all registered backends, sorted.
pub fn registered() -> Vec<&'static str> {
    let providers = PROVIDERS.read().unwrap_or_else(PoisonError::into_inner);
    let mut names: Vec<_> = providers.iter().map(|p| p.name()).collect();
    names.sort_unstable();
    names
}

/// What people are told of a backend, in help and by `--version`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KvAbout {
    /// Its version; empty if it has none.
    pub version: &'static str,
    /// Settings with a name, to be typed after the colon; an empty one is the backend's name alone.
    pub presets: &'static [&'static str],
}

/// Names of all registered backends with their versions, sorted.
pub fn versions() -> Vec<String> {
    about(|name, about| vec![format!("{name} {}", about.version).trim_end().to_string()])
}

/// Specs with a name, of all registered backends.
pub fn presets() -> Vec<String> {
    about(|name, about| {
        let spec = |preset: &&str| format!("{name}:{preset}").trim_end_matches(':').to_string();
        about.presets.iter().map(spec).collect()
    })
}

fn about(tell: impl Fn(&str, KvAbout) -> Vec<String>) -> Vec<String> {
    let names = registered();
    let all = names.iter().filter_map(|name| Some((name, find(name)?)));
    all.flat_map(|(name, provider)| tell(name, provider.about()))
        .collect()
}

pub(crate) fn find(name: &str) -> Option<Arc<dyn KvBackendProvider>> {
    let providers = PROVIDERS.read().unwrap_or_else(PoisonError::into_inner);
    providers.iter().find(|p| p.name() == name).cloned()
}
