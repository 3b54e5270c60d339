//! Keys and values of a page as one thing: rows of codes, each with a scale and a min.
//!
//! A row is a channel of the keys or a token of the values, a column the other one. Both sums of
//! attention are `out[column] += sum over rows of x[row] * (code * scale[row] + min[row])`, so that
//! an instruction set needs one kernel for both.

use super::{Keys, Values};
use crate::layout::V_GROUP;
use crate::pack::packed_len;

/// Most rows of a strip.
pub const ROWS: usize = 128;
/// Most columns of a strip: tokens of a page, channels of a value group.
pub const COLUMNS: usize = 128;

/// Rows of codes that share their columns.
#[derive(Clone, Copy, Debug)]
pub struct Strip<'a> {
    /// Bits per code; 1 for high bits of boosted keys.
    pub bits: u8,
    /// From the first row's first byte on.
    pub codes: &'a [u8],
    /// Bytes from a row to the next.
    pub stride: usize,
    /// Up to [`ROWS`]; a multiple of 8, but for high bits, whose `scale` and `min` go on to one.
    pub rows: usize,
    /// Codes of a row, packed by themselves; up to [`COLUMNS`] and a multiple of 8.
    pub columns: usize,
    /// `(rows)` f16, little-endian.
    pub scale: &'a [u8],
    /// `(rows)` f16, little-endian.
    pub min: &'a [u8],
    /// Place of the first row in a query's numbers.
    x_start: usize,
    /// Place of the first column in a query's sums.
    out_start: usize,
}

/// What several queries multiply rows with: query `n` begins at `n * stride`.
#[derive(Clone, Copy, Debug)]
pub struct Numbers<'a> {
    x: &'a [f32],
    stride: usize,
}

impl<'a> Numbers<'a> {
    /// Queries.
    #[inline(always)]
    pub fn len(&self) -> usize {
        self.x.len() / self.stride
    }

    /// Query `n`'s numbers, one for each row of a strip.
    #[inline(always)]
    pub fn of(&self, n: usize, strip: &Strip<'_>) -> &'a [f32] {
        &self.x[n * self.stride + strip.x_start..][..strip.rows]
    }
}

/// Sums of several queries: query `n` begins at `n * stride`.
#[derive(Debug)]
pub struct Sums<'a> {
    out: &'a mut [f32],
    stride: usize,
}

impl Sums<'_> {
    /// Query `n`'s sums, one for each column of a strip.
    #[inline(always)]
    pub fn of(&mut self, n: usize, strip: &Strip<'_>) -> &mut [f32] {
        &mut self.out[n * self.stride + strip.out_start..][..strip.columns]
    }
}

/// [`key_scores`](super::CpuOps::key_scores) from a kernel that adds strips: rows are channels.
#[inline(always)]
pub fn sum_keys(
    keys: &Keys<'_>,
    q: &[f32],
    k_dim: usize,
    scores: &mut [f32],
    add: impl Fn(&Strip<'_>, Numbers<'_>, &mut Sums<'_>),
) {
    scores.fill(0.0);
    let x = Numbers {
        x: q,
        stride: k_dim,
    };
    let mut sums = Sums {
        out: scores,
        stride: keys.tokens,
    };
    let stride = packed_len(keys.tokens, keys.bits);
    for start in (0..k_dim).step_by(ROWS) {
        let strip = Strip {
            bits: keys.bits,
            codes: &keys.codes[start * stride..],
            stride,
            rows: ROWS.min(k_dim - start),
            columns: keys.tokens,
            scale: &keys.scale[2 * start..],
            min: &keys.min[2 * start..],
            x_start: start,
            out_start: 0,
        };
        add(&strip, x, &mut sums);
    }
    for start in (0..keys.boosted.len() / 2).step_by(HIGH_ROWS) {
        for first in (0..x.len()).step_by(HIGH_QUERIES) {
            sum_high(keys, x, (start, first), &mut sums, &add);
        }
    }
}

/// Most rows and queries of a strip of high bits.
const HIGH_ROWS: usize = 32;
const HIGH_QUERIES: usize = 8;

/// High bits are a strip too: channels from the `start`-th boosted one on, for queries from `first`
/// on. Their scales and the queries' numbers, times what the bit is worth, are gathered.
#[inline(always)]
fn sum_high(
    keys: &Keys<'_>,
    q: Numbers<'_>,
    (start, first): (usize, usize),
    sums: &mut Sums<'_>,
    add: &impl Fn(&Strip<'_>, Numbers<'_>, &mut Sums<'_>),
) {
    let rows = HIGH_ROWS.min(keys.boosted.len() / 2 - start);
    let queries = HIGH_QUERIES.min(q.len() - first);
    let worth = keys.high_worth();
    let mut x = [0f32; HIGH_ROWS * HIGH_QUERIES];
    let mut scale = [0u8; 2 * HIGH_ROWS];
    let channels = keys.boosted.as_chunks::<2>().0[start..][..rows].iter();
    let channels = channels.map(|c| usize::from(u16::from_le_bytes(*c)));
    let scales = keys.scale.as_chunks::<2>().0;
    for (scale, c) in scale
        .as_chunks_mut::<2>()
        .0
        .iter_mut()
        .zip(channels.clone())
    {
        *scale = scales.get(c).copied().unwrap_or_default();
    }
    let numbers = q.x.chunks_exact(q.stride).skip(first);
    for (x, q) in x.chunks_exact_mut(rows).take(queries).zip(numbers) {
        for (x, c) in x.iter_mut().zip(channels.clone()) {
            *x = worth * q.get(c).copied().unwrap_or_default();
        }
    }
    let stride = packed_len(keys.tokens, 1);
    let strip = Strip {
        bits: 1,
        codes: &keys.high[start * stride..],
        stride,
        rows,
        columns: keys.tokens,
        scale: &scale,
        min: &[0; 2 * HIGH_ROWS],
        x_start: 0,
        out_start: 0,
    };
    let x = Numbers {
        x: &x[..queries * rows],
        stride: rows,
    };
    let mut sums = Sums {
        out: &mut sums.out[first * keys.tokens..],
        stride: keys.tokens,
    };
    add(&strip, x, &mut sums);
}

/// [`value_sum`](super::CpuOps::value_sum) from a kernel that adds strips: rows are tokens, and each
/// value group is a strip.
#[inline(always)]
pub fn sum_values(
    values: &Values<'_>,
    p: &[f32],
    out: &mut [f32],
    add: impl Fn(&Strip<'_>, Numbers<'_>, &mut Sums<'_>),
) {
    let (tokens, v_dim) = (values.tokens, values.v_dim);
    let x = Numbers {
        x: p,
        stride: tokens,
    };
    let mut sums = Sums { out, stride: v_dim };
    for (group, start) in (0..v_dim).step_by(V_GROUP).enumerate() {
        let strip = Strip {
            bits: values.bits,
            codes: &values.codes[packed_len(start, values.bits)..],
            stride: packed_len(v_dim, values.bits),
            rows: tokens,
            columns: V_GROUP.min(v_dim - start),
            scale: &values.scale[2 * group * tokens..],
            min: &values.min[2 * group * tokens..],
            x_start: 0,
            out_start: start,
        };
        add(&strip, x, &mut sums);
    }
}
