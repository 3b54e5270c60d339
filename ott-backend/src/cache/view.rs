//! What a layer holds, read.

use super::element::Element;
use super::layer::{Block, LayerCache};
use super::page::PageHead;
use super::seal::LayerSpec;
use super::LayerStats;
use crate::layout::STOPPED;

impl<E: Element> LayerCache<E> {
    /// What never changes.
    pub fn spec(&self) -> &LayerSpec {
        &self.spec
    }

    /// Bytes held now.
    pub fn allocated_bytes(&self) -> usize {
        self.pages.capacity()
            + self.blocks.capacity() * size_of::<Block>()
            + self.places.capacity() * size_of::<u32>()
            + self.staging.allocated_bytes()
            + self.traced.allocated_bytes()
    }

    /// Counts, for tests and reports.
    pub fn stats(&self) -> LayerStats {
        let mut stats = LayerStats {
            traced_tokens: self.traced.in_use(),
            staging_chunks: self.staging.in_use(),
            ..LayerStats::default()
        };
        for block in 0..self.blocks.len() {
            stats.tokens += self.held(block);
            match self.is_sealed(block) {
                true => self.count_page(block, &mut stats),
                false => stats.window_tokens += self.held(block),
            }
        }
        stats
    }

    fn count_page(&self, block: usize, stats: &mut LayerStats) {
        let layout = &self.spec.layout;
        stats.sealed_blocks += 1;
        for head in (0..layout.num_kv_heads).filter(|_| layout.outliers > 0) {
            let displaced = self.head(block, head).bytes[layout.extra];
            stats.stopped_parts += usize::from(displaced == STOPPED);
            let displaced = usize::from(displaced).min(self.spec.config.extra);
            stats.most_displaced = stats.most_displaced.max(displaced);
        }
    }

    /// A sealed block's bytes.
    pub fn page(&self, block: usize) -> Option<&[u8]> {
        let bytes = self.spec.layout.page_bytes();
        self.is_sealed(block)
            .then(|| &self.pages[block * bytes..(block + 1) * bytes])
    }

    /// Whether a block is sealed.
    pub fn is_sealed(&self, block: usize) -> bool {
        self.blocks.get(block) == Some(&Block::Sealed)
    }

    /// One head's part of a sealed block.
    pub fn head(&self, block: usize, head: usize) -> PageHead<'_> {
        let layout = &self.spec.layout;
        let start = block * layout.page_bytes() + head * layout.head_bytes;
        PageHead {
            layout,
            bytes: &self.pages[start..start + layout.head_bytes],
        }
    }

    /// Key and value of the `i`-th traced token of one head in a sealed block.
    pub fn traced(&self, block: usize, head: usize, i: usize) -> (&[E], &[E]) {
        let layout = &self.spec.layout;
        let at = (block * layout.num_kv_heads + head) * layout.outliers + i;
        self.traced.token(self.places[at])
    }

    /// Keys `(32, k_dim)` and values `(32, v_dim)` of one head in chunk `i` of an open block.
    pub fn chunk(&self, block: usize, i: usize, head: usize) -> Option<(&[E], &[E])> {
        match self.blocks[block] {
            Block::Open { chunks, .. } => Some(self.staging.head(chunks[i], head)),
            _ => None,
        }
    }

    /// Tokens that a block holds.
    pub fn held(&self, block: usize) -> usize {
        match self.blocks[block] {
            Block::Empty => 0,
            Block::Open { len, .. } => len as usize,
            Block::Sealed => self.spec.layout.group_size,
        }
    }
}
