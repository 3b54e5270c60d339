//! Where each byte of a page lies; the only place with offsets. `docs/layout.md` is the normative
//! picture.
//!
//! A page is the bytes of one block (G tokens) in one layer: one part per kv head, all alike.
//!
//! ```text
//! page   | head 0 | head 1 | ...                          heads x head_bytes
//! head   | k_codes | k_scale | k_min | v_codes | v_scale | v_min | trace | k_high | k_boosted |
//!
//! k_codes  (k_dim, G)          packed along tokens, one channel after the other
//! k_scale  (k_dim) f16         k_min  (k_dim) f16
//! v_codes  (G, v_dim)          packed along channels, one token after the other
//! v_scale  (v_groups, G) f16   v_min  (v_groups, G) f16
//! trace    pool (N) f32 | slots (N) u8 | extra u8 | padding to 16   absent if N is 0
//! k_high   (M, G) bits         k_boosted  (M) u16    absent if M is 0
//! ```
//!
//! Numbers are little-endian. Every section starts at a multiple of 16 bytes.

use std::ops::Range;

use half::f16;

use crate::config::OttConfig;
use crate::error::{Error, Result};
use crate::pack::packed_len;

/// Most channels of a value group.
pub const V_GROUP: usize = 128;
/// `extra` of a chain on which tracing has stopped for good.
pub const STOPPED: u8 = u8::MAX;
/// A place of `slots` that holds no traced token.
pub const NO_SLOT: u8 = u8::MAX;

pub use ott_kernels::shape::MAX_DIM;

/// Shape of the pages of one layer, with the place of each section inside the part of a head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageLayout {
    /// Key/value heads.
    pub num_kv_heads: usize,
    /// Channels of a key head.
    pub k_dim: usize,
    /// Channels of a value head.
    pub v_dim: usize,
    /// G: tokens of a page.
    pub group_size: usize,
    /// Bits per key code.
    pub k_bits: u8,
    /// Bits per value code.
    pub v_bits: u8,
    /// N: members of the outlier pool in this layer.
    pub outliers: usize,
    /// Key codes.
    pub k_codes: Range<usize>,
    /// Key scales, one f16 per channel.
    pub k_scale: Range<usize>,
    /// Key mins, one f16 per channel.
    pub k_min: Range<usize>,
    /// Value codes.
    pub v_codes: Range<usize>,
    /// Value scales, one f16 per value group and token.
    pub v_scale: Range<usize>,
    /// Value mins, one f16 per value group and token.
    pub v_min: Range<usize>,
    /// Magnitudes of the pool after this page, ascending, `+inf` where a place is free.
    pub pool: Range<usize>,
    /// Places in the group of the tokens traced in this page, ascending, then [`NO_SLOT`].
    pub slots: Range<usize>,
    /// Offset of the number of tokens displaced from the pool up to this page, or [`STOPPED`].
    pub extra: usize,
    /// M: key channels with one more bit.
    pub boosted: usize,
    /// Their high bits, packed along tokens like the high bits of 3-bit codes.
    pub k_high: Range<usize>,
    /// Which they are, ascending, one u16 each.
    pub k_boosted: Range<usize>,
    /// Bytes of one head's part.
    pub head_bytes: usize,
}

impl PageLayout {
    /// Layout of layer `layer`.
    ///
    /// # Errors
    /// If a head has no multiple of 8 channels between 8 and 1024.
    pub fn new(
        config: &OttConfig,
        layer: usize,
        num_kv_heads: usize,
        k_dim: usize,
        v_dim: usize,
    ) -> Result<Self> {
        for (what, dim) in [("key", k_dim), ("value", v_dim)] {
            if !dim.is_multiple_of(8) || !(8..=MAX_DIM).contains(&dim) {
                return Err(Error::HeadDim { layer, what, dim });
            }
        }
        let group = config.group_size;
        let outliers = config.outliers_in(layer);
        let mut end = 0;
        let mut section = |bytes: usize| {
            let start = end;
            end = (start + bytes).next_multiple_of(16);
            start..start + bytes
        };
        let k_codes = section(k_dim * packed_len(group, config.k_bits));
        let k_scale = section(k_dim * 2);
        let k_min = section(k_dim * 2);
        let v_codes = section(group * packed_len(v_dim, config.v_bits));
        let v_scale = section(v_dim.div_ceil(V_GROUP) * group * 2);
        let v_min = section(v_dim.div_ceil(V_GROUP) * group * 2);
        let trace = section(match outliers {
            0 => 0,
            n => n * 5 + 1,
        });
        let boosted = config.boosted(k_dim);
        let k_high = section(boosted * packed_len(group, 1));
        let k_boosted = section(boosted * 2);
        let pool = trace.start..trace.start + outliers * 4;
        let slots = pool.end..pool.end + outliers;
        Ok(Self {
            num_kv_heads,
            k_dim,
            v_dim,
            group_size: group,
            k_bits: config.k_bits,
            v_bits: config.v_bits,
            outliers,
            k_codes,
            k_scale,
            k_min,
            v_codes,
            v_scale,
            v_min,
            extra: slots.end,
            pool,
            slots,
            boosted,
            k_high,
            k_boosted,
            head_bytes: end,
        })
    }

    /// Bytes of a page.
    pub fn page_bytes(&self) -> usize {
        self.num_kv_heads * self.head_bytes
    }

    /// The part of one head in a page.
    pub fn head(&self, head: usize) -> Range<usize> {
        head * self.head_bytes..(head + 1) * self.head_bytes
    }

    /// Bytes of the codes of one key channel.
    pub fn k_channel_bytes(&self) -> usize {
        packed_len(self.group_size, self.k_bits)
    }

    /// Bytes of the codes of one value token.
    pub fn v_token_bytes(&self) -> usize {
        packed_len(self.v_dim, self.v_bits)
    }

    /// Value groups of a token.
    pub fn v_groups(&self) -> usize {
        self.v_dim.div_ceil(V_GROUP)
    }

    /// Channels of one value group.
    pub fn v_group(&self, index: usize) -> Range<usize> {
        index * V_GROUP..((index + 1) * V_GROUP).min(self.v_dim)
    }
}

/// The `index`-th f16 of a section of scales or mins.
pub fn f16_at(section: &[u8], index: usize) -> f16 {
    f16::from_le_bytes([section[2 * index], section[2 * index + 1]])
}

/// The `index`-th u16 of a section.
pub fn u16_at(section: &[u8], index: usize) -> u16 {
    u16::from_le_bytes([section[2 * index], section[2 * index + 1]])
}

/// Write the `index`-th f16 of a section of scales or mins.
pub fn put_f16(section: &mut [u8], index: usize, x: f16) {
    section[2 * index..2 * index + 2].copy_from_slice(&x.to_le_bytes());
}
