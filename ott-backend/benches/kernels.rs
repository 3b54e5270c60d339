//! Each inner loop of each table by itself, on one page in the processor's cache:
//! `cargo bench -p ott-backend --bench kernels`. Nanoseconds, the least of many.

use std::hint::black_box;
use std::time::Instant;

use half::f16;
use ott_backend::cpu::{Full, Keys, Values};
use ott_backend::{Clip, CpuOps};

const TOKENS: usize = 128;

fn main() {
    let only: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| !a.starts_with('-'))
        .collect();
    for ops in CpuOps::available() {
        if only.is_empty() || only.iter().any(|name| name == ops.name) {
            run(ops);
        }
    }
}

fn run(ops: &CpuOps) {
    for (bits, dim, n) in [
        (2, 64, 1),
        (2, 64, 3),
        (2, 64, 7),
        (2, 128, 1),
        (2, 128, 4),
        (4, 128, 4),
    ] {
        let codes = vec![0x6Cu8; TOKENS * dim * bits as usize / 8];
        let halves = [0x66u8, 0x2E].repeat(dim.max(TOKENS)); // 0.1
        let keys = Keys {
            bits,
            tokens: TOKENS,
            codes: &codes,
            scale: &halves,
            min: &halves,
            boosted: &[],
            high: &[],
        };
        let boosted: Vec<u8> = (0..dim as u16 * 12 / 64)
            .flat_map(|i| (i * 5).to_le_bytes())
            .collect();
        let high = Keys {
            boosted: &boosted,
            high: &codes[..boosted.len() / 2 * TOKENS / 8],
            ..keys
        };
        let values = Values {
            bits,
            tokens: TOKENS,
            v_dim: dim,
            codes: &codes,
            scale: &halves,
            min: &halves,
        };
        let q: Vec<f32> = (0..n * dim).map(|i| (i % 7) as f32 - 3.0).collect();
        let p: Vec<f32> = (0..n * TOKENS).map(|i| (i % 7) as f32 * 0.1).collect();
        let mut scores = vec![0f32; n * TOKENS];
        let mut out = vec![0f32; n * dim];
        let bytes = codes.len() as f64;
        let k = least(|| (ops.key_scores)(&keys, black_box(&q), dim, &mut scores));
        let third = least(|| (ops.key_scores)(&high, black_box(&q), dim, &mut scores));
        let v = least(|| (ops.value_sum)(&values, black_box(&p), &mut out));
        println!(
            "{}: {bits} bits, head_dim {dim}, {n} queries: keys {k:.0} ns ({:.1} GB/s), with third bits {third:.0} ns, values {v:.0} ns ({:.1} GB/s)",
            ops.name, bytes / k, bytes / v
        );
    }
    let x: Vec<f32> = (0..TOKENS)
        .map(|i| (i * 37 % 101) as f32 * 0.1 - 9.0)
        .collect();
    let mut y = x.clone();
    let exp = least(|| {
        y.copy_from_slice(&x);
        black_box((ops.exp_sum)(black_box(&mut y), 3.0));
    });
    let max = least(|| {
        black_box((ops.max)(black_box(&x)));
    });
    let kv: Vec<f32> = (0..32 * 64).map(|i| (i % 11) as f32).collect();
    let (q, mut s) = (vec![0.5f32; 3 * 64], vec![0f32; 3 * 32]);
    let kv: Vec<f16> = kv.into_iter().map(f16::from_f32).collect();
    let kv = Full::F16(&kv);
    let scores = least(|| (ops.full_scores)(black_box(kv), &q, 64, &mut s, 32));
    let mut out = vec![0f32; 3 * 64];
    let sums = least(|| (ops.full_sum)(black_box(kv), &s, 32, 64, &mut out));
    let weight = [1f32; TOKENS];
    let mut codes = [0u8; TOKENS];
    let clip = least(|| {
        black_box((ops.quantize_group)(
            black_box(&x),
            &weight,
            2,
            Clip::Keys,
            &mut codes,
        ));
    });
    let plain = least(|| {
        black_box((ops.quantize_group)(
            black_box(&x),
            &weight,
            2,
            Clip::None,
            &mut codes,
        ));
    });
    println!(
        "{}: 128 exponentials {exp:.0} ns, maximum {max:.0} ns; 32 x 64 numbers in f16, 3 queries: scores {scores:.0} ns, sums {sums:.0} ns; quantize 128: clipped {clip:.0} ns, plain {plain:.0} ns",
        ops.name
    );
}

/// Nanoseconds of a call, the least of many.
fn least(mut f: impl FnMut()) -> f64 {
    let mut least = f64::INFINITY;
    for _ in 0..300 {
        let start = Instant::now();
        (0..16).for_each(|_| f());
        least = least.min(start.elapsed().as_secs_f64() * 1e9 / 16.0);
    }
    least
}
