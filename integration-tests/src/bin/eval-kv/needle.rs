//! Needles in a haystack: numbers that are named once, at depths of a text, and asked for at its end.
//!
//! All needles lie in one text and are asked for one after the other, the answers before filled in. An answer is found
//! if each of its tokens is the likeliest: then greedy decoding gives it. Names differ, so no answer helps another.

use anyhow::{Context, Result};
use candle_core::D;
use integration_tests::engine::{Engine, Setup};
use serde::{Deserialize, Serialize};

use crate::kept::{model_name, Kept};
use crate::measure::Bench;
use crate::texts;

const NAMES: [&str; 10] = [
    "Lisbon", "Oslo", "Cairo", "Lima", "Vienna", "Tokyo", "Nairobi", "Quebec", "Dublin", "Athens",
];
const NUMBERS: [u32; 10] = [
    48213, 90577, 31846, 75092, 16638, 52409, 87351, 20964, 69725, 43180,
];
/// Questions come in another order than needles.
const ORDER: [usize; 10] = [3, 8, 0, 6, 1, 9, 4, 7, 2, 5];

/// What a cache found.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Needles {
    pub model: String,
    pub tokens: usize,
    pub spec: String,
    /// By depth: 5 %, 15 %, .. 95 %.
    pub found: Vec<bool>,
}

impl Bench<'_> {
    /// Look for needles in texts of these lengths.
    pub async fn needles(
        &self,
        lengths: &[usize],
        specs: &[String],
        kept: &mut Kept<Needles>,
    ) -> Result<()> {
        let host = Engine::load(self.model, &Setup::default()).await?;
        let mut texts = Vec::new();
        for length in lengths {
            texts.push((*length, haystack(&host, *length).await?));
        }
        drop(host);
        for (length, (tokens, answers)) in texts {
            for spec in specs {
                let model = model_name(self.model);
                let same = |n: &Needles| n.model == model && n.tokens == length && n.spec == *spec;
                if kept.all().iter().any(same) {
                    continue;
                }
                let mut likeliest = Vec::new();
                self.each_prompt(spec, &tokens, |_, logits| {
                    likeliest.extend(logits.argmax(D::Minus1)?.to_vec1::<u32>()?);
                    Ok(())
                })
                .await?;
                let right = |&(start, end): &(usize, usize)| {
                    (start..end).all(|i| likeliest[i - 1] == tokens[i])
                };
                let found: Vec<bool> = answers.iter().map(right).collect();
                eprintln!("  needles, {length} tokens, {spec}: {found:?}");
                kept.add(Needles {
                    model,
                    tokens: length,
                    spec: spec.clone(),
                    found,
                })?;
            }
        }
        Ok(())
    }
}

/// Tokens of a haystack with questions and answers, and where the answer of each needle is.
async fn haystack(engine: &Engine, length: usize) -> Result<(Vec<u32>, Vec<(usize, usize)>)> {
    let needle = |i: usize| format!("The secret number of {} is {}.", NAMES[i], NUMBERS[i]);
    let mut end = Vec::new();
    let mut answers = vec![(0, 0); NAMES.len()];
    for i in ORDER {
        let question = format!(
            "\n\nQuestion: What is the secret number of {0}?\nAnswer: The secret number of {0} is",
            NAMES[i]
        );
        end.extend(engine.tokenize(&question).await?);
        let start = end.len();
        end.extend(engine.tokenize(&format!(" {}", NUMBERS[i])).await?);
        answers[i] = (start, end.len());
        end.extend(engine.tokenize(".").await?);
    }
    let mut needles = Vec::new();
    for i in 0..NAMES.len() {
        needles.push(engine.tokenize(&format!("\n\n{}\n\n", needle(i))).await?);
    }
    let taken = end.len() + needles.iter().map(Vec::len).sum::<usize>();
    let hay = texts::tokens(engine, "prose", usize::MAX).await?;
    let hay = hay
        .get(
            ..length
                .checked_sub(taken)
                .context("a haystack is longer than its needles")?,
        )
        .context("the text is shorter than the haystack")?;
    let mut tokens = Vec::with_capacity(length);
    let part = hay.len() / NAMES.len();
    for (i, needle) in needles.iter().enumerate() {
        let middle = i * part + part / 2;
        let from = if i == 0 { 0 } else { middle - part };
        tokens.extend(&hay[from..middle]);
        tokens.extend(needle);
    }
    tokens.extend(&hay[(NAMES.len() - 1) * part + part / 2..]);
    let start = tokens.len();
    tokens.extend(end);
    answers
        .iter_mut()
        .for_each(|(a, b)| (*a, *b) = (*a + start, *b + start));
    Ok((tokens, answers))
}
