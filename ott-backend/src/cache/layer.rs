//! The bytes of one layer: pages, the window's chunks, traced tokens.

use super::element::Element;
use super::sample::NewSamples;
use super::seal::{seal_groups, LayerSpec, SealedHead};
use super::staging::Staging;
use super::trace::TraceState;
use super::traced::{TracedStore, NONE};
use super::{NewTokens, RowPlan, CHUNK};
use crate::config::Weigh;
use crate::error::{Error, Result};
use crate::weigh::SAMPLED;

/// The cache of one layer.
#[derive(Debug)]
pub struct LayerCache<E> {
    pub(super) spec: LayerSpec,
    /// `(num_blocks, page_bytes)`.
    pub(super) pages: Vec<u8>,
    /// `(num_blocks, num_kv_heads, N)`: where traced tokens lie, in the order of the page's slots.
    /// Not in the page, which is a function of the prefix alone.
    pub(super) places: Vec<u32>,
    pub(super) staging: Staging<E>,
    pub(super) traced: TracedStore<E>,
}

impl<E: Element> LayerCache<E> {
    /// Bytes of one block and bytes beside the blocks, at worst.
    pub fn worst_bytes(spec: &LayerSpec, max_seqs: usize) -> (usize, usize) {
        let layout = &spec.layout;
        let traced = layout.num_kv_heads * layout.outliers;
        let (token, beside) = TracedStore::<E>::worst_bytes(layout);
        let block = layout.page_bytes() + traced * (size_of::<u32>() + token);
        let staging = Staging::<E>::worst_bytes(layout, &spec.config, spec.chunks(max_seqs));
        let beside = if traced > 0 { beside } else { 0 };
        (block, staging.saturating_add(beside))
    }

    /// An empty cache.
    pub fn new(spec: LayerSpec, num_blocks: usize) -> Self {
        let layout = &spec.layout;
        Self {
            pages: vec![0; num_blocks * layout.page_bytes()],
            places: vec![NONE; num_blocks * layout.num_kv_heads * layout.outliers],
            staging: Staging::new(layout, &spec.config),
            traced: TracedStore::new(layout),
            spec,
        }
    }

    /// Make chunks up to number `last`.
    pub(super) fn make_chunks(&mut self, last: u32) {
        self.staging.make(last);
    }

    /// Store the new tokens of all rows, but for those that hold numbers that cannot be kept: which rows, and why.
    pub(super) fn append(&mut self, rows: &[NewTokens<'_, E>]) -> Vec<(usize, Error)> {
        let mut faults = Vec::new();
        let mut good = Vec::with_capacity(rows.len());
        for (i, new) in rows.iter().enumerate() {
            let samples = self.samples(new);
            // A chunk that one row seals from may be given to another row's window: all seal before any stores.
            match self
                .check_numbers(new)
                .and_then(|()| self.seal(new.row, Some(new), samples.as_ref()))
            {
                Ok(()) => good.push((new, samples)),
                Err(fault) => faults.push((i, fault)),
            }
        }
        for (new, samples) in good {
            self.stage(new);
            if let Some(samples) = samples {
                self.stage_samples(new.row, &samples);
            }
        }
        faults
    }

    /// Make pages `pages_before..pages` of a row whose tokens are all stored.
    pub(super) fn seal_stored(&mut self, row: &RowPlan) -> Result<()> {
        self.seal(row, None, None)
    }

    /// What f16 cannot hold would fail later, when its group is sealed: refuse it now.
    fn check_numbers(&self, new: &NewTokens<'_, E>) -> Result<()> {
        for (what, x) in [("key", &new.k), ("value", &new.v)] {
            for head in 0..self.spec.layout.num_kv_heads {
                if !(0..new.row.new).all(|t| E::fit(x.row(head, t))) {
                    return Err(Error::NotRepresentable {
                        layer: self.spec.layer,
                        what,
                        head,
                    });
                }
            }
        }
        Ok(())
    }

    /// Forget the traced tokens of a block.
    pub fn clear(&mut self, block: usize) {
        let per_block = self.spec.layout.num_kv_heads * self.spec.layout.outliers;
        let places = self
            .places
            .get_mut(block * per_block..(block + 1) * per_block);
        for place in places.into_iter().flatten().filter(|place| **place != NONE) {
            self.traced.remove(*place);
            *place = NONE;
        }
    }

    /// Forget everything.
    pub fn reset(&mut self) {
        self.places.fill(NONE);
        self.traced.reset();
    }

    /// Make pages `pages_before..pages` of a row; all or none.
    fn seal(
        &mut self,
        row: &RowPlan,
        new: Option<&NewTokens<'_, E>>,
        samples: Option<&NewSamples<E>>,
    ) -> Result<()> {
        let (first, end) = (row.pages_before, row.pages);
        if first >= end {
            return Ok(());
        }
        let before = self.trace_states(first.checked_sub(1).map(|i| row.table[i]));
        let Self { spec, staging, .. } = &*self;
        let start = first * spec.layout.group_size;
        let chunk = |position: usize| row.chunks_before[(position - start) / CHUNK];
        let source = |position: usize, head: usize| match (new, position.checked_sub(row.past)) {
            (Some(new), Some(t)) => (new.k.row(head, t), new.v.row(head, t)),
            _ => staging.token(chunk(position), head, position % CHUNK),
        };
        let sample = |place: usize, head: usize| {
            let new = samples.and_then(|samples| samples.get(place, head));
            new.unwrap_or_else(|| {
                let position = place * SAMPLED;
                staging.sample(chunk(position), head, position % CHUNK / SAMPLED)
            })
        };
        let sealed = seal_groups(spec, (first, end - first), &before, &source, &sample)?;
        let group = spec.layout.group_size;
        let traced: Vec<(usize, usize, Vec<E>, Vec<E>)> = traced_tokens(&sealed, |i, head, t| {
            let (k, v) = source((first + i) * group + t, head);
            (row.table[first + i], head, k.to_vec(), v.to_vec())
        });
        for (i, heads) in sealed.into_iter().enumerate() {
            self.store(row.table[first + i], &heads);
        }
        for (block, head, k, v) in traced {
            self.keep(block, head, &k, &v);
        }
        Ok(())
    }

    /// Write a row's new tokens that are in the window after the step.
    fn stage(&mut self, new: &NewTokens<'_, E>) {
        let row = new.row;
        let start = row.pages * self.spec.layout.group_size;
        for position in row.past.max(start)..row.end() {
            let chunk = row.chunks[(position - start) / CHUNK];
            for head in 0..self.spec.layout.num_kv_heads {
                let t = position - row.past;
                let (k, v) = (new.k.row(head, t), new.v.row(head, t));
                self.staging.write(chunk, head, position % CHUNK, k, v);
            }
        }
    }

    /// Samples of a row's new queries, if keys are weighed by them.
    fn samples(&self, new: &NewTokens<'_, E>) -> Option<NewSamples<E>> {
        let layout = &self.spec.layout;
        match self.spec.config.weigh {
            Weigh::None => None,
            Weigh::Queries => Some(NewSamples::new(
                (new.row.past, new.row.end()),
                new.q.as_ref(),
                layout.num_kv_heads,
                layout.k_dim,
            )),
        }
    }

    /// Write those of a row's new samples whose tokens are in the window after the step.
    fn stage_samples(&mut self, row: &RowPlan, samples: &NewSamples<E>) {
        let start = row.pages * self.spec.layout.group_size;
        let places = samples.places();
        for place in places.start.max(start / SAMPLED)..places.end {
            let position = place * SAMPLED;
            let chunk = row.chunks[(position - start) / CHUNK];
            for head in 0..self.spec.layout.num_kv_heads {
                if let Some(sample) = samples.get(place, head) {
                    let i = position % CHUNK / SAMPLED;
                    self.staging.write_sample(chunk, head, i, sample);
                }
            }
        }
    }

    fn trace_states(&self, previous: Option<usize>) -> Vec<TraceState> {
        let layout = &self.spec.layout;
        let state = |head| match previous {
            Some(block) => TraceState::read(layout, self.head(block, head).bytes),
            None => TraceState::new(layout.outliers),
        };
        (0..layout.num_kv_heads).map(state).collect()
    }

    /// Put a page into its place.
    fn store(&mut self, block: usize, heads: &[SealedHead]) {
        self.clear(block);
        let bytes = self.spec.layout.page_bytes();
        let page = &mut self.pages[block * bytes..(block + 1) * bytes];
        for (head, sealed) in heads.iter().enumerate() {
            page[self.spec.layout.head(head)].copy_from_slice(&sealed.bytes);
        }
    }

    /// Keep a traced token of a page, after those that were kept before.
    fn keep(&mut self, block: usize, head: usize, k: &[E], v: &[E]) {
        let outliers = self.spec.layout.outliers;
        let at = (block * self.spec.layout.num_kv_heads + head) * outliers;
        let places = &mut self.places[at..at + outliers];
        if let Some(place) = places.iter_mut().find(|p| **p == NONE) {
            *place = self.traced.insert(k, v);
        }
    }
}

/// `token(group, head, place)` of all traced tokens, in that order.
fn traced_tokens<T>(
    sealed: &[Vec<SealedHead>],
    token: impl Fn(usize, usize, usize) -> T,
) -> Vec<T> {
    let mut tokens = Vec::new();
    for (i, heads) in sealed.iter().enumerate() {
        for (head, part) in heads.iter().enumerate() {
            tokens.extend(part.traced.iter().map(|t| token(i, head, usize::from(*t))));
        }
    }
    tokens
}
