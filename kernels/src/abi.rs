//! What kernels take: `cuda/cache.cuh` and `cuda/attend.cuh`, field by field. Addresses are the device's.

/// Most chunks of one row's window.
pub const WINDOW_CHUNKS: usize = 8;
/// Blocks or chunks that an item names.
pub const ITEM_FIRST: usize = 4;
/// No chunk, no place, no page.
pub const NONE: u32 = u32::MAX;

/// Numbers of an item's result beside its weighted values.
pub const PARTIAL: usize = 4;

/// Queries of a block of the tensor-core kernel for prompts, and of the clear one's.
pub const TILE_QUERIES: usize = 128;
/// See [`TILE_QUERIES`].
pub const CLEAR_QUERIES: usize = 8;

/// One sequence in one step.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Tokens stored before this step.
    pub past: u32,
    /// Tokens of this step.
    pub fresh: u32,
    /// Pages before this step.
    pub sealed_before: u32,
    /// Pages after it.
    pub sealed: u32,
    /// Where its block ids begin.
    pub table: u32,
    /// Chunks of the window from its first block on, before this step.
    pub chunk_before: [u32; WINDOW_CHUNKS],
    /// And after it.
    pub chunk: [u32; WINDOW_CHUNKS],
}

impl Row {
    /// As the device reads it.
    pub fn words(&self) -> [u32; 5 + 2 * WINDOW_CHUNKS] {
        let mut words = [0; 5 + 2 * WINDOW_CHUNKS];
        let (numbers, chunks) = words.split_at_mut(5);
        let (before, after) = chunks.split_at_mut(WINDOW_CHUNKS);
        numbers.copy_from_slice(&[
            self.past,
            self.fresh,
            self.sealed_before,
            self.sealed,
            self.table,
        ]);
        before.copy_from_slice(&self.chunk_before);
        after.copy_from_slice(&self.chunk);
        words
    }
}

/// One layer's memory and shape.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Layer {
    /// `(num_blocks, kv_heads, head_bytes)`.
    pub pages: u64,
    /// `(chunks, kv_heads, keys (32, k_dim) then values (32, v_dim))`.
    pub staging: u64,
    /// `(chunks, kv_heads, 2, means (k_dim) then roots (k_dim))` of queries; 0 if keys are not weighed by them.
    pub samples: u64,
    /// `(places, key (k_dim) then value (v_dim))`.
    pub traced: u64,
    /// `(num_blocks, kv_heads, outliers)`.
    pub places: u64,
    /// `(rows of the step)`: 0, or the number of the first layer that met a number that cannot be kept, plus one.
    pub faults: u64,
    /// Key/value heads.
    pub kv_heads: u32,
    /// Channels of a key.
    pub k_dim: u32,
    /// Channels of a value.
    pub v_dim: u32,
    /// Tokens of a page.
    pub group: u32,
    /// Bits of a key code.
    pub k_bits: u32,
    /// Bits of a value code.
    pub v_bits: u32,
    /// Members of the outlier pool.
    pub outliers: u32,
    /// Places of the extra store.
    pub extra: u32,
    /// Ranges that are searched: 0 none, 1 the keys', 2 the values' too, and what is read back is stretched.
    pub clip: u32,
    /// Key channels with one more bit.
    pub boosted: u32,
    /// Whether values are kept in another basis.
    pub rotate: u32,
    /// Whether errors of keys are weighed by samples of queries.
    pub weigh: u32,
    /// Query heads.
    pub num_heads: u32,
    /// The layer's number.
    pub number: u32,
}

/// New queries, keys or values: strides in numbers.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Fresh {
    /// The first row's first head's first token.
    pub data: u64,
    /// From a row to the next.
    pub row: i64,
    /// From a head to the next.
    pub head: i64,
    /// From a token to the next.
    pub token: i64,
}

impl Fresh {
    /// Nothing comes, or nobody said what.
    pub const NOTHING: Self = Self {
        data: 0,
        row: 0,
        head: 0,
        token: 0,
    };
}

/// A part of one row's context: pages whose blocks are `tables[from..to]`, or tokens `from..to` of the window.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Item {
    /// The row.
    pub row: u32,
    /// 1: of the window.
    pub window: u32,
    /// First.
    pub from: u32,
    /// End.
    pub to: u32,
    /// The first blocks, or the first chunks of the window; [`NONE`] where there are fewer.
    pub first: [u32; ITEM_FIRST],
}

impl Item {
    /// As the device reads it.
    pub fn words(&self) -> [u32; 4 + ITEM_FIRST] {
        let mut words = [0; 4 + ITEM_FIRST];
        let (numbers, first) = words.split_at_mut(4);
        numbers.copy_from_slice(&[self.row, self.window, self.from, self.to]);
        first.copy_from_slice(&self.first);
        words
    }
}

/// A pair: items of a row (first, end), or a group to seal (row, group).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair {
    /// First, or row.
    pub a: u32,
    /// End, or group.
    pub b: u32,
}

/// One attention call.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Query {
    /// `(rows, num_heads, k_dim)`.
    pub q: u64,
    /// From a row to the next.
    pub row: i64,
    /// From a head to the next.
    pub head: i64,
    /// `(rows, num_heads, v_dim)`.
    pub out: u64,
    /// `(items, num_heads, v_dim + PARTIAL)` f32.
    pub sums: u64,
    /// `(rows, kv_heads, tiles)`, zero before and after.
    pub arrived: u64,
    /// Query heads.
    pub num_heads: u32,
    /// Factor on scores, times log2(e).
    pub scale: f32,
    /// 0: none.
    pub softcap: f32,
}

/// Attention of a step's new tokens, values in the model's basis.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Prompt {
    /// `(rows, num_heads, tokens, k_dim)`.
    pub q: Fresh,
    /// `(rows, kv_heads, tokens, k_dim)`.
    pub k: Fresh,
    /// `(rows, kv_heads, tokens, v_dim)`.
    pub v: Fresh,
    /// `(rows, num_heads, tokens, v_dim)`; zeros where a row has no token.
    pub out: u64,
    /// `(rows, kv_heads, tiles, splits, TILE_QUERIES, v_dim + PARTIAL)` f32 where there are several splits.
    pub sums: u64,
    /// Of the longest row, or more.
    pub tokens: u32,
    /// Parts of a tile's context.
    pub splits: u32,
    /// Factor on scores, times log2(e).
    pub scale: f32,
    /// 0: none.
    pub softcap: f32,
}
