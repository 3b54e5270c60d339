//! The seam: the host's words in, our words out. The only room that knows candle and the host.

#[cfg(feature = "cuda")]
mod cuda;
mod provider;
mod stats;
mod tensor;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Result, Tensor};
use mistralrs_kv_backend::{KvAttn, KvCacheBackend, KvPlan, KvStats, KvStep};

pub use provider::{provider, register, OttProvider};
pub use tensor::Activation;

use crate::attention::{decode, Queries};
use crate::cache::{Cache, LayerStats, NewQueries, Row};
use crate::config::{OttConfig, Rotation, Weigh};
use crate::error::Error;
use crate::prompt::{attend, NewTokens, Scores};
use crate::rotate::rotate;
use tensor::{tensor, Rows, Slices};

/// The cache of one model whose activations are `E`.
#[derive(Debug)]
pub struct OttBackend<E> {
    cache: Arc<Cache<E>>,
    config: OttConfig,
    num_heads: Arc<[usize]>,
    description: String,
    page_bits: f64,
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
        Some(self.cache.layer(layer).ok()?.stats())
    }

    fn page(&self, layer: usize, block: usize) -> Option<Vec<u8>> {
        let layer = self.cache.layer(layer).ok()?;
        layer.page(block).map(<[u8]>::to_vec)
    }

    fn bytes(&self) -> usize {
        self.cache.allocated_bytes()
    }
}

impl<E: Activation> KvCacheBackend for OttBackend<E> {
    fn begin_step(&self, plan: KvPlan) -> Result<Arc<dyn KvStep>> {
        check_block_size(&plan, &self.config)?;
        self.cache.begin(&rows(&plan)).map_err(seam)?;
        Ok(Arc::new(OttStep {
            cache: Arc::clone(&self.cache),
            rotation: self.config.rotation,
            num_heads: Arc::clone(&self.num_heads),
            queries: LastQueries::default(),
            plan,
        }))
    }

    fn allocated(&self, _seq: usize, blocks: &[usize]) {
        self.cache.allocated(blocks);
    }

    fn released(&self, _seq: usize, blocks: &[usize]) {
        self.cache.released(blocks);
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
        let layers = layers.filter_map(|layer| Some(self.cache.layer(layer).ok()?.stats()));
        stats::stats(&layers.collect::<Vec<_>>(), &self.config, self.page_bits)
    }
}

/// One forward pass.
struct OttStep<E> {
    cache: Arc<Cache<E>>,
    rotation: Rotation,
    num_heads: Arc<[usize]>,
    queries: LastQueries,
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
        let rows = rows(&self.plan);
        let new = rows.iter().map(|row| row.new).max().unwrap_or(0);
        let (num_heads, kv_heads) = (self.num_heads[layer], layout.num_kv_heads);
        let q_rows = Rows::new::<E>("q", q, (rows.len(), num_heads, new, layout.k_dim))?;
        let k = Rows::new::<E>("k", k, (rows.len(), kv_heads, new, layout.k_dim))?;
        let v = Rows::new::<E>("v", v, (rows.len(), kv_heads, new, layout.v_dim))?;
        // Without a past there is nothing to be of one basis with.
        let turned = rows.iter().any(|row| row.past > 0) && self.rotation == Rotation::Values;
        let v = if turned { v.rotated::<E>()? } else { v };
        let tokens = q_rows.tokens();
        let mut out = vec![E::default(); rows.len() * num_heads * tokens * layout.v_dim];
        self.queries.keep(layer, q);
        let scores = Scores {
            num_heads,
            scale: attn.scale,
            softcap: attn.softcap,
        };
        with_all(&q_rows, &k, &v, |q, k, v| {
            let new = rows.iter().enumerate().map(|(i, row)| NewTokens {
                row: *row,
                q: q.row(i),
                k: k.row(i),
                v: v.row(i),
            });
            let new: Vec<NewTokens<'_, E>> = new.collect();
            attend(&cache, &new, scores, tokens, &mut out)
        })?
        .map_err(seam)?;
        if turned {
            turn_back(&mut out, layout.v_dim);
        }
        let shape = (rows.len(), num_heads, tokens, layout.v_dim);
        tensor(out, shape, q.dtype()).map(Some)
    }

    fn past(&self, layer: usize, row: usize, dtype: DType) -> Result<(Tensor, Tensor)> {
        let rows = rows(&self.plan);
        let Some(row) = rows.get(row) else {
            let rows = rows.len();
            return Err(seam(Error::NoSuchRow { row, rows }));
        };
        let cache = self.cache.layer(layer).map_err(seam)?;
        let layout = &cache.spec().layout;
        let (heads, past) = (layout.num_kv_heads, row.past);
        let (k, mut v) = cache.gather(row).map_err(seam)?;
        if self.rotation == Rotation::Values {
            turn_back(&mut v, layout.v_dim);
        }
        Ok((
            tensor(k, (1, heads, past, layout.k_dim), dtype)?,
            tensor(v, (1, heads, past, layout.v_dim), dtype)?,
        ))
    }

    fn append(&self, layer: usize, k: &Tensor, v: &Tensor) -> Result<()> {
        let q = self.queries.take(layer);
        self.store(layer, q.as_ref(), k, v)
    }

    fn decode(
        &self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        attn: KvAttn,
    ) -> Result<Tensor> {
        self.store(layer, Some(q), k, v)?;
        let cache = self.cache.layer(layer).map_err(seam)?;
        let layout = &cache.spec().layout;
        let rows = rows(&self.plan);
        let new = rows.iter().map(|row| row.new).max().unwrap_or(0);
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
            out.chunks_exact_mut(layout.v_dim).for_each(rotate);
        }
        let out: Vec<E> = out.into_iter().map(E::round).collect();
        let shape = (rows.len(), num_heads, tokens, layout.v_dim);
        tensor(out, shape, q.dtype())
    }
}

/// The queries of the layer whose prompt was attended to last, until its keys are stored.
#[derive(Default)]
struct LastQueries(Mutex<Option<(usize, Tensor)>>);

impl LastQueries {
    /// Keep those of a prompt.
    fn keep(&self, layer: usize, q: &Tensor) {
        *self.last() = Some((layer, q.clone()));
    }

    /// Those of the prompt whose keys are stored now, if it was attended to through this step.
    fn take(&self, layer: usize) -> Option<Tensor> {
        let last = self.last().take();
        last.filter(|(of, _)| *of == layer).map(|(_, q)| q)
    }

    fn last(&self) -> MutexGuard<'_, Option<(usize, Tensor)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<E: Activation> OttStep<E> {
    /// Store the new tokens of all rows in one layer.
    fn store(&self, layer: usize, q: Option<&Tensor>, k: &Tensor, v: &Tensor) -> Result<()> {
        let (heads, k_dim, v_dim, weigh) = {
            let cache = self.cache.layer(layer).map_err(seam)?;
            let (layout, config) = (&cache.spec().layout, &cache.spec().config);
            (
                layout.num_kv_heads,
                layout.k_dim,
                layout.v_dim,
                config.weigh,
            )
        };
        let rows = rows(&self.plan);
        let new = rows.iter().map(|row| row.new).max().unwrap_or(0);
        let num_heads = self.num_heads[layer];
        // Nobody asks for them where keys are not weighed.
        let q = q.filter(|_| weigh == Weigh::Queries);
        let q = q.map(|q| Rows::new::<E>("q", q, (rows.len(), num_heads, new, k_dim)));
        let q = q.transpose()?;
        let k = Rows::new::<E>("k", k, (rows.len(), heads, new, k_dim))?;
        let v = Rows::new::<E>("v", v, (rows.len(), heads, new, v_dim))?;
        let v = match self.rotation {
            Rotation::None => v,
            Rotation::Values => v.rotated::<E>()?,
        };
        // Without queries the keys stand in their place, and nobody asks for them.
        with_all(q.as_ref().unwrap_or(&k), &k, &v, |new, k, v| {
            rows.iter().enumerate().try_for_each(|(i, row)| {
                let queries = q.as_ref().map(|_| NewQueries {
                    tokens: new.row(i),
                    num_heads,
                });
                let queries = queries.as_ref();
                self.cache.append(layer, row, queries, &k.row(i), &v.row(i))
            })
        })?
        .map_err(seam)
    }
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
        rotate(&mut wide);
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
