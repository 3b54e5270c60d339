//! Prompt attention in one layer: `cargo bench -p ott-backend --bench prompt [LENGTH..]`.
//!
//! Prints milliseconds and GFLOP/s, of which a causal prompt of n tokens needs
//! `2 n^2 (k_dim + v_dim) / 2` per query head, and what storing the same tokens takes; minima of
//! several runs. The last token's answer is compared with a plain softmax before anything is timed.

use std::time::Instant;

use half::f16;
use ott_backend::cache::{Cache, NewTokens, Row, Tokens};
use ott_backend::prompt::{attend, Prompt, Scores};
use ott_backend::report::ModelShape;
use ott_backend::{CpuOps, OttConfig};

/// Name, query heads, kv heads, channels: SmolLM2-135M, Qwen2.5-0.5B, Llama 3 8B.
const MODELS: [(&str, usize, usize, usize); 3] = [
    ("smollm2", 9, 3, 64),
    ("qwen2.5", 14, 2, 64),
    ("llama3-8b", 32, 8, 128),
];
const LENGTHS: [usize; 4] = [512, 2048, 4096, 8192];
const LAYER: usize = 2;

fn main() {
    let asked: Vec<usize> = std::env::args().filter_map(|a| a.parse().ok()).collect();
    let lengths = if asked.is_empty() {
        &LENGTHS[..]
    } else {
        &asked
    };
    for model in MODELS {
        for length in lengths {
            Case::new(model, *length).run(model.0);
        }
    }
}

/// Numbers in -1..1 that repeat late.
fn noise(seed: u32, len: usize) -> Vec<f16> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f16::from_f32((state >> 8) as f32 / (1 << 23) as f32 - 1.0)
    };
    (0..len).map(|_| next()).collect()
}

struct Case {
    heads: usize,
    kv_heads: usize,
    dim: usize,
    length: usize,
    q: Vec<f16>,
    k: Vec<f16>,
    v: Vec<f16>,
}

impl Case {
    fn new((_, heads, kv_heads, dim): (&str, usize, usize, usize), length: usize) -> Self {
        Self {
            heads,
            kv_heads,
            dim,
            length,
            q: noise(1, heads * length * dim),
            k: noise(2, kv_heads * length * dim),
            v: noise(3, kv_heads * length * dim),
        }
    }

    fn run(&self, name: &str) {
        let config = OttConfig::default();
        let shape = ModelShape {
            layers: LAYER + 1,
            num_kv_heads: self.kv_heads,
            k_dim: self.dim,
            v_dim: self.dim,
        };
        let specs = shape
            .specs(&config, CpuOps::best().expect("known"))
            .expect("served");
        let blocks = self.length / config.group_size + 2;
        let cache = Cache::<f16>::new(specs, blocks, 1);
        let table: Vec<usize> = (1..blocks).collect();
        let row = Row {
            seq: 1,
            past: 0,
            new: self.length,
            table: &table,
        };
        let tokens = |x| Tokens::contiguous(x, self.length, self.dim);
        let (mut attending, mut storing) = (f64::INFINITY, f64::INFINITY);
        for run in 0..5 {
            cache.allocated(&table);
            let plans = cache.begin(&[row]).expect("room");
            let new = Prompt {
                row: &plans[0],
                q: tokens(&self.q),
                k: tokens(&self.k),
                v: tokens(&self.v),
            };
            let start = Instant::now();
            let out = self.attend(&cache, &new);
            attending = attending.min(start.elapsed().as_secs_f64());
            let start = Instant::now();
            let stored = NewTokens {
                row: &plans[0],
                q: None,
                k: new.k,
                v: new.v,
            };
            let faults = cache.append(LAYER, &[stored]).expect("there");
            assert!(faults.is_empty());
            storing = storing.min(start.elapsed().as_secs_f64());
            if run == 0 {
                self.check(&out);
            }
        }
        let n = self.length as f64;
        let flops = n * n * (2 * self.dim * self.heads) as f64;
        println!(
            "prompt/{name}/{}: attention {:.2} ms, {:.1} GFLOP/s; storing {:.2} ms, {:.3} us per token",
            self.length,
            attending * 1e3,
            flops / attending / 1e9,
            storing * 1e3,
            storing / n * 1e6,
        );
    }

    fn attend(&self, cache: &Cache<f16>, new: &Prompt<'_, f16>) -> Vec<f16> {
        let mut out = vec![f16::ZERO; self.q.len()];
        let layer = cache.layer(LAYER).expect("there");
        let scores = Scores {
            num_heads: self.heads,
            scale: self.scale(),
            softcap: None,
        };
        attend(&layer, &[*new], scores, self.length, &mut out);
        out
    }

    fn scale(&self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }

    /// The last token in the last head.
    fn check(&self, out: &[f16]) {
        let last = self.q.len() - self.dim;
        let dot = |a: &[f16], b: &[f16]| -> f32 {
            a.iter().zip(b).map(|(a, b)| a.to_f32() * b.to_f32()).sum()
        };
        let head = self.k.len() - self.length * self.dim;
        let keys = self.k[head..].chunks(self.dim);
        let weights: Vec<f32> = keys
            .map(|k| (dot(k, &self.q[last..]) * self.scale()).exp())
            .collect();
        let total: f32 = weights.iter().sum();
        for c in 0..self.dim {
            let values = self.v[head + c..].iter().step_by(self.dim);
            let sum: f32 = weights
                .iter()
                .zip(values)
                .map(|(w, v)| w * v.to_f32())
                .sum();
            let error = (out[last + c].to_f32() - sum / total).abs();
            assert!(error < 1e-3, "channel {c} is off by {error}");
        }
    }
}
