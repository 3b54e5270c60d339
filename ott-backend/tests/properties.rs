//! What must hold for any input: pages are a function of the prefix, whatever the host does around
//! them; nothing panics; no byte is held that was not answered.

mod harness;
mod reference;

use std::panic::{catch_unwind, AssertUnwindSafe};

use candle_core::{DType, Device, Tensor};
use harness::{difference, numbers, Host, Model, Sequence, Text};
use mistralrs_kv_backend::{KvBackendProvider, KvPlan, KvRow};
use proptest::collection::vec;
use proptest::prelude::*;
use reference::{Rules, Token};

const GROUP: usize = 32;
const RULES: Rules = Rules {
    group: GROUP,
    residual: 32,
    outliers: 2,
    extra: 3,
    boost: 12,
    rotate: true,
    ..Rules::PAPER
};
const OPTIONS: &str = "group=32,residual=32,outliers=2,extra=3,clip=none";
const SPARE: usize = 60;

fn model() -> Model {
    Model::new(OPTIONS).heads(3, 1)
}

/// A text with tokens to trace, not all of them in the same group.
fn text(seed: u64) -> Text {
    let planted = [0, 17, 41, 70, 99, 130, 131, 180, 222];
    let shrinks = [0.02, 0.3, 0.01, 0.005, 0.1, 0.002, 0.2, 0.001, 0.0005];
    Text::with_outliers(seed, &planted.into_iter().zip(shrinks).collect::<Vec<_>>())
}

/// Blocks for `tokens` tokens and one more, from `first` on in steps of `stride`.
fn blocks(tokens: usize, first: usize, stride: usize) -> Vec<usize> {
    (0..=tokens / GROUP).map(|i| first + i * stride).collect()
}

/// Everything stored: `[layer][head][token]`.
fn everything(host: &Host, s: &Sequence) -> Vec<Vec<Vec<Token>>> {
    let layers = 0..host.model.layers;
    layers.map(|layer| host.past(s, layer).unwrap()).collect()
}

/// The sequence ends; its full blocks are hit by a new one, which starts behind them.
fn hit(host: &Host, s: &Sequence, id: usize, spare: &[usize]) -> Sequence {
    host.cache.released(s.id, &s.blocks);
    let full = s.past / GROUP;
    host.cache.allocated(id, spare);
    Sequence {
        id,
        text: s.text.clone(),
        blocks: s.blocks[..full].iter().chain(spare).copied().collect(),
        past: full * GROUP,
    }
}

/// Store in steps of the given sizes; odd sizes come as decode steps of few tokens.
fn store(host: &Host, s: &mut Sequence, chunks: &[usize]) {
    for chunk in chunks {
        let prompt = chunk % 2 == 0 || *chunk > 4;
        host.step(s, *chunk, prompt).unwrap();
    }
}

proptest! {
    #![proptest_config(harness::proptest_config())]

    /// However the tokens came, the same is stored; and once the sequence has ended, the same is
    /// in its pages.
    #[test]
    fn chunking_is_irrelevant(
        seed in 0u64..1000,
        chunks in vec(prop_oneof![1usize..5, 1usize..80], 1..12),
    ) {
        let tokens: usize = chunks.iter().sum();
        let host = model().host(SPARE);
        let mut whole = host.sequence(1, &text(seed), &blocks(tokens, 1, 1));
        host.step(&mut whole, tokens, true).unwrap();
        let mut parts = host.sequence(2, &text(seed), &blocks(tokens, 59, 1).iter().map(|b| 118 - b).collect::<Vec<_>>());
        store(&host, &mut parts, &chunks);
        prop_assert_eq!(difference(&everything(&host, &whole), &everything(&host, &parts)), None);
        let whole = hit(&host, &whole, 3, &[29]);
        let parts = hit(&host, &parts, 4, &[30]);
        prop_assert_eq!(difference(&everything(&host, &whole), &everything(&host, &parts)), None);
    }

    /// A sequence stores and answers the same alone and beside others, in any row.
    #[test]
    fn batches_are_irrelevant(
        seed in 0u64..1000,
        steps in vec((1usize..70, 1usize..70, 0usize..2), 1..5),
    ) {
        let tokens = |i: usize| steps.iter().map(|s| if i == 0 { s.0 } else { s.1 }).sum::<usize>();
        let alone = model().host(SPARE);
        let mut a = alone.sequence(1, &text(seed), &blocks(tokens(0), 40, 1));
        let together = model().host(SPARE);
        let mut b = together.sequence(7, &text(seed), &blocks(tokens(0), 1, 2));
        let mut other = together.sequence(3, &text(seed + 1), &blocks(tokens(1), 2, 2));
        for (new, beside, place) in steps {
            let prompt = new > 1;
            let want = alone.step(&mut a, new, prompt).unwrap();
            let mut rows = [(&mut b, new), (&mut other, beside)];
            rows.rotate_left(place);
            let got = together.step_all(&mut rows, prompt).unwrap();
            for (want, got) in want.iter().zip(&got) {
                let Some((want, got)) = want.as_ref().zip(got.as_ref()) else {
                    prop_assert!(want.is_none() && got.is_none());
                    continue;
                };
                let row = got.narrow(0, place, 1).unwrap().narrow(2, 0, new).unwrap();
                prop_assert_eq!(numbers(want), numbers(&row));
            }
        }
        prop_assert_eq!(difference(&everything(&alone, &a), &everything(&together, &b)), None);
    }

    /// A hit on another sequence's blocks reads and continues as if the sequence had stored that
    /// prefix by itself, wherever the blocks lie; and as the paper's rules say.
    #[test]
    fn a_prefix_hit_is_as_good_as_own_work(
        seed in 0u64..1000,
        prefix in GROUP..200usize,
        more in 1usize..70,
        weighed: bool,
    ) {
        let options = format!("{OPTIONS},weigh={}", if weighed { "q" } else { "none" });
        let model = || Model::new(&options).heads(3, 1);
        let first = model().host(SPARE);
        let mut donor = first.sequence(1, &text(seed), &blocks(prefix, 50, 1).iter().map(|b| 108 - b).collect::<Vec<_>>());
        host_prompt(&first, &mut donor, prefix);
        let second = model().host(SPARE);
        let mut own = second.sequence(9, &text(seed), &blocks(prefix, 1, 3));
        store(&second, &mut own, &[prefix / 2, prefix - prefix / 2].map(|n| n.max(1)));
        let fork = text(seed).forked(prefix / GROUP * GROUP, seed + 77);
        let mut pair = [(first, donor, 2), (second, own, 10)].map(|(host, s, id)| {
            let mut s = hit(&host, &s, id, &[30, 31, 32]);
            s.text = fork.clone();
            (host, s)
        });
        let [(_, a), _] = &pair;
        let start = a.past;
        for (new, prompt) in [(more, true), (1, false), (1, false)] {
            let outs = pair.each_mut().map(|(host, s)| host.step(s, new, prompt).unwrap());
            for (a, b) in outs[0].iter().zip(&outs[1]) {
                prop_assert_eq!(a.as_ref().map(numbers), b.as_ref().map(numbers));
            }
        }
        let [(first, a), (second, b)] = &pair;
        prop_assert_eq!(difference(&everything(first, a), &everything(second, b)), None);
        // The paper knows of no weights.
        for layer in (0..3).filter(|_| !weighed) {
            let tokens = first.model.tokens(&fork, layer, 0, a.past);
            let mut head = reference::Head::new(RULES.in_layer(layer));
            for (i, token) in tokens.into_iter().enumerate() {
                if i == start {
                    head.flush();
                }
                head.push(token);
            }
            same(&head.past(), &first.past(a, layer).unwrap()[0])?;
        }
    }

    /// A preempted sequence, recomputed in other blocks while others wrote over its old ones.
    #[test]
    fn recomputed_after_preemption(
        seed in 0u64..1000,
        before in 1usize..150,
        after in 1usize..60,
    ) {
        let host = model().host(SPARE);
        let mut s = host.sequence(1, &text(seed), &blocks(before, 1, 1));
        host_prompt(&host, &mut s, before);
        host.cache.released(1, &s.blocks);
        let mut thief = host.sequence(2, &text(seed + 5), &blocks(before, 1, 1));
        host_prompt(&host, &mut thief, before);
        let total = before + after;
        let mut s = host.sequence(1, &text(seed), &blocks(total, 40, 1));
        store(&host, &mut s, &[before, after]);
        let undisturbed = model().host(SPARE);
        let mut whole = undisturbed.sequence(4, &text(seed), &blocks(total, 3, 2));
        host_prompt(&undisturbed, &mut whole, total);
        prop_assert_eq!(difference(&everything(&host, &s), &everything(&undisturbed, &whole)), None);
    }

    /// The newest tokens are taken back and as many others stored, and more. (With fewer, pages
    /// that were sealed before stay sealed.)
    #[test]
    fn newest_tokens_can_be_taken_back(
        seed in 0u64..1000,
        kept in 1usize..150,
        taken in 1usize..33,
        more in 1usize..60,
    ) {
        let host = model().host(SPARE);
        let mut s = host.sequence(1, &text(seed), &blocks(kept + 1 + taken + more, 1, 1));
        host_prompt(&host, &mut s, kept + taken);
        s.past = kept;
        s.text = text(seed).forked(kept, seed + 3);
        store(&host, &mut s, &[1, taken + more]);
        let straight = model().host(SPARE);
        let mut t = straight.sequence(1, &s.text, &blocks(kept + 1 + taken + more, 5, 2));
        host_prompt(&straight, &mut t, kept + 1 + taken + more);
        prop_assert_eq!(difference(&everything(&host, &s), &everything(&straight, &t)), None);
    }

    /// No plan and no tensor makes the backend panic; what is wrong with them is an error.
    #[test]
    fn nonsense_is_an_error_and_never_a_panic(
        rows in vec((0usize..4, past(), count(70), prop_oneof![vec(1usize..SPARE, 3..5), vec(count(70), 0..8)]), 0..4),
        (layer, heads, tokens, dim) in (0usize..5, prop_oneof![Just(1usize), 0usize..5], 0usize..70, prop_oneof![Just(64usize), 0usize..80]),
        block_size in prop_oneof![Just(GROUP), 0usize..70],
        prompt: bool,
    ) {
        let host = model().host(SPARE);
        host.cache.allocated(1, &[1, 2, 3, 3, 900]);
        host.cache.released(2, &[5, 800]);
        let rows: Vec<KvRow> = rows
            .into_iter()
            .map(|(seq, past, new, blocks)| KvRow { seq, past, new, blocks })
            .collect();
        let count = rows.len();
        let plan = KvPlan { prompt, block_size, rows };
        let zeros = |heads: usize| Tensor::zeros((count, heads, tokens, dim), DType::F32, &Device::Cpu);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            let Ok(step) = host.cache.begin_step(plan) else { return };
            let (Ok(q), Ok(kv)) = (zeros(3 * heads), zeros(heads)) else { return };
            let _ = step.past(layer, count, DType::F32);
            let _ = step.past(layer, 0, DType::F16);
            let _ = step.prefill(layer, &q, &kv, &kv, host.model.attn);
            let _ = step.append(layer, &q, &kv, &kv);
            let _ = step.decode(layer, &q, &kv, &kv, host.model.attn);
            let _ = host.cache.end_step();
        }));
        prop_assert!(outcome.is_ok());
    }

    /// What is held never exceeds what was answered.
    #[test]
    fn bytes_held_were_answered(
        lengths in vec(1usize..300, 1..4),
        dims in prop_oneof![Just((64usize, 64usize)), Just((128, 128)), Just((80, 80))],
    ) {
        let model = model().dims(dims.0, dims.1);
        let memory = ott_backend::provider().memory(&model.shape()).unwrap();
        let host = model.host(SPARE);
        let answered = memory.per_block * SPARE + memory.fixed;
        let mut at = 1;
        for (id, length) in lengths.into_iter().enumerate() {
            let blocks = blocks(length, at, 1);
            at += blocks.len();
            let mut s = host.sequence(id, &text(id as u64), &blocks);
            host_prompt(&host, &mut s, length);
            prop_assert!(host.cache.allocated_bytes() <= answered);
            if id % 2 == 1 {
                host.cache.released(id, &s.blocks);
            }
        }
        prop_assert!(host.cache.allocated_bytes() <= answered);
    }

    /// A group whose numbers are all alike has scale 0 and gives them back as they were. (Numbers
    /// of 11 bits: minima are stored as f16.)
    #[test]
    fn constant_groups_are_exact(level in -2000i32..2000, bits in prop_oneof![Just(2), Just(3), Just(4), Just(8)]) {
        let host = Model::new(&format!("{OPTIONS},bits={bits}")).heads(2, 1).host(8);
        host.cache.allocated(1, &[1, 2]);
        let x = Tensor::full(level as f32 / 64.0, (1, 1, 40, 64), &Device::Cpu).unwrap();
        let row = KvRow { seq: 1, past: 0, new: 40, blocks: vec![1, 2] };
        let plan = KvPlan { prompt: true, block_size: GROUP, rows: vec![row] };
        let step = host.cache.begin_step(plan.clone()).unwrap();
        let q = Tensor::zeros((1, 2, 40, 64), DType::F32, &Device::Cpu).unwrap();
        (0..3).for_each(|layer| step.append(layer, &q, &x, &x).unwrap());
        prop_assert_eq!(host.cache.end_step().unwrap(), vec![]);
        let mut later = plan;
        (later.rows[0].past, later.rows[0].new) = (40, 1);
        let step = host.cache.begin_step(later).unwrap();
        for layer in 0..3 {
            let (k, v) = step.past(layer, 0, DType::F32).unwrap();
            prop_assert_eq!(numbers(&k), numbers(&x));
            prop_assert_eq!(numbers(&v), numbers(&x));
        }
    }
}

/// A small number, or now and then one that no sum can take.
fn count(below: usize) -> impl Strategy<Value = usize> {
    prop_oneof![30 => 0..below, 1 => Just(usize::MAX), 1 => Just(usize::MAX / 2 + 1)]
}

/// Often nothing is stored, so that plans are accepted.
fn past() -> impl Strategy<Value = usize> {
    prop_oneof![Just(0), count(200)]
}

fn host_prompt(host: &Host, s: &mut Sequence, tokens: usize) {
    host.step(s, tokens, true).unwrap();
}

/// Stored tokens against the reference's.
fn same(want: &[Token], got: &[Token]) -> Result<(), TestCaseError> {
    prop_assert_eq!(want.len(), got.len());
    for (t, (want, got)) in want.iter().zip(got).enumerate() {
        let pairs = want.k.iter().zip(&got.k).chain(want.v.iter().zip(&got.v));
        for (want, got) in pairs {
            prop_assert!(
                (want - got).abs() <= 1e-5 * (1.0 + want.abs()),
                "token {}: {} for {}",
                t,
                got,
                want
            );
        }
    }
    Ok(())
}

/// After a reset nothing that was stored is read: a row that claims it is refused, and a new sequence starts clean.
#[test]
fn a_reset_forgets_everything() {
    let host = model().host(SPARE);
    let mut s = host.sequence(1, &text(1), &blocks(100, 1, 1));
    host_prompt(&host, &mut s, 100);
    let before = everything(&host, &s);
    host.cache.reset();
    let read = host
        .begin(true, &[(&s, 1)])
        .and_then(|step| step.past(2, 0, DType::F32));
    assert!(read.is_err(), "a forgotten sequence was read");
    let mut s = host.sequence(1, &text(1), &blocks(100, 9, 2));
    host_prompt(&host, &mut s, 100);
    assert_eq!(difference(&everything(&host, &s), &before), None);
}

/// Counts that no sum can take are refused as well.
#[test]
fn absurd_counts_are_refused() {
    let host = model().host(SPARE);
    let huge = [usize::MAX, usize::MAX - 31, usize::MAX / 2 + 1];
    for (past, new) in huge
        .into_iter()
        .flat_map(|n| [(n, 1), (0, n), (n, n), (GROUP, n)])
    {
        let row = KvRow {
            seq: 1,
            past,
            new,
            blocks: vec![1, 2, 3],
        };
        let plan = KvPlan {
            prompt: true,
            block_size: GROUP,
            rows: vec![row],
        };
        let begun = catch_unwind(AssertUnwindSafe(|| host.cache.begin_step(plan).is_ok()));
        assert!(
            matches!(begun, Ok(false)),
            "{past} past and {new} new tokens"
        );
    }
}

/// Numbers that are not finite are told when the step ends, with the sequence and the layer's number.
#[test]
fn what_is_not_finite_is_a_fault() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 65520.0] {
        let host = model().host(SPARE);
        let s = host.sequence(7, &text(1), &[1, 2]);
        let q = Tensor::zeros((1, 3, 1, 64), DType::F32, &Device::Cpu).unwrap();
        let good = Tensor::zeros((1, 1, 1, 64), DType::F32, &Device::Cpu).unwrap();
        let bad = Tensor::full(bad, (1, 1, 1, 64), &Device::Cpu).unwrap();
        for (k, v) in [(&bad, &good), (&good, &bad)] {
            let step = host.begin(false, &[(&s, 1)]).unwrap();
            step.append(2, &q, k, v).unwrap();
            let faults = host.cache.end_step().unwrap();
            assert_eq!((faults.len(), faults[0].seq), (1, 7));
            assert!(faults[0].error.contains("layer 2"), "{faults:?}");
        }
    }
}
