//! What a layer holds, read.

use super::element::Element;
use super::layer::LayerCache;
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
            + self.places.capacity() * size_of::<u32>()
            + self.staging.allocated_bytes()
            + self.traced.allocated_bytes()
    }

    /// Counts over the pages of these blocks.
    pub(super) fn count(&self, pages: &[usize]) -> LayerStats {
        let layout = &self.spec.layout;
        let mut stats = LayerStats {
            traced_tokens: self.traced.in_use(),
            ..LayerStats::default()
        };
        let traces = layout.outliers > 0;
        for &block in pages.iter().filter(|_| traces) {
            for head in 0..layout.num_kv_heads {
                let displaced = self.head(block, head).bytes[layout.extra];
                stats.stopped_parts += usize::from(displaced == STOPPED);
                let displaced = usize::from(displaced).min(self.spec.config.extra);
                stats.most_displaced = stats.most_displaced.max(displaced);
            }
        }
        stats
    }

    /// The bytes of a block's page; of a block without one, anything.
    pub fn page(&self, block: usize) -> &[u8] {
        let bytes = self.spec.layout.page_bytes();
        &self.pages[block * bytes..(block + 1) * bytes]
    }

    /// One head's part of a block's page.
    pub fn head(&self, block: usize, head: usize) -> PageHead<'_> {
        let layout = &self.spec.layout;
        let start = block * layout.page_bytes() + head * layout.head_bytes;
        PageHead {
            layout,
            bytes: &self.pages[start..start + layout.head_bytes],
        }
    }

    /// Key and value of the `i`-th traced token of one head in a block's page.
    pub fn traced(&self, block: usize, head: usize, i: usize) -> (&[E], &[E]) {
        let layout = &self.spec.layout;
        let at = (block * layout.num_kv_heads + head) * layout.outliers + i;
        self.traced.token(self.places[at])
    }

    /// Keys `(32, k_dim)` and values `(32, v_dim)` of one head in a chunk of the window.
    pub fn chunk(&self, chunk: u32, head: usize) -> (&[E], &[E]) {
        self.staging.head(chunk, head)
    }
}
