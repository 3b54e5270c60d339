//! Greedy answers in the real engine: how many tokens agree with full precision's before the first that does not.

use anyhow::Result;
use integration_tests::engine::{Engine, Setup};
use serde::{Deserialize, Serialize};

use crate::kept::{model_name, Kept};
use crate::measure::Bench;
use crate::texts;

/// Tokens of the prompts, from texts' beginnings.
const PROMPT: usize = 512;
/// Tokens of an answer.
const ANSWER: usize = 96;

/// How far one answer agrees.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Greedy {
    pub model: String,
    pub text: String,
    pub spec: String,
    /// Tokens before the first difference.
    pub agreed: usize,
    /// Tokens of the answer.
    pub of: usize,
}

impl Bench<'_> {
    /// Answer each text's beginning with each cache, and with the host's own.
    pub async fn greedy(
        &self,
        names: &[String],
        specs: &[String],
        kept: &mut Kept<Greedy>,
    ) -> Result<()> {
        let host = Engine::load(self.model, &Setup::default()).await?;
        let (mut prompts, mut right) = (Vec::new(), Vec::new());
        for name in names {
            let prompt = texts::tokens(&host, name, PROMPT).await?;
            right.push(host.complete(prompt.clone(), ANSWER).await?.tokens);
            prompts.push(prompt);
        }
        drop(host);
        for spec in specs {
            let engine = Engine::load(self.model, &Setup::with(spec)).await?;
            for ((name, prompt), right) in names.iter().zip(&prompts).zip(&right) {
                let model = model_name(self.model);
                let same = |g: &Greedy| g.model == model && g.text == *name && g.spec == *spec;
                if kept.all().iter().any(same) {
                    continue;
                }
                let found = engine.complete(prompt.clone(), ANSWER).await?.tokens;
                let pairs = found.iter().zip(right);
                let agreed = pairs.take_while(|(a, b)| a.0 == b.0).count();
                eprintln!("  {name}, {spec}: {agreed} of {} tokens", right.len());
                kept.add(Greedy {
                    model,
                    text: name.clone(),
                    spec: spec.clone(),
                    agreed,
                    of: right.len(),
                })?;
            }
        }
        Ok(())
    }
}
