//! One text through one cache after the other.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{bail, Result};
use candle_core::Tensor;
use integration_tests::engine::{Engine, Setup};
use integration_tests::model::shape;
use integration_tests::request::prompt_tensor;
use ott_backend::report::ModelShape;
use ott_backend::{CpuOps, OttConfig};
use rayon::prelude::*;

use crate::baseline::{row, Baseline};
use crate::codec::Codec;
use crate::compare::{compare, Sample, Summary};
use crate::pass::{Held, Pass};
use crate::results::{Outcome, Results};
use crate::{teacher, texts, Way};

/// What stays the same.
pub struct Bench<'a> {
    pub model: &'a Path,
    /// Where logits in full precision are kept.
    pub files: &'a Path,
    /// The cache that is full precision.
    pub base: &'a str,
    pub way: Way,
    pub pass: &'a Pass,
}

impl Bench<'_> {
    /// Measure what `results` does not hold yet.
    pub async fn run(
        &self,
        text: &str,
        most: usize,
        specs: &[String],
        results: &mut Results,
    ) -> Result<()> {
        let host = Engine::load(self.model, &self.setup("host", most)?).await?;
        let tokens = texts::tokens(&host, text, most).await?;
        let path = Baseline::path(self.files, self.model, self.base, &tokens);
        if !path.exists() {
            eprintln!("{text}: {} tokens in full precision", tokens.len());
            let logits = match self.base {
                "host" => prompt_tensor(host.runner(), tokens.clone()).await?,
                other => self.logits(other, &tokens).await?,
            };
            Baseline::write(&path, &logits)?;
        }
        drop(host);
        let base = Arc::new(Baseline::open(&path, tokens.len())?);
        for spec in specs {
            let key = Outcome::key(self.model, text, tokens.len(), self.way, spec, self.base);
            if results.has(&key) {
                continue;
            }
            eprintln!("{text}: {} tokens, {spec}", tokens.len());
            let start = Instant::now();
            let (samples, held) = match self.way {
                Way::Decode => self.decode(spec, &tokens, &base).await?,
                Way::Pass => self.pass(spec, &tokens, &base).await?,
            };
            let shape = shape(self.model)?;
            results.add(Outcome {
                key,
                page_bits: page_bits(spec, &shape)?,
                stored_bits: stored_bits(&held, &shape, tokens.len()),
                traced: held.traced,
                seconds: start.elapsed().as_secs_f64(),
                summary: Summary::of(&samples),
            })?;
        }
        Ok(())
    }

    fn setup(&self, spec: &str, tokens: usize) -> Result<Setup> {
        let kv_cache = match (spec, self.way) {
            ("host", _) => None,
            (spec, Way::Pass) => Some(format!("pass:{spec}")),
            (spec, Way::Decode) if spec.starts_with("ott") => Some(spec.to_owned()),
            (spec, Way::Decode) => bail!("`{spec}` cannot decode: choose `--way pass`"),
        };
        Ok(Setup {
            kv_cache,
            pool_tokens: tokens,
            max_seqs: 1,
            prefix_cache: false,
        })
    }

    async fn logits(&self, spec: &str, tokens: &[u32]) -> Result<Tensor> {
        let setup = self.setup(spec, tokens.len() + 1)?;
        let engine = Engine::load(self.model, &setup).await?;
        prompt_tensor(engine.runner(), tokens.to_vec()).await
    }

    async fn pass(
        &self,
        spec: &str,
        tokens: &[u32],
        base: &Baseline,
    ) -> Result<(Vec<Sample>, Held)> {
        let logits = self.logits(spec, tokens).await?;
        let positions = (0..tokens.len() - 1).into_par_iter();
        let samples = positions.map(|i| {
            let (base, found) = (base.row(i)?, row(&logits, i)?);
            Ok(compare(&base, &found, tokens[i + 1]))
        });
        Ok((samples.collect::<Result<_>>()?, self.pass.held()))
    }

    async fn decode(
        &self,
        spec: &str,
        tokens: &[u32],
        base: &Arc<Baseline>,
    ) -> Result<(Vec<Sample>, Held)> {
        let setup = self.setup(spec, tokens.len())?;
        let engine = Engine::load(self.model, &setup).await?;
        let samples = teacher::run(&engine, tokens, Arc::clone(base)).await?;
        let caches = ott_backend::provider().caches();
        let held = caches.last().map(|cache| {
            let layers = 0..cache.num_layers();
            let traced = layers.filter_map(|l| Some(cache.stats(l)?.traced_tokens));
            Held {
                bytes: cache.bytes(),
                traced: traced.collect(),
            }
        });
        Ok((samples, held.unwrap_or_default()))
    }
}

/// Bits of a number in a page, over all layers; of other caches those of the format.
fn page_bits(spec: &str, shape: &ModelShape) -> Result<f64> {
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
