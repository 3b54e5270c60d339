//! `name` or `name:options`, checked once and then carried by value.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use crate::registry::{find, registered};
use crate::KvBackendProvider;

/// A backend chosen by the user, with its options. Holding one means that the backend was
/// registered and that its options are valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KvBackendSpec {
    // Interned, so that the host's configuration types stay `Copy`.
    text: &'static str,
    name_len: usize,
}

impl KvBackendSpec {
    /// Read `name` or `name:options`.
    ///
    /// # Errors
    /// If no such backend is registered (the message lists those that are) or the options are not
    /// valid (the message comes from the backend).
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let text = text.trim();
        let (name, options) = text.split_once(':').unwrap_or((text, ""));
        let Some(provider) = find(name) else {
            let known = registered();
            let known = if known.is_empty() {
                "none is registered in this program".to_string()
            } else {
                format!("registered: {}", known.join(", "))
            };
            anyhow::bail!("unknown KV-cache backend `{name}` ({known})");
        };
        provider.check_options(options)?;
        Ok(Self {
            text: intern(text),
            name_len: name.len(),
        })
    }

    /// The backend's name.
    pub fn name(&self) -> &'static str {
        &self.text[..self.name_len]
    }

    /// The text after the colon; empty if there is none.
    pub fn options(&self) -> &'static str {
        self.text[self.name_len..].strip_prefix(':').unwrap_or("")
    }

    /// The registered backend.
    pub fn provider(&self) -> Arc<dyn KvBackendProvider> {
        find(self.name())
            .expect("a spec is only made for a registered backend; none is ever removed")
    }
}

impl fmt::Display for KvBackendSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text)
    }
}

// Specs are few and typed by a person: one leaked string per distinct text.
fn intern(text: &str) -> &'static str {
    static TEXTS: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());
    let mut texts = TEXTS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = texts.get(text) {
        return known;
    }
    let leaked: &'static str = Box::leak(text.to_owned().into_boxed_str());
    texts.insert(leaked);
    leaked
}
