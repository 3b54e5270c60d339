//! Texts of prompts: words of the random model, one token each, or pieces of a text.

use std::path::Path;
use std::sync::Arc;

use anyhow::{ensure, Context, Result};

use crate::draw::Draw;

/// The first words of the random model have a meaning: begin, end, unknown.
pub const SPECIAL: usize = 3;

enum Words {
    /// `w3` to below `wN`: each is one token.
    Random { vocabulary: usize },
    /// In their order, over and over.
    Text(Vec<String>),
}

/// Prompts, each another one: a function of the seed and of the request's number.
pub struct Prompts {
    words: Arc<Words>,
    seed: u64,
    /// Words that all begin with.
    shared: usize,
}

impl Prompts {
    /// Of the words of a random model that has so many.
    ///
    /// # Errors
    /// If these are too few.
    pub fn random(vocabulary: usize, seed: u64, shared: usize) -> Result<Self> {
        ensure!(
            vocabulary >= SPECIAL + 2,
            "a vocabulary of {vocabulary} leaves no words for prompts: give the model's, {} at least",
            SPECIAL + 2
        );
        let words = Arc::new(Words::Random { vocabulary });
        Ok(Self {
            words,
            seed,
            shared,
        })
    }

    /// Of pieces of the text of a file. A depth is in words then.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn text(path: &Path, seed: u64, shared: usize) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("reading the text of prompts, {}", path.display()))?;
        let words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
        ensure!(
            words.len() > 1,
            "{} has no words: give a text to cut prompts from",
            path.display()
        );
        let words = Arc::new(Words::Text(words));
        Ok(Self {
            words,
            seed,
            shared,
        })
    }

    /// The same words in another order, for another load on the same server.
    pub fn reseeded(&self, more: u64) -> Self {
        Self {
            words: self.words.clone(),
            seed: self.seed + more,
            shared: self.shared,
        }
    }

    /// Whether so many requests get different prompts.
    ///
    /// # Errors
    /// If the text is too short for that.
    pub fn suffice(&self, requests: usize) -> Result<()> {
        if let Words::Text(words) = &*self.words {
            ensure!(
                words.len() > requests,
                "the text has {} words, and {requests} prompts must begin with different ones: give a longer text",
                words.len()
            );
        }
        Ok(())
    }

    /// The seed of requests, too.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// `depth` words for request `id`; however many are shared, the last is drawn for it alone.
    pub fn of(&self, id: usize, depth: usize) -> String {
        let shared = self.shared.min(depth.saturating_sub(1));
        // Number 0 is what all share.
        let mut text = String::with_capacity(8 * depth);
        self.add(&mut text, 0, shared);
        self.add(&mut text, id + 1, depth - shared);
        text
    }

    fn add(&self, text: &mut String, number: usize, count: usize) {
        let mut draw = Draw::new(self.seed, 0x5EED_0000_0000 + number as u64);
        let word = |text: &mut String, word: &str| {
            if !text.is_empty() {
                text.push(' ');
            }
            text.push_str(word);
        };
        match &*self.words {
            Words::Random { vocabulary } => {
                for _ in 0..count {
                    let drawn = SPECIAL + draw.below(vocabulary - SPECIAL);
                    word(text, &format!("w{drawn}"));
                }
            }
            Words::Text(words) => {
                // Steps without a common factor reach every word once before any twice.
                let n = words.len();
                let step = (n * 5 / 8..).find(|step| gcd(*step, n) == 1).unwrap_or(1);
                let begin = self.seed as usize % n + (number % n) * step % n;
                (0..count).for_each(|i| word(text, &words[(begin + i) % n]));
            }
        }
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 {
        a
    } else {
        gcd(b, a % b)
    }
}
