//! Prompt attention against a plain softmax in f64 over [past, as it is stored; new tokens], one
//! query at a time: whatever the heads, sizes, lengths, batch, layout of tensors or number of
//! threads.

mod harness;
mod reference;

use candle_core::{DType, Tensor};
use harness::{numbers, rows, Host, Model, Sequence, Text};
use proptest::prelude::*;
use reference::{attend, Head, Rules, Token};

/// Sums of f32 over hundreds of tokens, and the fast exponential; answers are below 1.
const F32: f64 = 5e-5;
/// The answer is rounded to the activation dtype: half a unit in the last place of numbers below 1.
const F16: f64 = F32 + 2.5e-4;
const BF16: f64 = F32 + 2e-3;

/// The options `GROUP` and what they mean.
const GROUP: &str = "paper,group=64,residual=32";
const RULES: Rules = Rules {
    group: 64,
    residual: 32,
    ..Rules::PAPER
};

fn text(seed: u64) -> Text {
    let planted = [0, 5, 33, 40, 100, 129, 200, 300];
    Text::with_outliers(seed, &planted.map(|p| (p, 0.3 / (1 + p % 17) as f32)))
}

/// What was stored before a row's prompt.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Before {
    Nothing,
    /// Another sequence left this many whole blocks behind, which the prompt hits.
    Hit(usize),
    /// The same prompt's first tokens, in a step of their own.
    Chunk(usize),
}

impl Before {
    fn tokens(self) -> usize {
        match self {
            Self::Nothing => 0,
            Self::Hit(blocks) => blocks * RULES.group,
            Self::Chunk(tokens) => tokens,
        }
    }
}

/// A row's sequence, with `before` stored, and the reference's tokens of that, `[layer][head]`.
fn prepare(host: &Host, id: usize, before: Before) -> Sequence {
    let first = 1 + id * 20;
    let table: Vec<usize> = (first..first + 20).rev().collect();
    let mut s = host.sequence(id, &text(id as u64), &table);
    if before != Before::Nothing {
        host.step(&mut s, before.tokens(), true).unwrap();
    }
    if let Before::Hit(blocks) = before {
        host.cache.released(id, &s.blocks);
        s.id = id + 100;
        host.cache.allocated(s.id, &s.blocks[blocks..]);
    }
    s
}

/// What the new tokens of a row may look at: the past as it is stored, then themselves.
fn seen(model: &Model, s: &Sequence, before: Before, at: (usize, usize), new: usize) -> Vec<Token> {
    let past = before.tokens();
    let all = model.tokens(&s.text, at.0, at.1, past + new);
    let mut stored = Head::new(RULES.in_layer(at.0));
    all[..past].iter().for_each(|t| stored.push(t.clone()));
    match before {
        Before::Hit(_) => stored.flush(),
        _ => stored.begin(past + new),
    }
    [&stored.past()[..], &all[past..]].concat()
}

/// Answers of one row and layer, `(1, heads, tokens, v_dim)`, against the reference: the tokens
/// around every seam, and padding.
fn check(model: &Model, s: &Sequence, before: Before, new: usize, layer: usize, out: &Tensor) {
    let budget = match model.dtype {
        DType::F32 => F32,
        DType::F16 => F16,
        _ => BF16,
    };
    let past = before.tokens();
    let [q, _, _] = model.qkv(&s.text, layer, past, past + new);
    let (q, out) = (rows(&q).unwrap(), rows(out).unwrap());
    let ratio = model.heads / model.kv_heads;
    let seams = [
        0, 1, 31, 32, 35, 36, 37, 63, 64, 84, 85, 127, 128, 129, 255, 256, 384, 512,
    ];
    let last = [new / 2, new.saturating_sub(2), new - 1];
    for kv in 0..model.kv_heads {
        let seen = seen(model, s, before, (layer, kv), new);
        for h in [kv * ratio, kv * ratio + ratio - 1] {
            for t in seams.into_iter().chain(last).filter(|t| *t < new) {
                let tokens = &seen[..=past + t];
                let want = attend(tokens, &q[h][t], model.attn.scale, model.attn.softcap);
                for (c, (got, want)) in out[h][t].iter().zip(want).enumerate() {
                    let error = (f64::from(*got) - want).abs();
                    assert!(
                        error <= budget,
                        "{model:?}: {before:?} and {new} tokens, layer {layer}, head {h}, token {t}, \
                         channel {c}: {got} for {want}, {budget:.1e} allowed"
                    );
                }
            }
            let padding = out[h][new..].iter().flatten();
            assert!(padding.clone().all(|x| *x == 0.0), "padding of head {h}");
        }
    }
}

/// The rows as one step.
fn check_step(model: Model, batch: &[(Before, usize)]) {
    let host = model.host(1 + 20 * batch.len());
    let mut sequences: Vec<Sequence> = (0..batch.len())
        .map(|id| prepare(&host, id, batch[id].0))
        .collect();
    let mut step: Vec<(&mut Sequence, usize)> = sequences
        .iter_mut()
        .zip(batch)
        .map(|(s, b)| (s, b.1))
        .collect();
    let out = host.step_all(&mut step, true).unwrap();
    for layer in [0, model.layers - 1] {
        let out = out[layer].as_ref().expect("the backend attends to prompts");
        assert_eq!(out.dtype(), model.dtype);
        for (i, (before, new)) in batch.iter().enumerate() {
            let out = out.narrow(0, i, 1).unwrap();
            check(&model, &sequences[i], *before, *new, layer, &out);
        }
    }
}

fn before() -> impl Strategy<Value = Before> {
    prop_oneof![
        Just(Before::Nothing),
        (1usize..6).prop_map(Before::Hit),
        (1usize..400).prop_map(Before::Chunk),
    ]
}

proptest! {
    #![proptest_config(harness::proptest_config())]

    #[test]
    fn any_prompt_is_a_softmax(
        (heads, kv_heads) in prop::sample::select(vec![(2, 2), (6, 2), (7, 1), (8, 2)]),
        (k_dim, v_dim) in prop::sample::select(vec![(64, 64), (80, 80), (64, 128), (128, 64), (8, 8)]),
        dtype in prop::sample::select(vec![DType::F32, DType::F16, DType::BF16]),
        softcap in prop::sample::select(vec![None, Some(3.0), Some(50.0)]),
        batch in prop::collection::vec((before(), prop_oneof![1usize..9, 1usize..600]), 1..4),
    ) {
        let mut model = Model::new(GROUP).heads(heads, kv_heads).dims(k_dim, v_dim).dtype(dtype);
        model.attn.softcap = softcap;
        check_step(model, &batch);
    }
}

/// The sizes that models have, and lengths around the seams of tiles.
#[test]
fn every_size() {
    for (heads, kv_heads, dim) in [
        (9, 3, 64),
        (14, 2, 64),
        (4, 4, 80),
        (8, 2, 128),
        (4, 2, 256),
    ] {
        let model = Model::new(GROUP).heads(heads, kv_heads).dims(dim, dim);
        check_step(model, &[(Before::Nothing, 300), (Before::Hit(3), 129)]);
    }
    for new in [1, 2, 127, 128, 129, 256, 257, 600] {
        check_step(Model::new(GROUP), &[(Before::Nothing, new)]);
    }
}

/// The default group, the smallest, and pasts that end within a block, a chunk and a tile.
#[test]
fn every_past() {
    for past in [1, 31, 32, 33, 63, 95, 96, 127, 128, 129, 160, 300] {
        check_step(Model::new(GROUP), &[(Before::Chunk(past), 70)]);
    }
    for blocks in 1..6 {
        check_step(Model::new(GROUP), &[(Before::Hit(blocks), 70)]);
    }
}

/// One layer's answer to a prompt of `new` tokens, with some of its tokens changed.
fn answer(model: &Model, new: usize, change: impl Fn(&Tensor) -> Tensor) -> Vec<Vec<Vec<f32>>> {
    let host = model.host(21);
    let s = prepare(&host, 0, Before::Nothing);
    let step = host.begin(true, &[(&s, new)]).unwrap();
    let [q, k, v] = model.qkv(&s.text, 0, 0, new);
    let out = step.prefill(0, &q, &change(&k), &change(&v), model.attn);
    rows(&out.unwrap().expect("the backend attends")).unwrap()
}

/// Token `t` and later ones are all that another token `t` changes: bit for bit.
#[test]
fn no_token_sees_a_later_one() {
    let (model, new) = (Model::new(GROUP), 270);
    let before = answer(&model, new, Tensor::clone);
    for t in [0, 1, 41, 42, 84, 127, 128, 200, 255, 256, 269] {
        let changed = answer(&model, new, |x| {
            let parts = [
                x.narrow(2, 0, t).unwrap(),
                (x.narrow(2, t, 1).unwrap() * 0.5).unwrap(),
                x.narrow(2, t + 1, new - t - 1).unwrap(),
            ];
            Tensor::cat(&parts, 2).unwrap()
        });
        for (h, (before, changed)) in before.iter().zip(&changed).enumerate() {
            assert_eq!(
                before[..t],
                changed[..t],
                "head {h}: token {t} is seen before it comes"
            );
            let same = (t..new).find(|i| before[*i] == changed[*i]);
            assert_eq!(same, None, "head {h}: token {t} is not seen");
        }
    }
}

/// A row's answer is the same bits alone, in a batch, and on any number of threads.
#[test]
fn batches_and_threads_are_irrelevant() {
    let model = Model::new(GROUP).dtype(DType::F16);
    let batch = [
        (Before::Hit(2), 300),
        (Before::Nothing, 77),
        (Before::Chunk(201), 140),
    ];
    let together = |threads: usize| -> Vec<Vec<f32>> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        pool.build().unwrap().install(|| {
            let host = model.host(61);
            let mut all: Vec<Sequence> = (0..3).map(|i| prepare(&host, i, batch[i].0)).collect();
            let mut step: Vec<_> = all.iter_mut().zip(batch).map(|(s, b)| (s, b.1)).collect();
            let out = host.step_all(&mut step, true).unwrap();
            let out = out[2].as_ref().expect("the backend attends");
            let row = |i: usize| out.narrow(0, i, 1).and_then(|x| x.narrow(2, 0, batch[i].1));
            (0..3).map(|i| numbers(&row(i).unwrap())).collect()
        })
    };
    let want = together(1);
    for threads in [2, 3, 8] {
        assert!(together(threads) == want, "{threads} threads");
    }
    for (i, want) in want.iter().enumerate() {
        let host = model.host(61);
        let mut s = prepare(&host, i, batch[i].0);
        let out = host.step(&mut s, batch[i].1, true).unwrap();
        assert!(numbers(out[2].as_ref().unwrap()) == *want, "row {i} alone");
    }
}
