//! One layer of a text: what it keeps, and attention of new tokens over it.

use anyhow::{ensure, Context, Result};
use candle_core::{DType, Tensor};
use half::f16;
use mistralrs_kv_backend::{KvAttn, KvLayer};
use ott_backend::attention::{decode, Queries};
use ott_backend::cache::{Cache, LayerSpec, NewQueries, NewTokens, Row, Tokens};
use ott_backend::cpu::Full;
use ott_backend::rotate::{rotate, rotate_back};
use ott_backend::{CpuOps, Element, OttConfig, PageLayout, Rotation};
use rayon::prelude::*;

use super::method::Format;
use super::{Held, Method};
use crate::codec::Codec;

/// Queries that share keys and values in attention over a number format.
const TILE: usize = 32;

/// What a layer keeps of a text.
pub enum Layer {
    /// The real cache of this layer alone.
    Ott(Box<Kept>),
    /// Tokens rounded through a number format.
    Rounded(Rounded),
}

pub struct Kept {
    config: OttConfig,
    cache: Cache<f16>,
    table: Vec<usize>,
    tokens: usize,
}

pub struct Rounded {
    codec: Codec,
    ops: &'static CpuOps,
    /// By kv head, `(tokens, dim)`.
    k: Vec<Vec<f32>>,
    v: Vec<Vec<f32>>,
    tokens: usize,
}

/// Queries of one head and where they go.
struct Tile<'a> {
    head: usize,
    /// The first query's position in the text.
    position: usize,
    q: &'a [f32],
    out: &'a mut [f32],
}

impl Layer {
    pub fn new(method: &Method, layer: usize, shape: &KvLayer, tokens: usize) -> Result<Self> {
        Ok(match method.of(layer) {
            Format::Ott(config, ops) => {
                let spec = LayerSpec {
                    layer,
                    config,
                    layout: PageLayout::new(
                        &config,
                        layer,
                        shape.num_kv_heads,
                        shape.k_dim,
                        shape.v_dim,
                    )?,
                    ops,
                };
                let blocks = tokens.div_ceil(config.group_size);
                Self::Ott(Box::new(Kept {
                    config,
                    cache: Cache::new(vec![spec], blocks + 1, 1),
                    table: (1..=blocks).collect(),
                    tokens: 0,
                }))
            }
            Format::Codec(codec) => Self::Rounded(Rounded {
                codec,
                ops: CpuOps::best()?,
                k: vec![Vec::new(); shape.num_kv_heads],
                v: vec![Vec::new(); shape.num_kv_heads],
                tokens: 0,
            }),
        })
    }

    /// Forget everything.
    pub fn clear(&mut self) {
        match self {
            Self::Ott(kept) => {
                kept.cache.reset();
                kept.tokens = 0;
            }
            Self::Rounded(rounded) => {
                let heads = rounded.k.iter_mut().chain(&mut rounded.v);
                heads.for_each(Vec::clear);
                rounded.tokens = 0;
            }
        }
    }

    /// Tokens kept.
    pub fn tokens(&self) -> usize {
        match self {
            Self::Ott(kept) => kept.tokens,
            Self::Rounded(rounded) => rounded.tokens,
        }
    }

    /// Keep new tokens, and attend as if each were decoded: `(num_heads, tokens, v_dim)`.
    pub fn attend(&mut self, q: &Tensor, k: &Tensor, v: &Tensor, attn: KvAttn) -> Result<Vec<f32>> {
        match self {
            Self::Ott(kept) => kept.attend(q, k, v, attn),
            Self::Rounded(rounded) => rounded.attend(q, k, v, attn),
        }
    }

    /// Add what is held to `held`.
    pub fn count(&self, held: &mut Held) {
        let Self::Ott(kept) = self else { return };
        let (Ok(layer), Ok(stats)) = (kept.cache.layer(0), kept.cache.stats(0)) else {
            return;
        };
        held.bytes += kept.cache.allocated_bytes();
        held.traced.push(stats.traced_tokens);
        let pages = stats.sealed_blocks;
        for (i, block) in kept.table.iter().enumerate().take(pages) {
            let heads = 0..layer.spec().layout.num_kv_heads;
            for head in heads {
                let slots = layer.head(*block, head).traced().iter();
                let position = |slot: &u8| i * kept.config.group_size + usize::from(*slot);
                held.positions.extend(slots.map(position));
            }
        }
    }
}

impl Kept {
    fn attend(&mut self, q: &Tensor, k: &Tensor, v: &Tensor, attn: KvAttn) -> Result<Vec<f32>> {
        let (num_heads, new, k_dim, v_dim) = (q.dim(1)?, q.dim(2)?, q.dim(3)?, v.dim(3)?);
        let (q, k, mut v) = (numbers(q)?, numbers(k)?, numbers(v)?);
        // What the seam does to values; this is below it.
        let turned = self.config.rotation == Rotation::Values;
        if turned {
            let mut wide = vec![0f32; v_dim];
            for v in v.chunks_exact_mut(v_dim) {
                f16::widen(v, &mut wide);
                rotate(&mut wide);
                f16::narrow(&wide, v);
            }
        }
        let mut out = vec![0f32; num_heads * new * v_dim];
        let mut done = 0;
        while done < new {
            // Group i is sealed by the token that makes them (i + 1) G + R: a step ends before it.
            let (group, residual) = (self.config.group_size, self.config.residual);
            let seals = (self.tokens + 1).saturating_sub(residual) / group;
            let most = (seals + 1) * group + residual - 1 - self.tokens;
            let step = most.min(new - done);
            let row = Row {
                seq: 1,
                past: self.tokens,
                new: step,
                table: &self.table,
            };
            let rows = self.cache.begin(&[row])?;
            let from = |x, dim| of_step(x, new, done, dim);
            let asked = NewQueries {
                tokens: from(&q[..], k_dim),
                num_heads,
            };
            let (keys, values) = (from(&k[..], k_dim), from(&v[..], v_dim));
            let stored = NewTokens {
                row: &rows[0],
                q: Some(asked),
                k: keys,
                v: values,
            };
            let faults = self.cache.append(0, &[stored])?;
            ensure!(faults.is_empty(), "{faults:?}");
            self.cache.end(|_| false)?;
            let mut queries = Vec::with_capacity(num_heads * step * k_dim);
            for head in 0..num_heads {
                let head = &q[(head * new + done) * k_dim..][..step * k_dim];
                queries.extend(head.iter().map(|x| x.to_f32() * attn.scale));
            }
            let queries = Queries {
                q: &queries,
                num_heads,
                tokens: step,
                softcap: attn.softcap,
            };
            let mut attended = vec![0f32; num_heads * step * v_dim];
            decode(&*self.cache.layer(0)?, &rows, &queries, &mut attended);
            for (head, attended) in attended.chunks_exact(step * v_dim).enumerate() {
                let at = (head * new + done) * v_dim;
                out[at..at + attended.len()].copy_from_slice(attended);
            }
            (done, self.tokens) = (done + step, self.tokens + step);
        }
        if turned {
            out.par_chunks_exact_mut(v_dim).for_each(rotate_back);
        }
        Ok(out)
    }
}

impl Rounded {
    fn attend(&mut self, q: &Tensor, k: &Tensor, v: &Tensor, attn: KvAttn) -> Result<Vec<f32>> {
        let (num_heads, new, k_dim, v_dim) = (q.dim(1)?, q.dim(2)?, q.dim(3)?, v.dim(3)?);
        let (k, v) = (self.codec.round(k, v)).context("rounding keys and values")?;
        let add = |heads: &mut [Vec<f32>], x: &[f16], dim: usize| {
            for (head, x) in heads.iter_mut().zip(x.chunks_exact(new * dim)) {
                head.extend(x.iter().map(|x| x.to_f32()));
            }
        };
        add(&mut self.k, &k, k_dim);
        add(&mut self.v, &v, v_dim);
        let past = self.tokens;
        self.tokens += new;
        let q: Vec<f32> = (numbers(q)?.iter())
            .map(|x| x.to_f32() * attn.scale)
            .collect();
        let mut out = vec![0f32; num_heads * new * v_dim];
        let heads = q
            .chunks_exact(new * k_dim)
            .zip(out.chunks_exact_mut(new * v_dim));
        let tiles = heads.enumerate().flat_map(|(head, (q, out))| {
            let parts = q.chunks(TILE * k_dim).zip(out.chunks_mut(TILE * v_dim));
            parts.enumerate().map(move |(i, (q, out))| Tile {
                head,
                position: past + i * TILE,
                q,
                out,
            })
        });
        let tiles: Vec<Tile<'_>> = tiles.collect();
        let ratio = num_heads / self.k.len();
        let this = &*self;
        tiles.into_par_iter().with_max_len(4).for_each(|tile| {
            let head = tile.head / ratio;
            this.tile(tile, head, (k_dim, v_dim), attn.softcap);
        });
        Ok(out)
    }

    fn tile(&self, tile: Tile<'_>, head: usize, (k_dim, v_dim): (usize, usize), cap: Option<f32>) {
        let rows = tile.q.len() / k_dim;
        let seen = tile.position + rows;
        let mut scores = vec![0f32; rows * seen];
        let keys = &self.k[head][..seen * k_dim];
        (self.ops.full_scores)(Full::F32(keys), tile.q, k_dim, &mut scores, seen);
        for (i, scores) in scores.chunks_exact_mut(seen).enumerate() {
            let (scores, hidden) = scores.split_at_mut(tile.position + i + 1);
            hidden.fill(0.0);
            if let Some(cap) = cap {
                scores.iter_mut().for_each(|s| *s = cap * (*s / cap).tanh());
            }
            let max = (self.ops.max)(scores);
            let inverse = 1.0 / (self.ops.exp_sum)(scores, max);
            scores.iter_mut().for_each(|s| *s *= inverse);
        }
        let values = &self.v[head][..seen * v_dim];
        (self.ops.full_sum)(Full::F32(values), &scores, seen, v_dim, tile.out);
    }
}

/// The tokens from `done` on of numbers `(heads, tokens, dim)`.
fn of_step(x: &[f16], tokens: usize, done: usize, dim: usize) -> Tokens<'_, f16> {
    Tokens {
        data: &x[done * dim..],
        head_stride: tokens * dim,
        token_stride: dim,
        dim,
    }
}

fn numbers(x: &Tensor) -> candle_core::Result<Vec<f16>> {
    x.to_dtype(DType::F16)?
        .contiguous()?
        .flatten_all()?
        .to_vec1()
}
