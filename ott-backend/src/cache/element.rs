//! Full precision: the model's activation dtype.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::cpu::Full;

/// A number as the model computes it.
pub trait Element: Copy + Default + PartialEq + Send + Sync + std::fmt::Debug + 'static {
    /// What the inner loops read.
    fn full(x: &[Self]) -> Full<'_>;
    /// Widen; the slices are equally long.
    fn widen(from: &[Self], to: &mut [f32]) {
        Self::full(from).widen(0, to);
    }
    /// Round to nearest.
    fn round(x: f32) -> Self;
    /// Round to nearest; the slices are equally long.
    fn narrow(from: &[f32], to: &mut [Self]);
    /// Whether f16 holds all of them, rounded: scales and mins of any such group are finite.
    fn fit(x: &[Self]) -> bool;
}

/// The least number that f16 rounds to infinity.
const TOO_LARGE: f32 = 65520.0;

impl Element for f32 {
    fn full(x: &[Self]) -> Full<'_> {
        Full::F32(x)
    }

    fn round(x: f32) -> Self {
        x
    }

    fn narrow(from: &[f32], to: &mut [Self]) {
        to.copy_from_slice(from);
    }

    fn fit(x: &[Self]) -> bool {
        x.iter().fold(true, |fit, x| fit & (x.abs() < TOO_LARGE))
    }
}

impl Element for f16 {
    fn full(x: &[Self]) -> Full<'_> {
        Full::F16(x)
    }

    fn round(x: f32) -> Self {
        Self::from_f32(x)
    }

    fn narrow(from: &[f32], to: &mut [Self]) {
        to.convert_from_f32_slice(from);
    }

    fn fit(x: &[Self]) -> bool {
        let finite = |x: &Self| x.to_bits() & 0x7C00 != 0x7C00;
        x.iter().fold(true, |fit, x| fit & finite(x))
    }
}

impl Element for bf16 {
    fn full(x: &[Self]) -> Full<'_> {
        Full::Bf16(x)
    }

    fn round(x: f32) -> Self {
        Self::from_f32(x)
    }

    fn narrow(from: &[f32], to: &mut [Self]) {
        to.convert_from_f32_slice(from);
    }

    fn fit(x: &[Self]) -> bool {
        let wide = |x: &Self| f32::from_bits(u32::from(x.to_bits()) << 16);
        x.iter()
            .fold(true, |fit, x| fit & (wide(x).abs() < TOO_LARGE))
    }
}

/// Keys or values of new tokens, `(num_kv_heads, tokens, dim)`, channels next to each other.
#[derive(Clone, Copy, Debug)]
pub struct Tokens<'a, E> {
    /// The numbers, from the first head's first token on.
    pub data: &'a [E],
    /// Numbers from a head to the next.
    pub head_stride: usize,
    /// Numbers from a token to the next.
    pub token_stride: usize,
    /// Channels.
    pub dim: usize,
}

impl<'a, E> Tokens<'a, E> {
    /// Contiguous `(num_kv_heads, tokens, dim)`.
    pub fn contiguous(data: &'a [E], tokens: usize, dim: usize) -> Self {
        Self {
            data,
            head_stride: tokens * dim,
            token_stride: dim,
            dim,
        }
    }

    /// Channels of one token of one head.
    pub fn row(&self, head: usize, token: usize) -> &'a [E] {
        &self.data[head * self.head_stride + token * self.token_stride..][..self.dim]
    }
}
