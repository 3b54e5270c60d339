//! One text through one cache after the other.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{bail, ensure, Result};
use candle_core::Tensor;
use integration_tests::engine::{Engine, Setup};
use integration_tests::model::shape;
use integration_tests::request::prompt_tensor;
use ott_backend::report::ModelShape;
use ott_backend::{CpuOps, OttConfig};
use rayon::prelude::*;

use crate::baseline::{row, stride, Baseline, Writer};
use crate::codec::Codec;
use crate::compare::{compare, Sample, Summary};
use crate::pass::{Held, Pass};
use crate::results::{Outcome, Results};
use crate::{teacher, texts, traced, Way};

/// Tokens of a prompt in a pass: more make more logits than fit into memory.
pub const PROMPT: usize = 2048;
/// The share of a text that a first request stores, where a second one hits it.
const STORED: f64 = 0.75;

/// What stays the same.
pub struct Bench<'a> {
    pub model: &'a Path,
    /// Where logits in full precision are kept.
    pub files: &'a Path,
    /// The cache that is full precision.
    pub base: &'a str,
    pub way: Way,
    pub pass: &'a Pass,
    /// Print which tokens are traced.
    pub traced: bool,
}

/// A text, and what full precision says of it.
#[derive(Clone)]
pub struct Text {
    pub name: String,
    pub tokens: Vec<u32>,
    pub base: Arc<Baseline>,
}

impl Bench<'_> {
    /// Measure what `results` does not hold yet.
    pub async fn run(
        &self,
        names: &[String],
        most: usize,
        specs: &[String],
        results: &mut Results,
    ) -> Result<()> {
        let host = Engine::load(self.model, &Setup::default()).await?;
        let mut tokens = Vec::new();
        for name in names {
            tokens.push(texts::tokens(&host, name, most).await?);
        }
        let mut texts = Vec::new();
        for (name, tokens) in names.iter().zip(tokens) {
            let base = Arc::new(self.baseline(&host, name, &tokens).await?);
            let name = name.clone();
            texts.push(Text { name, tokens, base });
        }
        drop(host);
        for spec in specs {
            let key = |text: &Text| {
                let tokens = text.tokens.len();
                Outcome::key(self.model, &text.name, tokens, self.way, spec, self.base)
            };
            let missing = texts.iter().filter(|text| !results.has(&key(text)));
            let missing: Vec<Text> = missing.cloned().collect();
            // A batch is all texts at once.
            let size = if self.way == Way::Batch {
                texts.len()
            } else {
                1
            };
            for texts in missing.chunks(size) {
                let start = Instant::now();
                texts.iter().for_each(|t| eprintln!("{}, {spec}", t.name));
                let found = self.measure(spec, texts).await?;
                for (text, (samples, held)) in texts.iter().zip(found) {
                    let shape = shape(self.model)?;
                    results.add(Outcome {
                        key: key(text),
                        page_bits: page_bits(spec, &shape)?,
                        stored_bits: stored_bits(&held, &shape, text.tokens.len()),
                        traced: held.traced,
                        seconds: start.elapsed().as_secs_f64(),
                        summary: Summary::of(&samples),
                    })?;
                    if self.traced {
                        traced::print(self.model, &text.tokens, &held.positions).await?;
                    }
                }
            }
        }
        Ok(())
    }

    /// What full precision says: from its file, or measured.
    async fn baseline(&self, host: &Engine, name: &str, tokens: &[u32]) -> Result<Baseline> {
        let path = Baseline::path(self.files, self.model, self.base, tokens);
        if !path.exists() {
            eprintln!("{name}: {} tokens in full precision", tokens.len());
            let mut writer = Writer::create(&path, tokens.len())?;
            match self.base {
                "host" => writer.add(&prompt_tensor(host.runner(), tokens.to_vec()).await?)?,
                other => {
                    self.each_prompt(other, tokens, |_, logits| writer.add(logits))
                        .await?;
                }
            }
            writer.finish()?;
        }
        Baseline::open(&path, tokens.len())
    }

    async fn measure(&self, spec: &str, texts: &[Text]) -> Result<Vec<(Vec<Sample>, Held)>> {
        let mut found = Vec::new();
        match (self.way, texts) {
            (Way::Pass, [text]) => found.push(self.through(spec, text).await?),
            (Way::Prefix, [text]) => found.push((self.after_hit(spec, text).await?, held())),
            _ => {
                let engine = Engine::load(self.model, &self.setup(spec, texts)?).await?;
                let samples = texts
                    .iter()
                    .map(|t| teacher::run(&engine, &t.tokens, Arc::clone(&t.base)));
                for samples in futures::future::try_join_all(samples).await? {
                    // What a batch holds is not told by text.
                    let held = if texts.len() == 1 {
                        held()
                    } else {
                        Held::default()
                    };
                    found.push((samples, held));
                }
            }
        }
        Ok(found)
    }

    fn setup(&self, spec: &str, texts: &[Text]) -> Result<Setup> {
        let kv_cache = match spec {
            "host" => None,
            spec if spec.starts_with("ott") => Some(spec.to_owned()),
            spec => bail!("`{spec}` cannot decode: choose `--way pass`"),
        };
        Ok(Setup {
            kv_cache,
            pool_tokens: texts.iter().map(|t| t.tokens.len() + 128).sum(),
            max_seqs: texts.len(),
            prefix_cache: self.way == Way::Prefix,
        })
    }

    /// Read tokens through a cache in prompts that begin alike: `each` gets the first position and the logits of
    /// what is new in each.
    pub async fn each_prompt(
        &self,
        spec: &str,
        tokens: &[u32],
        mut each: impl FnMut(usize, &Tensor) -> Result<()>,
    ) -> Result<()> {
        self.pass.expect(tokens.len());
        let setup = Setup {
            kv_cache: Some(format!("pass:{spec}")),
            pool_tokens: tokens.len() + 256,
            max_seqs: 1,
            prefix_cache: true,
        };
        let engine = Engine::load(self.model, &setup).await?;
        let mut start = 0;
        while start < tokens.len() {
            let end = tokens.len().min(start + PROMPT);
            let logits = prompt_tensor(engine.runner(), tokens[..end].to_vec()).await?;
            // The last block that was hit is read again.
            let hit = end - logits.dim(0)?;
            ensure!(hit <= start, "{hit} tokens are hit, of {start}");
            each(start, &logits.narrow(0, start - hit, end - start)?)?;
            start = end;
        }
        Ok(())
    }

    async fn through(&self, spec: &str, text: &Text) -> Result<(Vec<Sample>, Held)> {
        let (tokens, stride) = (&text.tokens, stride(text.tokens.len()));
        let mut samples = Vec::new();
        self.each_prompt(spec, tokens, |start, logits| {
            let end = (start + logits.dim(0)?).min(tokens.len() - 1);
            let positions: Vec<usize> = (start..end).filter(|i| i % stride == 0).collect();
            let new = positions.into_par_iter().map(|i| {
                let (base, found) = (text.base.row(i)?, row(logits, i - start)?);
                Ok(compare(&base, &found, tokens[i + 1]))
            });
            samples.extend(new.collect::<Result<Vec<Sample>>>()?);
            let mean = samples.iter().map(|s| s.kld).sum::<f64>() / samples.len() as f64;
            eprintln!("  {end} tokens: {mean:.4}");
            Ok(())
        })
        .await?;
        Ok((samples, self.pass.held()))
    }

    /// The end of a text, whose beginning an earlier request has stored: prompts attend to a past as it is stored,
    /// and to themselves in full precision.
    async fn after_hit(&self, spec: &str, text: &Text) -> Result<Vec<Sample>> {
        let tokens = &text.tokens;
        ensure!(stride(tokens.len()) == 1, "too long for this way");
        let engine =
            Engine::load(self.model, &self.setup(spec, std::slice::from_ref(text))?).await?;
        let stored = (tokens.len() as f64 * STORED) as usize;
        engine.complete(tokens[..stored].to_vec(), 1).await?;
        let logits = prompt_tensor(engine.runner(), tokens.clone()).await?;
        let start = tokens.len() - logits.dim(0)?;
        ensure!(start > 0, "nothing was hit");
        let positions = (start..tokens.len() - 1).into_par_iter();
        let samples = positions.map(|i| {
            let (base, found) = (text.base.row(i)?, row(&logits, i - start)?);
            Ok(compare(&base, &found, tokens[i + 1]))
        });
        samples.collect()
    }
}

/// What the cache of the last engine holds.
fn held() -> Held {
    let caches = ott_backend::provider().caches();
    let held = caches.last().map(|cache| {
        let layers = 0..cache.num_layers();
        let traced = layers.filter_map(|l| Some(cache.stats(l)?.traced_tokens));
        Held {
            bytes: cache.bytes(),
            traced: traced.collect(),
            positions: Vec::new(),
        }
    });
    held.unwrap_or_default()
}

/// Bits of a number in a page, over all layers; of other caches those of the format.
fn page_bits(spec: &str, shape: &ModelShape) -> Result<f64> {
    let spec = spec.split_once('@').map_or(spec, |(spec, _)| spec);
    if spec == "host" {
        return Ok(16.0);
    }
    let (name, options) = spec.split_once(':').unwrap_or((spec, ""));
    if name != "ott" {
        return Ok(Codec::parse(spec)?.bits());
    }
    let config = OttConfig::parse(options)?;
    let specs = shape.specs(&config, CpuOps::best()?)?;
    let bytes: usize = specs.iter().map(|s| s.layout.page_bytes()).sum();
    Ok((bytes * 8) as f64 / (numbers(shape) * config.group_size) as f64)
}

/// All that is held, over the text's numbers; `None` if there is no cache of ours.
fn stored_bits(held: &Held, shape: &ModelShape, tokens: usize) -> Option<f64> {
    (held.bytes > 0).then(|| (held.bytes * 8) as f64 / (numbers(shape) * tokens) as f64)
}

/// Numbers of one token.
fn numbers(shape: &ModelShape) -> usize {
    shape.layers * shape.num_kv_heads * (shape.k_dim + shape.v_dim)
}
