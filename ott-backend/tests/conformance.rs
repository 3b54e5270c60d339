//! One suite for every table of inner loops that this machine can run, against plain loops in f64.
//!
//! Codes, scales, minima and magnitudes must be equal bit for bit; sums may err by [`Budget`]. The
//! data are painted so that no swap of tokens, channels, queries or codes can cancel.

mod reference;

use half::{bf16, f16};
use ott_backend::cpu::{Full, Keys, Values};
use ott_backend::pack::{pack, pack_bits, packed_len, unpack, unpack_f32};
use ott_backend::weigh::Feedback;
use ott_backend::{Clip, CpuOps};
use reference::Range;

const BITS: [u8; 4] = [2, 3, 4, 8];
const DIMS: [usize; 7] = [8, 64, 80, 96, 128, 256, 264];
const GROUPS: [usize; 3] = [32, 64, 128];
/// Query heads of one key/value head.
const QUERIES: [usize; 4] = [1, 3, 4, 7];

/// A sum of `terms` terms whose absolute values add up to `mass`: n additions in f32, in any order,
/// err by n * 2^-24 * mass at most, and so do the few roundings of each term (scale folded into the
/// query, products). Measured errors are a hundred times smaller; a swapped code is not.
struct Budget {
    sum: f64,
    mass: f64,
    terms: usize,
    steps: f64,
}

impl Budget {
    fn of(terms: impl Iterator<Item = f64>) -> Self {
        let (mut sum, mut mass, mut count) = (0.0, 0.0, 0);
        for term in terms {
            (sum, mass, count) = (sum + term, mass + term.abs(), count + 1);
        }
        Self {
            sum,
            mass,
            terms: count,
            steps: 0.0,
        }
    }

    /// Beside that, factors in fixed point are off by half a step each, which counts as often as a
    /// code is away from the middle one: `rows` are the factors with their codes.
    fn with_steps(mut self, ops: &CpuOps, bits: u8, rows: impl Iterator<Item = (f64, u8)>) -> Self {
        let middle = f64::from((1u16 << bits) - 1) / 2.0;
        let (mut largest, mut distance) = (0f64, 0.0);
        for (factor, code) in rows {
            largest = largest.max(factor.abs());
            distance += (f64::from(code) - middle).abs();
        }
        self.steps += f64::from(ops.factor_step) / 2.0 * largest * distance;
        self
    }

    fn check(&self, got: f32, what: &str) {
        let allowed = (self.terms + 8) as f64 * f64::from(f32::EPSILON) / 2.0 * self.mass;
        let allowed = allowed + self.steps;
        let error = (f64::from(got) - self.sum).abs();
        assert!(
            error <= allowed,
            "{what}: {got} for {}, off by {error:.2e}, {allowed:.2e} allowed",
            self.sum
        );
    }
}

/// Numbers in -1..1 with a period of 8191, longer than any group and prime to every size.
fn paint(seed: usize, len: usize) -> Vec<f32> {
    let number = |i: usize| ((i * 1297 + seed * 2741 + i / 8191) % 8191) as f32 / 4095.5 - 1.0;
    (0..len).map(number).collect()
}

fn paint_codes(seed: usize, len: usize, bits: u8) -> Vec<u8> {
    let code = |i: usize| ((i * 7919 + seed * 31) % 8191 % (1 << bits)) as u8;
    (0..len).map(code).collect()
}

fn paint_f16(seed: usize, len: usize) -> (Vec<f64>, Vec<u8>) {
    let halves: Vec<f16> = paint(seed, len).into_iter().map(f16::from_f32).collect();
    let bytes = halves.iter().flat_map(|h| h.to_le_bytes()).collect();
    (halves.iter().map(|h| h.to_f64()).collect(), bytes)
}

/// Calls `test` for every table.
fn for_each_table(test: impl Fn(&CpuOps)) {
    let tables = CpuOps::available();
    assert_eq!(tables[0].name, "scalar", "the specification comes first");
    for ops in tables {
        println!("table {}", ops.name);
        test(ops);
    }
}

/// The places in `docs/layout.md`, one code at a time.
fn code_at(bytes: &[u8], n: usize, bits: u8, j: usize) -> u8 {
    let two = |j: usize| (bytes[j % (n / 4)] >> (2 * (j / (n / 4)))) & 3;
    match bits {
        2 => two(j),
        3 => two(j) | ((bytes[n / 4 + j % (n / 8)] >> (j / (n / 8))) & 1) << 2,
        4 => (bytes[j % (n / 2)] >> (4 * (j / (n / 2)))) & 15,
        _ => bytes[j],
    }
}

#[test]
fn packed_codes_lie_where_the_layout_says() {
    for bits in BITS {
        for n in (8..=264).step_by(8) {
            let codes = paint_codes(n, n, bits);
            let mut bytes = vec![0xA5; packed_len(n, bits)];
            pack(&codes, bits, &mut bytes);
            let read: Vec<u8> = (0..n).map(|j| code_at(&bytes, n, bits, j)).collect();
            assert_eq!(read, codes, "{bits} bits, {n} codes");
            let mut back = vec![0xA5; n];
            unpack(&bytes, bits, &mut back);
            assert_eq!(back, codes, "{bits} bits, {n} codes");
            let mut floats = vec![f32::NAN; n];
            unpack_f32(&bytes, bits, &mut floats);
            assert!(floats.iter().zip(&codes).all(|(f, c)| *f == f32::from(*c)));
        }
    }
}

/// Groups with ties, tiny and wide ranges, one outlier, and all numbers alike.
fn groups(len: usize) -> Vec<Vec<f32>> {
    let painted = |factor: f32, shift: f32| -> Vec<f32> {
        paint(len, len).iter().map(|x| x * factor + shift).collect()
    };
    let mut outlier = painted(0.5, 4.0);
    outlier[len / 3] = -0.01;
    vec![
        painted(1.0, 0.0),
        painted(300.0, -17.0),
        painted(1e-3, 0.25),
        painted(3e-8, 0.0),
        outlier,
        (0..len).map(|i| (i % 13) as f32 / 2.0).collect(),
        vec![0.0; len],
        vec![-1.5; len],
    ]
}

#[test]
fn codes_and_ranges_are_the_references_bit_for_bit() {
    for_each_table(|ops| {
        for len in GROUPS.into_iter().chain(DIMS) {
            for (g, x) in groups(len).iter().enumerate() {
                for bits in BITS {
                    let what = format!("{}: group {g} of {len} at {bits} bits", ops.name);
                    let mut codes = vec![0xA5; len];
                    let weight = vec![1.0; len];
                    let got = (ops.quantize_group)(x, &weight, bits, Clip::None, &mut codes);
                    let got = got.expect(&what);
                    let want = Range::of(x, bits.into(), true);
                    let range = (got.scale.to_f32(), got.min.to_f32());
                    assert_eq!(range, (want.scale, want.min), "{what}");
                    let want: Vec<u8> = x.iter().map(|x| want.code(*x, bits.into())).collect();
                    assert_eq!(codes, want, "{what}");
                }
            }
        }
    });
}

/// Squared error over the elements that count, in f64.
fn squared_error(x: &[f32], weight: &[f32], codes: &[u8], range: Range) -> f64 {
    let error = |((x, w), code): ((&f32, &f32), &u8)| {
        f64::from(*w) * f64::from(x - range.value(*code)).powi(2)
    };
    x.iter().zip(weight).zip(codes).map(error).sum()
}

/// Clipping is ours, not the papers': it is judged by what it promises. The error over the elements
/// that count is not larger than without it, and codes are the nearest ones of the chosen range.
#[test]
fn clipping_only_helps() {
    for_each_table(|ops| {
        for len in GROUPS {
            for (g, x) in groups(len).iter().enumerate() {
                for bits in BITS {
                    let what = format!("{}: group {g} of {len} at {bits} bits", ops.name);
                    let mut weight = vec![1.0; len];
                    weight[len / 3] = if g % 2 == 0 { 0.0 } else { 1.0 };
                    let run = |ops: &CpuOps, clip: Clip| {
                        let mut codes = vec![0xA5; len];
                        let affine = (ops.quantize_group)(x, &weight, bits, clip, &mut codes);
                        let affine = affine.expect(&what);
                        let (scale, min) = (affine.scale.to_f32(), affine.min.to_f32());
                        (codes, Range { scale, min })
                    };
                    let (codes, range) = run(ops, Clip::Keys);
                    let nearest = x.iter().map(|x| range.code(*x, bits.into()));
                    assert_eq!(codes, nearest.collect::<Vec<u8>>(), "{what}");
                    assert_eq!((&codes, range), {
                        let (codes, range) = run(&ott_backend::cpu::scalar::OPS, Clip::Keys);
                        (&codes.clone(), range)
                    });
                    let clipped = squared_error(x, &weight, &codes, range);
                    let (codes, range) = run(ops, Clip::None);
                    let full = squared_error(x, &weight, &codes, range);
                    // Errors are compared in f32 by the search.
                    assert!(clipped <= full * (1.0 + 1e-5), "{what}: {clipped} > {full}");
                }
            }
        }
    });
}

#[test]
fn codes_that_make_up_for_others() {
    for_each_table(|ops| {
        for len in GROUPS {
            for (g, x) in groups(len).iter().enumerate() {
                for bits in BITS {
                    let mut codes = vec![0; len];
                    let range =
                        (ops.quantize_group)(x, &vec![1.0; len], bits, Clip::Keys, &mut codes);
                    let range = range.expect("finite");
                    let part = Feedback {
                        gain: 0.3 - g as f32 / 4.0,
                        mean: 1.7,
                    };
                    let run = |ops: &CpuOps| {
                        let (mut sums, mut codes) = (paint(g, len), vec![0xA5; len]);
                        (ops.encode_fed_back)(x, range, bits, part, &mut sums, &mut codes);
                        let sums: Vec<u32> = sums.iter().map(|x| x.to_bits()).collect();
                        (sums, codes)
                    };
                    let want = run(&ott_backend::cpu::scalar::OPS);
                    assert_eq!(run(ops), want, "{}: group {g} of {len} at {bits}", ops.name);
                    let range = Range {
                        scale: range.scale.to_f32(),
                        min: range.min.to_f32(),
                    };
                    let made_up = paint(g, len);
                    let nearest = x.iter().zip(made_up);
                    let nearest =
                        nearest.map(|(x, sum)| range.code(x + part.gain * sum, bits.into()));
                    assert_eq!(want.1, nearest.collect::<Vec<u8>>());
                }
            }
        }
    });
}

#[test]
fn what_has_no_scale_is_refused() {
    for_each_table(|ops| {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e9, -1e9] {
            for place in [0, 1, 31] {
                let mut x = paint(1, 32);
                x[place] = bad;
                for clip in [Clip::None, Clip::Keys] {
                    let mut codes = vec![0; 32];
                    let got = (ops.quantize_group)(&x, &[1.0; 32], 2, clip, &mut codes);
                    assert_eq!(got, None, "{}: {bad} at {place}", ops.name);
                }
            }
        }
    });
}

#[test]
fn magnitudes() {
    for_each_table(|ops| {
        for len in DIMS.into_iter().chain([1, 15, 17, 1024]) {
            let x = paint(len, len);
            let got = (ops.l1_norm)(&x);
            Budget::of(x.iter().map(|x| f64::from(x.abs()))).check(got, "L1 norm");
            assert_eq!(
                got,
                (ott_backend::cpu::scalar::OPS.l1_norm)(&x),
                "{}",
                ops.name
            );
        }
    });
}

/// One more bit for some channels: none, few, or half of them, by `seed`.
struct High {
    channels: Vec<usize>,
    boosted: Vec<u8>,
    /// 0 or 1, `(M, tokens)`.
    bits: Vec<u8>,
    packed: Vec<u8>,
}

fn high_bits(seed: usize, k_dim: usize, tokens: usize, bits: u8) -> High {
    let share = if bits == 8 { 0 } else { seed % 4 };
    let count = [0, k_dim * 12 / 64, k_dim / 2, 1][share];
    let channels: Vec<usize> = (0..count).map(|i| i * k_dim / count).collect();
    let bits = paint_codes(seed, count * tokens, 1);
    let mut packed = vec![0; packed_len(bits.len(), 1)];
    let planes = packed.chunks_exact_mut(packed_len(tokens, 1));
    for (codes, out) in bits.chunks_exact(tokens).zip(planes) {
        pack_bits(codes, 0, out);
    }
    let boosted = channels.iter().flat_map(|c| (*c as u16).to_le_bytes());
    High {
        boosted: boosted.collect(),
        channels,
        bits,
        packed,
    }
}

#[test]
fn scores_of_sealed_keys() {
    for_each_table(|ops| {
        for (bits, k_dim) in BITS.into_iter().flat_map(|b| DIMS.map(|d| (b, d))) {
            for (tokens, n) in GROUPS.into_iter().flat_map(|t| QUERIES.map(|n| (t, n))) {
                let codes = paint_codes(k_dim + tokens, k_dim * tokens, bits);
                let mut packed = vec![0; packed_len(codes.len(), bits)];
                let channels = packed.chunks_exact_mut(packed_len(tokens, bits));
                for (codes, out) in codes.chunks_exact(tokens).zip(channels) {
                    pack(codes, bits, out);
                }
                let (scale, scale_bytes) = paint_f16(3, k_dim);
                let (min, min_bytes) = paint_f16(5, k_dim);
                let boosted = high_bits(tokens + n, k_dim, tokens, bits);
                let keys = Keys {
                    bits,
                    tokens,
                    codes: &packed,
                    scale: &scale_bytes,
                    min: &min_bytes,
                    boosted: &boosted.boosted,
                    high: &boosted.packed,
                };
                let q = paint(7, n * k_dim);
                let mut scores = vec![f32::NAN; n * tokens];
                (ops.key_scores)(&keys, &q, k_dim, &mut scores);
                for (i, t) in (0..n).flat_map(|i| (0..tokens).map(move |t| (i, t))) {
                    let what = format!("{}: {bits} bits, query {i}, key {t}", ops.name);
                    let factor = |c: usize| f64::from(q[i * k_dim + c]) * scale[c];
                    let value = f64::from(1u32 << bits);
                    let worth = |m: usize| value * factor(boosted.channels[m]);
                    let high = |m: usize| boosted.bits[m * tokens + t];
                    let terms = (0..k_dim).flat_map(|c| {
                        let base = f64::from(q[i * k_dim + c]) * min[c];
                        [factor(c) * f64::from(codes[c * tokens + t]), base]
                    });
                    let beside = (0..boosted.channels.len()).map(|m| worth(m) * f64::from(high(m)));
                    let rows = (0..k_dim).map(|c| (factor(c), codes[c * tokens + t]));
                    let high = (0..boosted.channels.len()).map(|m| (worth(m), high(m)));
                    let budget = Budget::of(terms.chain(beside))
                        .with_steps(ops, bits, rows)
                        .with_steps(ops, 1, high);
                    budget.check(scores[i * tokens + t], &what);
                }
            }
        }
    });
}

#[test]
fn sums_of_sealed_values() {
    for_each_table(|ops| {
        for (bits, v_dim) in BITS.into_iter().flat_map(|b| DIMS.map(|d| (b, d))) {
            for (tokens, n) in GROUPS.into_iter().flat_map(|t| QUERIES.map(|n| (t, n))) {
                let codes = paint_codes(v_dim + tokens, tokens * v_dim, bits);
                let mut packed = vec![];
                for token in codes.chunks_exact(v_dim) {
                    for group in token.chunks(reference::VALUE_GROUP) {
                        let mut bytes = vec![0; packed_len(group.len(), bits)];
                        pack(group, bits, &mut bytes);
                        packed.extend(bytes);
                    }
                }
                let groups = v_dim.div_ceil(reference::VALUE_GROUP);
                let (scale, scale_bytes) = paint_f16(11, groups * tokens);
                let (min, min_bytes) = paint_f16(13, groups * tokens);
                let values = Values {
                    bits,
                    tokens,
                    v_dim,
                    codes: &packed,
                    scale: &scale_bytes,
                    min: &min_bytes,
                };
                let (p, start) = (paint(17, n * tokens), paint(19, n * v_dim));
                let mut out = start.clone();
                (ops.value_sum)(&values, &p, &mut out);
                for (i, c) in (0..n).flat_map(|i| (0..v_dim).map(move |c| (i, c))) {
                    let what = format!("{}: {bits} bits, query {i}, channel {c}", ops.name);
                    let group = c / reference::VALUE_GROUP * tokens;
                    let terms = (0..tokens).flat_map(|t| {
                        let (p, code) = (f64::from(p[i * tokens + t]), codes[t * v_dim + c]);
                        [p * scale[group + t] * f64::from(code), p * min[group + t]]
                    });
                    let before = f64::from(start[i * v_dim + c]);
                    let rows = (0..tokens).map(|t| {
                        let factor = f64::from(p[i * tokens + t]) * scale[group + t];
                        (factor, codes[t * v_dim + c])
                    });
                    let budget = Budget::of(terms.chain([before])).with_steps(ops, bits, rows);
                    budget.check(out[i * v_dim + c], &what);
                }
            }
        }
    });
}

/// `exact` are the numbers `kv (tokens, dim)` in f64.
fn check_full(ops: &CpuOps, kv: Full<'_>, exact: &[f64], dim: usize, n: usize) {
    let tokens = exact.len() / dim;
    let (stride, q) = (tokens + 5, paint(29, n * dim));
    let mut scores = vec![0.5; n * stride];
    (ops.full_scores)(kv, &q, dim, &mut scores, stride);
    let p = paint(31, n * stride);
    let start = paint(37, n * dim);
    let mut out = start.clone();
    (ops.full_sum)(kv, &p, stride, dim, &mut out);
    for i in 0..n {
        for t in 0..tokens {
            assert_eq!(
                scores[i * stride + tokens],
                0.5,
                "written beyond the tokens"
            );
            let terms = (0..dim).map(|c| f64::from(q[i * dim + c]) * exact[t * dim + c]);
            Budget::of(terms).check(scores[i * stride + t], "score");
        }
        for c in 0..dim {
            let terms = (0..tokens).map(|t| f64::from(p[i * stride + t]) * exact[t * dim + c]);
            let all = terms.chain([f64::from(start[i * dim + c])]);
            Budget::of(all).check(out[i * dim + c], "sum");
        }
    }
}

#[test]
fn full_precision_scores_and_sums() {
    for_each_table(|ops| {
        for (dim, n) in DIMS.into_iter().flat_map(|d| QUERIES.map(|n| (d, n))) {
            for tokens in [1, 2, 31, 35, 159] {
                let kv = paint(23, tokens * dim);
                let f16s: Vec<f16> = kv.iter().map(|x| f16::from_f32(*x)).collect();
                let bf16s: Vec<bf16> = kv.iter().map(|x| bf16::from_f32(*x)).collect();
                let exact: Vec<f64> = kv.iter().map(|x| f64::from(*x)).collect();
                check_full(ops, Full::F32(&kv), &exact, dim, n);
                let exact: Vec<f64> = f16s.iter().map(|x| x.to_f64()).collect();
                check_full(ops, Full::F16(&f16s), &exact, dim, n);
                let exact: Vec<f64> = bf16s.iter().map(|x| x.to_f64()).collect();
                check_full(ops, Full::Bf16(&bf16s), &exact, dim, n);
            }
        }
    });
}

/// `exp` may be off by a few units in the last place: 1e-6 relative, and below -87 it is 0 (weights
/// that small vanish beside the largest, which is 1).
#[test]
fn exponentials() {
    for_each_table(|ops| {
        for len in [1, 7, 16, 33, 160, 4097] {
            let max = 3.5;
            let scores: Vec<f32> = paint(41, len).iter().map(|x| x * 60.0 - 56.5).collect();
            let mut weights = scores.clone();
            let sum = (ops.exp_sum)(&mut weights, max);
            let exact: Vec<f64> = scores.iter().map(|s| f64::from(s - max).exp()).collect();
            for (got, want) in weights.iter().zip(&exact) {
                let error = (f64::from(*got) - want).abs();
                assert!(
                    error <= 1e-6 * want + 2e-38,
                    "{}: {got} for {want}",
                    ops.name
                );
            }
            let all: f64 = exact.iter().sum();
            assert!(
                (f64::from(sum) - all).abs() <= 3e-6 * all,
                "{}: {sum} for {all}",
                ops.name
            );
        }
    });
}
