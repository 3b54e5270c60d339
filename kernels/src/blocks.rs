//! The life of blocks, for CPU and GPU alike: which blocks are pages, where the residual window lies, what a step reads
//! and writes. It depends on counts of tokens alone, so one copy serves all layers.
//!
//! A block has a **page** (its group is quantised, for good), or **chunks** of the window (its first `len` tokens in full
//! precision), or both while some sequence still reads it from its window, or nothing.
//!
//! A step is planned, run and ended:
//!
//! | call | effect |
//! |---|---|
//! | [`Blocks::begin`] | groups of stored tokens that leave the window get their pages, at once and in all layers; the step's own pages and window are planned |
//! | (the layers run) | bytes are written |
//! | [`Blocks::end`] | what the step wrote counts from now on; rows with a fault are undone |
//! | any other call instead | the step is undone |
//!
//! So a page exists only after all layers hold its bytes, and a step that fails takes nothing from other sequences. A
//! sequence reads the groups of its own window in full precision, whatever sequences that share its blocks do.

use std::collections::{HashMap, HashSet};
use std::fmt;

/// Tokens of a chunk.
pub const CHUNK: usize = 32;

/// One sequence in one step: tokens `0..past` are stored, `new` come now.
#[derive(Clone, Copy, Debug)]
pub struct Row<'a> {
    /// The host's sequence.
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

/// What one row of a step reads and writes, the same in all layers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowPlan {
    /// The host's sequence.
    pub seq: usize,
    /// Tokens stored.
    pub past: usize,
    /// Tokens of this step.
    pub new: usize,
    /// Block ids of past and new tokens, in order.
    pub table: Vec<usize>,
    /// Groups that are read as pages before the new tokens are stored.
    pub pages_before: usize,
    /// Groups that are read as pages after that. This row makes those from `pages_before` on.
    pub pages: usize,
    /// Chunks of the stored tokens that are in no page.
    pub chunks_before: Vec<u32>,
    /// Chunks of the window after the step.
    pub chunks: Vec<u32>,
}

/// Stored tokens of one sequence: pages, then the window.
#[derive(Clone, Copy, Debug)]
pub struct Stored<'a> {
    /// Tokens.
    pub tokens: usize,
    /// Block ids in order.
    pub table: &'a [usize],
    /// Groups that are read as pages.
    pub pages: usize,
    /// Chunks of the tokens after them.
    pub chunks: &'a [u32],
}

impl RowPlan {
    /// Tokens after this step.
    pub fn end(&self) -> usize {
        self.past + self.new
    }

    /// What is stored before the new tokens are.
    pub fn before(&self) -> Stored<'_> {
        Stored {
            tokens: self.past,
            table: &self.table,
            pages: self.pages_before,
            chunks: &self.chunks_before,
        }
    }

    /// What is stored after that.
    pub fn after(&self) -> Stored<'_> {
        Stored {
            tokens: self.end(),
            table: &self.table,
            pages: self.pages,
            chunks: &self.chunks,
        }
    }
}

/// Why a step cannot be; nothing of the step was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// No rows.
    Empty,
    /// A table that does not cover the tokens of its row.
    ShortTable {
        /// The host's sequence.
        seq: usize,
        /// Tokens stored.
        past: usize,
        /// Tokens of this step.
        new: usize,
        /// Blocks in the table.
        blocks: usize,
        /// Tokens of a block.
        group: usize,
    },
    /// Two rows of one sequence.
    TwoRows {
        /// The host's sequence.
        seq: usize,
    },
    /// A block outside the pool, or the padding block.
    NoSuchBlock {
        /// Its id.
        block: usize,
        /// Blocks of the pool.
        num_blocks: usize,
    },
    /// A block that would be written while another sequence reads it.
    SharedWrite {
        /// The block.
        block: usize,
        /// The sequence that would write it.
        seq: usize,
    },
    /// A block does not hold the tokens that it should.
    Missing {
        /// The block.
        block: usize,
        /// Tokens it holds.
        held: usize,
        /// Tokens that the step says it holds.
        expected: usize,
    },
    /// A page would be written.
    Sealed {
        /// The block.
        block: usize,
        /// Newest tokens of a sequence that can always be written again.
        residual: usize,
    },
    /// The step was undone by a call that came before its end.
    Undone,
    /// The window has no room for the step.
    Full {
        /// Sequences that it was made for.
        max_seqs: usize,
    },
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => write!(f, "a step without rows"),
            Self::ShortTable {
                seq,
                past,
                new,
                blocks,
                group,
            } => write!(
                f,
                "sequence {seq}: {past} past and {new} new tokens in {blocks} blocks of {group}"
            ),
            Self::TwoRows { seq } => write!(f, "sequence {seq} has two rows in one step"),
            Self::NoSuchBlock { block, num_blocks } => {
                write!(f, "block {block} is not one of 1..{num_blocks}")
            }
            Self::SharedWrite { block, seq } => write!(
                f,
                "sequence {seq} would write block {block}, which another sequence reads or writes"
            ),
            Self::Missing {
                block,
                held: 0,
                expected,
            } => write!(f, "block {block} holds no tokens, {expected} expected"),
            Self::Missing {
                block,
                held,
                expected,
            } => write!(f, "block {block} holds {held} tokens, {expected} expected"),
            Self::Sealed { block, residual } => write!(
                f,
                "block {block} is sealed and cannot be written again: only the newest {residual} tokens of a sequence can \
                 be rolled back"
            ),
            Self::Undone => write!(f, "the step was undone by a call that came before its end"),
            Self::Full { max_seqs } => write!(
                f,
                "there is no room for the newest tokens of one more sequence: the cache was sized for {max_seqs} at once"
            ),
        }
    }
}

impl std::error::Error for Refused {}

/// How many blocks and tokens are held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Pages.
    pub pages: usize,
    /// Tokens in all blocks.
    pub tokens: usize,
    /// Those of them that are in full precision.
    pub window: usize,
    /// Chunks of the window in use.
    pub chunks: usize,
}

/// What a block holds.
#[derive(Clone, Debug, Default)]
struct Block {
    /// Its group is quantised in all layers.
    page: bool,
    /// The first `len` tokens in full precision.
    chunks: Vec<u32>,
    len: usize,
    /// Sequences whose window it is in.
    holders: u32,
}

/// Bytes of a block's state, with its chunks.
pub const BLOCK_STATE_BYTES: usize = size_of::<Block>() + 4 * size_of::<u32>();

/// The blocks of one sequence's window.
#[derive(Debug)]
struct Window {
    /// The block before them.
    before: Option<usize>,
    blocks: Vec<usize>,
}

/// What one row of the step that has begun is to write.
#[derive(Debug)]
struct Written {
    /// Blocks that become pages, and whether they were full before.
    pages: Vec<(usize, bool)>,
    /// Blocks of the window that it writes, and their tokens after the step.
    window: Vec<(usize, usize)>,
}

/// All blocks of a pool and the chunks of the window.
#[derive(Debug)]
pub struct Blocks {
    blocks: Vec<Block>,
    free: Vec<u32>,
    num_chunks: usize,
    group: usize,
    residual: usize,
    /// By sequence.
    windows: HashMap<usize, Window>,
    /// By row, while a step runs.
    step: Option<Vec<Written>>,
    /// Full blocks whose tokens are gone though nobody took the block; told by [`Blocks::released`].
    lost: Vec<usize>,
    /// Blocks whose pages were made in some layers and do not count.
    void: Vec<usize>,
}

impl Blocks {
    /// Empty blocks.
    pub fn new(num_blocks: usize, num_chunks: usize, group: usize, residual: usize) -> Self {
        Self {
            blocks: vec![Block::default(); num_blocks],
            free: (0..num_chunks as u32).rev().collect(),
            num_chunks,
            group,
            residual,
            windows: HashMap::new(),
            step: None,
            lost: Vec::new(),
            void: Vec::new(),
        }
    }

    /// Blocks of the pool.
    pub fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// How much is held.
    pub fn counts(&self) -> Counts {
        let mut counts = Counts {
            chunks: self.num_chunks - self.free.len(),
            ..Counts::default()
        };
        for block in &self.blocks {
            counts.window += block.len;
            counts.tokens += if block.page { self.group } else { block.len };
            counts.pages += usize::from(block.page);
        }
        counts
    }

    /// Blocks that have a page.
    pub fn pages(&self) -> Vec<usize> {
        let blocks = 0..self.blocks.len();
        blocks.filter(|b| self.is_page(*b)).collect()
    }

    /// Whether a block has a page.
    pub fn is_page(&self, block: usize) -> bool {
        self.blocks.get(block).is_some_and(|block| block.page)
    }

    /// Whether a step has begun and not ended.
    pub fn has_step(&self) -> bool {
        self.step.is_some()
    }

    /// Blocks whose pages were made in some layers and do not count, since this was asked last.
    pub fn take_void(&mut self) -> Vec<usize> {
        std::mem::take(&mut self.void)
    }

    /// Plan a step. `seal` makes pages in all layers out of stored tokens: those of a call need each other's not. An
    /// earlier step that did not end is undone.
    ///
    /// # Errors
    /// If a past is not there, a page or another sequence's block would be written, or the window has no room; or that of
    /// `seal`.
    pub fn begin<E: From<Refused>>(
        &mut self,
        rows: &[Row<'_>],
        mut seal: impl FnMut(&[RowPlan]) -> Result<(), E>,
    ) -> Result<Vec<RowPlan>, E> {
        self.undo_step();
        self.check_tables(rows)?;
        let plans: Result<Vec<_>, Refused> = rows.iter().map(|row| self.look(row)).collect();
        let mut plans = plans?;
        self.check_room(&plans)?;
        for wave in self.waves(&plans) {
            seal(&wave)?;
            for made in wave {
                self.blocks[made.table[made.pages_before]].page = true;
            }
        }
        for plan in &mut plans {
            plan.chunks_before = self.chunks_of(plan, plan.pages_before, plan.past);
            // All rows hold before any lets go: what one row leaves may stay in another's window.
            for &block in &plan.table[plan.pages..] {
                self.blocks[block].holders += 1;
            }
        }
        let written: Vec<_> = plans.iter().map(|plan| self.move_window(plan)).collect();
        // All rows shrink before any grows: what one gives up may be another's.
        written.iter().for_each(|row| self.shrink_window(row));
        for (plan, row) in plans.iter_mut().zip(&written) {
            self.grow_window(row);
            plan.chunks = self.chunks_of(plan, plan.pages, plan.end());
        }
        self.step = Some(written);
        Ok(plans)
    }

    /// The step has passed all layers: what it wrote counts, but for rows of which `failed` is true.
    pub fn end(&mut self, failed: impl Fn(usize) -> bool) {
        for (row, written) in self.step.take().into_iter().flatten().enumerate() {
            if failed(row) {
                self.undo(written);
                continue;
            }
            for (block, _) in written.pages {
                self.blocks[block].page = true;
            }
            for (block, len) in written.window {
                self.blocks[block].len = len;
            }
        }
    }

    /// Blocks were handed out: what they held is gone.
    pub fn allocated(&mut self, blocks: &[usize]) {
        self.undo_step();
        let num_blocks = self.blocks.len();
        for &block in blocks.iter().filter(|b| **b < num_blocks) {
            if self.blocks[block].holders > 0 {
                let windows = self.windows.values_mut();
                windows.for_each(|window| window.blocks.retain(|b| *b != block));
                self.blocks[block].holders = 0;
            }
            self.clear(block);
            self.lost.retain(|b| *b != block);
        }
    }

    /// A sequence gave up blocks, in table order. Of those that are in no other sequence's window, full ones get their
    /// pages, because they may be hit again, and others are forgotten. The blocks that hold nothing to hit any more, these
    /// and others: full ones that could not be sealed, or were lost with a step that failed.
    pub fn released<E>(
        &mut self,
        seq: usize,
        blocks: &[usize],
        mut seal: impl FnMut(&[RowPlan]) -> Result<(), E>,
    ) -> Vec<usize> {
        self.undo_step();
        let num_blocks = self.blocks.len();
        let inside = blocks.iter().copied().filter(|b| *b < num_blocks);
        let given: Vec<usize> = inside.collect();
        let (mut before, mut path) = (None, Vec::new());
        if let Some(mut window) = self.windows.remove(&seq) {
            let known = given.first() == window.blocks.first();
            before = window.before.filter(|_| known);
            for block in window.blocks.iter().filter(|b| given.contains(b)) {
                self.blocks[*block].holders -= 1;
            }
            window.blocks.retain(|b| !given.contains(b));
            // What stays lies before what goes.
            path.extend_from_slice(&window.blocks);
            if !window.blocks.is_empty() {
                before = window.before;
                self.windows.insert(seq, window);
            }
        }
        path.extend_from_slice(&given);
        let ends = |block: &Block| block.holders == 0 && !block.page && block.len == self.group;
        let last = path.iter().rposition(|b| ends(&self.blocks[*b]));
        // Up to the last one that needs a page, all before it need theirs.
        for &block in &path[..last.map_or(0, |i| i + 1)] {
            if !self.is_page(block) {
                let is_full = self.blocks[block].len == self.group;
                let follows = before.is_none_or(|before| self.is_page(before));
                if is_full && follows && seal(&[self.sealing(block, before)]).is_ok() {
                    self.blocks[block].page = true;
                }
            }
            before = Some(block);
        }
        for block in given {
            if self.blocks[block].holders == 0 {
                self.let_go(block);
            }
        }
        std::mem::take(&mut self.lost)
    }

    /// Forget everything.
    pub fn reset(&mut self) {
        *self = Self::new(
            self.blocks.len(),
            self.num_chunks,
            self.group,
            self.residual,
        );
    }

    /// Whether tables cover their tokens, and no block is written that another row writes too.
    fn check_tables(&self, rows: &[Row<'_>]) -> Result<(), Refused> {
        let (group, num_blocks) = (self.group, self.blocks.len());
        if rows.is_empty() {
            return Err(Refused::Empty);
        }
        let full = |row: &Row<'_>| row.table[..(row.past / group).min(row.table.len())].to_vec();
        let read: HashSet<usize> = rows.iter().flat_map(full).collect();
        let (mut written, mut seqs) = (HashSet::new(), HashSet::new());
        for row in rows {
            let (seq, past, new) = (row.seq, row.past, row.new);
            if !seqs.insert(seq) {
                return Err(Refused::TwoRows { seq });
            }
            let Some(blocks) = row.table.get(..row.end().div_ceil(group)) else {
                let blocks = row.table.len();
                return Err(Refused::ShortTable {
                    seq,
                    past,
                    new,
                    blocks,
                    group,
                });
            };
            let outside = |block: &&usize| !(1..num_blocks).contains(*block);
            if let Some(&block) = blocks.iter().find(outside) {
                return Err(Refused::NoSuchBlock { block, num_blocks });
            }
            for &block in &blocks[past / group..] {
                let own = self.windows.get(&seq);
                let own = own.is_some_and(|window| window.blocks.contains(&block));
                let others = self.blocks[block].holders > u32::from(own);
                if others || read.contains(&block) || !written.insert(block) {
                    return Err(Refused::SharedWrite { block, seq });
                }
            }
        }
        Ok(())
    }

    /// A row as it finds the blocks; its chunks are not known yet.
    fn look(&self, row: &Row<'_>) -> Result<RowPlan, Refused> {
        let (group, past, end) = (self.group, row.past, row.end());
        let table = &row.table[..end.div_ceil(group)];
        let stored = &table[..past.div_ceil(group)];
        let expected = |i: usize| group.min(past - i * group);
        // Before a block that is only a page, a prefix hit's, everything is read as pages.
        let only_page = |block: &usize| self.blocks[*block].page && self.blocks[*block].len == 0;
        let hit = stored[..past / group].iter().rposition(only_page);
        let target = end.saturating_sub(self.residual) / group;
        let pages_before = target.min(past / group).max(hit.map_or(0, |i| i + 1));
        for (i, &block) in stored.iter().enumerate() {
            let (page, held) = (self.blocks[block].page, self.blocks[block].len);
            let expected = expected(i);
            if held < expected && !(page && i < pages_before) {
                return Err(match page {
                    true => self.sealed(block),
                    false => Refused::Missing {
                        block,
                        held,
                        expected,
                    },
                });
            }
        }
        if let Some(&block) = table[past / group..].iter().find(|b| self.is_page(**b)) {
            return Err(self.sealed(block));
        }
        Ok(RowPlan {
            seq: row.seq,
            past,
            new: row.new,
            table: table.to_vec(),
            pages_before,
            pages: pages_before.max(target),
            chunks_before: Vec::new(),
            chunks: Vec::new(),
        })
    }

    /// Whether there are chunks for the windows after the step.
    fn check_room(&self, plans: &[RowPlan]) -> Result<(), Refused> {
        // By how much the holders of a block change.
        let mut change: HashMap<usize, i64> = HashMap::new();
        let mut needed: HashMap<usize, usize> = HashMap::new();
        for plan in plans {
            let window = self.windows.get(&plan.seq);
            for &block in window.iter().flat_map(|window| &window.blocks) {
                *change.entry(block).or_default() -= 1;
            }
            for (i, &block) in plan.table.iter().enumerate().skip(plan.pages) {
                *change.entry(block).or_default() += 1;
                let len = self.group.min(plan.end() - i * self.group);
                needed.insert(block, len.div_ceil(CHUNK));
            }
        }
        let mut total = self.num_chunks - self.free.len();
        for (block, change) in change {
            let (held, holders) = (self.blocks[block].chunks.len(), self.blocks[block].holders);
            // Another row's need of a shared block is the same.
            let after = match (i64::from(holders) + change, needed.get(&block)) {
                (0, _) => 0,
                (_, Some(needed)) => *needed,
                (_, None) => held,
            };
            total = total - held + after;
        }
        match total <= self.num_chunks {
            true => Ok(()),
            false => Err(Refused::Full {
                max_seqs: self.num_chunks * CHUNK / (self.group + self.residual),
            }),
        }
    }

    fn sealed(&self, block: usize) -> Refused {
        let residual = self.residual;
        Refused::Sealed { block, residual }
    }

    /// Stored groups that are to be read as pages and have none, each once, in the order in which they can be sealed.
    fn waves(&self, plans: &[RowPlan]) -> Vec<Vec<RowPlan>> {
        let mut waves: Vec<Vec<RowPlan>> = Vec::new();
        let mut wave_of: HashMap<usize, usize> = HashMap::new();
        for plan in plans {
            let mut before = None;
            for &block in &plan.table[..plan.pages_before] {
                if !self.is_page(block) && !wave_of.contains_key(&block) {
                    let wave = before.and_then(|b| wave_of.get(&b)).map_or(0, |w| w + 1);
                    waves.resize_with(waves.len().max(wave + 1), Vec::new);
                    waves[wave].push(self.sealing(block, before));
                    wave_of.insert(block, wave);
                }
                before = Some(block);
            }
        }
        waves
    }

    /// A row of no new tokens that makes the page of a full block behind one that has a page, if any.
    fn sealing(&self, block: usize, before: Option<usize>) -> RowPlan {
        let table: Vec<usize> = before.into_iter().chain([block]).collect();
        RowPlan {
            seq: 0,
            past: table.len() * self.group,
            new: 0,
            pages_before: table.len() - 1,
            pages: table.len(),
            table,
            chunks_before: self.blocks[block].chunks.clone(),
            chunks: Vec::new(),
        }
    }

    /// Chunks of tokens `pages * G .. tokens` of a row.
    fn chunks_of(&self, plan: &RowPlan, pages: usize, tokens: usize) -> Vec<u32> {
        let blocks = &plan.table[pages..tokens.div_ceil(self.group).max(pages)];
        let of = |(i, block): (usize, &usize)| {
            let len = self.group.min(tokens - (pages + i) * self.group);
            self.blocks[*block].chunks[..len.div_ceil(CHUNK)].to_vec()
        };
        blocks.iter().enumerate().flat_map(of).collect()
    }

    /// Let go of a row's window before the step, whose window after it is held, and give up the chunks that nobody reads
    /// after the step: layers seal before they store.
    fn move_window(&mut self, plan: &RowPlan) -> Written {
        let group = self.group;
        let blocks = plan.table[plan.pages..].to_vec();
        let before = plan.pages.checked_sub(1).map(|i| plan.table[i]);
        let window = Window { before, blocks };
        let old = self.windows.insert(plan.seq, window);
        let old = old.map_or_else(Vec::new, |window| window.blocks);
        let made = &plan.table[plan.pages_before..plan.pages];
        let is_full = |block: &usize| (*block, self.blocks[*block].len == group);
        let pages = made.iter().map(is_full).collect();
        for block in old {
            self.blocks[block].holders -= 1;
            if self.blocks[block].holders == 0 && !made.contains(&block) {
                self.let_go(block);
            }
        }
        made.iter().for_each(|block| self.clear(*block));
        let first = plan.pages.max(plan.past / group);
        let mut window = Vec::new();
        for (i, &block) in plan.table.iter().enumerate().skip(first) {
            // Tokens that are written again do not count until the step ends.
            let kept = plan.past.saturating_sub(i * group);
            self.blocks[block].len = self.blocks[block].len.min(kept);
            window.push((block, group.min(plan.end() - i * group)));
        }
        Written { pages, window }
    }

    /// No more chunks for the blocks that a row writes than they need.
    fn shrink_window(&mut self, row: &Written) {
        for &(block, len) in &row.window {
            let needed = len.div_ceil(CHUNK);
            let chunks = &mut self.blocks[block].chunks;
            self.free.extend(chunks.drain(needed.min(chunks.len())..));
        }
    }

    /// As many chunks for the blocks that a row writes as they need; [`Self::check_room`] has found that there are.
    fn grow_window(&mut self, row: &Written) {
        for &(block, len) in &row.window {
            let needed = len.div_ceil(CHUNK);
            let chunks = &mut self.blocks[block].chunks;
            let missing = needed.saturating_sub(chunks.len()).min(self.free.len());
            chunks.extend(self.free.drain(self.free.len() - missing..).rev());
        }
    }

    fn undo_step(&mut self) {
        let rows = self.step.take().into_iter().flatten();
        rows.for_each(|written| self.undo(written));
    }

    /// What a row wrote does not count.
    fn undo(&mut self, written: Written) {
        for (block, was_full) in written.pages {
            self.void.push(block);
            if was_full {
                self.lost.push(block);
            }
        }
        for (block, _) in written.window {
            let block = &mut self.blocks[block];
            let kept = block.len.div_ceil(CHUNK).min(block.chunks.len());
            self.free.extend(block.chunks.drain(kept..));
        }
    }

    /// A block is in nobody's window: what is no page is gone.
    fn let_go(&mut self, block: usize) {
        let held = &mut self.blocks[block];
        if !held.page && held.len == self.group {
            self.lost.push(block);
        }
        held.len = 0;
        self.free.append(&mut held.chunks);
    }

    /// A block holds nothing. Its holders stay.
    fn clear(&mut self, block: usize) {
        let held = &mut self.blocks[block];
        (held.page, held.len) = (false, 0);
        self.free.append(&mut held.chunks);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(seq: usize, past: usize, new: usize, table: &[usize]) -> Row<'_> {
        Row {
            seq,
            past,
            new,
            table,
        }
    }

    /// Blocks with groups of 128 and a window of 32, and the blocks whose pages were made from stored tokens.
    struct Bench {
        blocks: Blocks,
        sealed: Vec<usize>,
    }

    impl Bench {
        fn new(num_blocks: usize, num_chunks: usize) -> Self {
            Self {
                blocks: Blocks::new(num_blocks, num_chunks, 128, 32),
                sealed: Vec::new(),
            }
        }

        fn begin(&mut self, rows: &[Row<'_>]) -> Result<Vec<RowPlan>, Refused> {
            self.blocks.begin(rows, |wave| {
                self.sealed
                    .extend(wave.iter().map(|w| w.table[w.pages_before]));
                Ok(())
            })
        }

        fn step(&mut self, rows: &[Row<'_>]) -> Vec<RowPlan> {
            let plans = self.begin(rows).expect("fits");
            self.blocks.end(|_| false);
            plans
        }

        fn released(&mut self, seq: usize, blocks: &[usize]) -> Vec<usize> {
            self.blocks.released(seq, blocks, |wave| {
                self.sealed
                    .extend(wave.iter().map(|w| w.table[w.pages_before]));
                Ok::<_, Refused>(())
            })
        }

        fn chunks(&self) -> usize {
            self.blocks.counts().chunks
        }
    }

    #[test]
    fn groups_leave_the_window_and_give_their_chunks_back() {
        let mut bench = Bench::new(8, 10);
        let table = [3, 5];
        let plan = bench.step(&[row(1, 0, 159, &table)]).remove(0);
        assert_eq!((plan.pages, plan.chunks.len()), (0, 5));
        let plan = bench.step(&[row(1, 159, 1, &table)]).remove(0);
        assert_eq!((plan.pages_before, plan.pages), (1, 1));
        assert_eq!((plan.chunks_before.len(), plan.chunks.len()), (1, 1));
        assert_eq!(bench.sealed, [3]);
        let counts = Counts {
            pages: 1,
            tokens: 160,
            window: 32,
            chunks: 1,
        };
        assert_eq!(bench.blocks.counts(), counts);
        assert_eq!(bench.released(1, &table), []);
        assert_eq!(bench.chunks(), 0);
        bench.blocks.allocated(&table);
        let missing = Refused::Missing {
            block: 3,
            held: 0,
            expected: 128,
        };
        assert_eq!(bench.begin(&[row(1, 160, 1, &table)]), Err(missing));
    }

    #[test]
    fn a_prompt_makes_the_pages_of_its_new_tokens_itself() {
        let mut bench = Bench::new(8, 5);
        bench.step(&[row(1, 0, 100, &[1])]);
        let plan = bench.step(&[row(1, 100, 200, &[1, 2, 3])]).remove(0);
        assert_eq!((plan.pages_before, plan.pages), (0, 2));
        assert_eq!((plan.chunks_before.len(), plan.chunks.len()), (4, 2));
        assert!(bench.sealed.is_empty() && bench.blocks.is_page(2));
    }

    #[test]
    fn rolled_back_tokens_are_written_again() {
        let mut bench = Bench::new(8, 10);
        let table = [1, 2];
        bench.step(&[row(1, 0, 150, &table)]);
        let plan = bench.step(&[row(1, 100, 1, &table)]).remove(0);
        assert_eq!((plan.pages, plan.chunks.len()), (0, 4));
        bench.step(&[row(1, 101, 100, &table)]);
        let sealed = Refused::Sealed {
            block: 1,
            residual: 32,
        };
        assert_eq!(bench.begin(&[row(1, 100, 1, &table)]), Err(sealed));
    }

    #[test]
    fn a_step_that_does_not_fit_changes_nothing() {
        let mut bench = Bench::new(8, 5);
        bench.step(&[row(1, 0, 100, &[1])]);
        let both = [row(1, 100, 60, &[1, 2]), row(2, 0, 159, &[3, 4])];
        assert_eq!(bench.begin(&both), Err(Refused::Full { max_seqs: 1 }));
        assert_eq!(bench.chunks(), 4);
        // What a block gives up when it is sealed serves the same step.
        bench.step(&both[..1]);
        let third = bench.step(&[row(2, 0, 128, &[3, 4])]);
        assert_eq!(third[0].chunks.len(), 4);
    }

    #[test]
    fn a_shared_block_is_sealed_once_and_stays_in_the_others_window() {
        let mut bench = Bench::new(9, 20);
        bench.step(&[row(1, 0, 130, &[1, 2])]);
        let hits = [row(2, 128, 300, &[1, 3, 4, 5]), row(3, 128, 40, &[1, 6])];
        let plans = bench.step(&hits);
        assert_eq!((plans[0].pages_before, plans[0].pages), (1, 3));
        assert_eq!((plans[1].pages_before, plans[1].pages), (1, 1));
        assert_eq!(bench.sealed, [1]);
        // The writer still reads it from its window.
        let plan = bench.step(&[row(1, 130, 1, &[1, 2])]).remove(0);
        assert_eq!((plan.pages, plan.chunks.len()), (0, 5));
        assert_eq!(bench.chunks(), 5 + 2 + 2);
        bench.released(2, hits[0].table);
        bench.released(3, hits[1].table);
        assert_eq!(bench.chunks(), 5);
        bench.released(1, &[1, 2]);
        assert_eq!((bench.chunks(), bench.blocks.pages()), (0, vec![1, 3, 4]));
    }

    #[test]
    fn a_reader_that_ends_leaves_the_writers_window_alone() {
        let mut bench = Bench::new(9, 20);
        bench.step(&[row(1, 0, 130, &[1, 2])]);
        bench.step(&[row(2, 128, 2, &[1, 3])]);
        assert_eq!(bench.released(2, &[1, 3]), []);
        assert!(!bench.blocks.is_page(1));
        bench.released(1, &[1, 2]);
        assert!(bench.blocks.is_page(1));
    }

    #[test]
    fn what_a_prefix_hit_mixes_is_read_as_pages() {
        let mut bench = Bench::new(9, 20);
        bench.step(&[row(1, 0, 140, &[1, 2])]);
        bench.step(&[row(2, 0, 290, &[3, 4, 5])]);
        assert!(!bench.blocks.is_page(1) && bench.blocks.is_page(4));
        // An open block before a page.
        let plan = bench.step(&[row(3, 256, 10, &[1, 4, 8])]).remove(0);
        assert_eq!((plan.pages_before, bench.sealed.len()), (2, 1));
        let plan = bench.step(&[row(1, 140, 1, &[1, 2])]).remove(0);
        assert_eq!((plan.pages, plan.chunks.len()), (0, 5));
    }

    #[test]
    fn a_step_that_never_ends_is_undone() {
        let mut bench = Bench::new(9, 20);
        bench.step(&[row(1, 0, 140, &[1, 2])]);
        let before = bench.chunks();
        let hit = row(2, 128, 260, &[1, 3, 4, 5]);
        let plan = bench.begin(&[hit]).expect("fits").remove(0);
        assert_eq!((plan.pages_before, plan.pages), (1, 2));
        assert_eq!(bench.released(2, hit.table), []);
        assert_eq!(bench.blocks.take_void(), [3]);
        assert_eq!((bench.chunks(), bench.blocks.pages()), (before, vec![1]));
        let plan = bench.step(&[row(1, 140, 1, &[1, 2])]).remove(0);
        assert_eq!((plan.pages, plan.chunks.len()), (0, 5));
    }

    #[test]
    fn a_row_with_a_fault_is_undone_alone() {
        let mut bench = Bench::new(9, 20);
        bench.step(&[row(1, 0, 150, &[1, 2]), row(2, 0, 150, &[3, 4])]);
        let rows = [row(1, 150, 200, &[1, 2, 5]), row(2, 150, 200, &[3, 4, 6])];
        bench.begin(&rows).expect("fits");
        bench.blocks.end(|row| row == 0);
        assert_eq!(bench.blocks.pages(), [1, 3, 4]);
        assert_eq!(bench.released(1, rows[0].table), []);
        assert_eq!(bench.blocks.pages(), [1, 3, 4]);
        let plan = bench.step(&[row(2, 350, 1, &[3, 4, 6])]).remove(0);
        assert_eq!(plan.chunks.len(), 3);
    }

    #[test]
    fn what_one_row_gives_up_in_a_step_is_room_for_another() {
        // Two sequences, exactly what the window is made for; the first takes back 31 of the newest 32 tokens.
        let mut bench = Bench::new(12, 10);
        bench.step(&[row(1, 0, 129, &[1, 2])]);
        bench.step(&[row(2, 128, 10, &[1, 3])]);
        bench.step(&[row(1, 129, 32, &[1, 2])]);
        let both = [row(1, 130, 1, &[1, 2]), row(2, 138, 140, &[1, 3, 4])];
        let plans = bench.step(&both);
        assert_eq!((plans[0].chunks.len(), plans[1].chunks.len()), (5, 5));
    }

    #[test]
    fn a_block_is_not_written_beside_its_first_reader() {
        let mut bench = Bench::new(9, 20);
        bench.step(&[row(1, 0, 128, &[1])]);
        let both = [row(1, 120, 1, &[1]), row(2, 128, 1, &[1, 2])];
        let shared = Refused::SharedWrite { block: 1, seq: 1 };
        assert_eq!(bench.begin(&both), Err(shared));
    }

    #[test]
    fn a_block_that_another_sequence_reads_is_not_written() {
        let mut bench = Bench::new(9, 20);
        bench.step(&[row(1, 0, 130, &[1, 2])]);
        bench.step(&[row(2, 128, 2, &[1, 3])]);
        let shared = Refused::SharedWrite { block: 1, seq: 1 };
        assert_eq!(bench.begin(&[row(1, 127, 1, &[1, 2])]), Err(shared));
    }

    #[test]
    fn a_full_block_that_cannot_be_sealed_is_told() {
        let mut bench = Bench::new(9, 20);
        bench.step(&[row(1, 0, 130, &[1, 2])]);
        let lost = bench.blocks.released(1, &[1, 2], |_| Err(Refused::Empty));
        assert_eq!((lost, bench.chunks()), (vec![1], 0));
    }
}
