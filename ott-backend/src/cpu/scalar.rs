//! The specification of each op: plain loops, written so that the compiler can vectorize them.

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::{CpuOps, Keys, Values};
use crate::layout::V_GROUP;
use crate::pack::{packed_len, unpack_f32};
use crate::quantize::{quantize_group, sum, sum2, LANES};

/// The table.
pub static OPS: CpuOps = CpuOps {
    name: "scalar",
    l1_norm,
    quantize_group,
    key_scores,
    value_sum,
    full_scores,
    full_sum,
    max,
    exp_sum,
};

/// Most tokens of a page, and channels whose scales are read at once.
const TILE: usize = 128;

fn l1_norm(x: &[f32]) -> f32 {
    sum(x, f32::abs)
}

/// `score = sum_c (q_c scale_c) code_c + sum_c q_c min_c`: scales fold into q once per page.
fn key_scores(keys: &Keys<'_>, q: &[f32], k_dim: usize, scores: &mut [f32]) {
    let (mut scale, mut min, mut codes) = ([0f32; TILE], [0f32; TILE], [0f32; TILE]);
    let codes = &mut codes[..keys.tokens];
    let channel_bytes = packed_len(keys.tokens, keys.bits);
    scores.fill(0.0);
    for start in (0..k_dim).step_by(TILE) {
        let channels = TILE.min(k_dim - start);
        read_f16(&keys.scale[2 * start..], &mut scale[..channels]);
        read_f16(&keys.min[2 * start..], &mut min[..channels]);
        for (q, scores) in rows(q, k_dim).zip(scores.chunks_exact_mut(keys.tokens)) {
            let base = sum2(&q[start..start + channels], &min[..channels], |q, m| q * m);
            scores.iter_mut().for_each(|s| *s += base);
        }
        for c in 0..channels {
            let at = (start + c) * channel_bytes;
            unpack_f32(&keys.codes[at..at + channel_bytes], keys.bits, codes);
            for (q, scores) in rows(q, k_dim).zip(scores.chunks_exact_mut(keys.tokens)) {
                add_scaled(scores, q[start + c] * scale[c], codes);
            }
        }
    }
}

/// `out_c = sum_t (p_t scale_t) code_tc + sum_t p_t min_t`: scales fold into p once per page.
fn value_sum(values: &Values<'_>, p: &[f32], out: &mut [f32]) {
    let (mut scale, mut min, mut codes) = ([0f32; TILE], [0f32; TILE], [0f32; V_GROUP]);
    let (tokens, v_dim) = (values.tokens, values.v_dim);
    let (scale, min) = (&mut scale[..tokens], &mut min[..tokens]);
    let token_bytes = packed_len(v_dim, values.bits);
    for (group, start) in (0..v_dim).step_by(V_GROUP).enumerate() {
        let width = V_GROUP.min(v_dim - start);
        let codes = &mut codes[..width];
        read_f16(&values.scale[2 * group * tokens..], scale);
        read_f16(&values.min[2 * group * tokens..], min);
        for (p, out) in rows(p, tokens).zip(out.chunks_exact_mut(v_dim)) {
            let base = sum2(p, min, |p, m| p * m);
            out[start..start + width]
                .iter_mut()
                .for_each(|o| *o += base);
        }
        for t in 0..tokens {
            let at = t * token_bytes + packed_len(start, values.bits);
            let bytes = &values.codes[at..at + packed_len(width, values.bits)];
            unpack_f32(bytes, values.bits, codes);
            for (p, out) in rows(p, tokens).zip(out.chunks_exact_mut(v_dim)) {
                add_scaled(&mut out[start..start + width], p[t] * scale[t], codes);
            }
        }
    }
}

fn full_scores(keys: &[f32], q: &[f32], dim: usize, scores: &mut [f32], stride: usize) {
    for (q, scores) in rows(q, dim).zip(scores.chunks_mut(stride)) {
        for (key, score) in rows(keys, dim).zip(scores) {
            *score = sum2(q, key, |q, k| q * k);
        }
    }
}

fn full_sum(values: &[f32], p: &[f32], stride: usize, dim: usize, out: &mut [f32]) {
    for (p, out) in p.chunks(stride).zip(out.chunks_exact_mut(dim)) {
        for (value, p) in rows(values, dim).zip(p) {
            add_scaled(out, *p, value);
        }
    }
}

fn max(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for x in x.chunks(LANES) {
        for (lane, &x) in lanes.iter_mut().zip(x) {
            *lane = if x > *lane { x } else { *lane };
        }
    }
    lanes.into_iter().fold(f32::NEG_INFINITY, f32::max)
}

fn exp_sum(x: &mut [f32], max: f32) -> f32 {
    x.iter_mut().for_each(|x| *x = exp(*x - max));
    sum(x, |x| x)
}

/// `exp` of a number that is 0 or less, to 2 units in the last place; 0 below -87. Cephes' `expf`
/// with a two-part ln 2, without branches, so that a loop of it vectorizes.
#[inline(always)]
fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let n = (x.max(-88.0) * std::f32::consts::LOG2_E).round_ties_even();
    let r = (x.max(-88.0) - n * LN2_HIGH) - n * LN2_LOW;
    let mut y = 1.987_569_1e-4f32;
    for c in [
        1.398_199_9e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_5e-1,
        0.5,
    ] {
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

fn rows(x: &[f32], len: usize) -> std::slice::ChunksExact<'_, f32> {
    x.chunks_exact(len)
}

/// The first `out.len()` (128 at most) of little-endian f16 `bytes`.
fn read_f16(bytes: &[u8], out: &mut [f32]) {
    let mut halves = [f16::ZERO; TILE];
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
