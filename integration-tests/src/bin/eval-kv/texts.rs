//! What is read. Frozen, so that numbers can be compared; `texts/README.md` says where each comes from.

use anyhow::{bail, Result};
use integration_tests::engine::Engine;

const TEXTS: [(&str, &str); 5] = [
    ("prose", include_str!("texts/prose.txt")),
    ("technical", include_str!("texts/technical.txt")),
    ("code", include_str!("texts/code.txt")),
    ("maths", include_str!("texts/maths.txt")),
    ("languages", include_str!("texts/languages.txt")),
];

/// The text of this name.
pub fn text(name: &str) -> Result<&'static str> {
    match TEXTS.iter().find(|(n, _)| *n == name) {
        Some((_, text)) => Ok(text),
        None => {
            let names = TEXTS.map(|(name, _)| name).join(", ");
            bail!("there is no text `{name}`: choose among {names}")
        }
    }
}

/// The first `most` tokens of a text, or all if it is shorter.
pub async fn tokens(engine: &Engine, name: &str, most: usize) -> Result<Vec<u32>> {
    let mut tokens = engine.tokenize(text(name)?).await?;
    tokens.truncate(most);
    Ok(tokens)
}
