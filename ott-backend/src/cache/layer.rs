//! One layer: blocks go from empty over open to sealed.

use std::collections::HashSet;

use super::element::{Element, Tokens};
use super::sample::{NewQueries, NewSamples};
use super::seal::{seal_groups, LayerSpec, SealedHead};
use super::staging::{Staging, CHUNK};
use super::trace::TraceState;
use super::traced::{TracedStore, NONE};
use super::window::{staged, staged_sample};
use super::Row;
use crate::error::{Error, Result};
use crate::weigh::SAMPLED;

/// Most chunks of a block.
pub(super) const MAX_CHUNKS: usize = 128 / CHUNK;

/// What a block holds in one layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Block {
    Empty,
    /// The first `len` tokens in full precision.
    Open {
        chunks: [u32; MAX_CHUNKS],
        len: u32,
    },
    /// A page.
    Sealed,
}

/// Bytes of a block's state in one layer.
pub const BLOCK_STATE_BYTES: usize = size_of::<Block>();

/// The cache of one layer.
#[derive(Debug)]
pub struct LayerCache<E> {
    pub(super) spec: LayerSpec,
    /// `(num_blocks, page_bytes)`.
    pub(super) pages: Vec<u8>,
    pub(super) blocks: Vec<Block>,
    /// `(num_blocks, num_kv_heads, N)`: where traced tokens lie, in the order of the page's slots.
    /// Not in the page, which is a function of the prefix alone.
    pub(super) places: Vec<u32>,
    pub(super) staging: Staging<E>,
    pub(super) traced: TracedStore<E>,
    pub(super) max_seqs: usize,
}

/// Chunks that a sequence's unsealed tokens need at worst: they are fewer than G + R.
fn chunks_per_seq(spec: &LayerSpec) -> usize {
    (spec.layout.group_size + spec.config.residual) / CHUNK
}

impl<E: Element> LayerCache<E> {
    /// Bytes of one block and bytes beside the blocks, at worst.
    pub fn worst_bytes(spec: &LayerSpec, max_seqs: usize) -> (usize, usize) {
        let layout = &spec.layout;
        let traced = layout.num_kv_heads * layout.outliers;
        let (token, beside) = TracedStore::<E>::worst_bytes(layout);
        let block = layout.page_bytes() + BLOCK_STATE_BYTES + traced * (size_of::<u32>() + token);
        let staging = Staging::<E>::worst_bytes(
            layout,
            &spec.config,
            max_seqs.saturating_mul(chunks_per_seq(spec)),
        );
        let beside = if traced > 0 { beside } else { 0 };
        (block, staging.saturating_add(beside))
    }

    /// An empty cache.
    pub fn new(spec: LayerSpec, num_blocks: usize, max_seqs: usize) -> Self {
        let layout = &spec.layout;
        Self {
            pages: vec![0; num_blocks * layout.page_bytes()],
            blocks: vec![Block::Empty; num_blocks],
            places: vec![NONE; num_blocks * layout.num_kv_heads * layout.outliers],
            staging: Staging::new(
                layout,
                &spec.config,
                max_seqs.saturating_mul(chunks_per_seq(&spec)),
            ),
            traced: TracedStore::new(layout),
            spec,
            max_seqs,
        }
    }

    /// Whether the past of a row is there and its new tokens can be written.
    ///
    /// # Errors
    /// Naming the block.
    pub fn check(&self, row: &Row<'_>) -> Result<()> {
        let group = self.spec.layout.group_size;
        for (i, &block) in row.table[..row.past.div_ceil(group)].iter().enumerate() {
            let expected = group.min(row.past - i * group);
            let held = self.held(block);
            if held < expected {
                return Err(Error::MissingTokens {
                    layer: self.spec.layer,
                    block,
                    held,
                    expected,
                });
            }
        }
        for &block in &row.table[row.past / group..row.end().div_ceil(group)] {
            if self.is_sealed(block) {
                return Err(Error::Sealed {
                    layer: self.spec.layer,
                    block,
                    residual: self.spec.config.residual,
                });
            }
        }
        Ok(())
    }

    /// What f16 cannot hold would fail later, when its group is sealed: refuse it now.
    fn check_numbers(&self, row: &Row<'_>, what: &'static str, x: &Tokens<'_, E>) -> Result<()> {
        for head in 0..self.spec.layout.num_kv_heads {
            if !(0..row.new).all(|t| E::fit(x.row(head, t))) {
                return Err(Error::NotRepresentable {
                    layer: self.spec.layer,
                    what,
                    head,
                });
            }
        }
        Ok(())
    }

    /// Make the chunks that the rows of a step will need.
    ///
    /// # Errors
    /// If that is more than the cache was sized for.
    pub fn reserve(&mut self, rows: &[Row<'_>]) -> Result<()> {
        let group = self.spec.layout.group_size;
        // Blocks that are open now or after the step; several rows may share one.
        let mut counted = HashSet::new();
        // Rows are stored one by one, and one before may seal a block that this one shares: what lies
        // before that block then stays open.
        let mut seals = HashSet::new();
        let mut total = self.staging.in_use();
        for row in rows {
            let sealed = self.groups_to_seal(row.end());
            let (mut before, mut after) = (0, 0);
            let first = self.first_open(row, &seals);
            seals.extend(row.table[..sealed].iter().skip(first));
            for i in first..row.end().div_ceil(group) {
                if counted.insert(row.table[i]) {
                    let open = i >= sealed;
                    let len = if open {
                        group.min(row.end() - i * group)
                    } else {
                        0
                    };
                    before += self.chunks_of(row.table[i]).len();
                    after += len.div_ceil(CHUNK);
                }
            }
            // One that shrinks may do so after the others have grown.
            total += after.saturating_sub(before);
        }
        match self.staging.reserve(total) {
            true => Ok(()),
            false => Err(self.staging_full()),
        }
    }

    /// Store the new tokens of a row, sealing the groups that leave the window. Without their queries
    /// all channels of these tokens' keys count alike.
    ///
    /// # Errors
    /// If the past is not there, a written block is sealed, or a number cannot be quantized; the
    /// tokens stored before are as they were then.
    pub fn append(
        &mut self,
        row: &Row<'_>,
        q: Option<&NewQueries<'_, E>>,
        k: &Tokens<'_, E>,
        v: &Tokens<'_, E>,
    ) -> Result<()> {
        self.check(row)?;
        self.check_numbers(row, "key", k)?;
        self.check_numbers(row, "value", v)?;
        let group = self.spec.layout.group_size;
        let sealed = self.groups_to_seal(row.end());
        let samples = self.samples(row, q);
        self.seal(row, sealed, Some((k, v)), samples.as_ref())?;
        let first = (row.past / group).max(sealed);
        for i in first..row.end().div_ceil(group) {
            self.stage(row, i, k, v)?;
        }
        if let Some(samples) = samples {
            self.stage_samples(row, first * group / SAMPLED, &samples);
        }
        Ok(())
    }

    /// Seal a full open block whose predecessor, if any, is sealed.
    ///
    /// # Errors
    /// If it is not full, the predecessor is not sealed, or a number cannot be quantized.
    pub fn flush(&mut self, block: usize, previous: Option<usize>) -> Result<()> {
        if let Some(open) = previous.filter(|b| !self.is_sealed(*b)) {
            return Err(Error::MissingTokens {
                layer: self.spec.layer,
                block: open,
                held: 0,
                expected: self.spec.layout.group_size,
            });
        }
        let table: Vec<usize> = previous.into_iter().chain([block]).collect();
        let row = Row {
            seq: 0,
            past: table.len() * self.spec.layout.group_size,
            new: 0,
            table: &table,
        };
        self.check(&row)?;
        self.seal(&row, table.len(), None, None)
    }

    /// Forget what a block holds.
    pub fn clear(&mut self, block: usize) {
        self.free_chunks(block);
        let per_block = self.spec.layout.num_kv_heads * self.spec.layout.outliers;
        for place in &mut self.places[block * per_block..(block + 1) * per_block] {
            if *place != NONE {
                self.traced.remove(*place);
                *place = NONE;
            }
        }
        self.blocks[block] = Block::Empty;
    }

    /// Forget everything.
    pub fn reset(&mut self) {
        self.blocks.fill(Block::Empty);
        self.places.fill(NONE);
        self.staging.reset();
        self.traced.reset();
    }

    /// Groups of a sequence of `tokens` tokens that are sealed: those with R newer tokens.
    fn groups_to_seal(&self, tokens: usize) -> usize {
        tokens.saturating_sub(self.spec.config.residual) / self.spec.layout.group_size
    }

    /// The first group of a row that is not sealed, if blocks of `seals` are.
    fn first_open(&self, row: &Row<'_>, seals: &HashSet<usize>) -> usize {
        let mut first = row.past / self.spec.layout.group_size;
        let is_open = |block: usize| !self.is_sealed(block) && !seals.contains(&block);
        while first > 0 && is_open(row.table[first - 1]) {
            first -= 1;
        }
        first
    }

    /// Seal the open groups of a row before group `end`; all or none.
    fn seal(
        &mut self,
        row: &Row<'_>,
        end: usize,
        new: Option<(&Tokens<'_, E>, &Tokens<'_, E>)>,
        samples: Option<&NewSamples<E>>,
    ) -> Result<()> {
        let first = self.first_open(row, &HashSet::new());
        if first >= end {
            return Ok(());
        }
        let before = self.trace_states(first.checked_sub(1).map(|i| row.table[i]));
        let Self {
            spec,
            blocks,
            staging,
            ..
        } = &*self;
        let group = spec.layout.group_size;
        let source = |position: usize, head: usize| match (new, position.checked_sub(row.past)) {
            (Some((k, v)), Some(t)) => (k.row(head, t), v.row(head, t)),
            _ => staged(
                staging,
                &blocks[row.table[position / group]],
                position % group,
                head,
            ),
        };
        let sample = |place: usize, head: usize| {
            let new = samples.and_then(|samples| samples.get(place, head));
            new.unwrap_or_else(|| {
                let block = &blocks[row.table[place * SAMPLED / group]];
                staged_sample(staging, block, place % (group / SAMPLED), head)
            })
        };
        let sealed = seal_groups(spec, (first, end - first), &before, &source, &sample)?;
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
        self.blocks[block] = Block::Sealed;
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
