//! A contiguous cache in full precision, attended with candle's matrix products: what is compared with.

use anyhow::Result;
use candle_core::{Tensor, D};

use crate::llama::{causal, Llama};

/// Keys and values of all layers, `(rows, kv_heads, room, dim)` each.
pub struct Plain<'a> {
    model: &'a Llama,
    layers: Vec<[Tensor; 2]>,
}

impl<'a> Plain<'a> {
    /// Room for `rows` sequences of `room` tokens.
    pub fn new(model: &'a Llama, rows: usize, room: usize) -> Result<Self> {
        let shape = (rows, model.num_kv_heads, room, model.dim);
        let empty = || Tensor::zeros(shape, model.dtype, &model.device);
        let layers = (0..model.num_layers).map(|_| Ok([empty()?, empty()?]));
        Ok(Self {
            model,
            layers: layers.collect::<Result<_>>()?,
        })
    }

    /// Logits of new tokens behind `past` others: a prompt, or one token of each row.
    pub fn step(&mut self, tokens: &[Vec<u32>], past: usize) -> Result<Tensor> {
        let (model, layers) = (self.model, &self.layers);
        model.forward(tokens, &vec![past; tokens.len()], &mut |layer, q, k, v| {
            let new = k.dim(2)?;
            for (cache, new) in layers[layer].iter().zip([k, v]) {
                cache.slice_set(&new.contiguous()?, 2, past)?;
            }
            match past {
                0 => causal(q, k, v),
                _ => attend(q, &layers[layer], past + new),
            }
        })
    }

    /// The same prompt in every row, computed once.
    pub fn fill(&mut self, tokens: &[u32]) -> Result<()> {
        let layers = &self.layers;
        self.model
            .forward(&[tokens.to_vec()], &[0], &mut |layer, q, k, v| {
                for (cache, new) in layers[layer].iter().zip([k, v]) {
                    let (_, heads, len, dim) = new.dims4()?;
                    let rows = new.broadcast_as((cache.dim(0)?, heads, len, dim))?;
                    cache.slice_set(&rows.contiguous()?, 2, 0)?;
                }
                causal(q, k, v)
            })?;
        Ok(())
    }
}

/// One query of each head over the first `tokens` tokens.
fn attend(q: &Tensor, [k, v]: &[Tensor; 2], tokens: usize) -> Result<Tensor> {
    let (rows, heads, new, dim) = q.dims4()?;
    let kv_heads = k.dim(1)?;
    let grouped = q.reshape((rows, kv_heads, heads / kv_heads * new, dim))?;
    let (k, v) = (k.narrow(2, 0, tokens)?, v.narrow(2, 0, tokens)?);
    let scores =
        (grouped.matmul(&k.t()?)? / (dim as f64).sqrt())?.to_dtype(candle_core::DType::F32)?;
    let weights = scores
        .broadcast_sub(&scores.max_keepdim(D::Minus1)?)?
        .exp()?;
    let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
    let out = weights.to_dtype(q.dtype())?.matmul(&v)?;
    Ok(out.reshape((rows, heads, new, dim))?)
}
