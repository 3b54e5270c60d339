//! The host's side of a cache: which block is whose, which are free, which may be hit. As
//! mistral.rs 0.8.1 does it (`kv_cache_manager.rs`, `block_pool.rs`), in plain lines.

use std::collections::VecDeque;

use crate::harness::Text;

/// A text up to some token: equal prefixes, equal stored bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Prefix {
    pub seed: u64,
    /// Where another text begins, if before `end`.
    pub fork: Option<(usize, u64)>,
    pub end: usize,
}

impl Prefix {
    pub fn new(text: &Text, end: usize) -> Self {
        Self {
            seed: text.seed,
            fork: text.fork.filter(|(at, _)| *at < end),
            end,
        }
    }
}

/// Reference counts, the free list and the hashes of full blocks.
#[derive(Clone, Debug)]
pub struct Pool {
    pub group: usize,
    refs: Vec<usize>,
    /// Least recently freed first.
    free: VecDeque<usize>,
    /// Of full blocks whose tokens were computed; kept until the block is handed out again.
    hashes: Vec<Option<Prefix>>,
}

impl Pool {
    /// Block 0 is padding and never handed out.
    pub fn new(num_blocks: usize, group: usize) -> Self {
        Self {
            group,
            refs: vec![0; num_blocks],
            free: (1..num_blocks).collect(),
            hashes: vec![None; num_blocks],
        }
    }

    /// Blocks that hold the longest hashed beginning of the first `tokens` tokens. The last token is
    /// never hit. Where several blocks hold the same, `pick` chooses.
    pub fn hit(&self, text: &Text, tokens: usize, pick: usize) -> Vec<usize> {
        let mut hit = vec![];
        for i in 0..tokens.saturating_sub(1) / self.group {
            let wanted = Some(Prefix::new(text, (i + 1) * self.group));
            let alike: Vec<usize> = (1..self.hashes.len())
                .filter(|b| self.hashes[*b] == wanted)
                .collect();
            match alike.is_empty() {
                true => break,
                false => hit.push(alike[(pick + i) % alike.len()]),
            }
        }
        hit
    }

    /// Take `hit` and new blocks until there are `count`; the new ones, or `None` if they do not fit.
    pub fn allocate(&mut self, hit: &[usize], count: usize) -> Option<Vec<usize>> {
        let new = count.saturating_sub(hit.len());
        let revived = hit.iter().filter(|b| self.refs[**b] == 0).count();
        if new + revived > self.free.len() {
            return None;
        }
        self.free.retain(|b| !hit.contains(b));
        let new: Vec<usize> = self.free.drain(..new).collect();
        new.iter().for_each(|b| self.hashes[*b] = None);
        hit.iter().chain(&new).for_each(|b| self.refs[*b] += 1);
        Some(new)
    }

    /// The first `past` tokens of a table are computed: full blocks may be hit from now on.
    pub fn computed(&mut self, text: &Text, table: &[usize], past: usize) {
        for (i, block) in table[..past / self.group].iter().enumerate() {
            let prefix = Some(Prefix::new(text, (i + 1) * self.group));
            assert!(self.hashes[*block].is_none() || self.hashes[*block] == prefix);
            self.hashes[*block] = prefix;
        }
    }

    /// Give blocks up, in table order; the last is reused first.
    pub fn free(&mut self, blocks: &[usize]) {
        for block in blocks.iter().rev() {
            self.refs[*block] -= 1;
            if self.refs[*block] == 0 {
                self.free.push_back(*block);
            }
        }
    }

    /// Whether nobody uses any block.
    pub fn is_at_rest(&self) -> bool {
        self.free.len() + 1 == self.refs.len()
    }
}
