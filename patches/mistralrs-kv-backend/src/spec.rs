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
            return Err(unknown(text, name, &registered()));
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

/// The error of a name nobody registered, with what was meant where that can be told.
fn unknown(text: &str, name: &str, known: &[&str]) -> anyhow::Error {
    let list = match known {
        [] => "none is registered in this program".to_string(),
        _ => format!("registered: {}", known.join(", ")),
    };
    let is_of_name = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    let end = text.find(|c| !is_of_name(c)).unwrap_or(text.len());
    let (meant, rest) = (text[..end].to_ascii_lowercase(), &text[end..]);
    let options = rest.trim_start_matches(|c: char| !is_of_name(c));
    let hint = match (known.contains(&meant.as_str()), options) {
        (false, _) => String::new(),
        (true, "") => format!(": did you mean `{meant}`?"),
        (true, _) => format!(": did you mean `{meant}:{options}`?"),
    };
    anyhow::anyhow!("unknown KV-cache backend `{name}`{hint} ({list})")
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

#[cfg(test)]
mod tests {
    use super::unknown;

    #[test]
    fn a_near_miss_is_told_what_was_meant() {
        let said = |text: &str| {
            let name = text.split(':').next().unwrap_or_default();
            unknown(text, name, &["toy-f32", "zip"]).to_string()
        };
        let list = "(registered: toy-f32, zip)";
        for (text, hint) in [
            ("ZIP", ": did you mean `zip`?"),
            ("zip=4bit", ": did you mean `zip:4bit`?"),
            (
                "zip bits=4,group=32",
                ": did you mean `zip:bits=4,group=32`?",
            ),
            ("Zip:bits=4", ": did you mean `zip:bits=4`?"),
            ("zip,4bit", ": did you mean `zip:4bit`?"),
            ("Toy-F32", ": did you mean `toy-f32`?"),
            ("zap", ""),
            ("", ""),
            (":bits=4", ""),
        ] {
            let name = text.split(':').next().unwrap_or_default();
            let words = format!("unknown KV-cache backend `{name}`{hint} {list}");
            assert_eq!(said(text), words);
        }
        let none = unknown("zip", "zip", &[]).to_string();
        assert!(
            none.ends_with("(none is registered in this program)"),
            "{none}"
        );
    }
}
