//! Attention of one decoded token in one layer: ours with each table of loops, upstream's over f16, turboquant-rs
//! through its published trait, and how long it takes to read as many bytes.

use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::Result;
use ott_backend::CpuOps;
use rayon::prelude::*;
use serde_json::{json, Value};

use crate::contenders::{
    attend, check_ours, ours, rival, rival_decode, stored_bytes, Case, Data, Upstream,
};
use integration_tests::report::{Samples, Table};

/// Channels, kv heads, query heads per kv head.
const SHAPES: [(usize, usize, usize); 6] = [
    (64, 8, 1),
    (64, 3, 3),
    (64, 2, 7),
    (128, 8, 1),
    (128, 8, 4),
    (256, 2, 4),
];
const DEPTHS: [usize; 4] = [1024, 4096, 8192, 32768];
/// Something to time, by name.
type Contender<'a> = (String, Box<dyn FnMut() -> Result<()> + 'a>);

/// Measure all shapes and depths.
pub fn run(quick: bool, repeats: usize) -> Result<Table> {
    let (shapes, depths) = match quick {
        true => (&SHAPES[1..2], &DEPTHS[..1]),
        false => (&SHAPES[..], &DEPTHS[..]),
    };
    let mut rows = Vec::new();
    for &(dim, heads, gqa) in shapes {
        for &depth in depths {
            eprintln!("layer: head_dim {dim}, {heads} kv heads, gqa {gqa}, depth {depth}");
            rows.extend(measure(
                Case {
                    dim,
                    heads,
                    gqa,
                    depth,
                },
                repeats,
            )?);
        }
    }
    Ok(Table {
        title: format!(
            "One layer, one decoded token: milliseconds, median of {repeats} measurements, contenders interleaved; \
             `load` reads the bytes that ours stores, on all cores."
        ),
        columns: vec![
            "head_dim", "kv heads", "gqa", "depth", "contender", "ms", "fastest", "slowest", "upstream/this",
        ],
        rows,
    })
}

fn measure(case: Case, repeats: usize) -> Result<Vec<Vec<Value>>> {
    let data = Data::new(case);
    let caches: Vec<_> = CpuOps::available()
        .into_iter()
        .map(|ops| ours(&data, ops))
        .collect::<Result<_>>()?;
    for ours in &caches {
        check_ours(&data, ours)?;
    }
    let upstream = Upstream::new(&data)?;
    upstream.check(&data)?;
    let rival = rival(&data)?;
    let bytes = stored_bytes(case)?;
    let buffer = vec![1u64; bytes / 8];
    let mut contenders: Vec<Contender<'_>> =
        vec![("upstream f16".into(), Box::new(|| upstream.run().map(drop)))];
    for ours in &caches {
        let mut out = vec![0f32; case.heads * case.gqa * case.dim];
        let data = &data;
        contenders.push((
            format!("ott {}", ours.name),
            Box::new(move || attend(data, ours, &mut out)),
        ));
    }
    contenders.push((
        "turboquant-rs 3 bits".into(),
        Box::new(|| rival_decode(&rival, &data, &upstream)),
    ));
    contenders.push((
        "load".into(),
        Box::new(|| {
            let sum = |part: &[u64]| part.iter().fold(0u64, |a, b| a.wrapping_add(*b));
            black_box(
                buffer
                    .par_chunks(1 << 15)
                    .map(sum)
                    .reduce(|| 0, u64::wrapping_add),
            );
            Ok(())
        }),
    ));
    let samples = interleave(&mut contenders, repeats)?;
    let base = samples[0].median();
    let rows = contenders.iter().zip(&samples).map(|((name, _), samples)| {
        let (fast, slow) = samples.range();
        let numbers = [samples.median(), fast, slow, base / samples.median()];
        [
            json!(case.dim),
            json!(case.heads),
            json!(case.gqa),
            json!(case.depth),
            json!(name),
        ]
        .into_iter()
        .chain(numbers.map(|x| json!(x)))
        .collect()
    });
    Ok(rows.collect())
}

/// Each contender in turn, `repeats` times; a measurement lasts a few milliseconds at least.
fn interleave(contenders: &mut [Contender<'_>], repeats: usize) -> Result<Vec<Samples>> {
    let mut samples = vec![Samples::default(); contenders.len()];
    for round in 0..=repeats {
        for ((_, work), samples) in contenders.iter_mut().zip(&mut samples) {
            let start = Instant::now();
            let mut runs = 0;
            while runs == 0 || (start.elapsed() < Duration::from_millis(5) && runs < 64) {
                work()?;
                runs += 1;
            }
            // The first round warms up.
            if round > 0 {
                samples.time(start.elapsed() / runs);
            }
        }
    }
    Ok(samples)
}
