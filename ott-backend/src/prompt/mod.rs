//! Prompt attention: the new tokens of a step over their past and each other, causal.
//!
//! New tokens are read in full precision, as the model computed them; the past, if a prefix was
//! hit, as it is stored. Queries go in tiles of about [`QUERIES`] rows, the query heads of one kv
//! head beneath each other, so that they share every key and value. Each tile makes one pass over
//! the keys and values that its last token sees, [`TILE`] tokens at a time, with an online softmax
//! between two matrix products (FlashAttention-2, arXiv 2307.08691, algorithm 1). Neither scores
//! nor past are ever there as a whole: a thread holds one tile of each.
//!
//! Tiles are independent and cut the same way whatever the batch and the number of threads: so are
//! the results, bit for bit.

mod gemm;
mod softmax;

use rayon::prelude::*;

use crate::cache::{Element, LayerCache, RowPlan, Tile, Tokens, KEY_STRIDE, TILE};
use gemm::{multiply, Matrix, MatrixMut, Write};
use softmax::Softmax;

/// Rows of a tile of queries, over the query heads of one kv head: enough that reading keys and
/// values costs little beside multiplying with them, and few enough for the second-level cache.
pub const QUERIES: usize = 256;

/// One row's new tokens, which are not stored yet.
#[derive(Clone, Copy, Debug)]
pub struct Prompt<'a, E> {
    /// The row.
    pub row: &'a RowPlan,
    /// Queries, `(num_heads, new, k_dim)`.
    pub q: Tokens<'a, E>,
    /// Keys, `(num_kv_heads, new, k_dim)`.
    pub k: Tokens<'a, E>,
    /// Values, `(num_kv_heads, new, v_dim)`.
    pub v: Tokens<'a, E>,
}

/// How scores are made.
#[derive(Clone, Copy, Debug)]
pub struct Scores {
    /// Query heads; a multiple of the kv heads.
    pub num_heads: usize,
    /// Factor on `q . k`.
    pub scale: f32,
    /// Scores become `softcap * tanh(score / softcap)`, if set.
    pub softcap: Option<f32>,
}

/// Attention of the rows' new tokens over past and new tokens; `out (rows, num_heads, tokens,
/// v_dim)` holds zeros, which is what padding beyond a row's `new` keeps.
pub fn attend<E: Element>(
    layer: &LayerCache<E>,
    rows: &[Prompt<'_, E>],
    scores: Scores,
    tokens: usize,
    out: &mut [E],
) {
    let layout = &layer.spec().layout;
    let ratio = scores.num_heads / layout.num_kv_heads;
    let step = (QUERIES / ratio).clamp(1, TILE);
    let mut tasks = Vec::new();
    let mut heads = out.chunks_exact_mut((tokens * layout.v_dim).max(1));
    for new in rows {
        for head in 0..layout.num_kv_heads {
            let first = tasks.len();
            tasks.extend((0..new.row.new).step_by(step).map(|start| Task {
                layer,
                new,
                scores,
                head,
                tokens: (start, step.min(new.row.new - start)),
                out: Vec::with_capacity(ratio),
            }));
            for out in heads.by_ref().take(ratio) {
                let strips = out[..new.row.new * layout.v_dim].chunks_mut(step * layout.v_dim);
                let tasks = tasks[first..].iter_mut().zip(strips);
                tasks.for_each(|(task, strip)| task.out.push(strip));
            }
        }
    }
    // Late tiles see more keys than early ones: every tile may be taken by another thread.
    tasks.into_par_iter().with_max_len(1).for_each(Task::run);
}

/// Some new tokens in the query heads of one kv head.
struct Task<'a, E> {
    layer: &'a LayerCache<E>,
    new: &'a Prompt<'a, E>,
    scores: Scores,
    head: usize,
    /// The first one among the row's new tokens, and how many they are.
    tokens: (usize, usize),
    /// By query head, `(tokens, v_dim)`.
    out: Vec<&'a mut [E]>,
}

/// What a task holds. Its rows are its tokens in the first query head, then in the next.
struct Scratch {
    /// `(rows, k_dim)`, times the scale.
    q: Vec<f32>,
    tile: Tile,
    /// `(rows, TILE)`: scores, then weights.
    weights: Vec<f32>,
    softmax: Softmax,
}

impl<E: Element> Task<'_, E> {
    fn run(mut self) {
        let layout = &self.layer.spec().layout;
        let rows = self.out.len() * self.tokens.1;
        let mut scratch = Scratch {
            q: self.queries(),
            tile: Tile::new(layout.k_dim, layout.v_dim),
            weights: vec![0.0; rows * TILE],
            softmax: Softmax::new(
                self.layer.spec().ops,
                self.scores.softcap,
                rows,
                layout.v_dim,
            ),
        };
        let (past, stored) = (self.new.row.past, self.new.row.before());
        for start in (0..past).step_by(TILE) {
            let end = past.min(start + TILE);
            let tile = &mut scratch.tile;
            self.layer.read(&stored, self.head, start..end, tile);
            self.take(end - start, |_| end - start, &mut scratch);
        }
        let (first, len) = self.tokens;
        for start in (0..first + len).step_by(TILE) {
            let count = TILE.min(first + len - start);
            let (k, v) = (&self.new.k, &self.new.v);
            let token = |t| (k.row(self.head, start + t), v.row(self.head, start + t));
            scratch.tile.put(0, count, token);
            let seen = |row: usize| (first + row % len + 1).saturating_sub(start).min(count);
            self.take(count, seen, &mut scratch);
        }
        let outs = self.out.iter_mut();
        let outs = outs.flat_map(|out| out.chunks_exact_mut(layout.v_dim));
        scratch.softmax.finish(outs);
    }

    /// Queries `(rows, k_dim)` times the scale.
    fn queries(&self) -> Vec<f32> {
        let (k_dim, ratio) = (self.layer.spec().layout.k_dim, self.out.len());
        let (first, len) = self.tokens;
        let mut q = vec![0.0; ratio * len * k_dim];
        for (row, q) in q.chunks_exact_mut(k_dim).enumerate() {
            let head = self.head * ratio + row / len;
            E::widen(self.new.q.row(head, first + row % len), q);
            q.iter_mut().for_each(|x| *x *= self.scores.scale);
        }
        q
    }

    /// Attend to the tile's first `count` tokens, of which row `i` sees the first `seen(i)`.
    fn take(&self, count: usize, seen: impl Fn(usize) -> usize, scratch: &mut Scratch) {
        let layout = &self.layer.spec().layout;
        let (k_dim, v_dim) = (layout.k_dim, layout.v_dim);
        let Scratch {
            q,
            tile,
            weights,
            softmax,
        } = scratch;
        let rows = q.len() / k_dim;
        multiply(
            MatrixMut {
                data: weights,
                stride: TILE,
            },
            Matrix {
                data: q,
                stride: k_dim,
            },
            Matrix {
                data: &tile.keys,
                stride: KEY_STRIDE,
            },
            (rows, count, k_dim),
            Write::Replace,
        );
        for (i, weights) in weights.chunks_exact_mut(TILE).enumerate() {
            softmax.weigh(i, &mut weights[..count], seen(i));
        }
        multiply(
            MatrixMut {
                data: &mut softmax.sums,
                stride: v_dim,
            },
            Matrix {
                data: weights,
                stride: TILE,
            },
            Matrix {
                data: &tile.values,
                stride: v_dim,
            },
            (rows, v_dim, count),
            Write::Add,
        );
    }
}
