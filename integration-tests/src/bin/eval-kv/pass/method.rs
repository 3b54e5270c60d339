//! What a spec stands for: `SPEC`, `SPEC@12` (in layer 12 alone), `SPEC@largest` (other tokens are traced).

use anyhow::{bail, Result};
use ott_backend::{CpuOps, OttConfig};

use crate::codec::Codec;

/// How keys and values are kept.
#[derive(Clone, Copy, Debug)]
pub enum Format {
    Ott(OttConfig, &'static CpuOps),
    Codec(Codec),
}

/// How which layers keep them.
#[derive(Clone, Copy, Debug)]
pub struct Method {
    format: Format,
    /// The one layer that does; all if `None`.
    only: Option<usize>,
}

impl Method {
    pub fn parse(spec: &str) -> Result<Self> {
        let (spec, how) = spec.split_once('@').unwrap_or((spec, ""));
        let (name, options) = spec.split_once(':').unwrap_or((spec, ""));
        let (only, ops) = match (how, how.parse()) {
            ("", _) => (None, CpuOps::best()?),
            ("largest", _) => (None, traces(largest)?),
            ("random", _) => (None, traces(random)?),
            (_, Ok(layer)) => (Some(layer), CpuOps::best()?),
            (other, _) => bail!("`@{other}` is neither a layer nor `largest` nor `random`"),
        };
        let format = match name {
            "ott" => Format::Ott(OttConfig::parse(options)?, ops),
            _ => Format::Codec(Codec::parse(spec)?),
        };
        Ok(Self { format, only })
    }

    /// What `layer` does.
    pub fn of(&self, layer: usize) -> Format {
        match self.only.is_none_or(|only| only == layer) {
            true => self.format,
            false => Format::Codec(Codec::F16),
        }
    }
}

/// The inner loops with another magnitude of tokens: the smallest are traced.
fn traces(magnitude: fn(&[f32]) -> f32) -> Result<&'static CpuOps> {
    Ok(Box::leak(Box::new(CpuOps {
        l1_norm: magnitude,
        ..*CpuOps::best()?
    })))
}

fn largest(key: &[f32]) -> f32 {
    -key.iter().map(|x| x.abs()).sum::<f32>()
}

/// FNV-1a of the key's bits: the same in each run.
fn random(key: &[f32]) -> f32 {
    let hash = key.iter().fold(0x811c_9dc5u32, |hash, x| {
        (hash ^ x.to_bits() ^ (x.to_bits() >> 16)).wrapping_mul(0x0100_0193)
    });
    (hash >> 8) as f32
}
