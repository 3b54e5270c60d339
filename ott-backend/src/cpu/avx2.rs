//! AVX2 with FMA and F16C: codes become f32 by a look-up of four numbers, eight codes at a time.

use std::arch::x86_64::*;

use super::compiled::compiled_for;
use super::strip::{sum_keys, sum_values, Numbers, Strip, Sums, ROWS};
use super::{scalar, CpuOps, Keys, Values};
use crate::config::Clip;
use crate::quantize::{quantize_group as quantize, sum2, Affine};

/// The table, if this machine can run it.
pub fn table() -> Option<&'static CpuOps> {
    let found = is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c");
    found.then_some(&OPS)
}

static OPS: CpuOps = CpuOps {
    name: "avx2",
    l1_norm,
    quantize_group,
    key_scores,
    value_sum,
    full_scores,
    full_sum,
    max,
    exp_sum,
};

compiled_for! {"avx2,fma,f16c":
    fn l1_norm(x: &[f32]) -> f32 = scalar::l1_norm;
    fn quantize_group(x: &[f32], weight: &[f32], bits: u8, clip: Clip, codes: &mut [u8]) -> Option<Affine> = quantize;
    fn key_scores(keys: &Keys<'_>, q: &[f32], k_dim: usize, scores: &mut [f32]) = keys_kernel;
    fn value_sum(values: &Values<'_>, p: &[f32], out: &mut [f32]) = values_kernel;
    fn full_scores(keys: &[f32], q: &[f32], dim: usize, scores: &mut [f32], stride: usize) = scalar::full_scores;
    fn full_sum(values: &[f32], p: &[f32], stride: usize, dim: usize, out: &mut [f32]) = scalar::full_sum;
    fn max(x: &[f32]) -> f32 = scalar::max;
    fn exp_sum(x: &mut [f32], max: f32) -> f32 = scalar::exp_sum;
}

/// Queries that share unpacked codes: 8 sums each of the 16 registers.
const QUERIES: usize = 2;

#[target_feature(enable = "avx2,fma,f16c")]
fn keys_kernel(keys: &Keys<'_>, q: &[f32], k_dim: usize, scores: &mut [f32]) {
    sum_keys(keys, q, k_dim, scores, |strip, x, out| add(strip, x, out));
}

#[target_feature(enable = "avx2,fma,f16c")]
fn values_kernel(values: &Values<'_>, p: &[f32], out: &mut [f32]) {
    sum_values(values, p, out, |strip, x, out| add(strip, x, out));
}

#[target_feature(enable = "avx2,fma,f16c")]
fn add(strip: &Strip<'_>, x: Numbers<'_>, out: &mut Sums<'_>) {
    match strip.bits {
        2 => add_planes::<4>(strip, x, out),
        4 => add_planes::<2>(strip, x, out),
        _ => scalar::add_strip(strip, x, out),
    }
}

/// `PLANES` codes in a byte.
#[target_feature(enable = "avx2,fma,f16c")]
fn add_planes<const PLANES: usize>(strip: &Strip<'_>, x: Numbers<'_>, out: &mut Sums<'_>) {
    let (mut scale, mut min) = ([0f32; ROWS], [0f32; ROWS]);
    widen(strip.scale, &mut scale[..strip.rows]);
    widen(strip.min, &mut min[..strip.rows]);
    let mut factors = [[0f32; ROWS]; QUERIES];
    let mut n = 0;
    while n < x.len() {
        let count = QUERIES.min(x.len() - n);
        for (i, factors) in factors[..count].iter_mut().enumerate() {
            let x = x.of(n + i, strip);
            for ((f, x), scale) in factors.iter_mut().zip(x).zip(&scale) {
                *f = x * scale;
            }
            let base = sum2(x, &min[..strip.rows], |x, m| x * m);
            out.of(n + i, strip).iter_mut().for_each(|o| *o += base);
        }
        for at in (0..strip.columns / PLANES).step_by(8) {
            match count {
                1 => dot::<PLANES, 1>(strip, at, &factors, n, out),
                _ => dot::<PLANES, 2>(strip, at, &factors, n, out),
            }
        }
        n += count;
    }
}

/// Byte columns `at..at + 8`, or fewer at the end of a row, for queries `n..n + N`.
#[target_feature(enable = "avx2,fma,f16c")]
fn dot<const PLANES: usize, const N: usize>(
    strip: &Strip<'_>,
    at: usize,
    factors: &[[f32; ROWS]; QUERIES],
    n: usize,
    out: &mut Sums<'_>,
) {
    let table = _mm256_setr_ps(0.0, 1.0, 2.0, 3.0, 0.0, 1.0, 2.0, 3.0);
    let mask = _mm256_set1_epi32((1 << (8 / PLANES)) - 1);
    let mut sums = [[_mm256_setzero_ps(); PLANES]; N];
    for r in 0..strip.rows {
        let bytes = eight(strip.codes, r * strip.stride + at);
        let bytes = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bytes));
        for p in 0..PLANES {
            let shift = _mm256_set1_epi32((p * 8 / PLANES) as i32);
            let shifted = _mm256_srlv_epi32(bytes, shift);
            // The look-up reads the low two bits of each number and ignores the others.
            let codes = match PLANES {
                4 => _mm256_permutevar_ps(table, shifted),
                _ => _mm256_cvtepi32_ps(_mm256_and_si256(shifted, mask)),
            };
            for i in 0..N {
                let factor = _mm256_set1_ps(factors[i][r]);
                sums[i][p] = _mm256_fmadd_ps(factor, codes, sums[i][p]);
            }
        }
    }
    let width = strip.columns / PLANES;
    for i in 0..N {
        for p in 0..PLANES {
            let out = &mut out.of(n + i, strip)[p * width..(p + 1) * width][at..];
            add_to(out, sums[i][p]);
        }
    }
}

/// Bytes `at..at + 8`; zeros beyond the end.
#[inline(always)]
fn eight(bytes: &[u8], at: usize) -> i64 {
    let mut eight = [0; 8];
    match bytes[at..].first_chunk::<8>() {
        Some(all) => eight = *all,
        None => eight[..bytes.len() - at].copy_from_slice(&bytes[at..]),
    }
    i64::from_le_bytes(eight)
}

/// Add the first numbers of `x` to those of `out`, which may be fewer.
#[target_feature(enable = "avx2,fma,f16c")]
fn add_to(out: &mut [f32], x: __m256) {
    let mut numbers = [0f32; 8];
    // SAFETY: eight numbers are written to eight.
    unsafe { _mm256_storeu_ps(numbers.as_mut_ptr(), x) };
    for (out, x) in out.iter_mut().zip(numbers) {
        *out += x;
    }
}

/// The first `out.len()` of little-endian f16 `bytes`; a multiple of 8.
#[target_feature(enable = "avx2,fma,f16c")]
fn widen(bytes: &[u8], out: &mut [f32]) {
    let (halves, _) = bytes.as_chunks::<16>();
    let (out, _) = out.as_chunks_mut::<8>();
    for (out, halves) in out.iter_mut().zip(halves) {
        // SAFETY: 16 bytes are read from 16, eight numbers are written to eight.
        unsafe {
            let halves = _mm_loadu_si128(halves.as_ptr().cast());
            _mm256_storeu_ps(out.as_mut_ptr(), _mm256_cvtph_ps(halves));
        }
    }
}
