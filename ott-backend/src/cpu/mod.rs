//! The inner loops as a table of functions, one table per instruction set, chosen at run time.
//!
//! [`scalar`] is the specification. Other tables give the same codes and magnitudes bit for bit,
//! and attention sums within a named budget. This room knows slices only.

mod compiled;
mod full;
pub mod scalar;
mod strip;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod fixed;
#[cfg_attr(target_arch = "x86_64", path = "native/x86_64.rs")]
#[cfg_attr(target_arch = "aarch64", path = "native/aarch64.rs")]
#[cfg_attr(
    not(any(target_arch = "x86_64", target_arch = "aarch64")),
    path = "native/none.rs"
)]
mod native;
#[cfg(target_arch = "aarch64")]
mod neon;

use crate::config::Clip;
use crate::error::{Error, Result};
use crate::quantize::Affine;
use crate::weigh::Feedback;

pub use full::Full;

/// Quantized keys of one head in one page.
#[derive(Clone, Copy, Debug)]
pub struct Keys<'a> {
    /// Bits per code.
    pub bits: u8,
    /// Tokens: G, 128 at most.
    pub tokens: usize,
    /// `(k_dim, tokens)`, packed along tokens.
    pub codes: &'a [u8],
    /// `(k_dim)` f16, little-endian.
    pub scale: &'a [u8],
    /// `(k_dim)` f16, little-endian.
    pub min: &'a [u8],
    /// `(M)` u16, little-endian: channels whose codes have one more bit, worth 2^bits. Others than
    /// `0..k_dim` count nothing.
    pub boosted: &'a [u8],
    /// `(M, tokens)`: these bits, packed along tokens.
    pub high: &'a [u8],
}

impl Keys<'_> {
    /// What one of the high bits adds to its code.
    pub(crate) fn high_worth(&self) -> f32 {
        f32::from(1u16 << self.bits)
    }
}

/// Quantized values of one head in one page.
#[derive(Clone, Copy, Debug)]
pub struct Values<'a> {
    /// Bits per code.
    pub bits: u8,
    /// Tokens: G, 128 at most.
    pub tokens: usize,
    /// Channels.
    pub v_dim: usize,
    /// `(tokens, v_dim)`, packed along the channels of each value group.
    pub codes: &'a [u8],
    /// `(v_groups, tokens)` f16, little-endian.
    pub scale: &'a [u8],
    /// `(v_groups, tokens)` f16, little-endian.
    pub min: &'a [u8],
}

/// Numbers, their weights, bits, range search, codes; the scale and min.
pub type QuantizeGroup = fn(&[f32], &[f32], u8, Clip, &mut [u8]) -> Option<Affine>;

/// Numbers, scale and min, bits, feedback, sums of errors by token, codes.
pub type EncodeFedBack = fn(&[f32], Affine, u8, Feedback, &mut [f32], &mut [u8]);

/// One implementation of the inner loops.
#[derive(Debug)]
pub struct CpuOps {
    /// `scalar`, or the instruction set.
    pub name: &'static str,
    /// Attention over codes multiplies with scales folded into factors. Step to which factors are
    /// rounded, as a share of the largest of those that are added up; 0 if they stay f32.
    pub factor_step: f32,
    /// L1 norm of a key, summed in the order of [`LANES`](crate::quantize::LANES).
    pub l1_norm: fn(x: &[f32]) -> f32,
    /// [`quantize_group`](crate::quantize::quantize_group).
    pub quantize_group: QuantizeGroup,
    /// [`encode_fed_back`](crate::weigh::encode_fed_back).
    pub encode_fed_back: EncodeFedBack,
    /// Scores of queries `q (n, k_dim)`: `scores (n, tokens)` are overwritten.
    pub key_scores: fn(keys: &Keys<'_>, q: &[f32], k_dim: usize, scores: &mut [f32]),
    /// Add weighted values: weights `p (n, tokens)`, `out (n, v_dim)`.
    pub value_sum: fn(values: &Values<'_>, p: &[f32], out: &mut [f32]),
    /// Scores of queries `q (n, dim)` over full-precision keys `(tokens, dim)`: `scores (n, stride)`,
    /// the first `tokens` of each row overwritten.
    pub full_scores: fn(keys: Full<'_>, q: &[f32], dim: usize, scores: &mut [f32], stride: usize),
    /// Add weighted full-precision values `(tokens, dim)`: weights `p (n, stride)`, `out (n, dim)`.
    pub full_sum: fn(values: Full<'_>, p: &[f32], stride: usize, dim: usize, out: &mut [f32]),
    /// Bytes that will be read soon: the processor may fetch them meanwhile.
    pub prefetch: fn(bytes: &[u8]),
    /// The largest of some numbers; `-inf` of none.
    pub max: fn(x: &[f32]) -> f32,
    /// `x = exp(x - max)` in place; returns their sum.
    pub exp_sum: fn(x: &mut [f32], max: f32) -> f32,
}

/// The environment variable that names the table to use.
const FORCE: &str = "OTT_CPU";

impl CpuOps {
    /// Tables that this machine can run: the specification first, the fastest last.
    pub fn available() -> Vec<&'static Self> {
        std::iter::once(&scalar::OPS)
            .chain(native::tables())
            .collect()
    }

    /// The fastest table of this machine, or the one that the environment variable `OTT_CPU` names.
    ///
    /// # Errors
    /// If this machine has no table of that name.
    pub fn best() -> Result<&'static Self> {
        match std::env::var_os(FORCE) {
            Some(name) => Self::named(&name.to_string_lossy()),
            None => Ok(Self::available().pop().unwrap_or(&scalar::OPS)),
        }
    }

    /// The table of one name.
    ///
    /// # Errors
    /// If this machine has no such table.
    pub fn named(name: &str) -> Result<&'static Self> {
        let available = Self::available();
        let found = available.iter().find(|ops| ops.name == name);
        found.copied().ok_or_else(|| Error::CpuOps {
            name: name.into(),
            available: available.iter().map(|ops| ops.name).collect(),
        })
    }
}
