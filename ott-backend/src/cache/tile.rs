//! Keys and values of a few tokens of one head as f32, as a matrix product wants them.

use super::element::Element;

/// Most tokens of a tile; a multiple of every group size.
pub const TILE: usize = 128;

/// Numbers from a channel of the keys to the next. Not a power of two, so that channels do not
/// compete for the same lines of a processor's cache.
pub const KEY_STRIDE: usize = TILE + 16;

/// Tokens that are transposed together.
const STRIP: usize = 16;

/// Up to [`TILE`] tokens of one head.
#[derive(Debug)]
pub struct Tile {
    /// `(k_dim, KEY_STRIDE)`, of which the first [`TILE`] columns are used.
    pub keys: Vec<f32>,
    /// `(TILE, v_dim)`.
    pub values: Vec<f32>,
    /// `(STRIP, k_dim)`.
    strip: Vec<f32>,
    k_dim: usize,
    v_dim: usize,
}

impl Tile {
    /// Zeros.
    pub fn new(k_dim: usize, v_dim: usize) -> Self {
        Self {
            keys: vec![0.0; k_dim * KEY_STRIDE],
            values: vec![0.0; TILE * v_dim],
            strip: vec![0.0; STRIP * k_dim],
            k_dim,
            v_dim,
        }
    }

    /// Put `len` tokens into places `at..at + len`; `token(i)` is the key and value of the `i`-th.
    pub fn put<'a, E: Element>(
        &mut self,
        at: usize,
        len: usize,
        token: impl Fn(usize) -> (&'a [E], &'a [E]),
    ) {
        for start in (0..len).step_by(STRIP) {
            let count = STRIP.min(len - start);
            for (i, wide) in self
                .strip
                .chunks_exact_mut(self.k_dim)
                .take(count)
                .enumerate()
            {
                let (key, value) = token(start + i);
                E::widen(key, wide);
                let place = (at + start + i) * self.v_dim;
                E::widen(value, &mut self.values[place..place + self.v_dim]);
            }
            let channels = self.keys.chunks_exact_mut(KEY_STRIDE);
            for (c, channel) in channels.enumerate() {
                for (i, x) in channel[at + start..][..count].iter_mut().enumerate() {
                    *x = self.strip[i * self.k_dim + c];
                }
            }
        }
    }

    /// The key in one place.
    pub fn key(&self, at: usize) -> impl Iterator<Item = f32> + '_ {
        self.keys.chunks_exact(KEY_STRIDE).map(move |c| c[at])
    }

    /// The value in one place.
    pub fn value(&self, at: usize) -> &[f32] {
        &self.values[at * self.v_dim..(at + 1) * self.v_dim]
    }
}
