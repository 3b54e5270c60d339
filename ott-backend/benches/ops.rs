//! Decode attention at depth, in one layer and over a model of such layers:
//! `cargo bench -p ott-backend`.
//!
//! Prints milliseconds per decoded token and the codes' bytes per second, after a check that the
//! result is a mean of values.

use std::time::Instant;

use half::f16;
use ott_backend::attention::{decode, Queries};
use ott_backend::cache::{Cache, Row, Tokens};
use ott_backend::report::ModelShape;
use ott_backend::{CpuOps, OttConfig};

/// Layers, query heads, kv heads, channels: SmolLM2-135M, Qwen2.5-0.5B, Llama 3 8B.
const MODELS: [(&str, usize, usize, usize, usize); 3] = [
    ("smollm2", 30, 9, 3, 64),
    ("qwen2.5", 24, 14, 2, 64),
    ("llama3-8b", 32, 32, 8, 128),
];
const DEPTHS: [usize; 3] = [1024, 4096, 8192];

fn main() {
    for ops in CpuOps::available() {
        for model in MODELS {
            for depth in DEPTHS {
                run(ops, model, depth);
            }
        }
    }
}

/// Numbers in -1..1 that repeat late.
fn noise(len: usize) -> Vec<f16> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f16::from_f32((state >> 8) as f32 / (1 << 23) as f32 - 1.0)
    };
    (0..len).map(|_| next()).collect()
}

fn run(
    ops: &'static CpuOps,
    (name, layers, num_heads, num_kv_heads, dim): (&str, usize, usize, usize, usize),
    depth: usize,
) {
    let config = OttConfig::default();
    let shape = ModelShape {
        layers: 3,
        num_kv_heads,
        k_dim: dim,
        v_dim: dim,
    };
    let specs = shape.specs(&config, ops).expect("served");
    let bytes = specs[2].layout.page_bytes() * depth / config.group_size;
    let blocks = depth / config.group_size + 2;
    let cache = Cache::<f16>::new(specs, blocks, 1);
    let table: Vec<usize> = (1..blocks).collect();
    let row = Row {
        seq: 1,
        past: 0,
        new: depth,
        table: &table,
    };
    let kv = noise(num_kv_heads * depth * dim);
    let tokens = Tokens::contiguous(&kv, depth, dim);
    cache.begin(&[row]).expect("room");
    let sealing = Instant::now();
    cache.append(2, &row, &tokens, &tokens).expect("finite");
    let sealing = sealing.elapsed().as_secs_f64() * 1e3 * layers as f64;
    let q: Vec<f32> = noise(num_heads * dim).iter().map(|x| x.to_f32()).collect();
    let queries = Queries {
        q: &q,
        num_heads,
        tokens: 1,
        softcap: None,
    };
    let rows = [Row {
        past: depth - 1,
        new: 1,
        ..row
    }];
    let layer = cache.layer(2).expect("there");
    let mut out = vec![0f32; num_heads * dim];
    let mut best = f64::INFINITY;
    for _ in 0..20 {
        let start = Instant::now();
        decode(&layer, &rows, &queries, &mut out);
        best = best.min(start.elapsed().as_secs_f64());
    }
    assert!(out.iter().all(|x| x.abs() < 1.2), "no mean of values");
    println!(
        "decode/{}/{name}/{depth}: {:.2} ms per token, {:.2} GB/s; sealing the prompt {sealing:.0} ms",
        ops.name,
        best * 1e3 * layers as f64,
        bytes as f64 / best / 1e9,
    );
}
