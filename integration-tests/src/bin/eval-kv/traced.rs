//! Which tokens are traced.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use integration_tests::engine::{Engine, Setup};
use integration_tests::model::shape;

/// Tokens that are shown.
const MOST: usize = 16;

/// Print the tokens that most layers and heads trace.
pub async fn print(model: &Path, tokens: &[u32], positions: &[usize]) -> Result<()> {
    let engine = Engine::load(model, &Setup::default()).await?;
    let shape = shape(model)?;
    let mut counts: BTreeMap<usize, usize> = BTreeMap::new();
    positions
        .iter()
        .for_each(|p| *counts.entry(*p).or_default() += 1);
    let mut counts: Vec<(usize, usize)> = counts.into_iter().collect();
    counts.sort_by_key(|(position, count)| (usize::MAX - count, *position));
    println!(
        "{} places in {} layers of {} heads, at {} positions:\n",
        positions.len(),
        shape.layers,
        shape.num_kv_heads,
        counts.len()
    );
    println!("| position | token | layers and heads |\n|---|---|---|");
    for (position, count) in counts.into_iter().take(MOST) {
        let text = engine
            .model()
            .detokenize(vec![tokens[position]], false)
            .await?;
        println!("| {position} | `{text:?}` | {count} |");
    }
    println!();
    Ok(())
}
