//! Which blocks are pages and where the window lies; the same for all layers, since it depends on counts of tokens
//! alone. The host's view of what the kernels do.

use anyhow::{bail, Result};

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
    /// Block ids in order.
    pub table: &'a [usize],
}

/// All blocks of a pool and the chunks of the window.
#[derive(Debug)]
pub struct Blocks {
    blocks: Vec<Block>,
    free: Vec<u32>,
    group: usize,
    residual: usize,
}

impl Blocks {
    /// Empty blocks.
    pub fn new(num_blocks: usize, chunks: usize, group: usize, residual: usize) -> Self {
        Self {
            blocks: vec![Block::Empty; num_blocks],
            free: (0..chunks as u32).rev().collect(),
            group,
            residual,
        }
    }

    /// Chunks in use.
    pub fn chunks_free(&self) -> usize {
        self.free.len()
    }

    /// What a step does to each row; the state after it is kept.
    ///
    /// # Errors
    /// If a past is not there, a page would be written, or the window is full.
    pub fn begin<'a>(&mut self, steps: &[Step<'a>]) -> Result<Vec<RowState<'a>>> {
        steps.iter().map(|step| self.row(step)).collect()
    }

    /// Blocks were handed out, or given up: what they held is dead.
    pub fn clear(&mut self, blocks: &[usize]) {
        for &block in blocks {
            if let Block::Open { chunks, .. } =
                std::mem::replace(&mut self.blocks[block], Block::Empty)
            {
                self.free.extend(chunks);
            }
        }
    }

    fn row<'a>(&mut self, step: &Step<'a>) -> Result<RowState<'a>> {
        let (group, end) = (self.group, step.past + step.new);
        let table = &step.table[..end.div_ceil(group)];
        let pages = table
            .iter()
            .take_while(|b| self.blocks[**b] == Block::Sealed);
        let sealed_before = pages.count();
        if sealed_before * group > step.past {
            bail!("tokens of a sealed block cannot be written again");
        }
        let sealed = sealed_before.max(end.saturating_sub(self.residual) / group);
        let mut chunks_before = Vec::new();
        for (i, block) in table.iter().enumerate().skip(sealed_before) {
            let start = i * group;
            let needed = group.min(step.past.saturating_sub(start));
            match &self.blocks[*block] {
                Block::Open { chunks, len } if *len >= needed => chunks_before.extend(chunks),
                _ if needed == 0 => {}
                _ => bail!("block {block} does not hold the {needed} tokens that it should"),
            }
        }
        for block in &table[sealed_before..sealed] {
            self.clear(&[*block]);
            self.blocks[*block] = Block::Sealed;
        }
        let mut window = Vec::new();
        for (i, block) in table.iter().enumerate().skip(sealed) {
            let len = group.min(end - i * group);
            let mut held = match std::mem::replace(&mut self.blocks[*block], Block::Empty) {
                Block::Open { chunks, .. } => chunks,
                _ => Vec::new(),
            };
            while held.len() < len.div_ceil(CHUNK) {
                let Some(chunk) = self.free.pop() else {
                    bail!("the residual window is full");
                };
                held.push(chunk);
            }
            self.free.extend(held.drain(len.div_ceil(CHUNK)..));
            window.extend(&held);
            self.blocks[*block] = Block::Open { chunks: held, len };
        }
        Ok(RowState {
            past: step.past,
            new: step.new,
            table,
            sealed_before,
            sealed,
            chunks_before,
            chunks: window,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_leave_the_window_and_give_their_chunks_back() {
        let mut blocks = Blocks::new(8, 10, 128, 32);
        let table = [3, 5];
        let step = |past, new| Step {
            past,
            new,
            table: &table,
        };
        let row = blocks.begin(&[step(0, 159)]).expect("fits").remove(0);
        assert_eq!((row.sealed, row.chunks.len()), (0, 5));
        let row = blocks.begin(&[step(159, 1)]).expect("fits").remove(0);
        assert_eq!((row.sealed_before, row.sealed), (0, 1));
        assert_eq!((row.chunks_before.len(), row.chunks.len()), (5, 1));
        assert_eq!(blocks.chunks_free(), 9);
        blocks.clear(&table);
        assert_eq!(blocks.chunks_free(), 10);
        assert!(blocks.begin(&[step(160, 1)]).is_err(), "nothing is there");
    }

    #[test]
    fn rolled_back_tokens_are_written_again() {
        let mut blocks = Blocks::new(8, 10, 128, 32);
        let table = [1, 2];
        let step = |past, new| Step {
            past,
            new,
            table: &table,
        };
        blocks.begin(&[step(0, 150)]).expect("fits");
        let row = blocks.begin(&[step(100, 1)]).expect("fits").remove(0);
        assert_eq!((row.sealed, row.chunks.len()), (0, 4));
    }
}
