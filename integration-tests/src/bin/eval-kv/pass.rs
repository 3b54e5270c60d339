//! `pass:SPEC`: a whole text as one prompt, in which each token sees of the others what it would see had it been
//! decoded: hours become minutes.
//!
//! The host runs its layers over all tokens at once; here each layer takes them in steps, stores them in the real
//! cache and attends through it. A step ends where the next token would seal a group, so that what is sealed, traced
//! and in the window is the same at every token. Other caches are their number format ([`Codec`]).

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context;
use candle_core::{bail, DType, Device, Result, Tensor};
use half::f16;
use mistralrs_kv_backend::{
    KvAttn, KvBackendProvider, KvCacheBackend, KvMemory, KvModelSource, KvPlan, KvShape, KvStep,
};
use ott_backend::attention::{decode, Queries};
use ott_backend::cache::{Cache, LayerSpec, Row, Tokens};
use ott_backend::prompt::{attend, NewTokens, Scores};
use ott_backend::rotate::rotate;
use ott_backend::{CpuOps, Element, OttConfig, PageLayout, Rotation};

use crate::codec::Codec;

/// What a cache holds after a text.
#[derive(Clone, Debug, Default)]
pub struct Held {
    /// Bytes of all layers.
    pub bytes: usize,
    /// Traced tokens of each layer, over its kv heads.
    pub traced: Vec<usize>,
}

/// The provider; it remembers what the last text left.
#[derive(Default)]
pub struct Pass {
    held: Arc<Mutex<Held>>,
}

impl Pass {
    /// What the cache held after the last text.
    pub fn held(&self) -> Held {
        self.held
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

#[derive(Clone, Copy, Debug)]
enum Method {
    Ott(OttConfig),
    Codec(Codec),
}

impl Method {
    fn parse(spec: &str) -> anyhow::Result<Self> {
        let (name, options) = spec.split_once(':').unwrap_or((spec, ""));
        Ok(match name {
            "ott" => Self::Ott(OttConfig::parse(options)?),
            _ => Self::Codec(Codec::parse(spec)?),
        })
    }
}

impl KvBackendProvider for Pass {
    fn name(&self) -> &'static str {
        "pass"
    }

    fn check_options(&self, options: &str) -> anyhow::Result<()> {
        Method::parse(options).map(drop)
    }

    fn check_model(&self, _source: &KvModelSource<'_>, _options: &str) -> anyhow::Result<()> {
        Ok(())
    }

    fn block_size(&self, user: Option<usize>, _options: &str) -> anyhow::Result<usize> {
        Ok(user.unwrap_or(128))
    }

    fn memory(&self, _shape: &KvShape) -> anyhow::Result<KvMemory> {
        Ok(KvMemory {
            per_block: 1,
            fixed: 0,
        })
    }

    fn create(&self, shape: KvShape, _blocks: usize) -> anyhow::Result<Arc<dyn KvCacheBackend>> {
        Ok(Arc::new(PassCache {
            method: Method::parse(&shape.options)?,
            shape,
            held: Arc::clone(&self.held),
        }))
    }
}

#[derive(Clone)]
struct PassCache {
    method: Method,
    shape: KvShape,
    held: Arc<Mutex<Held>>,
}

impl KvCacheBackend for PassCache {
    fn begin_step(&self, plan: KvPlan) -> Result<Arc<dyn KvStep>> {
        let whole = plan.rows.len() == 1 && plan.rows[0].past == 0;
        if !plan.prompt || !whole {
            bail!("`pass` reads one text as one prompt");
        }
        *self.held.lock().unwrap_or_else(PoisonError::into_inner) = Held::default();
        Ok(Arc::new(PassStep(self.clone(), plan)))
    }

    fn allocated(&self, _seq: usize, _blocks: &[usize]) {}

    fn released(&self, _seq: usize, _blocks: &[usize]) {}

    fn reset(&self) {}

    fn describe(&self) -> String {
        format!("pass: {:?}", self.method)
    }

    fn allocated_bytes(&self) -> usize {
        0
    }
}

struct PassStep(PassCache, KvPlan);

impl fmt::Debug for PassStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PassStep").field(&self.1).finish()
    }
}

impl KvStep for PassStep {
    fn plan(&self) -> &KvPlan {
        &self.1
    }

    fn prefill(
        &self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        attn: KvAttn,
    ) -> Result<Option<Tensor>> {
        let text = Text::new(&self.0, layer, q.dim(2)?);
        let out = match self.0.method {
            Method::Ott(config) => text.through(&config, q, k, v, attn, &self.0.held),
            Method::Codec(codec) => text.rounded(codec, q, k, v, attn),
        };
        let out = out.map_err(|error| candle_core::Error::Msg(format!("{error:#}")))?;
        let shape = (1, q.dim(1)?, q.dim(2)?, v.dim(3)?);
        Tensor::from_vec(out, shape, &Device::Cpu)?
            .to_dtype(q.dtype())
            .map(Some)
    }

    fn past(&self, _layer: usize, _row: usize, _dtype: DType) -> Result<(Tensor, Tensor)> {
        bail!("`pass` keeps nothing between steps")
    }

    fn append(&self, _layer: usize, _k: &Tensor, _v: &Tensor) -> Result<()> {
        Ok(())
    }

    fn decode(&self, _: usize, _: &Tensor, _: &Tensor, _: &Tensor, _: KvAttn) -> Result<Tensor> {
        bail!("`pass` decodes nothing")
    }
}

/// One layer's part of a text.
struct Text<'a> {
    cache: &'a PassCache,
    layer: usize,
    tokens: usize,
}

impl<'a> Text<'a> {
    fn new(cache: &'a PassCache, layer: usize, tokens: usize) -> Self {
        Self {
            cache,
            layer,
            tokens,
        }
    }

    /// An empty cache of this layer alone, with blocks for the text, and their numbers.
    fn cache(&self, config: &OttConfig) -> anyhow::Result<(Cache<f16>, Vec<usize>)> {
        let l = &self.cache.shape.layers[self.layer];
        let spec = LayerSpec {
            layer: self.layer,
            config: *config,
            layout: PageLayout::new(config, self.layer, l.num_kv_heads, l.k_dim, l.v_dim)?,
            ops: CpuOps::best()?,
        };
        let blocks = self.tokens.div_ceil(config.group_size);
        Ok((
            Cache::new(vec![spec], blocks + 1, 1),
            (1..=blocks).collect(),
        ))
    }

    /// Store the text step by step, and attend in each step.
    fn through(
        &self,
        config: &OttConfig,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        attn: KvAttn,
        held: &Mutex<Held>,
    ) -> anyhow::Result<Vec<f32>> {
        let (cache, table) = self.cache(config)?;
        let (num_heads, k_dim, v_dim) = (q.dim(1)?, q.dim(3)?, v.dim(3)?);
        let (q, k, mut v) = (numbers(q)?, numbers(k)?, numbers(v)?);
        // What the seam does to values; this is below it.
        let turned = config.rotation == Rotation::Values;
        if turned {
            let mut wide = vec![0f32; v_dim];
            for v in v.chunks_exact_mut(v_dim) {
                f16::widen(v, &mut wide);
                rotate(&mut wide);
                f16::narrow(&wide, v);
            }
        }
        let mut out = vec![0f32; num_heads * self.tokens * v_dim];
        let mut past = 0;
        while past < self.tokens {
            // Group i is sealed by the token that makes them (i + 1) G + R.
            let (group, residual) = (config.group_size, config.residual);
            let seals = (past + 1).saturating_sub(residual) / group;
            let new = ((seals + 1) * group + residual - 1).min(self.tokens) - past;
            let row = Row {
                seq: 1,
                past,
                new,
                table: &table,
            };
            cache.begin(&[row])?;
            let from = |x, dim| step(x, self.tokens, past, dim);
            cache.append(0, &row, &from(&k[..], k_dim), &from(&v[..], v_dim))?;
            let mut queries = Vec::with_capacity(num_heads * new * k_dim);
            let mut attended = vec![0f32; num_heads * new * v_dim];
            for head in 0..num_heads {
                let at = (head * self.tokens + past) * k_dim;
                let head = &q[at..at + new * k_dim];
                queries.extend(head.iter().map(|x| x.to_f32() * attn.scale));
            }
            let queries = Queries {
                q: &queries,
                num_heads,
                tokens: new,
                softcap: attn.softcap,
            };
            decode(&*cache.layer(0)?, &[row], &queries, &mut attended);
            for (head, attended) in attended.chunks_exact(new * v_dim).enumerate() {
                let at = (head * self.tokens + past) * v_dim;
                out[at..at + attended.len()].copy_from_slice(attended);
            }
            past += new;
        }
        if turned {
            out.chunks_exact_mut(v_dim).for_each(rotate);
        }
        let mut held = held.lock().unwrap_or_else(PoisonError::into_inner);
        held.bytes += cache.allocated_bytes();
        held.traced.push(cache.layer(0)?.stats().traced_tokens);
        Ok(out)
    }

    /// Attend over rounded keys and values.
    fn rounded(
        &self,
        codec: Codec,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        attn: KvAttn,
    ) -> anyhow::Result<Vec<f32>> {
        let config = OttConfig::default();
        let (cache, table) = self.cache(&config)?;
        let (num_heads, k_dim, v_dim) = (q.dim(1)?, q.dim(3)?, v.dim(3)?);
        let (k, v) = codec.round(k, v).context("rounding keys and values")?;
        let q = numbers(q)?;
        let new = NewTokens {
            row: Row {
                seq: 1,
                past: 0,
                new: self.tokens,
                table: &table,
            },
            q: Tokens::contiguous(&q, self.tokens, k_dim),
            k: Tokens::contiguous(&k, self.tokens, k_dim),
            v: Tokens::contiguous(&v, self.tokens, v_dim),
        };
        let scores = Scores {
            num_heads,
            scale: attn.scale,
            softcap: attn.softcap,
        };
        let mut out = vec![f16::ZERO; num_heads * self.tokens * v_dim];
        attend(&*cache.layer(0)?, &[new], scores, self.tokens, &mut out)?;
        Ok(out.into_iter().map(f16::to_f32).collect())
    }
}

/// The tokens from `past` on of numbers `(heads, tokens, dim)`.
fn step(x: &[f16], tokens: usize, past: usize, dim: usize) -> Tokens<'_, f16> {
    Tokens {
        data: &x[past * dim..],
        head_stride: tokens * dim,
        token_stride: dim,
        dim,
    }
}

fn numbers(x: &Tensor) -> Result<Vec<f16>> {
    x.to_dtype(DType::F16)?
        .contiguous()?
        .flatten_all()?
        .to_vec1()
}
