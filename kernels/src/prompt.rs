//! Into how many parts the context of a prompt's queries is cut, and what that takes.

use crate::abi::{Row, CLEAR_QUERIES, PARTIAL, TILE_QUERIES};

/// Bytes that the tensor-core kernel reads at once.
pub const VECTOR: usize = 16;
/// Tokens that a block works on at once, about.
const UNIT: usize = 128;
/// What [`UNIT`] tokens take a block that has a multiprocessor alone.
const ALONE: f64 = 0.72;
/// What joining parts takes, and more for each wave of blocks that wrote some.
const JOIN: f64 = 7.0;
const JOIN_WAVE: f64 = 3.0;
/// Blocks of threads at most where contexts are cut.
const MOST_BLOCKS: usize = 1024;
/// Parts of a context at most.
const MOST_SPLITS: usize = 64;

/// What an attention call has to do: new tokens by row, heads, and how many blocks the device runs at once.
#[derive(Clone, Copy, Debug)]
pub struct Load<'a> {
    /// The rows.
    pub rows: &'a [Row],
    /// Tokens that there is room for in each row's answer.
    pub tokens: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Query heads of each.
    pub ratio: usize,
    /// Blocks at once.
    pub slots: usize,
}

/// Tiles of queries of a row of so many tokens.
pub fn tiles(tokens: usize, ratio: usize) -> usize {
    (tokens * ratio).div_ceil(TILE_QUERIES)
}

impl Load<'_> {
    /// Parts of each tile's context: those that take the least time, in units of what a block that shares its multiprocessor
    /// needs for [`UNIT`] tokens (docs/kernels.md).
    pub fn splits(&self) -> usize {
        let of_rows = |rows: usize| rows * self.kv_heads;
        let blocks = self
            .rows
            .iter()
            .map(|r| tiles(r.fresh as usize, self.ratio));
        let blocks = of_rows(blocks.sum());
        let places = of_rows(self.rows.len() * tiles(self.tokens, self.ratio)).max(1);
        let units = |r: &Row| (r.past as usize + r.fresh as usize).div_ceil(UNIT);
        let units = self.rows.iter().map(units).max().unwrap_or(0);
        let slots = self.slots.max(1);
        let cost = |splits: usize| {
            let all = blocks * splits;
            // The last wave's blocks are alone if they are few.
            let last = match all % slots {
                0 => 0.0,
                few if 2 * few <= slots => ALONE,
                _ => 1.0,
            };
            let waves = (all / slots) as f64 + last;
            let join = match splits {
                1 => 0.0,
                _ => JOIN + JOIN_WAVE * all as f64 / slots as f64,
            };
            waves * (1 + units.div_ceil(splits)) as f64 + join
        };
        let most = (MOST_BLOCKS / places).min(units).clamp(1, MOST_SPLITS);
        let best = (1..=most).min_by(|a, b| cost(*a).total_cmp(&cost(*b)));
        best.unwrap_or(1)
    }
}

/// Numbers that the parts take.
pub fn sums(load: &Load<'_>, splits: usize, v_dim: usize) -> usize {
    let tiles = load.rows.len() * load.kv_heads * tiles(load.tokens, load.ratio);
    tiles * splits * TILE_QUERIES * (v_dim + PARTIAL)
}

/// Bytes that attention of a prompt takes at most, beside its queries and answers, in layers of this value size.
pub fn scratch_bytes(v_dim: usize) -> usize {
    let of_block = TILE_QUERIES.saturating_mul(v_dim.saturating_add(PARTIAL));
    of_block.saturating_mul(MOST_BLOCKS * size_of::<f32>())
}

/// Bytes of shared memory of the clear kernel (`cuda/prompt.cu`), in layers of this key and value size together.
pub fn clear_shared(width: usize) -> u32 {
    const THREADS: usize = 128;
    let of_query = width + THREADS + 2;
    ((CLEAR_QUERIES * of_query + THREADS) * size_of::<f32>()) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::{NONE, WINDOW_CHUNKS};

    fn row(past: u32, fresh: u32) -> Row {
        Row {
            past,
            fresh,
            sealed_before: past / 128,
            sealed: past / 128,
            table: 0,
            chunk_before: [NONE; WINDOW_CHUNKS],
            chunk: [NONE; WINDOW_CHUNKS],
        }
    }

    /// Llama 3 8B on 132 multiprocessors.
    fn splits(rows: &[Row]) -> usize {
        let longest = rows.iter().map(|r| r.fresh as usize).max();
        let load = Load {
            rows,
            tokens: longest.unwrap_or(0),
            kv_heads: 8,
            ratio: 4,
            slots: 264,
        };
        let splits = load.splits();
        assert!(splits == 1 || sums(&load, splits, 128) * 4 <= scratch_bytes(128));
        splits
    }

    #[test]
    fn contexts_are_cut_until_the_device_is_full() {
        // A wave already, or four.
        assert_eq!(splits(&[row(32768, 1024)]), 1);
        assert_eq!(splits(&[row(32768, 4096)]), 1);
        // Half a wave, in which each block is alone.
        assert_eq!(splits(&[row(4096, 512)]), 1);
        assert_eq!(splits(&[row(32768, 512)]), 2);
        assert_eq!(splits(&[row(32768, 16)]), 33);
        // A bit more than one wave.
        assert_eq!(splits(&[row(32768, 1536)]), 2);
        // Nothing to cut.
        assert_eq!(splits(&[row(0, 16)]), 1);
        assert_eq!(splits(&[]), 1);
    }

    #[test]
    fn scratch_is_bounded_whatever_the_past() {
        assert_eq!(scratch_bytes(128) >> 20, 66);
    }
}
