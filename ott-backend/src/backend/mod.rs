//! The seam: the host's words in, our words out. The only room that knows candle and the host.

#[cfg(feature = "cuda")]
mod cuda;
mod provider;
mod stats;
mod tensor;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Result, Tensor};
use mistralrs_kv_backend::{KvAttn, KvCacheBackend, KvFault, KvPlan, KvStats, KvStep};

pub use provider::{provider, register, OttProvider};
pub use tensor::Activation;

use crate::attention::{decode, Queries};
use crate::cache::{Cache, LayerStats, NewQueries, NewTokens, Row, RowPlan};
use crate::config::{OttConfig, Rotation};
use crate::error::Error;
use crate::prompt::{attend, Prompt, Scores};
use crate::rotate::rotate_back;
use tensor::{tensor, Rows, Slices};

/// The cache of one model whose activations are `E`.
#[derive(Debug)]
pub struct OttBackend<E> {
    cache: Arc<Cache<E>>,
    config: OttConfig,
    num_heads: Arc<[usize]>,
    description: String,
    page_bits: f64,
    /// Of the step that has begun and not ended.
    step: Mutex<Option<Arc<StepRows>>>,
}

/// The rows of a step, and what became of them.
#[derive(Debug)]
struct StepRows {
    plans: Vec<RowPlan>,
    /// By row, why its new tokens could not be stored.
    faults: Mutex<BTreeMap<usize, Error>>,
}

impl StepRows {
    fn faults(&self) -> MutexGuard<'_, BTreeMap<usize, Error>> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The rows as attention finds them after their tokens are stored; one with a fault has none.
    fn stored(&self) -> Cow<'_, [RowPlan]> {
        let faults = self.faults();
        if faults.is_empty() {
            return Cow::Borrowed(&self.plans);
        }
        let mut plans = self.plans.clone();
        for row in faults.keys() {
            (plans[*row].past, plans[*row].new) = (0, 0);
        }
        Cow::Owned(plans)
    }
}

/// What tests and demonstrations may look at.
pub trait Inspect: Send + Sync {
    /// Number of layers.
    fn num_layers(&self) -> usize;
    /// Counts of one layer; `None` if there is no such layer.
    fn stats(&self, layer: usize) -> Option<LayerStats>;
    /// The page of a sealed block in one layer.
    fn page(&self, layer: usize, block: usize) -> Option<Vec<u8>>;
    /// Bytes held now, all layers.
    fn bytes(&self) -> usize;
}

impl<E: Activation> Inspect for OttBackend<E> {
    fn num_layers(&self) -> usize {
        self.cache.num_layers()
    }

    fn stats(&self, layer: usize) -> Option<LayerStats> {
        self.cache.stats(layer).ok()
    }

    fn page(&self, layer: usize, block: usize) -> Option<Vec<u8>> {
        self.cache.page(layer, block)
    }

    fn bytes(&self) -> usize {
        self.cache.allocated_bytes()
    }
}

impl<E: Activation> KvCacheBackend for OttBackend<E> {
    fn begin_step(&self, plan: KvPlan) -> Result<Arc<dyn KvStep>> {
        check_block_size(&plan, &self.config)?;
        let step = Arc::new(StepRows {
            plans: self.cache.begin(&rows(&plan)).map_err(seam)?,
            faults: Mutex::default(),
        });
        *self.step() = Some(Arc::clone(&step));
        Ok(Arc::new(OttStep {
            cache: Arc::clone(&self.cache),
            rotation: self.config.rotation,
            num_heads: Arc::clone(&self.num_heads),
            rows: step,
            plan,
        }))
    }

    fn end_step(&self) -> Result<Vec<KvFault>> {
        let Some(step) = self.step().take() else {
            return Ok(Vec::new());
        };
        let faults = step.faults();
        let ended = self.cache.end(|row| faults.contains_key(&row));
        ended.map_err(seam)?;
        Ok(told(&step.plans, faults.iter()))
    }

    fn allocated(&self, _seq: usize, blocks: &[usize]) {
        self.cache.allocated(blocks);
    }

    fn released(&self, seq: usize, blocks: &[usize]) -> Vec<usize> {
        self.cache.released(seq, blocks)
    }

    fn reset(&self) {
        self.cache.reset();
    }

    fn describe(&self) -> String {
        self.description.clone()
    }

    fn allocated_bytes(&self) -> usize {
        self.cache.allocated_bytes()
    }

    fn stats(&self) -> KvStats {
        let layers = 0..self.cache.num_layers();
        let layers = layers.filter_map(|layer| self.cache.stats(layer).ok());
        stats::stats(&layers.collect::<Vec<_>>(), &self.config, self.page_bits)
    }
}

/// One forward pass.
struct OttStep<E> {
    cache: Arc<Cache<E>>,
    rotation: Rotation,
    num_heads: Arc<[usize]>,
    rows: Arc<StepRows>,
    plan: KvPlan,
}

impl<E> fmt::Debug for OttStep<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OttStep")
            .field("plan", &self.plan)
            .finish_non_exhaustive()
    }
}

impl<E: Activation> KvStep for OttStep<E> {
    fn plan(&self) -> &KvPlan {
        &self.plan
    }

    fn prefill(
        &self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        attn: KvAttn,
    ) -> Result<Option<Tensor>> {
        let cache = self.cache.layer(layer).map_err(seam)?;
        let layout = &cache.spec().layout;
        let (rows, new) = (&self.rows.plans, longest(&self.plan));
        let (num_heads, kv_heads) = (self.num_heads[layer], layout.num_kv_heads);
        let q_rows = Rows::new::<E>("q", q, (rows.len(), num_heads, new, layout.k_dim))?;
        let k = Rows::new::<E>("k", k, (rows.len(), kv_heads, new, layout.k_dim))?;
        let v = Rows::new::<E>("v", v, (rows.len(), kv_heads, new, layout.v_dim))?;
        // Without a past there is nothing to be of one basis with.
        let turned = rows.iter().any(|row| row.past > 0) && self.rotation == Rotation::Values;
        let v = if turned { v.rotated::<E>()? } else { v };
        let tokens = q_rows.tokens();
        let mut out = vec![E::default(); rows.len() * num_heads * tokens * layout.v_dim];
        let scores = Scores {
            num_heads,
            scale: attn.scale,
            softcap: attn.softcap,
        };
        with_all(&q_rows, &k, &v, |q, k, v| {
            let new = rows.iter().enumerate().map(|(i, row)| Prompt {
                row,
                q: q.row(i),
                k: k.row(i),
                v: v.row(i),
            });
            let new: Vec<Prompt<'_, E>> = new.collect();
            attend(&cache, &new, scores, tokens, &mut out);
        })?;
        if turned {
            turn_back(&mut out, layout.v_dim);
        }
        let shape = (rows.len(), num_heads, tokens, layout.v_dim);
        tensor(out, shape, q.dtype()).map(Some)
    }

    fn past(&self, layer: usize, row: usize, dtype: DType) -> Result<(Tensor, Tensor)> {
        let plans = &self.rows.plans;
        let Some(row) = plans.get(row) else {
            let rows = plans.len();
            return Err(seam(Error::NoSuchRow { row, rows }));
        };
        let cache = self.cache.layer(layer).map_err(seam)?;
        let layout = &cache.spec().layout;
        let (heads, past) = (layout.num_kv_heads, row.past);
        let (k, mut v) = cache.gather(&row.before());
        if self.rotation == Rotation::Values {
            turn_back(&mut v, layout.v_dim);
        }
        Ok((
            tensor(k, (1, heads, past, layout.k_dim), dtype)?,
            tensor(v, (1, heads, past, layout.v_dim), dtype)?,
        ))
    }

    fn append(&self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<()> {
        let (heads, k_dim, v_dim) = {
            let cache = self.cache.layer(layer).map_err(seam)?;
            let layout = &cache.spec().layout;
            (layout.num_kv_heads, layout.k_dim, layout.v_dim)
        };
        let (plans, new) = (&self.rows.plans, longest(&self.plan));
        let num_heads = self.num_heads[layer];
        let of = |heads, dim| (plans.len(), heads, new, dim);
        let q = Rows::new::<E>("q", q, of(num_heads, k_dim))?;
        let k = Rows::new::<E>("k", k, of(heads, k_dim))?;
        let v = Rows::new::<E>("v", v, of(heads, v_dim))?;
        let v = match self.rotation {
            Rotation::None => v,
            Rotation::Values => v.rotated::<E>()?,
        };
        // Rows with a fault are left out from the layer that found it on.
        let mut faults = self.rows.faults();
        let good: Vec<usize> = (0..plans.len())
            .filter(|i| !faults.contains_key(i))
            .collect();
        let found = with_all(&q, &k, &v, |q, k, v| {
            let rows = good.iter().map(|&i| NewTokens {
                row: &plans[i],
                q: Some(NewQueries {
                    tokens: q.row(i),
                    num_heads,
                }),
                k: k.row(i),
                v: v.row(i),
            });
            self.cache.append(layer, &rows.collect::<Vec<_>>())
        })?;
        let found = found.map_err(seam)?.into_iter();
        faults.extend(found.map(|(i, fault)| (good[i], fault)));
        Ok(())
    }

    fn decode(
        &self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        attn: KvAttn,
    ) -> Result<Tensor> {
        self.append(layer, q, k, v)?;
        let cache = self.cache.layer(layer).map_err(seam)?;
        let layout = &cache.spec().layout;
        let (rows, new) = (self.rows.stored(), longest(&self.plan));
        let num_heads = self.num_heads[layer];
        let queries = Rows::new::<E>("q", q, (rows.len(), num_heads, new, layout.k_dim))?;
        let tokens = queries.tokens();
        let wide = queries.widened::<E>(attn.scale)?;
        let mut out = vec![0f32; rows.len() * num_heads * tokens * layout.v_dim];
        let queries = Queries {
            q: &wide,
            num_heads,
            tokens,
            softcap: attn.softcap,
        };
        decode(&cache, &rows, &queries, &mut out);
        if self.rotation == Rotation::Values {
            out.chunks_exact_mut(layout.v_dim).for_each(rotate_back);
        }
        let out: Vec<E> = out.into_iter().map(E::round).collect();
        let shape = (rows.len(), num_heads, tokens, layout.v_dim);
        tensor(out, shape, q.dtype())
    }
}

impl<E: Activation> OttBackend<E> {
    fn step(&self) -> MutexGuard<'_, Option<Arc<StepRows>>> {
        self.step.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Faults of rows, by the host's sequences.
fn told<'a>(
    plans: &[RowPlan],
    faults: impl Iterator<Item = (&'a usize, &'a Error)>,
) -> Vec<KvFault> {
    let fault = |(row, error): (&usize, &Error)| KvFault {
        seq: plans[*row].seq,
        error: error.to_string(),
    };
    faults.map(fault).collect()
}

/// Most new tokens of a row.
fn longest(plan: &KvPlan) -> usize {
    plan.rows.iter().map(|row| row.new).max().unwrap_or(0)
}

/// Do something with the numbers of three tensors.
fn with_all<E: Activation, T>(
    q: &Rows<'_>,
    k: &Rows<'_>,
    v: &Rows<'_>,
    f: impl FnOnce(Slices<'_, E>, Slices<'_, E>, Slices<'_, E>) -> T,
) -> Result<T> {
    q.with(|q| k.with(|k| v.with(|v| f(q, k, v))))??
}

/// Values or answers `(.., v_dim)` in the model's basis again.
fn turn_back<E: Activation>(x: &mut [E], v_dim: usize) {
    let mut wide = vec![0f32; v_dim];
    for x in x.chunks_exact_mut(v_dim) {
        E::widen(x, &mut wide);
        rotate_back(&mut wide);
        E::narrow(&wide, x);
    }
}

fn check_block_size(plan: &KvPlan, config: &OttConfig) -> Result<()> {
    match plan.block_size == config.group_size {
        true => Ok(()),
        false => Err(seam(Error::PlanBlockSize {
            plan: plan.block_size,
            group: config.group_size,
        })),
    }
}

fn rows(plan: &KvPlan) -> Vec<Row<'_>> {
    let rows = plan.rows.iter();
    rows.map(|row| Row {
        seq: row.seq,
        past: row.past,
        new: row.new,
        table: &row.blocks,
    })
    .collect()
}

fn seam(error: Error) -> candle_core::Error {
    candle_core::Error::wrap(error)
}
