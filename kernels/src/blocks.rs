//! Which blocks are pages and where the window lies; the same for all layers, since it depends on counts of tokens
//! alone. The host's view of what the kernels do.

use std::collections::HashSet;
use std::fmt;

use crate::plan::{RowState, CHUNK};

/// What a block holds.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Block {
    Empty,
    /// `len` tokens in these chunks.
    Open {
        chunks: Vec<u32>,
        len: usize,
    },
    Sealed,
}

/// One sequence in one step.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// Tokens stored.
    pub past: usize,
    /// Tokens that come.
    pub new: usize,
    /// Block ids in order, covering all of them.
    pub table: &'a [usize],
}

/// Why a step cannot be; nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
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
    },
    /// The window has no room for the step.
    Full,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing {
                block,
                held,
                expected,
            } => write!(f, "block {block} holds {held} tokens, not {expected}"),
            Self::Sealed { block } => write!(f, "block {block} is sealed and cannot be written"),
            Self::Full => write!(f, "the residual window is full"),
        }
    }
}

impl std::error::Error for Refused {}

/// How many blocks and tokens are held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Pages.
    pub sealed: usize,
    /// Tokens of the window.
    pub window: usize,
    /// Chunks of the window in use.
    pub chunks: usize,
}

/// All blocks of a pool and the chunks of the window.
#[derive(Debug)]
pub struct Blocks {
    blocks: Vec<Block>,
    free: Vec<u32>,
    chunks: usize,
    group: usize,
    residual: usize,
}

impl Blocks {
    /// Empty blocks.
    pub fn new(num_blocks: usize, chunks: usize, group: usize, residual: usize) -> Self {
        Self {
            blocks: vec![Block::Empty; num_blocks],
            free: (0..chunks as u32).rev().collect(),
            chunks,
            group,
            residual,
        }
    }

    /// Chunks that are free.
    pub fn chunks_free(&self) -> usize {
        self.free.len()
    }

    /// How much is held.
    pub fn counts(&self) -> Counts {
        let mut counts = Counts {
            chunks: self.chunks - self.free.len(),
            ..Counts::default()
        };
        for block in &self.blocks {
            match block {
                Block::Empty => {}
                Block::Open { len, .. } => counts.window += len,
                Block::Sealed => counts.sealed += 1,
            }
        }
        counts
    }

    /// Blocks that are pages.
    pub fn sealed(&self) -> Vec<usize> {
        let blocks = 0..self.blocks.len();
        blocks.filter(|b| self.is_sealed(*b)).collect()
    }

    /// Whether a block is a page.
    pub fn is_sealed(&self, block: usize) -> bool {
        self.blocks[block] == Block::Sealed
    }

    /// Tokens in a block.
    pub fn held(&self, block: usize) -> usize {
        match self.blocks[block] {
            Block::Empty => 0,
            Block::Open { len, .. } => len,
            Block::Sealed => self.group,
        }
    }

    /// Open blocks of a row that must be sealed before its step, in order: those before a page, and those that have left
    /// the window of this row, but not that of the row that wrote them. A prefix hit brings them.
    pub fn overdue(&self, step: &Step<'_>) -> Vec<usize> {
        let past = &step.table[..step.past / self.group];
        let sealed = past.iter().rposition(|b| self.is_sealed(*b));
        let left = step.past.saturating_sub(self.residual) / self.group;
        let end = left.max(sealed.map_or(0, |i| i + 1));
        let open = |i: &usize| !self.is_sealed(past[*i]);
        (0..end).filter(open).collect()
    }

    /// Seal the last block of `table`, which is full, behind those before it, which are sealed; what a row of no new tokens
    /// is to do. The state after it is kept.
    ///
    /// # Errors
    /// If it is not so.
    pub fn flush<'a>(&mut self, table: &'a [usize]) -> Result<RowState<'a>, Refused> {
        let step = Step {
            past: table.len() * self.group,
            new: 0,
            table,
        };
        let mut row = self.look(&step)?;
        row.sealed = table.len();
        table[row.sealed_before..]
            .iter()
            .for_each(|b| self.seal(*b));
        Ok(row)
    }

    /// What a step does to each row; the state after it is kept. Nothing is [overdue](Self::overdue).
    ///
    /// # Errors
    /// If a past is not there, a page would be written, or the window is full.
    pub fn begin<'a>(&mut self, steps: &[Step<'a>]) -> Result<Vec<RowState<'a>>, Refused> {
        // All rows see what was before the step: two that share an open block both seal it, and write the same bytes.
        let rows: Result<Vec<_>, _> = steps.iter().map(|step| self.look(step)).collect();
        let mut rows = rows?;
        self.check_room(&rows)?;
        for row in &rows {
            for block in &row.table[row.sealed_before..row.sealed] {
                self.seal(*block);
            }
        }
        rows.iter_mut().for_each(|row| self.open(row));
        Ok(rows)
    }

    /// Blocks were handed out, or given up: what they held is dead.
    pub fn clear(&mut self, blocks: &[usize]) {
        for &block in blocks {
            self.put(block, Block::Empty);
        }
    }

    /// Forget everything.
    pub fn reset(&mut self) {
        self.blocks.fill(Block::Empty);
        self.free = (0..self.chunks as u32).rev().collect();
    }

    fn seal(&mut self, block: usize) {
        self.put(block, Block::Sealed);
    }

    fn put(&mut self, block: usize, what: Block) {
        if let Block::Open { chunks, .. } = std::mem::replace(&mut self.blocks[block], what) {
            self.free.extend(chunks);
        }
    }

    /// A row as it finds the blocks.
    fn look<'a>(&self, step: &Step<'a>) -> Result<RowState<'a>, Refused> {
        let (group, end) = (self.group, step.past + step.new);
        let table = &step.table[..end.div_ceil(group)];
        let pages = table.iter().take_while(|b| self.is_sealed(**b));
        let sealed_before = pages.count();
        if sealed_before * group > step.past {
            let block = table[sealed_before - 1];
            return Err(Refused::Sealed { block });
        }
        let mut chunks_before = Vec::new();
        for (i, &block) in table.iter().enumerate().skip(sealed_before) {
            let expected = group.min(step.past.saturating_sub(i * group));
            match &self.blocks[block] {
                Block::Open { chunks, len } if *len >= expected => chunks_before.extend(chunks),
                Block::Sealed => return Err(Refused::Sealed { block }),
                _ if expected == 0 => {}
                _ => {
                    return Err(Refused::Missing {
                        block,
                        held: self.held(block),
                        expected,
                    })
                }
            }
        }
        Ok(RowState {
            past: step.past,
            new: step.new,
            table,
            sealed_before,
            sealed: sealed_before.max(end.saturating_sub(self.residual) / group),
            chunks_before,
            chunks: Vec::new(),
        })
    }

    fn check_room(&self, rows: &[RowState<'_>]) -> Result<(), Refused> {
        let held = |block: usize| match &self.blocks[block] {
            Block::Open { chunks, .. } => chunks.len(),
            _ => 0,
        };
        let (mut freed, mut needed) = (0, 0);
        let mut counted = HashSet::new();
        for row in rows {
            for (i, &block) in row.table.iter().enumerate().skip(row.sealed_before) {
                let tokens = self.group.min(row.past + row.new - i * self.group);
                match counted.insert(block) {
                    true if i < row.sealed => freed += held(block),
                    true => needed += tokens.div_ceil(CHUNK).saturating_sub(held(block)),
                    false => {}
                }
            }
        }
        match needed <= self.free.len() + freed {
            true => Ok(()),
            false => Err(Refused::Full),
        }
    }

    /// Give the blocks of a row's window as many chunks as it needs; [`Self::check_room`] has found that there are.
    fn open(&mut self, row: &mut RowState<'_>) {
        let end = row.past + row.new;
        for (i, &block) in row.table.iter().enumerate().skip(row.sealed) {
            let len = self.group.min(end - i * self.group);
            let mut held = match std::mem::replace(&mut self.blocks[block], Block::Empty) {
                Block::Open { chunks, .. } => chunks,
                _ => Vec::new(),
            };
            let missing = len.div_ceil(CHUNK).saturating_sub(held.len());
            held.extend(
                self.free
                    .drain(self.free.len() - missing.min(self.free.len())..),
            );
            self.free
                .extend(held.drain(len.div_ceil(CHUNK).min(held.len())..));
            row.chunks.extend(&held);
            self.blocks[block] = Block::Open { chunks: held, len };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(past: usize, new: usize, table: &[usize]) -> Step<'_> {
        Step { past, new, table }
    }

    #[test]
    fn groups_leave_the_window_and_give_their_chunks_back() {
        let mut blocks = Blocks::new(8, 10, 128, 32);
        let table = [3, 5];
        let row = blocks
            .begin(&[step(0, 159, &table)])
            .expect("fits")
            .remove(0);
        assert_eq!((row.sealed, row.chunks.len()), (0, 5));
        let row = blocks
            .begin(&[step(159, 1, &table)])
            .expect("fits")
            .remove(0);
        assert_eq!((row.sealed_before, row.sealed), (0, 1));
        assert_eq!((row.chunks_before.len(), row.chunks.len()), (5, 1));
        assert_eq!(blocks.chunks_free(), 9);
        let counts = Counts {
            sealed: 1,
            window: 32,
            chunks: 1,
        };
        assert_eq!(blocks.counts(), counts);
        blocks.clear(&table);
        assert_eq!(blocks.chunks_free(), 10);
        let missing = Refused::Missing {
            block: 3,
            held: 0,
            expected: 128,
        };
        assert_eq!(blocks.begin(&[step(160, 1, &table)]).err(), Some(missing));
    }

    #[test]
    fn rolled_back_tokens_are_written_again() {
        let mut blocks = Blocks::new(8, 10, 128, 32);
        let table = [1, 2];
        blocks.begin(&[step(0, 150, &table)]).expect("fits");
        let row = blocks
            .begin(&[step(100, 1, &table)])
            .expect("fits")
            .remove(0);
        assert_eq!((row.sealed, row.chunks.len()), (0, 4));
        blocks.begin(&[step(101, 100, &table)]).expect("fits");
        let sealed = Refused::Sealed { block: 1 };
        assert_eq!(blocks.begin(&[step(100, 1, &table)]).err(), Some(sealed));
    }

    #[test]
    fn a_step_that_does_not_fit_changes_nothing() {
        let mut blocks = Blocks::new(8, 5, 128, 32);
        blocks.begin(&[step(0, 100, &[1])]).expect("fits");
        let both = [step(100, 60, &[1, 2]), step(0, 159, &[3, 4])];
        assert_eq!(blocks.begin(&both).err(), Some(Refused::Full));
        assert_eq!((blocks.chunks_free(), blocks.held(1)), (1, 100));
        // What a block gives up when it is sealed serves the same step.
        blocks.begin(&both[..1]).expect("fits");
        let third = [step(0, 128, &[3, 4])];
        assert_eq!(blocks.begin(&third).expect("fits")[0].chunks.len(), 4);
    }

    #[test]
    fn rows_that_share_an_open_block_seal_it_together() {
        let mut blocks = Blocks::new(9, 20, 128, 32);
        blocks.begin(&[step(0, 130, &[1, 2])]).expect("fits");
        // Two prompts hit block 1 while its writer still holds it open.
        let rows = [step(128, 300, &[1, 3, 4, 5]), step(128, 40, &[1, 6])];
        assert!(rows.iter().all(|row| blocks.overdue(row).is_empty()));
        let rows = blocks.begin(&rows).expect("fits");
        assert_eq!((rows[0].sealed_before, rows[0].sealed), (0, 3));
        assert_eq!((rows[1].sealed_before, rows[1].sealed), (0, 1));
        assert_eq!(rows[0].chunks_before, rows[1].chunks_before);
        assert_eq!(blocks.counts().chunks, 1 + 2 + 2);
    }

    #[test]
    fn what_a_prefix_hit_brings_too_late_is_sealed_first() {
        let mut blocks = Blocks::new(9, 20, 128, 32);
        blocks.begin(&[step(0, 140, &[1, 2])]).expect("fits");
        blocks.begin(&[step(0, 290, &[3, 4, 5])]).expect("fits");
        blocks.begin(&[step(0, 256, &[6, 7])]).expect("fits");
        assert!(blocks.is_sealed(4) && !blocks.is_sealed(7));
        // An open block before a page.
        let hit = step(256, 10, &[1, 4, 8]);
        assert_eq!(blocks.overdue(&hit), [0]);
        let row = blocks.flush(&[1]).expect("full").sealed;
        assert_eq!((row, blocks.overdue(&hit).len()), (1, 0));
        assert_eq!(blocks.begin(&[hit]).expect("fits")[0].sealed_before, 2);
        // Its writer goes on behind a page.
        assert_eq!(
            blocks.begin(&[step(140, 1, &[1, 2])]).expect("fits")[0].sealed_before,
            1
        );
        // A block that this row's window has left.
        let hit = step(256 + 40, 1, &[6, 7, 8]);
        assert_eq!(blocks.overdue(&hit), [1]);
    }
}
