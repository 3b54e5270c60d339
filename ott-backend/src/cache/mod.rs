//! The cache of all layers of a model: append, window, trace, seal.
//!
//! Which blocks are pages and which chunks hold the window is decided once for all layers, by
//! [`ott_kernels::blocks`]; a layer keeps bytes. Group `i` of a sequence of `n` tokens is a page once
//! `n >= (i + 1) G + R`. A page is a function of the tokens up to its end: whatever the batch, the
//! steps in which the tokens came, or the moment of sealing.
//!
//! | call | effect |
//! |---|---|
//! | [`Cache::begin`] | a step is planned; stored groups that leave the window are sealed |
//! | [`Cache::append`] | in one layer, new groups that leave the window are sealed and the other new tokens are staged |
//! | [`Cache::end`] | what the step wrote counts; a step without it is undone |
//! | [`Cache::released`] | full blocks of the window are sealed, because they may be hit again; blocks in part are dropped |
//! | [`Cache::allocated`] | the block is empty |

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

use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use ott_kernels::blocks::{Blocks, Refused};
use rayon::prelude::*;

pub use element::{Element, Tokens};
pub use layer::LayerCache;
pub use ott_kernels::blocks::{Row, RowPlan, Stored, BLOCK_STATE_BYTES, CHUNK};
pub use page::PageHead;
pub use sample::NewQueries;
pub use seal::{seal_groups, LayerSpec, SealedHead};
pub use tile::{Tile, KEY_STRIDE, TILE};
pub use trace::TraceState;

use crate::error::{Error, Result};

/// One row's new tokens in one layer.
#[derive(Clone, Copy, Debug)]
pub struct NewTokens<'a, E> {
    /// What the row reads and writes.
    pub row: &'a RowPlan,
    /// Queries; without them all channels of these tokens' keys count alike.
    pub q: Option<NewQueries<'a, E>>,
    /// Keys, `(num_kv_heads, new, k_dim)`.
    pub k: Tokens<'a, E>,
    /// Values, `(num_kv_heads, new, v_dim)`, in the basis in which they are kept.
    pub v: Tokens<'a, E>,
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
    blocks: Mutex<Blocks>,
}

/// Bytes of a sequence's window in tables, at most.
const WINDOW_TABLE_BYTES: usize = 256;

impl<E: Element> Cache<E> {
    /// Bytes of one block and bytes beside the blocks, over all layers, at worst.
    pub fn worst_bytes(specs: &[LayerSpec], max_seqs: usize) -> (usize, usize) {
        let layers = specs
            .iter()
            .map(|spec| LayerCache::<E>::worst_bytes(spec, max_seqs));
        let add = |sum: (usize, usize), x: (usize, usize)| {
            (sum.0 + x.0, usize::saturating_add(sum.1, x.1))
        };
        let tables = max_seqs.saturating_mul(WINDOW_TABLE_BYTES);
        layers.fold((BLOCK_STATE_BYTES, tables), add)
    }

    /// An empty cache of `num_blocks` blocks, the padding block among them.
    pub fn new(specs: Vec<LayerSpec>, num_blocks: usize, max_seqs: usize) -> Self {
        let (group, residual) = specs.first().map_or((1, 0), |spec| {
            (spec.layout.group_size, spec.config.residual)
        });
        let chunks = specs.first().map_or(0, |spec| spec.chunks(max_seqs));
        Self {
            blocks: Mutex::new(Blocks::new(num_blocks, chunks, group, residual)),
            layers: specs
                .into_iter()
                .map(|spec| RwLock::new(LayerCache::new(spec, num_blocks)))
                .collect(),
        }
    }

    /// Number of layers.
    pub fn num_layers(&self) -> usize {
        self.layers.len()
    }

    /// Plan a step. A step that has not ended is undone.
    ///
    /// # Errors
    /// If blocks or tokens are missing, a block is sealed or is another sequence's too, or the window has no room; the
    /// cache is as it was.
    pub fn begin(&self, rows: &[Row<'_>]) -> Result<Vec<RowPlan>> {
        let mut blocks = self.blocks();
        let plans = blocks.begin(rows, |wave| self.seal(wave));
        self.clear_void(&mut blocks);
        let plans = plans?;
        let chunks = plans.iter().flat_map(|plan| &plan.chunks);
        if let Some(last) = chunks.max() {
            let layers = self.layers.iter();
            layers.for_each(|layer| write(layer).make_chunks(*last));
        }
        Ok(plans)
    }

    /// Store the new tokens of all rows in one layer. By row, why its tokens could not be stored, if so: such a row is left
    /// out, here and in the layers after this one.
    ///
    /// # Errors
    /// If there is no such layer.
    pub fn append(&self, layer: usize, rows: &[NewTokens<'_, E>]) -> Result<Vec<(usize, Error)>> {
        Ok(write(self.lock(layer)?).append(rows))
    }

    /// The step has passed all layers, but for rows of which `failed` is true: those are undone.
    ///
    /// # Errors
    /// If no step runs: it was undone.
    pub fn end(&self, failed: impl Fn(usize) -> bool) -> Result<()> {
        let mut blocks = self.blocks();
        if !blocks.has_step() {
            return Err(Refused::Undone.into());
        }
        blocks.end(failed);
        self.clear_void(&mut blocks);
        Ok(())
    }

    /// One layer, to be read.
    ///
    /// # Errors
    /// If there is no such layer.
    pub fn layer(&self, layer: usize) -> Result<RwLockReadGuard<'_, LayerCache<E>>> {
        Ok(read(self.lock(layer)?))
    }

    /// Blocks were handed out: what they held is dead.
    pub fn allocated(&self, given: &[usize]) {
        let mut blocks = self.blocks();
        blocks.allocated(given);
        self.clear_void(&mut blocks);
        for layer in &self.layers {
            let mut layer = write(layer);
            given.iter().for_each(|block| layer.clear(*block));
        }
    }

    /// A sequence gave up blocks, in table order. Those that are in no other sequence's window are sealed if they are full,
    /// and forgotten if they are not. The blocks that hold nothing to hit any more, these and others.
    pub fn released(&self, seq: usize, given: &[usize]) -> Vec<usize> {
        let mut blocks = self.blocks();
        let lost = blocks.released(seq, given, |wave| self.seal(wave));
        self.clear_void(&mut blocks);
        lost
    }

    /// Forget everything.
    pub fn reset(&self) {
        let mut blocks = self.blocks();
        blocks.reset();
        self.layers.iter().for_each(|layer| write(layer).reset());
    }

    /// Counts of one layer.
    ///
    /// # Errors
    /// If there is no such layer.
    pub fn stats(&self, layer: usize) -> Result<LayerStats> {
        let (counts, pages) = {
            let blocks = self.blocks();
            (blocks.counts(), blocks.pages())
        };
        Ok(LayerStats {
            sealed_blocks: counts.pages,
            staging_chunks: counts.chunks,
            tokens: counts.tokens,
            window_tokens: counts.window,
            ..self.layer(layer)?.count(&pages)
        })
    }

    /// The page of a block in one layer, if it has one.
    pub fn page(&self, layer: usize, block: usize) -> Option<Vec<u8>> {
        let blocks = self.blocks();
        let layer = blocks.is_page(block).then(|| self.layer(layer).ok())??;
        Some(layer.page(block).to_vec())
    }

    /// Bytes held now, all layers.
    pub fn allocated_bytes(&self) -> usize {
        let layers = self.layers.iter();
        let layers: usize = layers.map(|layer| read(layer).allocated_bytes()).sum();
        layers + self.blocks().num_blocks() * BLOCK_STATE_BYTES
    }

    /// Make pages out of stored tokens, in all layers.
    fn seal(&self, wave: &[RowPlan]) -> Result<()> {
        self.layers.par_iter().try_for_each(|layer| {
            let mut layer = write(layer);
            wave.iter().try_for_each(|plan| layer.seal_stored(plan))
        })
    }

    /// Pages that some layers have and that do not count keep no traced tokens.
    fn clear_void(&self, blocks: &mut Blocks) {
        let void = blocks.take_void();
        for layer in self.layers.iter().filter(|_| !void.is_empty()) {
            let mut layer = write(layer);
            void.iter().for_each(|block| layer.clear(*block));
        }
    }

    fn lock(&self, layer: usize) -> Result<&RwLock<LayerCache<E>>> {
        self.layers.get(layer).ok_or(Error::NoSuchLayer {
            layer,
            layers: self.layers.len(),
        })
    }

    fn blocks(&self) -> MutexGuard<'_, Blocks> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// A lock is poisoned by a panic that ended a request; `reset` brings a sane state.
fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}
