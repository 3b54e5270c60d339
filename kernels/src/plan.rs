//! A step's tables, made once on the host and shared by all layers: what is sealed, where the window lies, and which
//! block of threads attends to which part of the context.

use std::ops::Range;

use crate::abi::{Item, Pair, Row, NONE};
use crate::blocks::{RowPlan, CHUNK};

/// Warps of a block: pages that are worked on at once.
const WARPS: usize = 4;
/// Tokens of the window that a block reads at once.
const WINDOW_ITEM: usize = 16 * WARPS;

/// Blocks that a multiprocessor runs at once.
const WAVE: usize = 4;
/// Blocks of threads that pages are cut into at most, beside one per row: several times what a device runs at once.
const MOST_PARTS: usize = 2048;

/// Query heads of a block of the tensor-core kernel: the narrow one's, and the wide one's.
pub const NARROW: usize = 4;
/// See [`NARROW`].
pub const WIDE: usize = 8;

/// Blocks of threads per item, narrow ones.
pub fn lanes(num_heads: usize, num_kv_heads: usize) -> usize {
    num_kv_heads * (num_heads / num_kv_heads).div_ceil(NARROW)
}

/// Items of a step of `rows` rows, at most.
pub fn most_items(rows: usize, group: usize, lanes: usize) -> usize {
    let windows = rows.saturating_mul(1 + (2 * group).div_ceil(WINDOW_ITEM));
    windows.saturating_add(MOST_PARTS / lanes.max(1))
}

/// Tables of one step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// By row.
    pub rows: Vec<Row>,
    /// Block ids of all rows.
    pub tables: Vec<u32>,
    /// Groups to seal: row, group.
    pub groups: Vec<Pair>,
    /// Parts of contexts.
    pub items: Vec<Item>,
    /// Items of each row.
    pub of_row: Vec<Pair>,
    /// Most new tokens of a row.
    pub longest: usize,
    /// Whether some new tokens are sealed at once.
    pub seals_new: bool,
}

impl Plan {
    /// Plan a step for `lanes` blocks of threads per item (kv heads, times tiles of query heads) on a device that runs
    /// `slots` of them at once.
    pub fn new(rows: &[RowPlan], group: usize, lanes: usize, slots: usize) -> Self {
        let mut plan = Self::default();
        let pages: Vec<usize> = rows.iter().map(|row| row.pages).collect();
        let (size, tokens) = item_sizes(&pages, group, lanes, slots);
        for (r, row) in rows.iter().enumerate() {
            let id = r as u32;
            plan.rows.push(Row {
                past: row.past as u32,
                fresh: row.new as u32,
                sealed_before: row.pages_before as u32,
                sealed: row.pages as u32,
                table: plan.tables.len() as u32,
                chunk_before: padded(&row.chunks_before),
                chunk: padded(&row.chunks),
            });
            let table = plan.tables.len();
            plan.tables.extend(row.table.iter().map(|b| *b as u32));
            let groups = row.pages_before..row.pages;
            plan.groups
                .extend(groups.map(|g| Pair { a: id, b: g as u32 }));
            let first = plan.items.len() as u32;
            let window = (row.past + row.new).saturating_sub(row.pages * group);
            let item = |window: bool, first: &[u32], range: Range<usize>| Item {
                row: id,
                window: window.into(),
                from: range.start as u32,
                to: range.end as u32,
                first: padded(first),
            };
            plan.items.extend(parts(0..window, tokens).map(|part| {
                let chunks = &row.chunks[part.start / CHUNK..];
                item(true, chunks, part)
            }));
            let tables = &plan.tables;
            let pages = parts(table..table + row.pages, size);
            let pages = pages.map(|part| item(false, &tables[part.clone()], part));
            plan.items.extend(pages);
            plan.of_row.push(Pair {
                a: first,
                b: plan.items.len() as u32,
            });
            plan.longest = plan.longest.max(row.new);
            plan.seals_new |= row.pages > row.pages_before && row.pages * group > row.past;
        }
        plan
    }
}

fn parts(all: Range<usize>, size: usize) -> impl Iterator<Item = Range<usize>> {
    let end = all.end;
    all.step_by(size)
        .map(move |from| from..(from + size).min(end))
}

fn padded<const N: usize>(numbers: &[u32]) -> [u32; N] {
    let mut all = [NONE; N];
    let len = numbers.len().min(N);
    all[..len].copy_from_slice(&numbers[..len]);
    all
}

/// Pages of an item and tokens of an item of the window, by what was measured on an H200 (docs/kernels.md), in
/// microseconds. A round of [`WARPS`] pages takes a block 2.1 alone on a multiprocessor, 6.3 where all four of a wave are
/// at work, and 5.2 where blocks of several waves follow each other; an item costs 1.2, or half a round, beside its pages,
/// and 0.05 to join its row. [`WINDOW_ITEM`] tokens take 1.
fn item_sizes(pages: &[usize], group: usize, lanes: usize, slots: usize) -> (usize, usize) {
    let rounds = |pages: &usize| pages.div_ceil(WARPS);
    let longest = pages.iter().map(rounds).max().unwrap_or(0).max(1);
    let all: usize = pages.iter().map(rounds).sum();
    let items = |size: usize| {
        let items = pages.iter().map(|p| rounds(p).div_ceil(size));
        items.sum::<usize>()
    };
    let windows = |tokens: usize| (2 * group).div_ceil(tokens);
    let cost = |size: usize, tokens: usize| {
        let blocks = (items(size) + pages.len() * windows(tokens)) * lanes;
        // Blocks of a multiprocessor.
        let each = (WAVE * blocks) as f64 / slots.max(1) as f64;
        let half = 0.5 * items(size) as f64;
        let window = (tokens / WINDOW_ITEM) as f64;
        let work = match each <= WAVE as f64 {
            true => window.max(1.2 + size as f64 * (0.7 + 1.4 * each).max(2.1)),
            // The device is full to the end, but for the last items.
            false => {
                5.2 * (all as f64 + half) * lanes as f64 / slots.max(1) as f64 + 2.1 * size as f64
            }
        };
        work + 0.05 * (longest.div_ceil(size) + windows(tokens)) as f64
    };
    let most = pages.len() + MOST_PARTS / lanes.max(1);
    // The window is cut where there is room beside the pages: only tokens that are read at once by a block.
    let sizes = (1..=longest).filter(|size| items(*size) <= most);
    let sizes = sizes.flat_map(|size| [(size, WINDOW_ITEM), (size, 2 * group)]);
    let best = sizes.min_by(|a, b| cost(a.0, a.1).total_cmp(&cost(b.0, b.1)));
    let (size, tokens) = best.unwrap_or((longest, 2 * group));
    (size * WARPS, tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_in_tables() {
        let rows = [
            RowPlan {
                seq: 0,
                past: 400,
                new: 1,
                table: vec![3, 4, 5, 6],
                pages_before: 2,
                pages: 2,
                chunks_before: vec![7, 8, 9, 1, 2],
                chunks: vec![7, 8, 9, 1, 2],
            },
            RowPlan {
                seq: 0,
                past: 0,
                new: 300,
                table: vec![1, 2, 9],
                pages_before: 0,
                pages: 2,
                chunks_before: vec![],
                chunks: vec![4, 5],
            },
        ];
        let plan = Plan::new(&rows, 128, 8, 396);
        assert_eq!(plan.tables, [3, 4, 5, 6, 1, 2, 9]);
        assert_eq!(plan.rows[1].table, 4);
        assert_eq!(plan.groups, [Pair { a: 1, b: 0 }, Pair { a: 1, b: 1 }]);
        assert_eq!(plan.rows[0].chunk[..6], [7, 8, 9, 1, 2, NONE]);
        // Windows of 145 and 44 tokens, in parts of 64.
        assert_eq!(plan.of_row, [Pair { a: 0, b: 4 }, Pair { a: 4, b: 6 }]);
        let parts: Vec<_> = plan
            .items
            .iter()
            .map(|i| (i.window, i.from, i.to))
            .collect();
        assert_eq!(
            parts[..4],
            [(1, 0, 64), (1, 64, 128), (1, 128, 145), (0, 0, 2)]
        );
        assert_eq!(plan.longest, 300);
        assert!(plan.seals_new);
    }

    #[test]
    fn every_page_is_in_one_item() {
        for (pages, slots) in [(1, 396), (63, 396), (256, 396), (1024, 132), (7, 1)] {
            let table = vec![1; pages];
            let rows = vec![
                RowPlan {
                    seq: 0,
                    past: pages * 128,
                    new: 1,
                    table: table.clone(),
                    pages_before: pages,
                    pages,
                    chunks_before: vec![],
                    chunks: vec![0],
                };
                3
            ];
            let plan = Plan::new(&rows, 128, 8, slots);
            for (row, of) in plan.of_row.iter().enumerate() {
                let items = &plan.items[of.a as usize..of.b as usize];
                let mut next = (row * pages) as u32;
                for item in items.iter().filter(|i| i.window == 0) {
                    assert_eq!((item.row as usize, item.from), (row, next));
                    next = item.to;
                }
                assert_eq!(next as usize, (row + 1) * pages);
            }
        }
    }

    #[test]
    fn sizes_are_those_that_measured_best() {
        // Batch x pages of 128 tokens, 8 heads, on an H200.
        let best = |batch: usize, pages: usize| item_sizes(&vec![pages; batch], 128, 8, 528).0;
        assert_eq!(best(1, 7), 4);
        assert_eq!(best(1, 255), 8);
        assert!((16..=32).contains(&best(1, 1023)));
        assert!((12..=24).contains(&best(32, 63)));
        assert!((24..=64).contains(&best(32, 255)));
    }
}
