//! Claims of the papers, as tests. OTT is arXiv 2505.10938, KIVI is arXiv 2402.02750; the rules are
//! numbered in `docs/algorithm.md`. Everything goes through the seam, as the host would.

mod harness;
mod reference;

use candle_core::DType;
use harness::{Host, Model, Sequence, Text};
use mistralrs_kv_backend::{KvBackendProvider, KvShape};
use reference::{Head, Rules, Token};

/// The paper's rules with small groups; the test's options say the same.
const RULES: Rules = Rules {
    group: 32,
    residual: 32,
    ..Rules::PAPER
};

fn options(rules: Rules) -> String {
    let Rules {
        group,
        residual,
        outliers,
        extra,
        exempt_layers,
        k_bits,
        v_bits,
        ..
    } = rules;
    let common = format!("paper,group={group},residual={residual},k_bits={k_bits},v_bits={v_bits}");
    match outliers {
        0 => format!("{common},outliers=0"),
        n => format!("{common},outliers={n},extra={extra},exempt_layers={exempt_layers}"),
    }
}

/// A cache with one sequence of `tokens` tokens in it, stored by prompt, and room for 200 more.
fn stored(rules: Rules, text: &Text, tokens: usize) -> (Host, Sequence) {
    let host = Model::new(&options(rules)).host(80);
    let blocks: Vec<usize> = (0..=(tokens + 200) / host.block_size)
        .map(|i| 70 - i)
        .collect();
    let mut sequence = host.sequence(5, text, &blocks);
    host.step(&mut sequence, tokens, true).unwrap();
    (host, sequence)
}

/// Positions that come back exactly as they were written, in one head.
fn exact(host: &Host, s: &Sequence, layer: usize, head: usize) -> Vec<usize> {
    let original = host.model.tokens(&s.text, layer, head, s.past);
    let past = &host.past(s, layer).unwrap()[head];
    (0..s.past).filter(|t| past[*t] == original[*t]).collect()
}

/// OTT, method: the outlier tokens are those whose keys have the smallest magnitude (L1 norm over
/// the channels of the head); they are kept in full precision.
#[test]
fn the_smallest_keys_are_traced() {
    let text = Text::with_outliers(1, &[(0, 0.02), (9, 0.01), (27, 0.03)]);
    let (host, s) = stored(RULES, &text, 64);
    for head in 0..2 {
        let window = 32..64;
        let expected: Vec<usize> = [0, 9, 27].into_iter().chain(window).collect();
        assert_eq!(exact(&host, &s, 2, head), expected, "head {head}");
    }
}

/// OTT, method: a token that loses its place in the pool is not quantised afterwards, it stays in
/// full precision (the extra store).
#[test]
fn a_traced_token_is_never_quantized_again() {
    // Each group of 32 brings a key smaller than all before.
    let outliers: Vec<_> = (0..6)
        .map(|g| (32 * g + 3 * g, 0.1 / (1 << g) as f32))
        .collect();
    let rules = Rules {
        outliers: 1,
        ..RULES
    };
    let text = Text::with_outliers(2, &outliers);
    let (host, mut s) = stored(rules, &text, 64);
    for group in 1..=6 {
        let expected: Vec<usize> = outliers[..group].iter().map(|o| o.0).collect();
        let found = exact(&host, &s, 2, 1);
        assert_eq!(found[..group], expected, "after {group} groups");
        assert_eq!(found[group..], (32 * group..s.past).collect::<Vec<_>>());
        if group < 6 {
            host.step(&mut s, 32, true).unwrap();
        }
    }
}

/// OTT, method: when the extra store is full, no more tokens are traced.
#[test]
fn tracing_stops_when_the_extra_store_is_full() {
    let outliers: Vec<_> = (0..6)
        .map(|g| (32 * g + 5, 0.1 / (1 << g) as f32))
        .collect();
    let rules = Rules {
        outliers: 1,
        extra: 2,
        ..RULES
    };
    let text = Text::with_outliers(3, &outliers);
    let (host, s) = stored(rules, &text, 6 * 32 + 32);
    let expected: Vec<usize> = [5, 37, 69].into_iter().chain(6 * 32..s.past).collect();
    assert_eq!(exact(&host, &s, 2, 0), expected);
}

/// OTT, method: traced tokens are replaced by the mean of the group before its ranges are taken,
/// so that nothing of them is left in the others' codes, scales and minima.
#[test]
fn statistics_of_a_group_know_nothing_of_its_traced_tokens() {
    let places = [3, 14, 31];
    let stored_with = |shrink: f32| {
        let text = Text::with_outliers(4, &places.map(|p| (p, shrink)));
        let (host, s) = stored(RULES, &text, 64);
        host.past(&s, 2).unwrap()
    };
    let (small, smaller) = (stored_with(0.05), stored_with(0.0005));
    for (a, b) in small.iter().zip(&smaller) {
        for t in (0..64).filter(|t| !places.contains(t)) {
            assert_eq!(a[t], b[t], "token {t}");
        }
    }
}

/// OTT, implementation details: the first two layers have no outlier tokens.
#[test]
fn the_first_two_layers_do_not_trace() {
    let text = Text::with_outliers(5, &[(2, 0.01), (11, 0.02), (23, 0.03)]);
    let (host, s) = stored(RULES, &text, 64);
    let (untraced, t) = stored(
        Rules {
            outliers: 0,
            ..RULES
        },
        &text,
        64,
    );
    for layer in 0..2 {
        assert_eq!(
            host.past(&s, layer).unwrap(),
            untraced.past(&t, layer).unwrap()
        );
        assert_eq!(exact(&host, &s, layer, 0), (32..64).collect::<Vec<_>>());
    }
    assert_ne!(host.past(&s, 2).unwrap(), untraced.past(&t, 2).unwrap());
}

/// KIVI, algorithm 1: the newest tokens are kept in full precision. Between R and
/// R + G - 1 of them (rule 1).
#[test]
fn the_window_is_exact() {
    let text = Text::new(6);
    let (host, mut s) = stored(
        Rules {
            outliers: 0,
            ..RULES
        },
        &text,
        30,
    );
    for _ in 30..170 {
        let sealed = s.past.saturating_sub(32) / 32 * 32;
        assert_eq!(exact(&host, &s, 2, 1), (sealed..s.past).collect::<Vec<_>>());
        host.step(&mut s, 1, false).unwrap();
    }
}

/// Mean squared error of attention over `tokens` stored tokens, against full precision.
fn attention_error(rules: Rules, text: &Text, tokens: usize) -> f64 {
    let (host, mut s) = stored(rules, text, tokens);
    let out = host.step(&mut s, 1, false).unwrap();
    let layer = 2;
    let [q, _, _] = host.model.qkv(text, layer, tokens, tokens + 1);
    let (q, out) = (
        harness::rows(&q).unwrap(),
        harness::rows(out[layer].as_ref().unwrap()).unwrap(),
    );
    let mut errors = vec![];
    for h in 0..host.model.heads {
        let all = host.model.tokens(text, layer, h / 3, tokens + 1);
        let want = reference::attend(&all, &q[h][0], host.model.attn.scale, None);
        errors.extend(
            want.iter()
                .zip(&out[h][0])
                .map(|(w, o)| (w - f64::from(*o)).powi(2)),
        );
    }
    errors.iter().sum::<f64>() / errors.len() as f64
}

/// Tracing must remove at least half of the squared error on the planted data below.
const WORTH: f64 = 0.5;

/// OTT, abstract and experiments: excluding outlier tokens makes keys of 2 bits clearly better where
/// such tokens exist. Values are at 8 bits, so that the error is that of the keys.
#[test]
fn without_tracing_planted_outliers_cost_accuracy() {
    let planted = [0, 5, 40, 77, 101, 120].map(|p| (p, 0.01));
    let text = Text::with_outliers(7, &planted);
    let rules = Rules { v_bits: 8, ..RULES };
    let traced = attention_error(rules, &text, 200);
    let untraced = attention_error(
        Rules {
            outliers: 0,
            ..rules
        },
        &text,
        200,
    );
    println!("mean squared error {traced:.3e} with tracing, {untraced:.3e} without");
    assert!(
        traced < WORTH * untraced,
        "mean squared error {traced:.3e} with tracing, {untraced:.3e} without"
    );
}

/// OTT, method: every position has one weight in one softmax, whichever tier holds it. Coarse, with
/// a tolerance for f32; the `cache` suite does it finely.
#[test]
fn three_tiers_share_one_softmax() {
    let text = Text::with_outliers(8, &[(4, 0.01), (33, 0.02), (90, 0.005)]);
    let (host, mut s) = stored(RULES, &text, 150);
    let out = host.step(&mut s, 1, false).unwrap();
    for layer in 0..3 {
        let [q, _, _] = host.model.qkv(&text, layer, 150, 151);
        let q = harness::rows(&q).unwrap();
        let out = harness::rows(out[layer].as_ref().unwrap()).unwrap();
        for h in 0..6 {
            let head: Head = host.model.reference(RULES, &text, (layer, h / 3), 151);
            let want = head.attend(&q[h][0], host.model.attn.scale, None);
            for (got, want) in out[h][0].iter().zip(want) {
                assert!((f64::from(*got) - want).abs() < 2e-3, "{got} for {want}");
            }
        }
    }
}

/// KIVI, round-to-nearest quantisation: round to the nearest of 2^b levels between minimum and maximum, so no untraced
/// value is further away than half a step (plus what f16 ranges add).
#[test]
fn no_value_is_further_away_than_half_a_step() {
    for bits in [2, 3, 4, 8] {
        let rules = Rules {
            outliers: 0,
            k_bits: bits,
            v_bits: bits,
            ..RULES
        };
        let text = Text::new(9);
        let (host, s) = stored(rules, &text, 64);
        let past = &host.past(&s, 2).unwrap()[0];
        let original = host.model.tokens(&text, 2, 0, 64);
        let steps = (2u32.pow(bits) - 1) as f32;
        let spread = |xs: &[f32]| {
            let (low, high) = xs
                .iter()
                .fold((f32::MAX, f32::MIN), |(l, h), x| (l.min(*x), h.max(*x)));
            (high - low) / steps
        };
        let near = |a: f32, b: f32, step: f32| {
            (a - b).abs() <= 0.5 * step + 4.0 * f16_error(a, b, step, steps)
        };
        for c in 0..64 {
            let channel: Vec<f32> = original[..32].iter().map(|t: &Token| t.k[c]).collect();
            let step = spread(&channel);
            for t in 0..32 {
                assert!(
                    near(past[t].k[c], channel[t], step),
                    "{bits} bits: key {t}, channel {c}"
                );
            }
        }
        for t in 0..32 {
            let step = spread(&original[t].v);
            for c in 0..64 {
                assert!(
                    near(past[t].v[c], original[t].v[c], step),
                    "{bits} bits: value {t}, channel {c}"
                );
            }
        }
    }
}

/// Rounding of a minimum of about `a` and of a scale taken `steps` times to 11 bits.
fn f16_error(a: f32, b: f32, step: f32, steps: f32) -> f32 {
    (a.abs() + b.abs() + step * steps) / 2048.0
}

/// OTT, abstract: memory shrinks 6.4 times at 2 bits. Counted as in `docs/algorithm.md`: every byte
/// that is allocated, for one sequence of `tokens` tokens.
#[test]
fn memory_ratio() {
    for (dim, tokens, goal) in [(128, 8192, 5.5), (128, 32768, 6.0)] {
        let model = Model::new("").dims(dim, dim).heads(32, 8).dtype(DType::F16);
        let shape = KvShape {
            max_seqs: 1,
            max_seq_len: tokens,
            ..model.shape()
        };
        let memory = ott_backend::provider().memory(&shape).unwrap();
        let blocks = tokens.div_ceil(shape.block_size) + 1; // Block 0 is the host's padding.
        let bytes = memory.per_block * blocks + memory.fixed;
        let numbers = tokens * shape.layers.len() * 8 * 2 * dim;
        let ratio = 16.0 / (8.0 * bytes as f64 / numbers as f64);
        println!("{ratio:.2} at {tokens} tokens, head size {dim}");
        assert!(
            ratio >= goal,
            "{ratio:.2} at {tokens} tokens, head size {dim}"
        );
    }
}
