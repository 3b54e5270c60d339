//! One forward pass on the device.

use std::f32::consts::LOG2_E;
use std::fmt;
use std::sync::Arc;

use candle_core::{DType, Result, Tensor};
use mistralrs_kv_backend::{KvAttn, KvPlan, KvStep};
use ott_kernels::abi::{Fresh, Prompt, Query};
use ott_kernels::blocks::RowPlan;
use ott_kernels::cache::Step;

use super::super::{longest, seam};
use super::cache::{failed, told, CudaCache};
use super::tensor::{filled, Rows};
use crate::error::Error;

/// Prompts attend here, by a kernel, in full precision to their new tokens; in the host where nothing is stored and no kernel
/// on tensor cores serves the layer.
pub struct CudaStep {
    pub(super) cache: Arc<CudaCache>,
    pub(super) step: Arc<Step>,
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
        k: &Tensor,
        v: &Tensor,
        attn: KvAttn,
    ) -> Result<Option<Tensor>> {
        let device_layer = self.cache.layers.layer(layer).map_err(told).map_err(seam)?;
        let is_stored = self.step.rows.iter().any(|row| row.past > 0);
        // The clear kernel is slower than the host's products.
        if !is_stored && !device_layer.is_tuned_for_prompts() {
            return Ok(None);
        }
        let (shape, own) = (&device_layer.shape, self.cache.dtype);
        let (rows, num_heads) = (self.step.rows.len(), device_layer.num_heads);
        let (given, tokens) = (q.dtype(), q.dim(2)?);
        let of = |heads, dim| (rows, heads, longest(&self.plan), dim);
        let q = Rows::new("q", q, of(num_heads, shape.k_dim), own)?.even()?;
        let k = Rows::new("k", k, of(shape.num_kv_heads, shape.k_dim), own)?.even()?;
        let v = Rows::new("v", v, of(shape.num_kv_heads, shape.v_dim), own)?.even()?;
        let tables = self.step.tables(&self.cache.layers, layer);
        let out_shape = (rows, num_heads, tokens, shape.v_dim);
        let out = filled(out_shape, own, &self.cache.device, |out| {
            let attend = |q, k, v| {
                let prompt = Prompt {
                    q,
                    k,
                    v,
                    out,
                    sums: 0,
                    tokens: tokens as u32,
                    splits: 1,
                    scale: attn.scale * LOG2_E,
                    softcap: attn.softcap.unwrap_or(0.0),
                };
                device_layer.prompt(tables, prompt)
            };
            let attended = q.with(|q| k.with(|k| v.with(|v| attend(q, k, v))))???;
            attended.map_err(failed).map_err(seam)
        })?;
        out.to_dtype(given).map(Some)
    }

    fn past(&self, layer: usize, row: usize, dtype: DType) -> Result<(Tensor, Tensor)> {
        let past = self.row(row)?.past;
        let device_layer = self.cache.layers.layer(layer).map_err(told).map_err(seam)?;
        let shape = &device_layer.shape;
        let (heads, own, device) = (shape.num_kv_heads, self.cache.dtype, &self.cache.device);
        let (k_shape, v_shape) = ((1, heads, past, shape.k_dim), (1, heads, past, shape.v_dim));
        if past == 0 {
            let empty = |shape| Tensor::zeros(shape, dtype, device);
            return Ok((empty(k_shape)?, empty(v_shape)?));
        }
        let mut v = None;
        let k = filled(k_shape, own, device, |k| {
            v = Some(filled(v_shape, own, device, |v| {
                let tables = self.step.tables(&self.cache.layers, layer);
                let gathered = device_layer.gather(tables, row as u32, 0..past as u32, k, v);
                gathered.map_err(failed).map_err(seam)
            })?);
            Ok(())
        })?;
        let v = v.ok_or_else(|| candle_core::Error::Msg("nothing was gathered".into()))?;
        Ok((k.to_dtype(dtype)?, v.to_dtype(dtype)?))
    }

    fn append(&self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<()> {
        let device_layer = self.cache.layers.layer(layer).map_err(told).map_err(seam)?;
        let (shape, dtype) = (&device_layer.shape, self.cache.dtype);
        let (num_rows, new) = (self.step.rows.len(), longest(&self.plan));
        let of = |heads, dim| (num_rows, heads, new, dim);
        // Nobody asks for them where keys are not weighed.
        let q = Some(q).filter(|_| shape.weigh);
        let q = q.map(|q| Rows::new("q", q, of(device_layer.num_heads, shape.k_dim), dtype));
        let q = q.transpose()?;
        let k = Rows::new("k", k, of(shape.num_kv_heads, shape.k_dim), dtype)?;
        let v = Rows::new("v", v, of(shape.num_kv_heads, shape.v_dim), dtype)?;
        let tables = self.step.tables(&self.cache.layers, layer);
        let store = |q| k.with(|k| v.with(|v| device_layer.append(tables, q, k, v)));
        let stored = match &q {
            Some(q) => q.with(store)?,
            None => store(Fresh::NOTHING),
        };
        stored??.map_err(failed).map_err(seam)
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
        if let Some(row) = self.plan.rows.iter().find(|row| row.new != 1) {
            let (seq, new) = (row.seq, row.new);
            return Err(seam(Error::DecodedTokens { seq, new }));
        }
        let device_layer = self.cache.layers.layer(layer).map_err(told).map_err(seam)?;
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
        let tables = self.step.tables(&self.cache.layers, layer);
        let out_shape = (num_rows, num_heads, 1, shape.v_dim);
        let out = filled(out_shape, self.cache.dtype, &self.cache.device, |out| {
            let attended = q.with(|q| {
                let query = Query {
                    q: q.data,
                    row: q.row,
                    head: q.head,
                    out,
                    sums: self.cache.layers.sums_address(),
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
    fn row(&self, row: usize) -> Result<&RowPlan> {
        let rows = self.step.rows.len();
        let found = self.step.rows.get(row);
        found.ok_or_else(|| seam(Error::NoSuchRow { row, rows }))
    }
}
