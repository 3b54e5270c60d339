//! One forward pass on the device.

use std::f32::consts::LOG2_E;
use std::fmt;
use std::sync::Arc;

use candle_core::{DType, Result, Tensor};
use mistralrs_kv_backend::{KvAttn, KvPlan, KvStep};
use ott_kernels::abi::{Fresh, Query};

use super::super::{rows, seam, LastQueries};
use super::cache::{failed, CudaCache, Tables};
use super::tensor::{filled, Rows};
use crate::error::Error;

/// Prompts attend in the host: new tokens to each other in full precision, and to what [`KvStep::past`] reads back.
pub struct CudaStep {
    pub(super) cache: Arc<CudaCache>,
    pub(super) tables: Tables,
    pub(super) queries: LastQueries,
    pub(super) plan: KvPlan,
}

impl fmt::Debug for CudaStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaStep")
            .field("plan", &self.plan)
            .finish_non_exhaustive()
    }
}

impl KvStep for CudaStep {
    fn plan(&self) -> &KvPlan {
        &self.plan
    }

    fn prefill(
        &self,
        layer: usize,
        q: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: KvAttn,
    ) -> Result<Option<Tensor>> {
        if self.cache.layer(layer).map_err(seam)?.shape.weigh {
            self.queries.keep(layer, q);
        }
        Ok(None)
    }

    fn past(&self, layer: usize, row: usize, dtype: DType) -> Result<(Tensor, Tensor)> {
        let device_layer = self.cache.layer(layer).map_err(seam)?;
        let rows = rows(&self.plan);
        let Some(past) = rows.get(row).map(|row| row.past) else {
            let rows = rows.len();
            return Err(seam(Error::NoSuchRow { row, rows }));
        };
        let shape = &device_layer.shape;
        let (heads, own) = (shape.num_kv_heads, self.cache.dtype);
        let (k_shape, v_shape) = ((1, heads, past, shape.k_dim), (1, heads, past, shape.v_dim));
        let device = &self.cache.device;
        if past == 0 {
            let empty = |shape| Tensor::zeros(shape, dtype, device);
            return Ok((empty(k_shape)?, empty(v_shape)?));
        }
        let mut v = None;
        let k = filled(k_shape, own, device, |k| {
            v = Some(filled(v_shape, own, device, |v| {
                let tables = self.tables.of(&self.cache, layer);
                let gathered = device_layer.gather(tables, row as u32, past as u32, k, v);
                gathered.map_err(failed).map_err(seam)?;
                if shape.rotate {
                    let stored = Fresh {
                        data: v,
                        row: 0,
                        head: (past * shape.v_dim) as i64,
                        token: shape.v_dim as i64,
                    };
                    let turned = device_layer.rotate((1, heads, past), stored, v);
                    turned.map_err(failed).map_err(seam)?;
                }
                Ok(())
            })?);
            Ok(())
        })?;
        let v = v.ok_or_else(|| seam(Error::EmptyPlan))?;
        Ok((k.to_dtype(dtype)?, v.to_dtype(dtype)?))
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
        if let Some(row) = self.plan.rows.iter().find(|row| row.new != 1) {
            let (seq, new) = (row.seq, row.new);
            return Err(seam(Error::DecodedTokens { seq, new }));
        }
        let device_layer = self.cache.layer(layer).map_err(seam)?;
        let shape = &device_layer.shape;
        let (num_rows, num_heads) = (self.plan.rows.len(), device_layer.num_heads);
        let given = q.dtype();
        let q = q.narrow(2, 0, 1)?;
        let q = Rows::new(
            "q",
            &q,
            (num_rows, num_heads, 1, shape.k_dim),
            self.cache.dtype,
        )?;
        let tables = self.tables.of(&self.cache, layer);
        let out_shape = (num_rows, num_heads, 1, shape.v_dim);
        let out = filled(out_shape, self.cache.dtype, &self.cache.device, |out| {
            let attended = q.with(|q| {
                let query = Query {
                    q: q.data,
                    row: q.row,
                    head: q.head,
                    out,
                    sums: self.cache.sums_address(),
                    arrived: 0,
                    num_heads: num_heads as u32,
                    scale: attn.scale * LOG2_E,
                    softcap: attn.softcap.unwrap_or(0.0),
                };
                device_layer.decode(tables, query, true)
            })?;
            attended.map_err(failed).map_err(seam)
        })?;
        out.to_dtype(given)
    }
}

impl CudaStep {
    /// Store the new tokens of all rows in one layer.
    fn store(&self, layer: usize, q: Option<&Tensor>, k: &Tensor, v: &Tensor) -> Result<()> {
        let device_layer = self.cache.layer(layer).map_err(seam)?;
        let (shape, dtype) = (&device_layer.shape, self.cache.dtype);
        let (num_rows, new) = (self.plan.rows.len(), self.longest());
        let of = |heads, dim| (num_rows, heads, new, dim);
        // Nobody asks for them where keys are not weighed.
        let q = q.filter(|_| shape.weigh);
        let q = q.map(|q| Rows::new("q", q, of(device_layer.num_heads, shape.k_dim), dtype));
        let q = q.transpose()?;
        let k = Rows::new("k", k, of(shape.num_kv_heads, shape.k_dim), dtype)?;
        let v = Rows::new("v", v, of(shape.num_kv_heads, shape.v_dim), dtype)?;
        let tables = self.tables.of(&self.cache, layer);
        let store = |q| k.with(|k| v.with(|v| device_layer.append(tables, q, k, v)));
        let stored = match &q {
            Some(q) => q.with(store)?,
            None => store(Fresh::NOTHING),
        };
        stored??.map_err(failed).map_err(seam)
    }

    /// Most new tokens of a row.
    fn longest(&self) -> usize {
        let rows = self.plan.rows.iter();
        rows.map(|row| row.new).max().unwrap_or(0)
    }
}
