//! One decode step through the seam, all layers of a model, at depth and in batches, on one thread
//! and on all: `cargo bench -p ott-backend --bench step`. `OTT_CPU=avx2` forces other inner loops.
//!
//! Prints the least of many, because other work can only add; and what would be left of it if
//! threads cost nothing, as efficiency.

use std::sync::Arc;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use mistralrs_kv_backend::{
    KvAttn, KvBackendProvider, KvCacheBackend, KvLayer, KvPlan, KvRow, KvShape,
};
use ott_backend::CpuOps;

/// Name, layers, query heads, kv heads, channels.
const MODELS: [(&str, usize, usize, usize, usize); 3] = [
    ("smollm2-135m", 30, 9, 3, 64),
    ("qwen2.5-0.5b", 24, 14, 2, 64),
    ("llama3-8b", 32, 32, 8, 128),
];
/// Tokens of each sequence, sequences.
const CASES: [(usize, usize); 8] = [
    (16, 1),
    (512, 1),
    (2048, 1),
    (8192, 1),
    (512, 8),
    (2048, 8),
    (128, 32),
    (512, 32),
];
const BLOCK: usize = 128;

fn main() {
    let only: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| !a.starts_with('-'))
        .collect();
    println!("inner loops: {}", CpuOps::best().expect("known").name);
    for model in MODELS {
        if only.is_empty() || only.iter().any(|name| model.0.contains(name.as_str())) {
            CASES
                .iter()
                .for_each(|(depth, batch)| run(model, *depth, *batch));
        }
    }
}

/// Numbers in -1..1 that repeat late.
fn noise(shape: (usize, usize, usize, usize)) -> Tensor {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    let numbers: Vec<f32> = (0..shape.0 * shape.1 * shape.2 * shape.3)
        .map(|_| next())
        .collect();
    let x = Tensor::from_vec(numbers, shape, &Device::Cpu).expect("its shape");
    x.to_dtype(DType::F16).expect("a number")
}

struct Case {
    cache: Arc<dyn KvCacheBackend>,
    layers: usize,
    plan: KvPlan,
    /// Queries, keys and values of a step.
    qkv: [Tensor; 3],
}

impl Case {
    fn step(&self) {
        let attn = KvAttn {
            scale: 0.125,
            softcap: None,
        };
        let step = self.cache.begin_step(self.plan.clone()).expect("room");
        let [q, k, v] = &self.qkv;
        for layer in 0..self.layers {
            step.decode(layer, q, k, v, attn).expect("stored");
        }
    }
}

fn run(
    (name, layers, num_heads, num_kv_heads, dim): (&str, usize, usize, usize, usize),
    depth: usize,
    batch: usize,
) {
    let layer = KvLayer {
        num_heads,
        num_kv_heads,
        k_dim: dim,
        v_dim: dim,
        device: Device::Cpu,
    };
    let per_row = (depth + 1).div_ceil(BLOCK);
    let shape = KvShape {
        layers: vec![layer; layers],
        dtype: DType::F16,
        block_size: BLOCK,
        max_seq_len: depth + 1,
        max_seqs: batch,
        options: String::new(),
    };
    let cache = ott_backend::provider()
        .create(shape, 1 + batch * per_row)
        .expect("served");
    let plan = |past, new| KvPlan {
        prompt: past == 0,
        block_size: BLOCK,
        rows: (0..batch)
            .map(|seq| KvRow {
                seq,
                past,
                new,
                blocks: (1 + seq * per_row..1 + (seq + 1) * per_row).collect(),
            })
            .collect(),
    };
    let prompt = cache.begin_step(plan(0, depth)).expect("room");
    let kv = noise((batch, num_kv_heads, depth, dim));
    let q = noise((batch, num_heads, depth, dim));
    for layer in 0..layers {
        prompt.append(layer, &q, &kv, &kv).expect("finite");
    }
    assert!(cache.end_step().expect("stored").is_empty());
    let case = Case {
        cache,
        layers,
        plan: plan(depth, 1),
        qkv: [
            noise((batch, num_heads, 1, dim)),
            noise((batch, num_kv_heads, 1, dim)),
            noise((batch, num_kv_heads, 1, dim)),
        ],
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let [one, all] = [1, threads].map(|n| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n).build();
        pool.expect("threads").install(|| least(|| case.step()))
    });
    println!(
        "{name}, {batch} x {depth} tokens: {:.0} us on 1 thread, {:.0} us on {threads} (efficiency {:.2})",
        one * 1e6,
        all * 1e6,
        one / all / threads as f64,
    );
}

/// Seconds of a call, the least of many.
fn least(f: impl Fn()) -> f64 {
    let (begin, mut least) = (Instant::now(), f64::INFINITY);
    while begin.elapsed().as_secs_f64() < 0.4 {
        let start = Instant::now();
        f();
        least = least.min(start.elapsed().as_secs_f64());
    }
    least
}
