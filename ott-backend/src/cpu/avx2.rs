//! AVX2 with FMA and F16C: codes become f32 by a look-up of four numbers, eight codes at a time.

// Loops of a constant length over several arrays in step become registers.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::compiled::compiled_for;
use super::strip::{sum_keys, sum_values, Numbers, Strip, Sums, ROWS};
use super::{scalar, CpuOps, Full, Keys, Values};
use crate::config::Clip;
use crate::quantize::{quantize_group as quantize, sum2, Affine};
use crate::weigh::{encode_fed_back as fed_back, Feedback};

/// The table, if this machine can run it.
pub fn table() -> Option<&'static CpuOps> {
    let found = is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c");
    found.then_some(&OPS)
}

static OPS: CpuOps = CpuOps {
    name: "avx2",
    factor_step: 0.0,
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

compiled_for! {"avx2,fma,f16c":
    fn l1_norm(x: &[f32]) -> f32 = scalar::l1_norm;
    fn quantize_group(x: &[f32], weight: &[f32], bits: u8, clip: Clip, codes: &mut [u8]) -> Option<Affine> = quantize;
    fn encode_fed_back(x: &[f32], affine: Affine, bits: u8, part: Feedback, sums: &mut [f32], codes: &mut [u8]) = fed_back;
    fn key_scores(keys: &Keys<'_>, q: &[f32], k_dim: usize, scores: &mut [f32]) = keys_kernel;
    fn value_sum(values: &Values<'_>, p: &[f32], out: &mut [f32]) = values_kernel;
    fn full_scores(keys: Full<'_>, q: &[f32], dim: usize, scores: &mut [f32], stride: usize) = full_scores_kernel;
    fn full_sum(values: Full<'_>, p: &[f32], stride: usize, dim: usize, out: &mut [f32]) = full_sum_kernel;
    fn max(x: &[f32]) -> f32 = max_kernel;
    fn exp_sum(x: &mut [f32], max: f32) -> f32 = exp_sum_kernel;
}

/// One hint for each line of 64 bytes.
pub fn prefetch(bytes: &[u8]) {
    for line in bytes.chunks(64) {
        // SAFETY: a hint reads nothing; SSE is part of x86-64.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
    }
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
        1 => add_planes::<8>(strip, x, out),
        2 => add_planes::<4>(strip, x, out),
        4 => add_planes::<2>(strip, x, out),
        _ => scalar::add_strip(strip, x, out),
    }
}

/// `PLANES` codes in a byte.
#[target_feature(enable = "avx2,fma,f16c")]
fn add_planes<const PLANES: usize>(strip: &Strip<'_>, x: Numbers<'_>, out: &mut Sums<'_>) {
    let (mut scale, mut min) = ([0f32; ROWS], [0f32; ROWS]);
    let eights = strip.rows.next_multiple_of(8);
    widen(strip.scale, &mut scale[..eights]);
    widen(strip.min, &mut min[..eights]);
    let mut factors = [[0f32; ROWS]; QUERIES];
    let mut n = 0;
    while n < x.len() {
        let queries = if PLANES == 8 { 1 } else { QUERIES };
        let count = queries.min(x.len() - n);
        for (i, factors) in factors[..count].iter_mut().enumerate() {
            let x = x.of(n + i, strip);
            for ((f, x), scale) in factors.iter_mut().zip(x).zip(&scale) {
                *f = x * scale;
            }
            let base = sum2(x, &min[..strip.rows], |x, m| x * m);
            out.of(n + i, strip).iter_mut().for_each(|o| *o += base);
        }
        for at in (0..strip.columns / PLANES).step_by(8) {
            let last = strip.rows.saturating_sub(1) * strip.stride + at;
            if strip.codes.len() < last + 8 {
                let bytes = |r: usize| {
                    let eight = eight(strip.codes, r * strip.stride + at);
                    _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(eight))
                };
                dots::<PLANES>(strip, at, bytes, &factors, (n, count), out);
            } else {
                let bytes = |r: usize| {
                    debug_assert!(r < strip.rows);
                    // SAFETY: 8 bytes from the start of a row, whose last one was just seen to have them.
                    unsafe {
                        let eight = strip.codes.as_ptr().add(r * strip.stride + at);
                        _mm256_cvtepu8_epi32(_mm_loadl_epi64(eight.cast()))
                    }
                };
                dots::<PLANES>(strip, at, bytes, &factors, (n, count), out);
            }
        }
        n += count;
    }
}

/// Byte columns `at..at + 8`, for `count` queries from `n` on; `bytes(r)` are those of row `r`.
#[target_feature(enable = "avx2,fma,f16c")]
fn dots<const PLANES: usize>(
    strip: &Strip<'_>,
    at: usize,
    bytes: impl Fn(usize) -> __m256i,
    factors: &[[f32; ROWS]; QUERIES],
    (n, count): (usize, usize),
    out: &mut Sums<'_>,
) {
    match count {
        1 => dot::<PLANES, 1>(strip, at, bytes, factors, n, out),
        _ => dot::<PLANES, 2>(strip, at, bytes, factors, n, out),
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn dot<const PLANES: usize, const N: usize>(
    strip: &Strip<'_>,
    at: usize,
    bytes: impl Fn(usize) -> __m256i,
    factors: &[[f32; ROWS]; QUERIES],
    n: usize,
    out: &mut Sums<'_>,
) {
    let table = match PLANES {
        8 => _mm256_setr_ps(0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0),
        _ => _mm256_setr_ps(0.0, 1.0, 2.0, 3.0, 0.0, 1.0, 2.0, 3.0),
    };
    let mask = _mm256_set1_epi32((1 << (8 / PLANES)) - 1);
    let mut sums = [[_mm256_setzero_ps(); PLANES]; N];
    for r in 0..strip.rows.min(ROWS) {
        let bytes = bytes(r);
        for p in 0..PLANES {
            let shift = _mm256_set1_epi32((p * 8 / PLANES) as i32);
            let shifted = _mm256_srlv_epi32(bytes, shift);
            // The look-up reads the low two bits of each number and ignores the others.
            let codes = match PLANES {
                4 | 8 => _mm256_permutevar_ps(table, shifted),
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

/// Full-precision numbers eight at a time.
trait Eight: Copy {
    /// To be inlined where the instructions are enabled.
    fn load(x: &[Self; 8]) -> __m256;
}

impl Eight for f32 {
    #[inline(always)]
    fn load(x: &[Self; 8]) -> __m256 {
        // SAFETY: eight numbers are read from eight; only kernels of this file call it.
        unsafe { _mm256_loadu_ps(x.as_ptr()) }
    }
}

impl Eight for f16 {
    #[inline(always)]
    fn load(x: &[Self; 8]) -> __m256 {
        // SAFETY: as above, 16 bytes.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(x.as_ptr().cast())) }
    }
}

impl Eight for bf16 {
    #[inline(always)]
    fn load(x: &[Self; 8]) -> __m256 {
        // SAFETY: as above, 16 bytes.
        unsafe {
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(x.as_ptr().cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high))
        }
    }
}

/// How many of `rest` queries share what is read, three at most: as even as possible.
fn share(rest: usize) -> usize {
    rest.div_ceil(rest.div_ceil(3))
}

#[target_feature(enable = "avx2,fma,f16c")]
pub fn full_scores_kernel(
    keys: Full<'_>,
    q: &[f32],
    dim: usize,
    scores: &mut [f32],
    stride: usize,
) {
    match keys {
        Full::F32(keys) => scores_of(keys, q, dim, scores, stride),
        Full::F16(keys) => scores_of(keys, q, dim, scores, stride),
        Full::Bf16(keys) => scores_of(keys, q, dim, scores, stride),
    }
}

/// Keys four at a time, so that a query's numbers are loaded once for four.
#[target_feature(enable = "avx2,fma,f16c")]
fn scores_of<E: Eight>(keys: &[E], q: &[f32], dim: usize, scores: &mut [f32], stride: usize) {
    let (tokens, queries) = (keys.len() / dim, q.len() / dim);
    let mut n = 0;
    while n < queries {
        let count = share(queries - n);
        let (q, scores) = (&q[n * dim..], &mut scores[n * stride..]);
        let mut t = 0;
        while t < tokens {
            let keys = &keys[t * dim..];
            let (len, scores) = (4.min(tokens - t), &mut scores[t..]);
            match (count, len) {
                (1, 4) => dot_products::<E, 1, 4>(keys, q, dim, scores, stride),
                (2, 4) => dot_products::<E, 2, 4>(keys, q, dim, scores, stride),
                (_, 4) => dot_products::<E, 3, 4>(keys, q, dim, scores, stride),
                _ => {
                    for i in 0..count {
                        let (q, scores) = (&q[i * dim..], &mut scores[i * stride..]);
                        dot_products::<E, 1, 1>(keys, q, dim, scores, stride);
                    }
                }
            }
            t += if len == 4 { 4 } else { 1 };
        }
        n += count;
    }
}

/// Of the first `N` queries with the first `T` keys, 4 at most.
#[target_feature(enable = "avx2,fma,f16c")]
fn dot_products<E: Eight, const N: usize, const T: usize>(
    keys: &[E],
    q: &[f32],
    dim: usize,
    scores: &mut [f32],
    stride: usize,
) {
    let mut sums = [[_mm256_setzero_ps(); 4]; N];
    let keys: [&[[E; 8]]; T] = std::array::from_fn(|t| keys[t * dim..][..dim].as_chunks().0);
    let q: [&[[f32; 8]]; N] = std::array::from_fn(|i| q[i * dim..][..dim].as_chunks().0);
    for c in 0..dim / 8 {
        for t in 0..T {
            let key = E::load(&keys[t][c]);
            for i in 0..N {
                sums[i][t] = _mm256_fmadd_ps(key, f32::load(&q[i][c]), sums[i][t]);
            }
        }
    }
    for (i, s) in sums.iter().enumerate() {
        let pairs = [_mm256_hadd_ps(s[0], s[1]), _mm256_hadd_ps(s[2], s[3])];
        let halves = _mm256_hadd_ps(pairs[0], pairs[1]);
        let high = _mm256_extractf128_ps::<1>(halves);
        let all = _mm_add_ps(_mm256_castps256_ps128(halves), high);
        let mut four = [0f32; 4];
        // SAFETY: four numbers are written to four.
        unsafe { _mm_storeu_ps(four.as_mut_ptr(), all) };
        scores[i * stride..][..T].copy_from_slice(&four[..T]);
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub fn full_sum_kernel(values: Full<'_>, p: &[f32], stride: usize, dim: usize, out: &mut [f32]) {
    match values {
        Full::F32(values) => sum_of(values, p, stride, dim, out),
        Full::F16(values) => sum_of(values, p, stride, dim, out),
        Full::Bf16(values) => sum_of(values, p, stride, dim, out),
    }
}

/// Channels 32 at a time, so that their sums stay in registers over all tokens.
#[target_feature(enable = "avx2,fma,f16c")]
fn sum_of<E: Eight>(values: &[E], p: &[f32], stride: usize, dim: usize, out: &mut [f32]) {
    let queries = out.len() / dim;
    let mut n = 0;
    while n < queries {
        let count = share(queries - n);
        let (p, out) = (&p[n * stride..], &mut out[n * dim..]);
        let mut c = 0;
        while c < dim {
            let wide = dim - c >= 32;
            match (count, wide) {
                (1, true) => weighted::<E, 1, 4>(values, (p, stride), dim, c, out),
                (2, true) => weighted::<E, 2, 4>(values, (p, stride), dim, c, out),
                (_, true) => weighted::<E, 3, 4>(values, (p, stride), dim, c, out),
                (1, false) => weighted::<E, 1, 1>(values, (p, stride), dim, c, out),
                (2, false) => weighted::<E, 2, 1>(values, (p, stride), dim, c, out),
                (_, false) => weighted::<E, 3, 1>(values, (p, stride), dim, c, out),
            }
            c += if wide { 32 } else { 8 };
        }
        n += count;
    }
}

/// Channels `c..c + 8 W` of the first `N` queries.
#[target_feature(enable = "avx2,fma,f16c")]
fn weighted<E: Eight, const N: usize, const W: usize>(
    values: &[E],
    (p, stride): (&[f32], usize),
    dim: usize,
    c: usize,
    out: &mut [f32],
) {
    let mut sums = [[_mm256_setzero_ps(); W]; N];
    for (t, value) in values.chunks_exact(dim).enumerate() {
        let value: &[[E; 8]] = value[c..c + 8 * W].as_chunks().0;
        let p: [__m256; N] = std::array::from_fn(|i| _mm256_set1_ps(p[i * stride + t]));
        for w in 0..W {
            let x = E::load(&value[w]);
            for i in 0..N {
                sums[i][w] = _mm256_fmadd_ps(p[i], x, sums[i][w]);
            }
        }
    }
    for (i, sums) in sums.iter().enumerate() {
        for (w, sum) in sums.iter().enumerate() {
            add_to(&mut out[i * dim + c + 8 * w..][..8], *sum);
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub fn max_kernel(x: &[f32]) -> f32 {
    let mut lanes = _mm256_set1_ps(f32::NEG_INFINITY);
    let (eights, rest) = x.as_chunks::<8>();
    for x in eights {
        lanes = _mm256_max_ps(f32::load(x), lanes);
    }
    let mut last = [f32::NEG_INFINITY; 8];
    last[..rest.len()].copy_from_slice(rest);
    let mut all = [0f32; 8];
    store(&mut all, _mm256_max_ps(f32::load(&last), lanes));
    all.into_iter().fold(f32::NEG_INFINITY, f32::max)
}

#[target_feature(enable = "avx2,fma,f16c")]
pub fn exp_sum_kernel(x: &mut [f32], max: f32) -> f32 {
    let mut lanes = _mm256_setzero_ps();
    let top = _mm256_set1_ps(max);
    let (eights, rest) = x.as_chunks_mut::<8>();
    for x in eights {
        let y = exp(_mm256_sub_ps(f32::load(x), top));
        lanes = _mm256_add_ps(lanes, y);
        store(x, y);
    }
    let mut last = [f32::NEG_INFINITY; 8];
    last[..rest.len()].copy_from_slice(rest);
    let y = exp(_mm256_sub_ps(f32::load(&last), top));
    store(&mut last, y);
    rest.copy_from_slice(&last[..rest.len()]);
    let mut all = [0f32; 8];
    store(&mut all, _mm256_add_ps(lanes, y));
    all.into_iter().sum()
}

/// [`scalar`]'s, with fused multiply-adds.
#[target_feature(enable = "avx2,fma,f16c")]
fn exp(x: __m256) -> __m256 {
    let (least, one) = (_mm256_set1_ps(-88.0), _mm256_set1_ps(1.0));
    let bounded = _mm256_max_ps(x, least);
    let n = _mm256_mul_ps(bounded, _mm256_set1_ps(std::f32::consts::LOG2_E));
    let n = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(n);
    let r = _mm256_fnmadd_ps(n, _mm256_set1_ps(scalar::LN2_HIGH), bounded);
    let r = _mm256_fnmadd_ps(n, _mm256_set1_ps(scalar::LN2_LOW), r);
    let mut y = _mm256_set1_ps(scalar::EXP[0]);
    for c in &scalar::EXP[1..] {
        y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(*c));
    }
    let y = _mm256_add_ps(_mm256_fmadd_ps(_mm256_mul_ps(y, r), r, r), one);
    let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    let power = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent));
    let counts = _mm256_cmp_ps::<_CMP_GE_OQ>(x, _mm256_set1_ps(-87.0));
    _mm256_and_ps(_mm256_mul_ps(y, power), counts)
}

#[target_feature(enable = "avx2,fma,f16c")]
fn store(out: &mut [f32; 8], x: __m256) {
    // SAFETY: eight numbers are written to eight.
    unsafe { _mm256_storeu_ps(out.as_mut_ptr(), x) }
}

/// Add the first numbers of `x` to those of `out`, which may be fewer.
#[target_feature(enable = "avx2,fma,f16c")]
fn add_to(out: &mut [f32], x: __m256) {
    if let Ok(out) = <&mut [f32; 8]>::try_from(&mut *out) {
        let sum = _mm256_add_ps(f32::load(out), x);
        return store(out, sum);
    }
    let mut numbers = [0f32; 8];
    store(&mut numbers, x);
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
