//! Decode attention: one online softmax over sealed pages, traced tokens and the window.
//!
//! Work per query is O(context), on codes as they lie: scales fold into the query, and into the
//! weights (see [`CpuOps`]). A traced token has its own key and value at its own position; what its
//! slot in the page holds has no weight. Query heads of one kv head share the unpacking.
//!
//! The context is cut into splits of [`SPLIT`] pages, which threads take in any order and which are
//! merged in order: results do not depend on the number of threads.
//!
//! [`CpuOps`]: crate::cpu::CpuOps

use rayon::prelude::*;

use crate::cache::{Element, LayerCache, Row, CHUNK};

/// Pages of a split.
pub const SPLIT: usize = 8;

/// Queries of one layer in one step.
#[derive(Clone, Copy, Debug)]
pub struct Queries<'a> {
    /// `(rows, num_heads, tokens, k_dim)`, times the scale of scores.
    pub q: &'a [f32],
    /// Query heads; a multiple of the kv heads.
    pub num_heads: usize,
    /// Tokens per row; those beyond a row's `new` are padding.
    pub tokens: usize,
    /// Scores become `softcap * tanh(score / softcap)`, if set.
    pub softcap: Option<f32>,
}

/// Attention of the rows' new tokens over their past and new tokens, causal. All of them are
/// stored; `out (rows, num_heads, tokens, v_dim)` is overwritten, padding with zeros.
pub fn decode<E: Element>(
    layer: &LayerCache<E>,
    rows: &[Row<'_>],
    queries: &Queries<'_>,
    out: &mut [f32],
) {
    let layout = &layer.spec().layout;
    let heads = layout.num_kv_heads;
    let len = queries.num_heads / heads * queries.tokens;
    let span = SPLIT * layout.group_size;
    let splits = |row: &Row<'_>| row.end().div_ceil(span);
    let tasks: Vec<Task<'_, E>> = rows
        .iter()
        .enumerate()
        .flat_map(|(r, row)| (0..heads).map(move |head| (r, row, head)))
        .flat_map(|(r, row, head)| {
            let at = (r * heads + head) * len * layout.k_dim;
            (0..splits(row)).map(move |split| Task {
                layer,
                row: *row,
                head,
                q: &queries.q[at..at + len * layout.k_dim],
                tokens: queries.tokens,
                softcap: queries.softcap,
                pages: (split * SPLIT, (split + 1) * SPLIT),
            })
        })
        .collect();
    let partials: Vec<Partial> = tasks.par_iter().map(Task::run).collect();
    let mut partials = partials.into_iter();
    let outputs = out.chunks_exact_mut(len * layout.v_dim);
    for (i, out) in outputs.enumerate() {
        let row = &rows[i / heads];
        let all = partials.by_ref().take(splits(row)).reduce(Partial::merge);
        if let Some(all) = all {
            all.finish(out);
        }
        for (j, out) in out.chunks_exact_mut(layout.v_dim).enumerate() {
            if j % queries.tokens >= row.new {
                out.fill(0.0);
            }
        }
    }
}

/// The queries of one kv head of one row over one split.
struct Task<'a, E> {
    layer: &'a LayerCache<E>,
    row: Row<'a>,
    head: usize,
    /// `(gqa ratio, tokens, k_dim)`.
    q: &'a [f32],
    tokens: usize,
    softcap: Option<f32>,
    pages: (usize, usize),
}

/// Softmaxes over some tokens, not divided by their `sum` yet.
struct Partial {
    max: Vec<f32>,
    sum: Vec<f32>,
    /// `(queries, v_dim)`.
    out: Vec<f32>,
}

/// Buffers of a task.
struct Scratch {
    /// `(queries, G)`: scores, then weights.
    scores: Vec<f32>,
    /// A chunk of keys or values as f32.
    wide: Vec<f32>,
    /// Scores of one token.
    column: Vec<f32>,
}

impl<E: Element> Task<'_, E> {
    fn run(&self) -> Partial {
        let layout = &self.layer.spec().layout;
        let group = layout.group_size;
        let len = self.q.len() / layout.k_dim;
        let mut partial = Partial {
            max: vec![f32::NEG_INFINITY; len],
            sum: vec![0.0; len],
            out: vec![0.0; len * layout.v_dim],
        };
        let mut scratch = Scratch {
            scores: vec![0.0; len * group],
            wide: vec![0.0; CHUNK * layout.k_dim.max(layout.v_dim)],
            column: vec![0.0; len],
        };
        let end = self.pages.1.min(self.row.end().div_ceil(group));
        for i in self.pages.0..end {
            match self.layer.is_sealed(self.row.table[i]) {
                true => self.sealed(i, &mut scratch, &mut partial),
                false => self.open(i, &mut scratch, &mut partial),
            }
        }
        partial
    }

    /// A sealed page and its traced tokens.
    fn sealed(&self, i: usize, scratch: &mut Scratch, partial: &mut Partial) {
        let spec = self.layer.spec();
        let (layout, ops) = (&spec.layout, spec.ops);
        let (group, block) = (layout.group_size, self.row.table[i]);
        let page = self.layer.head(block, self.head);
        let scores = &mut scratch.scores[..];
        (ops.key_scores)(&page.keys(), self.q, layout.k_dim, scores);
        page.add_high_scores(self.q, scores, &mut scratch.wide);
        for (n, t) in page.traced().iter().map(|t| usize::from(*t)).enumerate() {
            let key = &mut scratch.wide[..layout.k_dim];
            E::widen(self.layer.traced(block, self.head, n).0, key);
            (ops.full_scores)(key, self.q, layout.k_dim, &mut scratch.column, 1);
            for (scores, score) in scores.chunks_exact_mut(group).zip(&scratch.column) {
                scores[t] = *score;
            }
        }
        self.weigh(i * group, group, scores, group, partial);
        for (n, t) in page.traced().iter().map(|t| usize::from(*t)).enumerate() {
            let value = &mut scratch.wide[..layout.v_dim];
            E::widen(self.layer.traced(block, self.head, n).1, value);
            for (p, column) in scores.chunks_exact_mut(group).zip(&mut scratch.column) {
                *column = std::mem::take(&mut p[t]);
            }
            (ops.full_sum)(value, &scratch.column, 1, layout.v_dim, &mut partial.out);
        }
        (ops.value_sum)(&page.values(), scores, &mut partial.out);
    }

    /// Full-precision tokens, chunk by chunk.
    fn open(&self, i: usize, scratch: &mut Scratch, partial: &mut Partial) {
        let spec = self.layer.spec();
        let (layout, ops) = (&spec.layout, spec.ops);
        let start = i * layout.group_size;
        let len = layout.group_size.min(self.row.end() - start);
        for chunk in 0..len.div_ceil(CHUNK) {
            let block = self.row.table[i];
            let Some((keys, values)) = self.layer.chunk(block, chunk, self.head) else {
                continue; // `check` has refused blocks that hold nothing.
            };
            let tokens = CHUNK.min(len - chunk * CHUNK);
            let scores = &mut scratch.scores[..self.q.len() / layout.k_dim * CHUNK];
            let wide = &mut scratch.wide[..tokens * layout.k_dim];
            E::widen(&keys[..tokens * layout.k_dim], wide);
            (ops.full_scores)(wide, self.q, layout.k_dim, scores, CHUNK);
            self.weigh(start + chunk * CHUNK, tokens, scores, CHUNK, partial);
            let wide = &mut scratch.wide[..tokens * layout.v_dim];
            E::widen(&values[..tokens * layout.v_dim], wide);
            (ops.full_sum)(wide, scores, CHUNK, layout.v_dim, &mut partial.out);
        }
    }

    /// Turn the scores of tokens `start..start + len` into weights relative to the running maximum.
    fn weigh(
        &self,
        start: usize,
        len: usize,
        scores: &mut [f32],
        stride: usize,
        partial: &mut Partial,
    ) {
        let spec = self.layer.spec();
        for (j, scores) in scores.chunks_exact_mut(stride).enumerate() {
            let visible = (self.row.past + j % self.tokens + 1).min(self.row.end());
            let visible = visible.saturating_sub(start).min(len);
            let (scores, hidden) = scores.split_at_mut(visible);
            hidden.fill(0.0);
            if visible == 0 {
                continue;
            }
            if let Some(softcap) = self.softcap {
                scores
                    .iter_mut()
                    .for_each(|s| *s = softcap * (*s / softcap).tanh());
            }
            let max = (spec.ops.max)(scores).max(partial.max[j]);
            partial.rescale(j, max);
            partial.sum[j] += (spec.ops.exp_sum)(scores, max);
        }
    }
}

impl Partial {
    /// Make `max` the maximum of query `j`; not below the present one.
    fn rescale(&mut self, j: usize, max: f32) {
        if max > self.max[j] {
            let v_dim = self.out.len() / self.max.len();
            let shrink = (self.max[j] - max).exp();
            self.sum[j] *= shrink;
            let out = &mut self.out[j * v_dim..(j + 1) * v_dim];
            out.iter_mut().for_each(|o| *o *= shrink);
            self.max[j] = max;
        }
    }

    fn merge(mut self, mut other: Self) -> Self {
        let v_dim = self.out.len() / self.max.len();
        for j in 0..self.max.len() {
            let max = self.max[j].max(other.max[j]);
            self.rescale(j, max);
            other.rescale(j, max);
            self.sum[j] += other.sum[j];
            let range = j * v_dim..(j + 1) * v_dim;
            let pairs = self.out[range.clone()].iter_mut().zip(&other.out[range]);
            pairs.for_each(|(a, b)| *a += b);
        }
        self
    }

    fn finish(&self, out: &mut [f32]) {
        let v_dim = self.out.len() / self.max.len();
        let rows = out
            .chunks_exact_mut(v_dim)
            .zip(self.out.chunks_exact(v_dim));
        for ((out, sums), sum) in rows.zip(&self.sum) {
            let inverse = 1.0 / sum;
            out.iter_mut().zip(sums).for_each(|(o, x)| *o = x * inverse);
        }
    }
}
