//! What is timed: each contender is set up, and held against plain f64 loops before its time counts.

use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device, Tensor};
use half::f16;
use mistralrs_kv_cache::{AttendConfig, CompressedKVCache, DecodeOutput};
use ott_backend::attention::{decode, Queries};
use ott_backend::cache::{Cache, NewTokens, Row, RowPlan, Tokens};
use ott_backend::report::ModelShape;
use ott_backend::{CpuOps, OttConfig};
use turboquant::cache::{CacheConfig, PqoCache, QuantNormMode};

use crate::attention::{run_flash_attn_cpu, SdpaParams};

/// Both attentions round their answer to f16 or better, and values lie in -1..1.
const BUDGET: f64 = 2e-3;

/// Shape of a layer, and how many tokens it holds.
#[derive(Clone, Copy)]
pub struct Case {
    pub dim: usize,
    pub heads: usize,
    pub gqa: usize,
    pub depth: usize,
}

/// Queries, keys and values of a case, in -1..1.
pub struct Data {
    pub case: Case,
    /// `(heads, gqa, dim)`.
    q: Vec<f16>,
    /// `(heads, depth, dim)`.
    k: Vec<f16>,
    v: Vec<f16>,
}

impl Data {
    pub fn new(case: Case) -> Self {
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

pub fn stored_bytes(case: Case) -> Result<usize> {
    let config = OttConfig::default();
    let specs = shape(case).specs(&config, CpuOps::best()?)?;
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

/// Our cache with all tokens stored, by inner loops of this name.
pub struct Ours {
    pub name: &'static str,
    cache: Cache<f16>,
    /// The last token is new, and stored.
    row: RowPlan,
}

pub fn ours(data: &Data, ops: &'static CpuOps) -> Result<Ours> {
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
    let row = cache.begin(&[row])?.pop().context("one row")?;
    let tokens = |x| Tokens::contiguous(x, case.depth, case.dim);
    let new = NewTokens {
        row: &row,
        q: None,
        k: tokens(&data.k),
        v: tokens(&data.v),
    };
    let faults = cache.append(LAYER, &[new])?;
    ensure!(faults.is_empty(), "{faults:?}");
    cache.end(|_| false)?;
    Ok(Ours {
        name: ops.name,
        cache,
        row: RowPlan {
            past: case.depth - 1,
            new: 1,
            ..row
        },
    })
}

/// Attention of the last token over all.
pub fn attend(data: &Data, ours: &Ours, out: &mut [f32]) -> Result<()> {
    let case = data.case;
    let q: Vec<f32> = data.q.iter().map(|x| x.to_f32() * data.scale()).collect();
    let queries = Queries {
        q: &q,
        num_heads: case.heads * case.gqa,
        tokens: 1,
        softcap: None,
    };
    let rows = std::slice::from_ref(&ours.row);
    decode(&*ours.cache.layer(LAYER)?, rows, &queries, out);
    Ok(())
}

pub fn check_ours(data: &Data, ours: &Ours) -> Result<()> {
    let case = data.case;
    let mut out = vec![0f32; case.heads * case.gqa * case.dim];
    attend(data, ours, &mut out)?;
    let (k, v) = ours.cache.layer(LAYER)?.gather(&ours.row.after());
    let at = |x: &[f16], t: usize, c: usize| x[t * case.dim + c].to_f64();
    near(
        "ott",
        &out[..case.dim],
        &data.exact(|t, c| at(&k, t, c), |t, c| at(&v, t, c)),
    )
}

/// Upstream's decode attention over its own f16 tensors.
pub struct Upstream {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    params: SdpaParams,
}

impl Upstream {
    pub fn new(data: &Data) -> Result<Self> {
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

    pub fn run(&self) -> Result<Tensor> {
        Ok(run_flash_attn_cpu::<f16>(
            &self.q,
            &self.k,
            &self.v,
            None,
            &self.params,
        )?)
    }

    pub fn check(&self, data: &Data) -> Result<()> {
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
pub fn rival(data: &Data) -> Result<PqoCache> {
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
pub fn rival_decode(cache: &PqoCache, data: &Data, upstream: &Upstream) -> Result<()> {
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
