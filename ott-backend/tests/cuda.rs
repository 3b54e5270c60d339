//! The cache on a GPU beside the cache on the CPU, behind the same seam: a host does the same with both, sequences that
//! come, hit each other's blocks, grow in batches, are rolled back and end, in a pool whose blocks are used again. Pages
//! are equal byte for byte, what is read back bit for bit, attention within a budget.
//!
//! Compiled with the feature `cuda`; run where a GPU is: `cargo test -p ott-backend --features cuda --test cuda -- --ignored`.

mod harness;
mod machine;
#[allow(dead_code)]
mod pool;
mod reference;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, Tensor};
use harness::{numbers, Host, Model, Sequence, Text};
use machine::{once_wrong, op, Machine, Op, Setting, Subject, BOOSTED, LARGER, NO_WINDOW, PLAIN};
use mistralrs_kv_backend::KvBackendProvider;
use ott_backend::backend::Inspect;
use pool::Pool;
use proptest::collection::vec;
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::TestRunner;

/// Random numbers: splitmix64.
struct Draw(u64);

impl Draw {
    /// One of `0..n`.
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x ^ (x >> 31)) as usize % n
    }
}

const NUM_BLOCKS: usize = 24;
const MAX_SEQS: usize = 6;

/// An answer is a mean of values, so errors are measured by a value's mean magnitude, not by the answer's: values are noise
/// around 0 and cancel.
const MAGNITUDE: f32 = 0.5;

/// Largest difference of attention allowed: the kernels' own budget, and what the CPU's answer is off by: its rounding to
/// f16, and factors of 16 bits where the inner loops add integers.
fn budget(dtype: DType) -> f32 {
    match dtype {
        DType::F16 => 1e-3 + 5e-4 + 2e-4,
        DType::BF16 => 6e-3,
        _ => 2e-4,
    }
}

/// The same of a prompt: weights are rounded to the dtype on both sides, and the CPU rounds new values in the basis
/// in which they are kept.
fn prompt_budget(dtype: DType) -> f32 {
    match dtype {
        DType::F16 => 2.5e-3,
        DType::BF16 => 1.2e-2,
        _ => 3e-4,
    }
}

struct Side {
    host: Host,
    inspect: Arc<dyn Inspect>,
}

struct Live {
    stored: Sequence,
    prompt: usize,
}

/// How often what happened.
#[derive(Debug, Default)]
struct Seen {
    hits: usize,
    decoded: usize,
    rolled_back: usize,
    preempted: usize,
    pages: usize,
    /// Blocks that a hit made the GPU seal before the CPU does.
    ahead: usize,
    error: f32,
    /// Prompt rows that the GPU attended to, and how far off.
    prompts: usize,
    prompt_error: f32,
}

struct Both {
    cpu: Side,
    gpu: Side,
    pool: Pool,
    live: Vec<Live>,
    texts: Vec<Text>,
    sequences: usize,
    rng: Draw,
    seen: Seen,
    answered: usize,
}

fn side(model: &Model, device: &Device) -> Side {
    let mut model = model.clone();
    model.device = device.clone();
    let host = model.host(NUM_BLOCKS);
    let inspect = ott_backend::provider().caches().pop().expect("it was made");
    Side { host, inspect }
}

impl Both {
    fn new(model: &Model, gpu: &Device, seed: u64) -> Self {
        let mut on_gpu = model.clone();
        on_gpu.device = gpu.clone();
        let memory = ott_backend::provider()
            .memory(&on_gpu.shape())
            .expect("served");
        let group = model.block_size();
        let text = Text::with_outliers(
            seed,
            &[
                (0, 0.02),
                (17, 0.3),
                (41, 0.01),
                (130, 0.002),
                (300, 0.001),
                (301, 0.0005),
            ],
        );
        let forks = [(group, 1), (2 * group, 2), (2 * group + 11, 3)];
        let mut texts: Vec<Text> = forks.map(|(at, i)| text.forked(at, 100 + i)).into();
        texts.push(text);
        Self {
            cpu: side(model, &Device::Cpu),
            gpu: side(model, gpu),
            pool: Pool::new(NUM_BLOCKS, group),
            live: vec![],
            texts,
            sequences: 0,
            rng: Draw(seed),
            seen: Seen::default(),
            answered: memory.per_block * NUM_BLOCKS + memory.fixed,
        }
    }

    fn sides(&self) -> [&Side; 2] {
        [&self.cpu, &self.gpu]
    }

    fn start(&mut self) {
        if self.live.len() == MAX_SEQS {
            return;
        }
        let text = self.texts[self.rng.below(self.texts.len())].clone();
        let group = self.pool.group;
        let tokens = 1 + self.rng.below(5 * group);
        let hit = self.pool.hit(&text, tokens, self.rng.below(4));
        let Some(new) = self.pool.allocate(&hit, tokens.div_ceil(group)) else {
            return;
        };
        self.seen.hits += hit.len();
        self.sequences += 1;
        for side in self.sides() {
            side.host.cache.allocated(self.sequences, &new);
        }
        let stored = Sequence {
            id: self.sequences,
            text,
            past: hit.len() * group,
            blocks: [hit, new].concat(),
        };
        self.live.push(Live {
            stored,
            prompt: tokens,
        });
    }

    fn end(&mut self, i: usize) {
        let s = self.live.remove(i).stored;
        for side in self.sides() {
            side.host.cache.released(s.id, &s.blocks);
        }
        self.pool.free(&s.blocks);
    }

    /// Room for one more token each; who gets none is preempted.
    fn grow(&mut self) {
        for i in (0..self.live.len()).rev() {
            let s = &self.live[i].stored;
            if s.past < self.live[i].prompt || s.past < s.blocks.len() * self.pool.group {
                continue;
            }
            let id = s.id;
            match self.pool.allocate(&[], 1) {
                Some(new) => {
                    for side in self.sides() {
                        side.host.cache.allocated(id, &new);
                    }
                    self.live[i].stored.blocks.extend(new);
                }
                None => {
                    self.seen.preempted += 1;
                    self.end(i);
                }
            }
        }
    }

    fn step(&mut self, prompt: bool) {
        if !prompt {
            self.grow();
        }
        let most = 1 + self.rng.below(4 * self.pool.group);
        let taking_part: Vec<usize> = (0..self.live.len())
            .filter(|i| (self.live[*i].stored.past < self.live[*i].prompt) == prompt)
            .collect();
        if taking_part.is_empty() {
            return;
        }
        let outs = self.sides().map(|side| {
            let rows = taking_part.iter().map(|i| &self.live[*i]);
            let rows = rows.map(|l| (l.stored.clone(), l.prompt.saturating_sub(l.stored.past)));
            let mut rows: Vec<_> = rows
                .map(|(s, left)| (s, if prompt { left.min(most) } else { 1 }))
                .collect();
            let mut rows: Vec<_> = rows.iter_mut().map(|(s, new)| (s, *new)).collect();
            let out = side.host.step_all(&mut rows, prompt).expect("served");
            let past: Vec<usize> = rows.iter().map(|(s, _)| s.past).collect();
            (out, past)
        });
        for (i, past) in taking_part.iter().zip(&outs[0].1) {
            let s = &mut self.live[*i].stored;
            s.past = *past;
            self.pool.computed(&s.text, &s.blocks, s.past);
        }
        let (cpu, gpu) = (&outs[0].0, &outs[1].0);
        // Prompts without a past attend in the host where no kernel on tensor cores serves the layer.
        let is_attended = gpu.iter().all(Option::is_some);
        assert!(prompt || is_attended, "decode answers");
        for (cpu, gpu) in cpu.iter().zip(gpu).filter(|_| is_attended) {
            let error = self.difference(cpu, gpu);
            let worst = match prompt {
                true => &mut self.seen.prompt_error,
                false => &mut self.seen.error,
            };
            *worst = worst.max(error);
        }
        match prompt {
            true => self.seen.prompts += usize::from(is_attended) * taking_part.len(),
            false => self.seen.decoded += taking_part.len(),
        }
        self.compare();
    }

    /// Of attention, relative to the values it is a mean of.
    fn difference(&self, cpu: &Option<Tensor>, gpu: &Option<Tensor>) -> f32 {
        let (cpu, gpu) = (
            cpu.as_ref().expect("attended"),
            gpu.as_ref().expect("attended"),
        );
        assert_eq!(cpu.dims(), gpu.dims());
        let dim = self.cpu.host.model.v_dim;
        let (cpu, gpu) = (numbers(cpu), numbers(gpu));
        let heads = cpu.chunks(dim).zip(gpu.chunks(dim));
        let errors = heads.map(|(c, g)| {
            let largest = c.iter().fold(0f32, |m, x| m.max(x.abs()));
            let error = c.iter().zip(g).fold(0f32, |m, (c, g)| m.max((c - g).abs()));
            assert!(error.is_finite(), "an answer is not a number");
            error / largest.max(MAGNITUDE)
        });
        errors.fold(0.0, f32::max)
    }

    /// The newest tokens are taken back: others come in their place.
    fn roll_back(&mut self) {
        let group = self.pool.group;
        let Some(i) = (!self.live.is_empty()).then(|| self.rng.below(self.live.len())) else {
            return;
        };
        let live = &mut self.live[i];
        let s = &mut live.stored;
        let back = 1 + self.rng.below(16);
        // No further than the block that is being written: full ones may be hit by others.
        if s.past < live.prompt || s.past % group <= back {
            return;
        }
        s.past -= back;
        if s.text.fork.is_none_or(|(at, _)| at >= s.past) {
            s.text = s.text.forked(s.past, 1000 + s.id as u64);
        }
        live.prompt = live.prompt.min(s.past);
        self.seen.rolled_back += 1;
    }

    /// Pages byte for byte, and what each sequence reads bit for bit.
    fn compare(&mut self) {
        let layers = self.cpu.host.model.layers;
        let mut ahead = [false; NUM_BLOCKS];
        for (block, ahead) in ahead.iter_mut().enumerate() {
            for layer in 0..layers {
                let pages = self.sides().map(|side| side.inspect.page(layer, block));
                match pages {
                    [Some(cpu), Some(gpu)] => {
                        assert!(cpu == gpu, "block {block} in layer {layer} differs");
                        self.seen.pages += 1;
                    }
                    [None, Some(_)] => *ahead = true,
                    [Some(_), None] => panic!("the GPU has not sealed block {block}"),
                    [None, None] => {}
                }
            }
        }
        for live in &self.live {
            let s = &live.stored;
            let held = s.past.div_ceil(self.pool.group);
            if s.blocks[..held].iter().any(|block| ahead[*block]) {
                self.seen.ahead += 1;
                continue;
            }
            for layer in 0..layers {
                let read = self.sides().map(|side| {
                    let step = side.host.begin(true, &[(s, 0)]).expect("stored");
                    let (k, v) = step.past(layer, 0, DType::F32).expect("stored");
                    [numbers(&k), numbers(&v)]
                });
                let bits = |x: &[Vec<f32>; 2]| -> Vec<u32> {
                    x.concat().iter().map(|x| x.to_bits()).collect()
                };
                let same = bits(&read[0]) == bits(&read[1]);
                assert!(same, "sequence {} reads differently in layer {layer}", s.id);
            }
        }
        assert!(self.gpu.host.cache.allocated_bytes() <= self.answered);
    }

    fn run(&mut self, steps: usize) {
        for _ in 0..steps {
            match self.rng.below(12) {
                0..=2 => self.start(),
                3..=5 => self.step(true),
                6..=9 => self.step(false),
                10 => self.roll_back(),
                _ if self.live.is_empty() => {}
                _ => {
                    let i = self.rng.below(self.live.len());
                    self.end(i);
                }
            }
        }
        while !self.live.is_empty() {
            self.end(0);
        }
        self.compare();
    }
}

/// The GPU, for one test at a time: a cache is found as the one that was made last.
fn gpu() -> (Device, MutexGuard<'static, ()>) {
    static ONE: Mutex<()> = Mutex::new(());
    let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    (Device::new_cuda(0).expect("a GPU"), one)
}

/// What the kernels serve, tensor cores and not.
const SETTINGS: [(&str, usize, usize, usize); 8] = [
    ("", 8, 2, 64),
    ("", 4, 1, 128),
    ("boost=0,rotate=none", 9, 3, 64),
    (
        "paper,group=32,residual=32,outliers=2,extra=3,exempt_layers=1",
        6,
        2,
        64,
    ),
    ("bits=4,boost=0", 4, 2, 128),
    ("3bit", 14, 2, 64),
    ("4bit", 8, 2, 128),
    ("kivi,group=64,residual=64", 2, 2, 32),
];

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn any_history_is_the_same_on_both() {
    let (gpu, _one) = gpu();
    let mut within = true;
    for (options, heads, kv_heads, dim) in SETTINGS {
        for dtype in [DType::F16, DType::BF16, DType::F32] {
            let mut seen = Seen::default();
            for seed in 0..3 {
                let mut model = Model::new(options)
                    .heads(heads, kv_heads)
                    .dims(dim, dim)
                    .dtype(dtype);
                model.max_seqs = MAX_SEQS;
                let mut both = Both::new(&model, &gpu, seed);
                both.run(60);
                let s = both.seen;
                seen.hits += s.hits;
                seen.decoded += s.decoded;
                seen.rolled_back += s.rolled_back;
                seen.preempted += s.preempted;
                seen.pages += s.pages;
                seen.ahead += s.ahead;
                seen.error = seen.error.max(s.error);
                seen.prompts += s.prompts;
                seen.prompt_error = seen.prompt_error.max(s.prompt_error);
            }
            println!("{options} head {dim} {dtype:?}: {seen:?}");
            assert!(
                seen.hits > 0 && seen.decoded > 0 && seen.pages > 0 && seen.prompts > 0,
                "{seen:?}"
            );
            within &= seen.error <= budget(dtype) && seen.prompt_error <= prompt_budget(dtype);
        }
    }
    assert!(within, "attention is off: see above");
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn a_bad_row_of_eight_ends_alone() {
    let mut model = Model::new("");
    let (gpu, _one) = gpu();
    model.device = gpu;
    harness::a_bad_row_of_eight_ends_alone(model);
}

/// The histories of `state_machine`, on the GPU; `OTT_HISTORIES` of each setting.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn the_state_machine_finds_nothing() {
    let (gpu, _one) = gpu();
    let count = std::env::var("OTT_HISTORIES").ok();
    let count: u64 = count.and_then(|n| n.parse().ok()).unwrap_or(130);
    let run = |(options, rules): Setting<'_>, seed: u64, ops: &[Op]| {
        let mut model = machine::model(options);
        model.device = gpu.clone();
        let memory = ott_backend::provider()
            .memory(&model.shape())
            .expect("served");
        let subject = Subject {
            host: model.host(machine::NUM_BLOCKS),
            inspect: ott_backend::provider().caches().pop().expect("it was made"),
            answered: memory.per_block * machine::NUM_BLOCKS + memory.fixed,
        };
        let mut machine = Machine::new(subject, rules, seed, 4e-4);
        ops.iter().for_each(|op| machine.apply(op.of_one_token()));
        machine.come_to_rest();
    };
    for (what, history) in once_wrong() {
        println!("{what}");
        run(PLAIN, 1, &history);
    }
    let mut runner = TestRunner::deterministic();
    let mut histories = 0;
    for setting in [PLAIN, NO_WINDOW, BOOSTED, LARGER] {
        for seed in 0..count {
            let ops = vec(op(), 1..50)
                .new_tree(&mut runner)
                .expect("ops")
                .current();
            run(setting, seed, &ops);
            histories += 1;
        }
        println!("{}: {histories} histories so far", setting.0);
    }
}

/// What a GPU cannot serve is refused with a sentence, before anything is taken.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn refusals() {
    let provider = ott_backend::provider();
    let mut shape = Model::new("").shape();
    let (gpu, _one) = gpu();
    shape.layers[1].device = gpu;
    let message = provider.memory(&shape).expect_err("refused").to_string();
    assert!(message.contains("several devices"), "{message}");
}
