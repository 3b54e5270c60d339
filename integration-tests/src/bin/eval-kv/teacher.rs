//! Teacher forcing: the engine decodes a given text token by token, through its real cache.
//!
//! A prompt of a few tokens starts it. Whatever the model would say, its logits are recorded and then replaced by
//! ones that leave the text's next token alone; so every later token is decoded, stored and read as in any answer.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use integration_tests::engine::Engine;
use integration_tests::request::steered;
use mistralrs::CustomLogitsProcessor;

use crate::baseline::Baseline;
use crate::compare::{compare, Sample};
use crate::progress::Progress;

/// Tokens of the prompt. Every cache attends to a prompt in full precision.
const PROMPT: usize = 4;
/// A logit that no softmax sees.
const NEVER: f32 = -1e9;

struct Teacher {
    text: Vec<u32>,
    base: Arc<Baseline>,
    samples: Mutex<Vec<Sample>>,
    progress: Progress,
}

impl CustomLogitsProcessor for Teacher {
    fn apply(&self, logits: &Tensor, context: &[u32]) -> candle_core::Result<Tensor> {
        let found: Vec<f32> = logits.to_vec1()?;
        let next = self.text[context.len()];
        let base = self.base.row(context.len() - 1);
        let base = base.map_err(candle_core::Error::wrap)?;
        let sample = compare(&base, &found, next);
        let mut samples = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        samples.push(sample);
        self.progress.at(samples.len());
        let mut forced = vec![NEVER; found.len()];
        forced[next as usize] = 0.0;
        Tensor::from_vec(forced, logits.shape(), &Device::Cpu)
    }
}

/// Decode a text; the samples of all positions after the prompt whose next token is known.
pub async fn run(engine: &Engine, text: &[u32], base: Arc<Baseline>) -> Result<Vec<Sample>> {
    let steps = text.len().saturating_sub(PROMPT);
    let teacher = Arc::new(Teacher {
        text: text.to_vec(),
        base,
        samples: Mutex::default(),
        progress: Progress::new("decoding", steps),
    });
    let prompt = text.get(..PROMPT).context("a text has a few tokens")?;
    steered(engine.runner(), prompt.to_vec(), steps, teacher.clone()).await?;
    let samples = teacher
        .samples
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    Ok(samples.clone())
}
