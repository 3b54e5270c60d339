//! AVX-512 with VNNI and VBMI (Ice Lake, Zen 4 and later): sums over codes in integers, see
//! [`fixed`](super::fixed).

// Loops of a constant length over several arrays in step become registers.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use super::compiled::compiled_for;
use super::fixed::{Fixed, LIMIT};
use super::strip::{sum_keys, sum_values, Numbers, Strip, Sums, ROWS};
use super::{avx2, scalar, CpuOps, Full, Keys, Values};
use crate::config::Clip;
use crate::quantize::{quantize_group as quantize, Affine};
use crate::weigh::{encode_fed_back as fed_back, Feedback};

/// The table, if this machine can run it.
pub fn table() -> Option<&'static CpuOps> {
    let found = is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni")
        && is_x86_feature_detected!("avx512vbmi");
    found.then_some(&OPS)
}

static OPS: CpuOps = CpuOps {
    name: "avx512",
    factor_step: 1.0 / LIMIT,
    l1_norm,
    quantize_group,
    encode_fed_back,
    key_scores,
    value_sum,
    full_scores,
    full_sum,
    prefetch: avx2::prefetch,
    max,
    exp_sum,
};

compiled_for! {"avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi":
    fn l1_norm(x: &[f32]) -> f32 = scalar::l1_norm;
    fn quantize_group(x: &[f32], weight: &[f32], bits: u8, clip: Clip, codes: &mut [u8]) -> Option<Affine> = quantize;
    fn encode_fed_back(x: &[f32], affine: Affine, bits: u8, part: Feedback, sums: &mut [f32], codes: &mut [u8]) = fed_back;
    fn key_scores(keys: &Keys<'_>, q: &[f32], k_dim: usize, scores: &mut [f32]) = keys_kernel;
    fn value_sum(values: &Values<'_>, p: &[f32], out: &mut [f32]) = values_kernel;
    fn full_scores(keys: Full<'_>, q: &[f32], dim: usize, scores: &mut [f32], stride: usize) = avx2::full_scores_kernel;
    fn full_sum(values: Full<'_>, p: &[f32], stride: usize, dim: usize, out: &mut [f32]) = avx2::full_sum_kernel;
    fn max(x: &[f32]) -> f32 = avx2::max_kernel;
    fn exp_sum(x: &mut [f32], max: f32) -> f32 = avx2::exp_sum_kernel;
}

/// Queries that share unpacked codes: 8 sums each of the 32 registers.
const QUERIES: usize = 3;

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
fn keys_kernel(keys: &Keys<'_>, q: &[f32], k_dim: usize, scores: &mut [f32]) {
    sum_keys(keys, q, k_dim, scores, |strip, x, out| add(strip, x, out));
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
fn values_kernel(values: &Values<'_>, p: &[f32], out: &mut [f32]) {
    sum_values(values, p, out, |strip, x, out| add(strip, x, out));
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
fn add(strip: &Strip<'_>, x: Numbers<'_>, out: &mut Sums<'_>) {
    match strip.bits {
        1 => add_planes::<8, 4>(strip, x, out),
        2 => add_planes::<4, 4>(strip, x, out),
        4 => add_planes::<2, 2>(strip, x, out),
        _ => scalar::add_strip(strip, x, out),
    }
}

/// `PLANES` codes in a byte, `W` of them added up at a time.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
fn add_planes<const PLANES: usize, const W: usize>(
    strip: &Strip<'_>,
    x: Numbers<'_>,
    out: &mut Sums<'_>,
) {
    let (mut scale, mut min) = ([0f32; ROWS], [0f32; ROWS]);
    let eights = strip.rows.next_multiple_of(8);
    widen(strip.scale, &mut scale[..eights]);
    widen(strip.min, &mut min[..eights]);
    let middle = ((1 << (8 / PLANES)) - 1) as f32 / 2.0;
    let mut fixed = [Fixed::ZERO; QUERIES];
    let mut n = 0;
    while n < x.len() {
        // As even as possible: 4 queries are 2 and 2.
        let rest = x.len() - n;
        let count = rest.div_ceil(rest.div_ceil(QUERIES));
        for (i, fixed) in fixed[..count].iter_mut().enumerate() {
            fold(x.of(n + i, strip), &scale, &min, middle, fixed);
        }
        match count {
            1 => dots::<PLANES, W, 1>(strip, &fixed, n, out),
            2 => dots::<PLANES, W, 2>(strip, &fixed, n, out),
            _ => dots::<PLANES, W, 3>(strip, &fixed, n, out),
        }
        n += count;
    }
}

/// Fold scales into the numbers of a query.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
fn fold(x: &[f32], scale: &[f32; ROWS], min: &[f32; ROWS], middle: f32, fixed: &mut Fixed) {
    let mut factors = [_mm512_setzero_ps(); ROWS / 16];
    let (mut base, mut max) = (_mm512_setzero_ps(), _mm512_setzero_ps());
    let (scale, min) = (scale.as_chunks::<16>().0, min.as_chunks::<16>().0);
    for (i, x) in x.chunks(16).enumerate() {
        let x = load_part(x);
        factors[i] = _mm512_mul_ps(x, load(&scale[i]));
        base = _mm512_fmadd_ps(x, load(&min[i]), base);
        max = _mm512_max_ps(max, _mm512_abs_ps(factors[i]));
    }
    let max = _mm512_reduce_max_ps(max);
    let inverse = if max > 0.0 { LIMIT / max } else { 0.0 };
    fixed.step = max / LIMIT;
    let (inverse, step) = (_mm512_set1_ps(inverse), _mm512_set1_ps(fixed.step));
    let mut lost = _mm512_setzero_ps();
    let low = fixed.low.as_chunks_mut::<16>().0;
    let high = fixed.high.as_chunks_mut::<16>().0;
    for i in 0..x.len().div_ceil(16) {
        let steps = _mm512_cvtps_epi32(_mm512_mul_ps(factors[i], inverse));
        let rounded = _mm512_add_epi32(steps, _mm512_set1_epi32(128));
        store_bytes(&mut low[i], steps);
        store_bytes(&mut high[i], _mm512_srai_epi32::<8>(rounded));
        let left = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(steps), step, factors[i]);
        lost = _mm512_add_ps(lost, left);
    }
    fixed.base = _mm512_reduce_add_ps(base) + middle * _mm512_reduce_add_ps(lost);
}

/// All columns, for queries `n..n + N`.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
fn dots<const PLANES: usize, const W: usize, const N: usize>(
    strip: &Strip<'_>,
    fixed: &[Fixed; QUERIES],
    n: usize,
    out: &mut Sums<'_>,
) {
    let width = strip.columns / PLANES;
    let Strip { codes, stride, .. } = *strip;
    for at in (0..width).step_by(16) {
        let len = 16.min(width - at);
        // Fewer rows than the last four are not there to be loaded together.
        let whole = len == 16 && strip.rows.is_multiple_of(4);
        if stride == 16 && whole {
            let index = column_bytes(16, 0);
            let four = |r: usize| match codes[r * 16..].first_chunk::<64>() {
                Some(bytes) => _mm512_permutexvar_epi8(index, load_bytes(bytes)),
                None => _mm512_setzero_si512(),
            };
            dot::<PLANES, W, N>(strip, (at, len), four, fixed, n, out);
        } else if stride == 32 && whole {
            let index = column_bytes(32, at);
            let four = |r: usize| match codes[r * 32..].first_chunk::<128>() {
                Some(bytes) => {
                    let (a, b) = (bytes.as_chunks::<64>().0[0], bytes.as_chunks::<64>().0[1]);
                    _mm512_permutex2var_epi8(load_bytes(&a), index, load_bytes(&b))
                }
                None => _mm512_setzero_si512(),
            };
            dot::<PLANES, W, N>(strip, (at, len), four, fixed, n, out);
        } else {
            let index = column_bytes(16, 0);
            let four = |r: usize| {
                let row = |r: usize| match r < strip.rows {
                    true => load_some(&codes[r * stride + at..][..len]),
                    false => _mm_setzero_si128(),
                };
                let x = _mm512_castsi128_si512(row(r));
                let x = _mm512_inserti32x4::<1>(x, row(r + 1));
                let x = _mm512_inserti32x4::<2>(x, row(r + 2));
                let x = _mm512_inserti32x4::<3>(x, row(r + 3));
                _mm512_permutexvar_epi8(index, x)
            };
            dot::<PLANES, W, N>(strip, (at, len), four, fixed, n, out);
        }
    }
}

/// Places of the bytes `at..at + 16` of four rows, column by column.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
fn column_bytes(stride: usize, at: usize) -> __m512i {
    let mut index = [0u8; 64];
    for (i, index) in index.iter_mut().enumerate() {
        *index = (i % 4 * stride + i / 4 + at) as u8;
    }
    load_bytes(&index)
}

/// Byte columns `at..at + len`, 16 at most; `four(r)` is rows `r..r + 4` of them, column by column.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
fn dot<const PLANES: usize, const W: usize, const N: usize>(
    strip: &Strip<'_>,
    (at, len): (usize, usize),
    four: impl Fn(usize) -> __m512i,
    fixed: &[Fixed; QUERIES],
    n: usize,
    out: &mut Sums<'_>,
) {
    let bits = 8 / PLANES;
    let width = strip.columns / PLANES;
    for from in (0..PLANES).step_by(W) {
        let mut low = [[_mm512_setzero_si512(); W]; N];
        let mut high = [[_mm512_setzero_si512(); W]; N];
        for block in 0..strip.rows.div_ceil(4) {
            let bytes = four(block * 4);
            for p in 0..W {
                // A code stays where it lies in the byte: its sums come out 2^place times as large.
                let place = bits * (from + p);
                let mask = _mm512_set1_epi8((((1u16 << bits) - 1) << place) as i8);
                let codes = _mm512_and_si512(bytes, mask);
                for i in 0..N {
                    let factors = fixed[i].low.as_chunks::<4>().0[block];
                    let factors = _mm512_set1_epi32(i32::from_le_bytes(factors));
                    low[i][p] = _mm512_dpbusd_epi32(low[i][p], codes, factors);
                    let factors = fixed[i].high.as_chunks::<4>().0[block];
                    let factors = _mm512_set1_epi32(i32::from_le_bytes(factors));
                    high[i][p] = _mm512_dpbusd_epi32(high[i][p], codes, factors);
                }
            }
        }
        for i in 0..N {
            let base = _mm512_set1_ps(fixed[i].base);
            let out = out.of(n + i, strip);
            for p in 0..W {
                let step = fixed[i].step / (1u32 << (bits * (from + p))) as f32;
                let low = _mm512_cvtepi32_ps(low[i][p]);
                let high = _mm512_cvtepi32_ps(high[i][p]);
                let sum = _mm512_fmadd_ps(high, _mm512_set1_ps(256.0), low);
                let sum = _mm512_fmadd_ps(sum, _mm512_set1_ps(step), base);
                add_to(&mut out[(from + p) * width + at..][..len], sum);
            }
        }
    }
}

/// The first `out.len()` of little-endian f16 `bytes`; a multiple of 8.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
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

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
fn load(x: &[f32; 16]) -> __m512 {
    // SAFETY: 16 numbers are read from 16.
    unsafe { _mm512_loadu_ps(x.as_ptr()) }
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
fn load_bytes(bytes: &[u8; 64]) -> __m512i {
    // SAFETY: 64 bytes are read from 64.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

/// The first 16 of `x`; zeros where it is shorter.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
fn load_part(x: &[f32]) -> __m512 {
    // SAFETY: no number beyond the slice is read.
    unsafe { _mm512_maskz_loadu_ps(first(x.len()), x.as_ptr()) }
}

/// The first 16 of `bytes`; zeros where they are fewer.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
fn load_some(bytes: &[u8]) -> __m128i {
    // SAFETY: no byte beyond the slice is read.
    unsafe { _mm_maskz_loadu_epi8(first(bytes.len()), bytes.as_ptr().cast()) }
}

/// Add the first numbers of `x` to `out`, 16 at most.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
fn add_to(out: &mut [f32], x: __m512) {
    let sum = _mm512_add_ps(load_part(out), x);
    // SAFETY: no number beyond the slice is written.
    unsafe { _mm512_mask_storeu_ps(out.as_mut_ptr(), first(out.len()), sum) }
}

/// The low bytes of 16 numbers.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
fn store_bytes(out: &mut [u8; 16], x: __m512i) {
    // SAFETY: 16 bytes are written to 16.
    unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(x)) }
}

/// A mask of the first `len` of 16.
fn first(len: usize) -> u16 {
    ((1u32 << len.min(16)) - 1) as u16
}
