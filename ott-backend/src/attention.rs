//! Decode attention: one online softmax over sealed pages, traced tokens and the window.
//!
//! Work per query is O(context), on codes as they lie: scales fold into the query, and into the
//! weights (see [`CpuOps`]). A traced token has its own key and value at its own position; what its
//! slot in the page holds has no weight. Query heads of one kv head share the unpacking.
//!
//! The context is cut into splits of [`SPLIT`] pages, which threads take in any order and which are
//! merged in order: results do not depend on the number of threads. Buffers belong to threads and
//! are kept, so that a layer allocates nothing once they have grown.
//!
//! [`CpuOps`]: crate::cpu::CpuOps

use std::cell::Cell;

use rayon::prelude::*;

use crate::cache::{Element, LayerCache, RowPlan, CHUNK};
use crate::layout::PageLayout;

/// Pages of a split.
pub const SPLIT: usize = 4;

/// Multiplications below which a step stays on the calling thread: some ten microseconds of them,
/// about what it costs to wake another one.
const SMALL: usize = 1 << 18;

thread_local! {
    /// Of a step: the partial softmaxes. Taken while in use: a thread that waits may begin another.
    static PARTIALS: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    /// Of a task.
    static SCRATCH: Cell<Scratch> = Cell::default();
}

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
    rows: &[RowPlan],
    queries: &Queries<'_>,
    out: &mut [f32],
) {
    let layout = &layer.spec().layout;
    let heads = layout.num_kv_heads;
    let len = queries.num_heads / heads * queries.tokens;
    let size = len * (layout.v_dim + 2);
    let task = |i: usize| Task::new(layer, rows, queries, i);
    let count = heads * rows.iter().map(|row| splits(row, layout)).sum::<usize>();
    let mut partials = PARTIALS.take();
    partials.resize(count * size, 0.0);
    let tokens: usize = rows.iter().map(RowPlan::end).sum();
    if tokens * heads * len * (layout.k_dim + layout.v_dim) < SMALL {
        let parts = partials.chunks_exact_mut(size).enumerate();
        parts.for_each(|(i, part)| task(i).run(Partial::new(part, len)));
    } else {
        let parts = partials.par_chunks_exact_mut(size).enumerate();
        parts.for_each(|(i, part)| task(i).run(Partial::new(part, len)));
    }
    let mut parts = partials.chunks_exact_mut(size);
    let outputs = out.chunks_exact_mut(len * layout.v_dim);
    for (i, out) in outputs.enumerate() {
        let row = &rows[i / heads];
        let parts = parts.by_ref().take(splits(row, layout));
        let all = parts.map(|part| Partial::new(part, len));
        if let Some(all) = all.reduce(Partial::merge) {
            all.finish(out);
        }
        for (j, out) in out.chunks_exact_mut(layout.v_dim).enumerate() {
            if j % queries.tokens >= row.new {
                out.fill(0.0);
            }
        }
    }
    PARTIALS.set(partials);
}

fn splits(row: &RowPlan, layout: &PageLayout) -> usize {
    row.end().div_ceil(SPLIT * layout.group_size)
}

/// The queries of one kv head of one row over one split.
struct Task<'a, E> {
    layer: &'a LayerCache<E>,
    row: &'a RowPlan,
    head: usize,
    /// `(gqa ratio, tokens, k_dim)`.
    q: &'a [f32],
    tokens: usize,
    softcap: Option<f32>,
    pages: (usize, usize),
}

/// Softmaxes over some tokens, not divided by their `sum` yet.
struct Partial<'a> {
    max: &'a mut [f32],
    sum: &'a mut [f32],
    /// `(queries, v_dim)`.
    out: &'a mut [f32],
}

/// Buffers of a task.
#[derive(Default)]
struct Scratch {
    /// `(queries, G)`: scores, then weights.
    scores: Vec<f32>,
    /// Scores of one token.
    column: Vec<f32>,
}

impl<'a, E: Element> Task<'a, E> {
    /// Number `i`, counted by row, then by head, then by split.
    fn new(layer: &'a LayerCache<E>, rows: &'a [RowPlan], queries: &Queries<'a>, i: usize) -> Self {
        let layout = &layer.spec().layout;
        let heads = layout.num_kv_heads;
        let (mut r, mut rest) = (0, i);
        while rest >= heads * splits(&rows[r], layout) {
            rest -= heads * splits(&rows[r], layout);
            r += 1;
        }
        let (head, split) = (
            rest / splits(&rows[r], layout),
            rest % splits(&rows[r], layout),
        );
        let size = queries.num_heads / heads * queries.tokens * layout.k_dim;
        Self {
            layer,
            row: &rows[r],
            head,
            q: &queries.q[(r * heads + head) * size..][..size],
            tokens: queries.tokens,
            softcap: queries.softcap,
            pages: (split * SPLIT, (split + 1) * SPLIT),
        }
    }

    fn run(&self, mut partial: Partial<'_>) {
        let layout = &self.layer.spec().layout;
        let group = layout.group_size;
        let len = self.q.len() / layout.k_dim;
        partial.max.fill(f32::NEG_INFINITY);
        partial.sum.fill(0.0);
        partial.out.fill(0.0);
        let mut scratch = SCRATCH.take();
        scratch.scores.resize(len * group, 0.0);
        scratch.column.resize(len, 0.0);
        let end = self.pages.1.min(self.row.end().div_ceil(group));
        for i in self.pages.0..end {
            self.prefetch(i + 1);
            match i < self.row.pages {
                true => self.sealed(i, &mut scratch, &mut partial),
                false => self.open(i, &mut scratch, &mut partial),
            }
        }
        SCRATCH.set(scratch);
    }

    /// Fetch a page while the one before it is computed: heads of pages lie far from each other, so
    /// that the processor does not see where the next one is.
    fn prefetch(&self, i: usize) {
        if let Some(block) = self.row.table[..self.row.pages].get(i) {
            (self.layer.spec().ops.prefetch)(self.layer.head(*block, self.head).bytes);
        }
    }

    /// A sealed page and its traced tokens.
    fn sealed(&self, i: usize, scratch: &mut Scratch, partial: &mut Partial<'_>) {
        let spec = self.layer.spec();
        let (layout, ops) = (&spec.layout, spec.ops);
        let (group, block) = (layout.group_size, self.row.table[i]);
        let page = self.layer.head(block, self.head);
        let scores = &mut scratch.scores[..];
        (ops.key_scores)(&page.keys(), self.q, layout.k_dim, scores);
        for (n, t) in page.traced().iter().map(|t| usize::from(*t)).enumerate() {
            let key = E::full(self.layer.traced(block, self.head, n).0);
            (ops.full_scores)(key, self.q, layout.k_dim, &mut scratch.column, 1);
            for (scores, score) in scores.chunks_exact_mut(group).zip(&scratch.column) {
                scores[t] = *score;
            }
        }
        self.weigh(i * group, group, scores, group, partial);
        for (n, t) in page.traced().iter().map(|t| usize::from(*t)).enumerate() {
            let value = E::full(self.layer.traced(block, self.head, n).1);
            for (p, column) in scores.chunks_exact_mut(group).zip(&mut scratch.column) {
                *column = std::mem::take(&mut p[t]);
            }
            (ops.full_sum)(value, &scratch.column, 1, layout.v_dim, partial.out);
        }
        (ops.value_sum)(&page.values(), scores, partial.out);
    }

    /// Full-precision tokens, chunk by chunk.
    fn open(&self, i: usize, scratch: &mut Scratch, partial: &mut Partial<'_>) {
        let spec = self.layer.spec();
        let (layout, ops) = (&spec.layout, spec.ops);
        let start = i * layout.group_size;
        let len = layout.group_size.min(self.row.end() - start);
        let chunks = &self.row.chunks[(i - self.row.pages) * (layout.group_size / CHUNK)..];
        for (chunk, number) in chunks.iter().take(len.div_ceil(CHUNK)).enumerate() {
            let (keys, values) = self.layer.chunk(*number, self.head);
            let tokens = CHUNK.min(len - chunk * CHUNK);
            let scores = &mut scratch.scores[..self.q.len() / layout.k_dim * CHUNK];
            let keys = E::full(&keys[..tokens * layout.k_dim]);
            (ops.full_scores)(keys, self.q, layout.k_dim, scores, CHUNK);
            self.weigh(start + chunk * CHUNK, tokens, scores, CHUNK, partial);
            let values = E::full(&values[..tokens * layout.v_dim]);
            (ops.full_sum)(values, scores, CHUNK, layout.v_dim, partial.out);
        }
    }

    /// Turn the scores of tokens `start..start + len` into weights relative to the running maximum.
    fn weigh(
        &self,
        start: usize,
        len: usize,
        scores: &mut [f32],
        stride: usize,
        partial: &mut Partial<'_>,
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

impl<'a> Partial<'a> {
    /// In a buffer of `len * (v_dim + 2)` numbers.
    fn new(buffer: &'a mut [f32], len: usize) -> Self {
        let (max, rest) = buffer.split_at_mut(len);
        let (sum, out) = rest.split_at_mut(len);
        Self { max, sum, out }
    }

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

    fn merge(mut self, mut other: Partial<'_>) -> Self {
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
        for ((out, sums), sum) in rows.zip(&*self.sum) {
            let inverse = 1.0 / sum;
            out.iter_mut().zip(sums).for_each(|(o, x)| *o = x * inverse);
        }
    }
}
