//! NEON with dot products (Armv8.2 and later: Graviton 2, Apple M1): sums over codes in integers, see
//! [`fixed`](super::fixed). All else is the specification, which NEON being a part of every aarch64 makes fast.

// Loops of a constant length over several arrays in step become registers.
#![allow(clippy::needless_range_loop)]

use std::arch::aarch64::*;
use std::arch::asm;

use super::compiled::compiled_for;
use super::fixed::{Fixed, LIMIT};
use super::strip::{sum_keys, sum_values, Numbers, Strip, Sums, ROWS};
use super::{scalar, CpuOps, Full, Keys, Values};
use crate::config::Clip;
use crate::quantize::{quantize_group as quantize, sum, sum2, Affine};
use crate::weigh::{encode_fed_back as fed_back, Feedback};

/// The table, if this machine can run it.
pub fn table() -> Option<&'static CpuOps> {
    std::arch::is_aarch64_feature_detected!("dotprod").then_some(&OPS)
}

static OPS: CpuOps = CpuOps {
    name: "neon",
    factor_step: 1.0 / LIMIT,
    l1_norm,
    quantize_group,
    encode_fed_back,
    key_scores,
    value_sum,
    full_scores,
    full_sum,
    prefetch,
    max,
    exp_sum,
};

compiled_for! {"neon,dotprod":
    fn l1_norm(x: &[f32]) -> f32 = scalar::l1_norm;
    fn quantize_group(x: &[f32], weight: &[f32], bits: u8, clip: Clip, codes: &mut [u8]) -> Option<Affine> = quantize;
    fn encode_fed_back(x: &[f32], affine: Affine, bits: u8, part: Feedback, sums: &mut [f32], codes: &mut [u8]) = fed_back;
    fn key_scores(keys: &Keys<'_>, q: &[f32], k_dim: usize, scores: &mut [f32]) = keys_kernel;
    fn value_sum(values: &Values<'_>, p: &[f32], out: &mut [f32]) = values_kernel;
    fn full_scores(keys: Full<'_>, q: &[f32], dim: usize, scores: &mut [f32], stride: usize) = scalar::full_scores;
    fn full_sum(values: Full<'_>, p: &[f32], stride: usize, dim: usize, out: &mut [f32]) = scalar::full_sum;
    fn max(x: &[f32]) -> f32 = scalar::max;
    fn exp_sum(x: &mut [f32], max: f32) -> f32 = scalar::exp_sum;
}

/// One hint for each line of 64 bytes.
fn prefetch(bytes: &[u8]) {
    for line in bytes.chunks(64) {
        // SAFETY: a hint reads nothing.
        unsafe {
            asm!("prfm pldl1keep, [{0}]", in(reg) line.as_ptr(), options(nostack, readonly, preserves_flags));
        }
    }
}

/// Queries that share unpacked codes: 8 sums each of the 32 registers.
const QUERIES: usize = 2;

#[target_feature(enable = "neon,dotprod")]
fn keys_kernel(keys: &Keys<'_>, q: &[f32], k_dim: usize, scores: &mut [f32]) {
    sum_keys(keys, q, k_dim, scores, |strip, x, out| add(strip, x, out));
}

#[target_feature(enable = "neon,dotprod")]
fn values_kernel(values: &Values<'_>, p: &[f32], out: &mut [f32]) {
    sum_values(values, p, out, |strip, x, out| add(strip, x, out));
}

#[target_feature(enable = "neon,dotprod")]
fn add(strip: &Strip<'_>, x: Numbers<'_>, out: &mut Sums<'_>) {
    match strip.bits {
        1 => add_planes::<8>(strip, x, out),
        2 => add_planes::<4>(strip, x, out),
        4 => add_planes::<2>(strip, x, out),
        _ => scalar::add_strip(strip, x, out),
    }
}

/// `PLANES` codes in a byte.
#[target_feature(enable = "neon,dotprod")]
fn add_planes<const PLANES: usize>(strip: &Strip<'_>, x: Numbers<'_>, out: &mut Sums<'_>) {
    let (mut scale, mut min) = ([0f32; ROWS], [0f32; ROWS]);
    let (scale, min) = (&mut scale[..strip.rows], &mut min[..strip.rows]);
    scalar::read_f16(strip.scale, scale);
    scalar::read_f16(strip.min, min);
    let middle = ((1 << (8 / PLANES)) - 1) as f32 / 2.0;
    let mut fixed = [Fixed::ZERO; QUERIES];
    let mut n = 0;
    while n < x.len() {
        let count = QUERIES.min(x.len() - n);
        for (i, fixed) in fixed[..count].iter_mut().enumerate() {
            fold(x.of(n + i, strip), scale, min, middle, fixed);
        }
        for at in (0..strip.columns / PLANES).step_by(8) {
            for from in (0..PLANES).step_by(2) {
                match count {
                    1 => dot::<PLANES, 1>(strip, (at, from), &fixed, n, out),
                    _ => dot::<PLANES, 2>(strip, (at, from), &fixed, n, out),
                }
            }
        }
        n += count;
    }
}

/// Fold scales into the numbers of a query.
#[target_feature(enable = "neon,dotprod")]
fn fold(x: &[f32], scale: &[f32], min: &[f32], middle: f32, fixed: &mut Fixed) {
    let (mut factors, mut lost) = ([0f32; ROWS], [0f32; ROWS]);
    for ((f, x), scale) in factors.iter_mut().zip(x).zip(scale) {
        *f = x * scale;
    }
    let largest = factors.map(f32::abs);
    let largest = scalar::max(&largest);
    let inverse = if largest > 0.0 { LIMIT / largest } else { 0.0 };
    fixed.step = largest / LIMIT;
    for r in 0..ROWS {
        let steps = (factors[r] * inverse).round_ties_even();
        lost[r] = factors[r] - steps * fixed.step;
        let steps = steps as i32;
        fixed.low[r] = steps as u8;
        fixed.high[r] = ((steps + 128) >> 8) as u8;
    }
    fixed.base = sum2(x, min, |x, m| x * m) + middle * sum(&lost, |x| x);
}

/// Planes `from..from + 2` of byte columns `at..at + 8`, or fewer at the end of a row, for queries
/// `n..n + N`.
#[target_feature(enable = "neon,dotprod")]
fn dot<const PLANES: usize, const N: usize>(
    strip: &Strip<'_>,
    (at, from): (usize, usize),
    fixed: &[Fixed; QUERIES],
    n: usize,
    out: &mut Sums<'_>,
) {
    let bits = 8 / PLANES;
    let width = strip.columns / PLANES;
    let mask = vdupq_n_u8(((1u16 << bits) - 1) as u8);
    let shifts = [0, 1].map(|p| vdupq_n_s8(-((bits * (from + p)) as i8)));
    let mut low = [[[vdupq_n_s32(0); 2]; 2]; N];
    let mut high = [[[vdupq_n_s32(0); 2]; 2]; N];
    for block in 0..strip.rows.div_ceil(4) {
        let columns = four_rows(strip, block * 4, at, width);
        for (p, half) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let codes = vandq_u8(vshlq_u8(columns[half], shifts[p]), mask);
            let codes = vreinterpretq_s8_u8(codes);
            for i in 0..N {
                let factors = four(&fixed[i].low, block);
                low[i][p][half] = dot_product(low[i][p][half], codes, factors);
                let factors = four(&fixed[i].high, block);
                high[i][p][half] = dot_product(high[i][p][half], codes, factors);
            }
        }
    }
    for i in 0..N {
        let base = vdupq_n_f32(fixed[i].base);
        let step = vdupq_n_f32(fixed[i].step);
        let out = out.of(n + i, strip);
        for p in 0..2 {
            let out = &mut out[(from + p) * width..][at..width];
            for (half, out) in out.chunks_mut(4).take(2).enumerate() {
                let low = vcvtq_f32_s32(low[i][p][half]);
                let high = vcvtq_f32_s32(high[i][p][half]);
                let sum = vfmaq_f32(low, high, vdupq_n_f32(256.0));
                add_to(out, vfmaq_f32(base, sum, step));
            }
        }
    }
}

/// Rows `r..r + 4` of eight byte columns, column by column; zeros where there are none.
#[target_feature(enable = "neon,dotprod")]
fn four_rows(strip: &Strip<'_>, r: usize, at: usize, width: usize) -> [uint8x16_t; 2] {
    let len = 8.min(width - at);
    let row = |r: usize| {
        let mut eight = [0; 8];
        if r < strip.rows {
            let bytes = &strip.codes[r * strip.stride + at..][..len];
            match bytes.first_chunk::<8>() {
                Some(all) => eight = *all,
                None => eight[..len].copy_from_slice(bytes),
            }
        }
        let bytes = vcreate_u8(u64::from_le_bytes(eight));
        vcombine_u8(bytes, bytes)
    };
    let pair = |r| vreinterpretq_u16_u8(vzip1q_u8(row(r), row(r + 1)));
    let (first, last) = (pair(r), pair(r + 2));
    [vzip1q_u16(first, last), vzip2q_u16(first, last)].map(|x| vreinterpretq_u8_u16(x))
}

/// The factors of four rows, for each of four columns.
#[target_feature(enable = "neon,dotprod")]
fn four(factors: &[u8; ROWS], block: usize) -> int8x16_t {
    let four = i32::from_le_bytes(factors.as_chunks::<4>().0[block]);
    vreinterpretq_s8_s32(vdupq_n_s32(four))
}

/// `sums[i] += sum of a[4 i + j] * b[4 i + j]` over j in 0..4.
#[target_feature(enable = "neon,dotprod")]
fn dot_product(sums: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    let mut sums = sums;
    // SAFETY: registers in, registers out; the feature is enabled. (The intrinsic is not stable.)
    unsafe {
        asm!("sdot {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) sums, in(vreg) a, in(vreg) b,
            options(pure, nomem, nostack, preserves_flags));
    }
    sums
}

/// Add the first numbers of `x` to `out`, 4 at most.
#[target_feature(enable = "neon,dotprod")]
fn add_to(out: &mut [f32], x: float32x4_t) {
    let mut four = [0f32; 4];
    // SAFETY: four numbers are written to four.
    unsafe { vst1q_f32(four.as_mut_ptr(), x) };
    for (out, x) in out.iter_mut().zip(four) {
        *out += x;
    }
}
