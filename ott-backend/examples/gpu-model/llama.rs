//! A Llama of a page, on candle: weights from a GGUF file, attention from whoever keeps the cache.

use std::fs::File;

use anyhow::{Context, Result};
use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::{DType, Device, Tensor, D};

/// What attention is asked: layer, q `(rows, heads, tokens, dim)`, k and v `(rows, kv_heads, tokens, dim)`.
pub type Attend<'a> = dyn FnMut(usize, &Tensor, &Tensor, &Tensor) -> Result<Tensor> + 'a;

struct Block {
    norms: [Tensor; 2],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
}

/// Weights in one dtype on one device.
pub struct Llama {
    pub num_layers: usize,
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub dim: usize,
    pub dtype: DType,
    pub device: Device,
    embedding: Tensor,
    blocks: Vec<Block>,
    norm: Tensor,
    head: Tensor,
    eps: f64,
    /// `(positions, dim / 2)`.
    cos: Tensor,
    sin: Tensor,
}

fn number(content: &Content, name: &str) -> Result<f64> {
    Ok(
        match content
            .metadata
            .get(name)
            .with_context(|| name.to_owned())?
        {
            Value::U32(x) => f64::from(*x),
            Value::F32(x) => f64::from(*x),
            other => anyhow::bail!("{name} is {other:?}"),
        },
    )
}

impl Llama {
    /// Read the weights, for sequences of up to `positions` tokens.
    pub fn load(path: &str, dtype: DType, device: &Device, positions: usize) -> Result<Self> {
        let mut file = File::open(path).context(path.to_owned())?;
        let content = Content::read(&mut file)?;
        let of = |name: &str| number(&content, &format!("llama.{name}"));
        let (num_layers, num_heads) = (
            of("block_count")? as usize,
            of("attention.head_count")? as usize,
        );
        let (hidden, kv_heads) = (
            of("embedding_length")? as usize,
            of("attention.head_count_kv")? as usize,
        );
        let (base, eps) = (
            of("rope.freq_base")?,
            of("attention.layer_norm_rms_epsilon")?,
        );
        let dim = hidden / num_heads;
        let mut tensor = |name: &str| -> Result<Tensor> {
            let quantized = content.tensor(&mut file, &format!("{name}.weight"), &Device::Cpu)?;
            let numbers = quantized.dequantize(&Device::Cpu)?;
            Ok(numbers.to_dtype(dtype)?.to_device(device)?)
        };
        let embedding = tensor("token_embd")?;
        let head = match content.tensor_infos.contains_key("output.weight") {
            true => tensor("output")?,
            false => embedding.clone(),
        };
        let mut blocks = Vec::with_capacity(num_layers);
        for layer in 0..num_layers {
            let mut of = |name: &str| tensor(&format!("blk.{layer}.{name}"));
            let mut transposed =
                |name: &str| -> Result<Tensor> { Ok(of(name)?.t()?.contiguous()?) };
            blocks.push(Block {
                q: transposed("attn_q")?,
                k: transposed("attn_k")?,
                v: transposed("attn_v")?,
                o: transposed("attn_output")?,
                gate: transposed("ffn_gate")?,
                up: transposed("ffn_up")?,
                down: transposed("ffn_down")?,
                norms: [of("attn_norm")?, of("ffn_norm")?],
            });
        }
        let norm = tensor("output_norm")?;
        let angle =
            |p: usize| (0..dim / 2).map(move |i| p as f64 / base.powf(2.0 * i as f64 / dim as f64));
        let angles: Vec<f64> = (0..positions).flat_map(angle).collect();
        let table = |f: fn(f64) -> f64| -> Result<Tensor> {
            let numbers: Vec<f32> = angles.iter().map(|a| f(*a) as f32).collect();
            Ok(Tensor::from_vec(numbers, (positions, dim / 2), device)?)
        };
        Ok(Self {
            num_layers,
            num_heads,
            num_kv_heads: kv_heads,
            dim,
            dtype,
            device: device.clone(),
            cos: table(f64::cos)?,
            sin: table(f64::sin)?,
            head: head.t()?.contiguous()?,
            embedding,
            blocks,
            norm,
            eps,
        })
    }

    /// Logits `(rows, tokens, vocabulary)` in f32 of `tokens`, one list a row and all of one length, that begin at `past`.
    pub fn forward(
        &self,
        tokens: &[Vec<u32>],
        past: &[usize],
        attend: &mut Attend<'_>,
    ) -> Result<Tensor> {
        let (rows, new) = (tokens.len(), tokens[0].len());
        let ids = Tensor::from_vec(tokens.concat(), rows * new, &self.device)?;
        let positions: Vec<u32> = past
            .iter()
            .flat_map(|p| (0..new).map(move |i| (p + i) as u32))
            .collect();
        let positions = Tensor::from_vec(positions, rows * new, &self.device)?;
        let turn = |table: &Tensor| {
            table
                .index_select(&positions, 0)?
                .reshape((rows, 1, new, self.dim / 2, 1))
        };
        let (cos, sin) = (turn(&self.cos)?, turn(&self.sin)?);
        let mut x = self.embedding.index_select(&ids, 0)?;
        for (layer, block) in self.blocks.iter().enumerate() {
            let h = self.normed(&x, &block.norms[0])?;
            let heads =
                |x: Tensor, heads: usize| x.reshape((rows, new, heads, self.dim))?.transpose(1, 2);
            let q = self.turned(&heads(h.matmul(&block.q)?, self.num_heads)?, &cos, &sin)?;
            let k = self.turned(&heads(h.matmul(&block.k)?, self.num_kv_heads)?, &cos, &sin)?;
            let v = heads(h.matmul(&block.v)?, self.num_kv_heads)?;
            let out = attend(layer, &q, &k, &v)?;
            let out = out
                .transpose(1, 2)?
                .reshape((rows * new, self.num_heads * self.dim))?;
            x = (x + out.matmul(&block.o)?)?;
            let h = self.normed(&x, &block.norms[1])?;
            let gated = (h.matmul(&block.gate)?.silu()? * h.matmul(&block.up)?)?;
            x = (x + gated.matmul(&block.down)?)?;
        }
        let logits = self.normed(&x, &self.norm)?.matmul(&self.head)?;
        Ok(logits.to_dtype(DType::F32)?.reshape((rows, new, ()))?)
    }

    fn normed(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let wide = x.to_dtype(DType::F32)?;
        let mean = wide.sqr()?.mean_keepdim(D::Minus1)?;
        let normed = wide.broadcast_div(&(mean + self.eps)?.sqrt()?)?;
        Ok(normed.to_dtype(self.dtype)?.broadcast_mul(weight)?)
    }

    /// Rotary positions on neighbouring channels, as GGUF files of this architecture have them.
    fn turned(&self, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
        let (rows, heads, tokens, dim) = x.dims4()?;
        let pairs = x
            .to_dtype(DType::F32)?
            .reshape((rows, heads, tokens, dim / 2, 2))?;
        let (a, b) = (pairs.narrow(4, 0, 1)?, pairs.narrow(4, 1, 1)?);
        let real = (a.broadcast_mul(cos)? - b.broadcast_mul(sin)?)?;
        let imaginary = (a.broadcast_mul(sin)? + b.broadcast_mul(cos)?)?;
        let turned = Tensor::cat(&[real, imaginary], 4)?;
        Ok(turned
            .reshape((rows, heads, tokens, dim))?
            .to_dtype(self.dtype)?)
    }
}

/// Causal attention of a prompt's tokens over each other, in f32.
pub fn causal(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let (rows, heads, tokens, dim) = q.dims4()?;
    let ratio = heads / k.dim(1)?;
    let wide = |x: &Tensor| -> Result<Tensor> {
        let x = x.to_dtype(DType::F32)?.contiguous()?.unsqueeze(2)?;
        let shape = (rows, heads / ratio, ratio, tokens, dim);
        Ok(x.broadcast_as(shape)?.reshape((rows, heads, tokens, dim))?)
    };
    let device = q.device();
    let place = Tensor::arange(0u32, tokens as u32, device)?;
    let column = place.reshape((tokens, 1))?;
    let later = place.reshape((1, tokens))?.broadcast_gt(&column)?;
    let (square, low) = ((tokens, tokens), f32::NEG_INFINITY);
    let mask = later.where_cond(
        &Tensor::full(low, square, device)?,
        &Tensor::zeros(square, DType::F32, device)?,
    )?;
    let wide_q = q.to_dtype(DType::F32)?.contiguous()?;
    let scores = (wide_q.matmul(&wide(k)?.t()?.contiguous()?)? / (dim as f64).sqrt())?;
    let scores = scores.broadcast_add(&mask)?;
    let weights = scores
        .broadcast_sub(&scores.max_keepdim(D::Minus1)?)?
        .exp()?;
    let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
    Ok(weights.matmul(&wide(v)?)?.to_dtype(q.dtype())?)
}
