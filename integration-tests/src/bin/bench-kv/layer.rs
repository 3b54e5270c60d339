//! Attention of one decoded token in one layer: ours with each table of loops, upstream's over f16, turboquant-rs
//! through its published trait, and how long it takes to read as many bytes.

use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device, Tensor};
use half::f16;
use mistralrs_kv_cache::{AttendConfig, CompressedKVCache, DecodeOutput};
use ott_backend::attention::{decode, Queries};
use ott_backend::cache::{Cache, Row, Tokens};
use ott_backend::report::ModelShape;
use ott_backend::{CpuOps, OttConfig};
use rayon::prelude::*;
use serde_json::{json, Value};
use turboquant::cache::{CacheConfig, PqoCache, QuantNormMode};

use crate::attention::{run_flash_attn_cpu, SdpaParams};
use crate::report::{Samples, Table};

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
/// Both attentions round their answer to f16 or better, and values lie in -1..1.
const BUDGET: f64 = 2e-3;

#[derive(Clone, Copy)]
struct Case {
    dim: usize,
    heads: usize,
    gqa: usize,
    depth: usize,
}

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
    for (_, cache) in &caches {
        check_ours(&data, cache)?;
    }
    let upstream = Upstream::new(&data)?;
    upstream.check(&data)?;
    let rival = rival(&data)?;
    let bytes = stored_bytes(case)?;
    let buffer = vec![1u64; bytes / 8];
    let mut contenders: Vec<Contender<'_>> =
        vec![("upstream f16".into(), Box::new(|| upstream.run().map(drop)))];
    for (name, cache) in &caches {
        let mut out = vec![0f32; case.heads * case.gqa * case.dim];
        let data = &data;
        contenders.push((
            format!("ott {name}"),
            Box::new(move || attend(data, cache, &mut out)),
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

/// Queries, keys and values of a case, in -1..1.
struct Data {
    case: Case,
    /// `(heads, gqa, dim)`.
    q: Vec<f16>,
    /// `(heads, depth, dim)`.
    k: Vec<f16>,
    v: Vec<f16>,
}

impl Data {
    fn new(case: Case) -> Self {
        let mut state = 1u32;
        let mut noise = |len: usize| -> Vec<f16> {
            let mut next = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                f16::from_f32((state >> 8) as f32 / (1 << 23) as f32 - 1.0)
            };
            (0..len).map(|_| next()).collect()
        };
        let len = case.heads * case.depth * case.dim;
        Self {
            case,
            q: noise(case.heads * case.gqa * case.dim),
            k: noise(len),
            v: noise(len),
        }
    }

    fn scale(&self) -> f32 {
        1.0 / (self.case.dim as f32).sqrt()
    }

    /// Attention of the first query head over some keys and values of its kv head, in f64.
    fn exact(
        &self,
        key: impl Fn(usize, usize) -> f64,
        value: impl Fn(usize, usize) -> f64,
    ) -> Vec<f64> {
        let Case { dim, depth, .. } = self.case;
        let dot = |t: usize| {
            (0..dim)
                .map(|c| self.q[c].to_f64() * key(t, c))
                .sum::<f64>()
        };
        let scores: Vec<f64> = (0..depth)
            .map(|t| dot(t) * f64::from(self.scale()))
            .collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
        let sum: f64 = weights.iter().sum();
        (0..dim)
            .map(|c| {
                weights
                    .iter()
                    .enumerate()
                    .map(|(t, w)| w * value(t, c))
                    .sum::<f64>()
                    / sum
            })
            .collect()
    }
}

fn near(what: &str, found: &[f32], exact: &[f64]) -> Result<()> {
    let worst = found
        .iter()
        .zip(exact)
        .map(|(a, b)| (f64::from(*a) - b).abs())
        .fold(0.0, f64::max);
    ensure!(
        worst < BUDGET,
        "{what} is off by {worst}: its time means nothing"
    );
    Ok(())
}

/// The layer that is measured: the first two do not trace.
const LAYER: usize = 2;

fn stored_bytes(case: Case) -> Result<usize> {
    let config = OttConfig::default();
    let specs = shape(case).specs(&config, CpuOps::best())?;
    Ok(specs[LAYER].layout.page_bytes() * case.depth / config.group_size)
}

fn shape(case: Case) -> ModelShape {
    ModelShape {
        layers: LAYER + 1,
        num_kv_heads: case.heads,
        k_dim: case.dim,
        v_dim: case.dim,
    }
}

fn table(case: Case) -> Vec<usize> {
    (1..case.depth / OttConfig::default().group_size + 2).collect()
}

fn ours(data: &Data, ops: &'static CpuOps) -> Result<(&'static str, Cache<f16>)> {
    let case = data.case;
    let table = table(case);
    let cache = Cache::new(
        shape(case).specs(&OttConfig::default(), ops)?,
        table.len() + 1,
        1,
    );
    let row = Row {
        seq: 1,
        past: 0,
        new: case.depth,
        table: &table,
    };
    cache.begin(&[row])?;
    let tokens = |x| Tokens::contiguous(x, case.depth, case.dim);
    cache.append(LAYER, &row, &tokens(&data.k), &tokens(&data.v))?;
    Ok((ops.name, cache))
}

/// Attention of the last token over all.
fn attend(data: &Data, cache: &Cache<f16>, out: &mut [f32]) -> Result<()> {
    let case = data.case;
    let table = table(case);
    let q: Vec<f32> = data.q.iter().map(|x| x.to_f32() * data.scale()).collect();
    let queries = Queries {
        q: &q,
        num_heads: case.heads * case.gqa,
        tokens: 1,
        softcap: None,
    };
    let row = Row {
        seq: 1,
        past: case.depth - 1,
        new: 1,
        table: &table,
    };
    decode(&*cache.layer(LAYER)?, &[row], &queries, out);
    Ok(())
}

fn check_ours(data: &Data, cache: &Cache<f16>) -> Result<()> {
    let case = data.case;
    let mut out = vec![0f32; case.heads * case.gqa * case.dim];
    attend(data, cache, &mut out)?;
    let table = table(case);
    let row = Row {
        seq: 1,
        past: case.depth,
        new: 0,
        table: &table,
    };
    let (k, v) = cache.layer(LAYER)?.gather(&row)?;
    let at = |x: &[f16], t: usize, c: usize| x[t * case.dim + c].to_f64();
    near(
        "ott",
        &out[..case.dim],
        &data.exact(|t, c| at(&k, t, c), |t, c| at(&v, t, c)),
    )
}

/// Upstream's decode attention over its own f16 tensors.
struct Upstream {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    params: SdpaParams,
}

impl Upstream {
    fn new(data: &Data) -> Result<Self> {
        let Case {
            dim,
            heads,
            gqa,
            depth,
        } = data.case;
        let tensor = |x: &[f16], heads, tokens| -> Result<Tensor> {
            let tensor = Tensor::from_slice(x, (1, heads, tokens, dim), &Device::Cpu)?;
            // Tokens before heads, as a view: that is how the host hands them on.
            Ok(tensor.transpose(1, 2)?)
        };
        let params = SdpaParams {
            n_kv_groups: gqa,
            softcap: None,
            softmax_scale: data.scale(),
            sliding_window: None,
        };
        Ok(Self {
            q: tensor(&data.q, heads * gqa, 1)?,
            k: tensor(&data.k, heads, depth)?,
            v: tensor(&data.v, heads, depth)?,
            params,
        })
    }

    fn run(&self) -> Result<Tensor> {
        Ok(run_flash_attn_cpu::<f16>(
            &self.q,
            &self.k,
            &self.v,
            None,
            &self.params,
        )?)
    }

    fn check(&self, data: &Data) -> Result<()> {
        let out = self
            .run()?
            .flatten_all()?
            .to_dtype(DType::F32)?
            .to_vec1::<f32>()?;
        let dim = data.case.dim;
        let at = |x: &[f16], t: usize, c: usize| x[t * dim + c].to_f64();
        near(
            "upstream's attention",
            &out[..dim],
            &data.exact(|t, c| at(&data.k, t, c), |t, c| at(&data.v, t, c)),
        )
    }
}

/// turboquant-rs with the setting it recommends, filled.
fn rival(data: &Data) -> Result<PqoCache> {
    let Case {
        dim,
        heads,
        gqa,
        depth,
    } = data.case;
    let config = CacheConfig {
        bits: 3,
        head_dim: dim,
        num_kv_heads: heads,
        num_layers: 1,
        norm_mode: QuantNormMode::default(),
        outlier_blocks: usize::MAX,
    };
    let cache = PqoCache::new(config)?;
    let tensor =
        |x: &[f16], heads, tokens| Tensor::from_slice(x, (1, heads, tokens, dim), &Device::Cpu);
    let last = &data
        .q
        .iter()
        .copied()
        .cycle()
        .take(heads * gqa * depth * dim)
        .collect::<Vec<_>>();
    cache.prefill(
        0,
        &tensor(&data.k, heads, depth)?,
        &tensor(&data.v, heads, depth)?,
        &tensor(last, heads * gqa, depth)?,
    )?;
    Ok(cache)
}

/// One decoded token: it is stored, and attention runs in their loops or, on what they give back, in upstream's.
fn rival_decode(cache: &PqoCache, data: &Data, upstream: &Upstream) -> Result<()> {
    let Case {
        dim, heads, gqa, ..
    } = data.case;
    let tensor =
        |x: &[f16], heads| Tensor::from_slice(&x[..heads * dim], (1, heads, 1, dim), &Device::Cpu);
    let (q, k, v) = (
        tensor(&data.q, heads * gqa)?,
        tensor(&data.k, heads)?,
        tensor(&data.v, heads)?,
    );
    let config = AttendConfig {
        softmax_scale: data.scale(),
        n_kv_groups: gqa,
    };
    match cache.decode(0, &k, &v, &q, &config)? {
        DecodeOutput::Fused(out) => ensure!(
            out.elem_count() == heads * gqa * dim,
            "a result of another shape"
        ),
        DecodeOutput::Dequantized(all) => {
            let side =
                |x: &Tensor| -> Result<Tensor> { Ok(x.to_dtype(DType::F16)?.transpose(1, 2)?) };
            let (k, v) = (side(&all.k)?, side(&all.v)?);
            run_flash_attn_cpu::<f16>(&upstream.q, &k, &v, None, &upstream.params)
                .context("upstream's attention")?;
        }
    }
    Ok(())
}
