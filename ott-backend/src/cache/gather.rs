//! The past of one sequence as numbers, for prompts that go on from stored tokens: sealed tokens as
//! their codes say, traced ones and those of the window exactly.

use std::ops::Range;

use rayon::prelude::*;

use super::element::Element;
use super::layer::LayerCache;
use super::tile::{Tile, KEY_STRIDE, TILE};
use super::{Stored, CHUNK};

impl<E: Element> LayerCache<E> {
    /// Keys `(num_kv_heads, tokens, k_dim)` and values `(num_kv_heads, tokens, v_dim)`.
    pub fn gather(&self, stored: &Stored<'_>) -> (Vec<E>, Vec<E>) {
        let layout = &self.spec().layout;
        let (k_len, v_len) = (stored.tokens * layout.k_dim, stored.tokens * layout.v_dim);
        let mut k = vec![E::default(); layout.num_kv_heads * k_len];
        let mut v = vec![E::default(); layout.num_kv_heads * v_len];
        if stored.tokens > 0 {
            let heads = k.par_chunks_mut(k_len).zip(v.par_chunks_mut(v_len));
            heads.enumerate().for_each(|(head, (k, v))| {
                let mut tile = Tile::new(layout.k_dim, layout.v_dim);
                let tokens = k.chunks_mut(layout.k_dim).zip(v.chunks_mut(layout.v_dim));
                for (t, (k, v)) in tokens.enumerate() {
                    if t % TILE == 0 {
                        let tokens = t..(t + TILE).min(stored.tokens);
                        self.read(stored, head, tokens, &mut tile);
                    }
                    let key = tile.key(t % TILE);
                    k.iter_mut().zip(key).for_each(|(k, x)| *k = E::round(x));
                    E::narrow(tile.value(t % TILE), v);
                }
            });
        }
        (k, v)
    }

    /// Some stored tokens in one head. The first is the first of a block, and there are [`TILE`] of them at most.
    pub fn read(&self, stored: &Stored<'_>, head: usize, tokens: Range<usize>, tile: &mut Tile) {
        let group = self.spec().layout.group_size;
        for start in tokens.clone().step_by(group) {
            let (i, at) = (start / group, start - tokens.start);
            match i < stored.pages {
                true => self.read_page(stored.table[i], head, at, tile),
                false => {
                    let chunks = &stored.chunks[(i - stored.pages) * (group / CHUNK)..];
                    self.read_chunks(chunks, head, at, group.min(tokens.end - start), tile);
                }
            }
        }
    }

    fn read_page(&self, block: usize, head: usize, at: usize, tile: &mut Tile) {
        let page = self.head(block, head);
        page.dequantize_keys(&mut tile.keys[at..], KEY_STRIDE);
        page.dequantize_values(&mut tile.values[at * page.layout.v_dim..]);
        for (i, t) in page.traced().iter().enumerate() {
            tile.put(at + usize::from(*t), 1, |_| self.traced(block, head, i));
        }
    }

    fn read_chunks(&self, chunks: &[u32], head: usize, at: usize, len: usize, tile: &mut Tile) {
        let layout = &self.spec().layout;
        let (k_dim, v_dim) = (layout.k_dim, layout.v_dim);
        for start in (0..len).step_by(CHUNK) {
            let (keys, values) = self.chunk(chunks[start / CHUNK], head);
            let token = |t: usize| {
                let (key, value) = (&keys[t * k_dim..], &values[t * v_dim..]);
                (&key[..k_dim], &value[..v_dim])
            };
            tile.put(at + start, CHUNK.min(len - start), token);
        }
    }
}
