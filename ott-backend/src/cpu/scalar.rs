//! The specification of each op: plain loops, written so that the compiler can vectorize them. Other
//! tables take the ones that it vectorizes well, compiled for their instructions.

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::strip::{sum_keys, sum_values, Numbers, Strip, Sums, COLUMNS, ROWS};
use super::{CpuOps, Full, Keys, Values};
use crate::layout::MAX_DIM;
use crate::pack::{packed_len, unpack_f32};
use crate::quantize::{quantize_group, sum, sum2, LANES};
use crate::weigh::encode_fed_back;

/// The table.
pub static OPS: CpuOps = CpuOps {
    name: "scalar",
    factor_step: 0.0,
    l1_norm,
    quantize_group,
    encode_fed_back,
    key_scores,
    value_sum,
    full_scores,
    full_sum,
    prefetch: |_| {},
    max,
    exp_sum,
};

#[inline(always)]
pub(super) fn l1_norm(x: &[f32]) -> f32 {
    sum(x, f32::abs)
}

#[inline(always)]
fn key_scores(keys: &Keys<'_>, q: &[f32], k_dim: usize, scores: &mut [f32]) {
    sum_keys(keys, q, k_dim, scores, add_strip);
}

#[inline(always)]
fn value_sum(values: &Values<'_>, p: &[f32], out: &mut [f32]) {
    sum_values(values, p, out, add_strip);
}

/// `out = sum_r (x_r scale_r) code_r + sum_r x_r min_r`: scales fold into x once per page.
#[inline(always)]
pub(super) fn add_strip(strip: &Strip<'_>, x: Numbers<'_>, out: &mut Sums<'_>) {
    let (mut scale, mut min, mut codes) = ([0f32; ROWS], [0f32; ROWS], [0f32; COLUMNS]);
    let (scale, min) = (&mut scale[..strip.rows], &mut min[..strip.rows]);
    let codes = &mut codes[..strip.columns];
    read_f16(strip.scale, scale);
    read_f16(strip.min, min);
    for n in 0..x.len() {
        let base = sum2(x.of(n, strip), min, |x, m| x * m);
        out.of(n, strip).iter_mut().for_each(|o| *o += base);
    }
    for (r, scale) in scale.iter().enumerate() {
        let row = &strip.codes[r * strip.stride..][..packed_len(strip.columns, strip.bits)];
        unpack_f32(row, strip.bits, codes);
        for n in 0..x.len() {
            add_scaled(out.of(n, strip), x.of(n, strip)[r] * scale, codes);
        }
    }
}

#[inline(always)]
pub(super) fn full_scores(
    keys: Full<'_>,
    q: &[f32],
    dim: usize,
    scores: &mut [f32],
    stride: usize,
) {
    let mut key = [0f32; MAX_DIM];
    let key = &mut key[..dim];
    for t in 0..keys.len() / dim {
        keys.widen(t * dim, key);
        for (q, scores) in q.chunks_exact(dim).zip(scores.chunks_mut(stride)) {
            scores[t] = sum2(q, key, |q, k| q * k);
        }
    }
}

#[inline(always)]
pub(super) fn full_sum(values: Full<'_>, p: &[f32], stride: usize, dim: usize, out: &mut [f32]) {
    let mut value = [0f32; MAX_DIM];
    let value = &mut value[..dim];
    for t in 0..values.len() / dim {
        values.widen(t * dim, value);
        for (p, out) in p.chunks(stride).zip(out.chunks_exact_mut(dim)) {
            add_scaled(out, p[t], value);
        }
    }
}

#[inline(always)]
pub(super) fn max(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for x in x.chunks(LANES) {
        for (lane, &x) in lanes.iter_mut().zip(x) {
            *lane = if x > *lane { x } else { *lane };
        }
    }
    lanes.into_iter().fold(f32::NEG_INFINITY, f32::max)
}

#[inline(always)]
pub(super) fn exp_sum(x: &mut [f32], max: f32) -> f32 {
    x.iter_mut().for_each(|x| *x = exp(*x - max));
    sum(x, |x| x)
}

/// ln 2 in two parts: multiples of the first up to 128 are exact.
pub(super) const LN2_HIGH: f32 = 0.693_359_4;
pub(super) const LN2_LOW: f32 = -2.121_944_4e-4;
/// Coefficients of `(exp(r) - 1 - r) / r^2`, highest power first.
pub(super) const EXP: [f32; 6] = [
    1.987_569_1e-4,
    1.398_199_9e-3,
    8.333_452e-3,
    4.166_579_6e-2,
    1.666_666_5e-1,
    0.5,
];

/// `exp` of a number that is 0 or less, to 2 units in the last place; 0 below -87. Cephes' `expf`
/// with a two-part ln 2, without branches, so that a loop of it vectorizes.
#[inline(always)]
fn exp(x: f32) -> f32 {
    let n = (x.max(-88.0) * std::f32::consts::LOG2_E).round_ties_even();
    let r = (x.max(-88.0) - n * LN2_HIGH) - n * LN2_LOW;
    let mut y = EXP[0];
    for c in &EXP[1..] {
        y = y * r + c;
    }
    let y = y * r * r + r + 1.0;
    let power = f32::from_bits(((n as i32 + 127) << 23) as u32);
    if x < -87.0 {
        0.0
    } else {
        y * power
    }
}

/// `out += factor * x`
#[inline(always)]
fn add_scaled(out: &mut [f32], factor: f32, x: &[f32]) {
    for (out, x) in out.iter_mut().zip(x) {
        *out += factor * x;
    }
}

/// The first `out.len()` (128 at most) of little-endian f16 `bytes`.
#[inline(always)]
pub(super) fn read_f16(bytes: &[u8], out: &mut [f32]) {
    let mut halves = [f16::ZERO; ROWS];
    let halves = &mut halves[..out.len()];
    for (half, bytes) in halves.iter_mut().zip(bytes.chunks_exact(2)) {
        *half = f16::from_le_bytes([bytes[0], bytes[1]]);
    }
    halves.convert_to_f32_slice(out);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_exp() {
        for i in 0..=870_000 {
            let x = i as f32 * -1e-4;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs() / exact;
            assert!(error < 2.5e-7, "exp({x}) is off by {error}");
        }
        assert_eq!(
            (exp(0.0), exp(-87.1), exp(f32::NEG_INFINITY)),
            (1.0, 0.0, 0.0)
        );
    }
}
