//! The window of a layer: what open blocks hold in full precision.

use super::element::{Element, Tokens};
use super::layer::{Block, LayerCache, MAX_CHUNKS};
use super::sample::{NewQueries, NewSamples};
use super::staging::{Staging, CHUNK};
use super::traced::NONE;
use super::Row;
use crate::config::Weigh;
use crate::error::{Error, Result};
use crate::weigh::SAMPLED;

impl<E: Element> LayerCache<E> {
    /// Write the new tokens of a row that lie in group `i`, which stays open.
    pub(super) fn stage(
        &mut self,
        row: &Row<'_>,
        i: usize,
        k: &Tokens<'_, E>,
        v: &Tokens<'_, E>,
    ) -> Result<()> {
        let group = self.spec.layout.group_size;
        let (block, start) = (row.table[i], i * group);
        let len = group.min(row.end() - start);
        let mut held: Vec<u32> = self.chunks_of(block).to_vec();
        while held.len() < len.div_ceil(CHUNK) {
            let Some(chunk) = self.staging.take() else {
                held[self.chunks_of(block).len()..]
                    .iter()
                    .for_each(|c| self.staging.give(*c));
                return Err(self.staging_full());
            };
            held.push(chunk);
        }
        for surplus in held.drain(len.div_ceil(CHUNK)..) {
            self.staging.give(surplus);
        }
        for position in row.past.max(start)..start + len {
            let (t, new) = (position - start, position - row.past);
            for head in 0..self.spec.layout.num_kv_heads {
                let (k, v) = (k.row(head, new), v.row(head, new));
                self.staging.write(held[t / CHUNK], head, t % CHUNK, k, v);
            }
        }
        let mut chunks = [NONE; MAX_CHUNKS];
        chunks[..held.len()].copy_from_slice(&held);
        let len = len as u32;
        self.blocks[block] = Block::Open { chunks, len };
        Ok(())
    }

    /// Samples of a row's new queries, if keys are weighed by them.
    pub(super) fn samples(
        &self,
        row: &Row<'_>,
        q: Option<&NewQueries<'_, E>>,
    ) -> Option<NewSamples<E>> {
        let layout = &self.spec.layout;
        match self.spec.config.weigh {
            Weigh::None => None,
            Weigh::Queries => Some(NewSamples::new(row, q, layout.num_kv_heads, layout.k_dim)),
        }
    }

    /// Write the new samples of a row from place `first` of the sequence on; their tokens are staged.
    pub(super) fn stage_samples(&mut self, row: &Row<'_>, first: usize, samples: &NewSamples<E>) {
        let group = self.spec.layout.group_size;
        let places = samples.places();
        for place in places.start.max(first)..places.end {
            let t = place * SAMPLED % group;
            let chunk = self.chunks_of(row.table[place * SAMPLED / group])[t / CHUNK];
            for head in 0..self.spec.layout.num_kv_heads {
                if let Some(sample) = samples.get(place, head) {
                    let i = t % CHUNK / SAMPLED;
                    self.staging.write_sample(chunk, head, i, sample);
                }
            }
        }
    }

    pub(super) fn chunks_of(&self, block: usize) -> &[u32] {
        match &self.blocks[block] {
            Block::Open { chunks, len } => &chunks[..(*len as usize).div_ceil(CHUNK)],
            _ => &[],
        }
    }

    pub(super) fn free_chunks(&mut self, block: usize) {
        if let Block::Open { chunks, len } = self.blocks[block] {
            for chunk in &chunks[..(len as usize).div_ceil(CHUNK)] {
                self.staging.give(*chunk);
            }
        }
    }

    pub(super) fn staging_full(&self) -> Error {
        Error::StagingFull {
            layer: self.spec.layer,
            max_seqs: self.max_seqs,
        }
    }
}

/// A token of an open block. What is not there reads as nothing; `check` has refused that before.
pub(super) fn staged<'a, E: Element>(
    staging: &'a Staging<E>,
    block: &Block,
    t: usize,
    head: usize,
) -> (&'a [E], &'a [E]) {
    match block {
        Block::Open { chunks, .. } => staging.token(chunks[t / CHUNK], head, t % CHUNK),
        _ => (&[], &[]),
    }
}

/// Sample `i` of an open block.
pub(super) fn staged_sample<'a, E: Element>(
    staging: &'a Staging<E>,
    block: &Block,
    i: usize,
    head: usize,
) -> &'a [E] {
    let t = i * SAMPLED;
    match block {
        Block::Open { chunks, .. } => staging.sample(chunks[t / CHUNK], head, t % CHUNK / SAMPLED),
        _ => &[],
    }
}
