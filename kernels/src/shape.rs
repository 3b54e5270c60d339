//! What a kernel must be told of a layer: shape and settings. The bytes are those of `docs/layout.md`.

use crate::blocks::CHUNK;

/// Most channels of a head.
pub const MAX_DIM: usize = 1024;
/// Of so many tokens the last one's queries are sampled.
pub const SAMPLED: usize = 16;

/// One layer's shape and settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerShape {
    /// Its number, for messages.
    pub layer: usize,
    /// Key/value heads.
    pub num_kv_heads: usize,
    /// Channels of a key.
    pub k_dim: usize,
    /// Channels of a value.
    pub v_dim: usize,
    /// G: tokens of a page.
    pub group_size: usize,
    /// Bits of a key code.
    pub k_bits: u8,
    /// Bits of a value code.
    pub v_bits: u8,
    /// N: members of the outlier pool in this layer.
    pub outliers: usize,
    /// Places of the extra store.
    pub extra: usize,
    /// Ranges that are searched: 0 none, 1 the keys', 2 the values' too, and what is read back is stretched.
    pub clip: u32,
    /// M: key channels with one more bit.
    pub boosted: usize,
    /// Whether values are kept in another basis.
    pub rotate: bool,
    /// Whether errors of keys are weighed by samples of queries.
    pub weigh: bool,
    /// Bytes of one head's part of a page.
    pub head_bytes: usize,
}

impl LayerShape {
    /// Bytes of a page.
    pub fn page_bytes(&self) -> usize {
        self.num_kv_heads * self.head_bytes
    }

    /// Channels of a key and its value.
    pub fn width(&self) -> usize {
        self.k_dim + self.v_dim
    }

    /// Traced tokens of a block, over all heads, at most.
    pub fn places(&self) -> usize {
        self.num_kv_heads * self.outliers
    }

    /// Bytes of one block on the device, its traced tokens among them, in numbers of `size` bytes.
    pub fn block_bytes(&self, size: usize) -> usize {
        self.page_bytes() + self.places() * (self.width() * size + size_of::<u32>())
    }

    /// Bytes of one chunk of the window.
    pub fn chunk_bytes(&self, size: usize) -> usize {
        CHUNK * self.num_kv_heads * self.width() * size
    }

    /// Bytes of the samples that are kept of a chunk's queries.
    pub fn sample_bytes(&self, size: usize) -> usize {
        match self.weigh {
            true => CHUNK / SAMPLED * self.num_kv_heads * 2 * self.k_dim * size,
            false => 0,
        }
    }
}
