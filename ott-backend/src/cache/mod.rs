//! The lifecycle: append, window, trace, seal; for all layers of a model.
//!
//! A block holds G tokens and is, in each layer, **empty**, **open** (its tokens in full precision,
//! in chunks of 32) or **sealed** (a page). Group `i` of a sequence of `n` tokens is sealed once
//! `n >= (i + 1) G + R`. A page is a function of the tokens up to its end: whatever the batch, the
//! steps in which the tokens came, or the moment of sealing.
//!
//! | event | effect |
//! |---|---|
//! | append | groups that leave the window are sealed, the rest is staged; the newest tokens can be written again |
//! | released | full open blocks are sealed, because they may be hit again; blocks in part are dropped |
//! | allocated | the block is empty |

mod element;
mod gather;
mod layer;
mod page;
mod sample;
mod seal;
mod staging;
mod tile;
mod trace;
mod traced;
mod view;
mod window;

use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use rayon::prelude::*;

pub use element::{Element, Tokens};
pub use layer::{LayerCache, BLOCK_STATE_BYTES};
pub use page::PageHead;
pub use sample::NewQueries;
pub use seal::{seal_groups, LayerSpec, SealedHead};
pub use staging::CHUNK;
pub use tile::{Tile, KEY_STRIDE, TILE};
pub use trace::TraceState;

use crate::error::{Error, Result};

/// One sequence in one step: tokens `0..past` are stored, `new` come now.
#[derive(Clone, Copy, Debug)]
pub struct Row<'a> {
    /// The host's sequence, for messages.
    pub seq: usize,
    /// Tokens stored.
    pub past: usize,
    /// Tokens of this step.
    pub new: usize,
    /// Block ids in order.
    pub table: &'a [usize],
}

impl Row<'_> {
    /// Tokens after this step.
    pub fn end(&self) -> usize {
        self.past.saturating_add(self.new)
    }
}

/// Counts of one layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayerStats {
    /// Blocks that are pages.
    pub sealed_blocks: usize,
    /// Tokens kept in full precision beside pages, over all kv heads.
    pub traced_tokens: usize,
    /// Chunks of the residual window in use.
    pub staging_chunks: usize,
    /// Tokens of all blocks, traced ones and those of the window among them.
    pub tokens: usize,
    /// Tokens that are not sealed.
    pub window_tokens: usize,
    /// Places of the extra store taken by the chain and head that took most; all of them, if tracing
    /// has stopped there.
    pub most_displaced: usize,
    /// Parts of pages, one per head, after which tracing has stopped.
    pub stopped_parts: usize,
}

/// The cache of all layers of a model.
#[derive(Debug)]
pub struct Cache<E> {
    layers: Vec<RwLock<LayerCache<E>>>,
    /// By block: the block before it in its sequence, 0 if none.
    previous: RwLock<Vec<u32>>,
    group_size: usize,
    num_blocks: usize,
}

/// No predecessor: the padding block never holds tokens.
pub const NO_BLOCK: u32 = 0;

impl<E: Element> Cache<E> {
    /// Bytes of one block and bytes beside the blocks, over all layers, at worst.
    pub fn worst_bytes(specs: &[LayerSpec], max_seqs: usize) -> (usize, usize) {
        let layers = specs
            .iter()
            .map(|spec| LayerCache::<E>::worst_bytes(spec, max_seqs));
        let add = |sum: (usize, usize), x: (usize, usize)| {
            (sum.0 + x.0, usize::saturating_add(sum.1, x.1))
        };
        let (block, fixed) = layers.fold((0, 0), add);
        (block + size_of::<u32>(), fixed)
    }

    /// An empty cache of `num_blocks` blocks, the padding block among them.
    pub fn new(specs: Vec<LayerSpec>, num_blocks: usize, max_seqs: usize) -> Self {
        let group_size = specs.first().map_or(1, |s| s.layout.group_size);
        let layer = |spec| RwLock::new(LayerCache::new(spec, num_blocks, max_seqs));
        Self {
            layers: specs.into_iter().map(layer).collect(),
            previous: RwLock::new(vec![NO_BLOCK; num_blocks]),
            group_size,
            num_blocks,
        }
    }

    /// Number of layers.
    pub fn num_layers(&self) -> usize {
        self.layers.len()
    }

    /// Check a step and make room for it in all layers.
    ///
    /// # Errors
    /// If blocks or tokens are missing, or a block is written twice or is sealed.
    pub fn begin(&self, rows: &[Row<'_>]) -> Result<()> {
        check_tables(rows, self.group_size, self.num_blocks)?;
        for layer in &self.layers {
            let mut layer = write(layer);
            rows.iter().try_for_each(|row| layer.check(row))?;
            layer.reserve(rows)?;
        }
        let mut previous = self
            .previous
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        for row in rows {
            let first = (row.past / self.group_size).saturating_sub(1);
            for i in first..row.end().div_ceil(self.group_size) {
                let before = i.checked_sub(1).map(|i| row.table[i] as u32);
                previous[row.table[i]] = before.unwrap_or(NO_BLOCK);
            }
        }
        Ok(())
    }

    /// Store a row's new tokens in one layer. `q` are these tokens' queries, by which errors of keys are
    /// weighed.
    ///
    /// # Errors
    /// See [`LayerCache::append`].
    pub fn append(
        &self,
        layer: usize,
        row: &Row<'_>,
        q: Option<&NewQueries<'_, E>>,
        k: &Tokens<'_, E>,
        v: &Tokens<'_, E>,
    ) -> Result<()> {
        write(self.lock(layer)?).append(row, q, k, v)
    }

    /// One layer, to be read.
    ///
    /// # Errors
    /// If there is no such layer.
    pub fn layer(&self, layer: usize) -> Result<RwLockReadGuard<'_, LayerCache<E>>> {
        Ok(read(self.lock(layer)?))
    }

    /// Blocks were handed out: what they held is dead.
    pub fn allocated(&self, blocks: &[usize]) {
        for layer in &self.layers {
            let mut layer = write(layer);
            for &block in blocks.iter().filter(|b| **b < self.num_blocks) {
                layer.clear(block);
            }
        }
    }

    /// A sequence gave up blocks, in table order. Full ones are sealed, others forgotten. One that
    /// cannot be sealed is forgotten too: whoever reads it gets an error, not wrong numbers.
    pub fn released(&self, blocks: &[usize]) {
        let mut before = None;
        for &block in blocks.iter().filter(|b| **b < self.num_blocks) {
            let mut layers = self.layers.iter();
            if !layers.all(|layer| read(layer).held(block) == self.group_size)
                || self.flush(block, before).is_err()
            {
                self.layers
                    .iter()
                    .for_each(|layer| write(layer).clear(block));
            }
            before = Some(block);
        }
    }

    /// Seal a block behind the one before it in the table that is released. Sequences that hit it may
    /// have a copy of that one before it, which is still open; so for the table's first block alone
    /// it is asked what was before it in the last step.
    fn flush(&self, block: usize, before: Option<usize>) -> Result<()> {
        let previous = self.previous.read().unwrap_or_else(PoisonError::into_inner);
        let previous = before.or(match previous[block] {
            NO_BLOCK => None,
            before => Some(before as usize),
        });
        self.layers.par_iter().try_for_each(|layer| {
            let sealed = read(layer).is_sealed(block);
            match sealed {
                true => Ok(()),
                false => write(layer).flush(block, previous),
            }
        })
    }

    /// Forget everything.
    pub fn reset(&self) {
        self.layers.iter().for_each(|layer| write(layer).reset());
        let mut previous = self
            .previous
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        previous.fill(NO_BLOCK);
    }

    /// Bytes held now, all layers.
    pub fn allocated_bytes(&self) -> usize {
        let layers = self.layers.iter();
        let layers: usize = layers.map(|layer| read(layer).allocated_bytes()).sum();
        layers + self.num_blocks * size_of::<u32>()
    }

    fn lock(&self, layer: usize) -> Result<&RwLock<LayerCache<E>>> {
        self.layers.get(layer).ok_or(Error::NoSuchLayer {
            layer,
            layers: self.layers.len(),
        })
    }
}

/// Whether the tables of a step cover its tokens and no block is written twice.
///
/// # Errors
/// Naming the sequence or the block.
pub fn check_tables(rows: &[Row<'_>], group_size: usize, num_blocks: usize) -> Result<()> {
    if rows.is_empty() {
        return Err(Error::EmptyPlan);
    }
    let mut written = std::collections::HashSet::new();
    for row in rows {
        let (seq, past, new) = (row.seq, row.past, row.new);
        let Some(blocks) = row.table.get(..row.end().div_ceil(group_size)) else {
            return Err(Error::ShortTable {
                seq,
                past,
                new,
                blocks: row.table.len(),
                group: group_size,
            });
        };
        let outside = |b: &&usize| !(1..num_blocks).contains(*b);
        if let Some(&block) = blocks.iter().find(outside) {
            return Err(Error::NoSuchBlock { block, num_blocks });
        }
        for &block in &blocks[past / group_size..] {
            if !written.insert(block) {
                return Err(Error::SharedWrite { block, seq });
            }
        }
    }
    Ok(())
}

// A lock is poisoned by a panic that ended a request; `reset` brings a sane state.
fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}
