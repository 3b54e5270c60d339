//! The past of one sequence as numbers, for prompts that go on from stored tokens.

use rayon::prelude::*;

use super::element::Element;
use super::layer::LayerCache;
use super::staging::CHUNK;
use super::Row;
use crate::error::Result;

impl<E: Element> LayerCache<E> {
    /// Keys `(num_kv_heads, past, k_dim)` and values `(num_kv_heads, past, v_dim)` of a row's past:
    /// sealed tokens as their codes say, traced ones and those of the window exactly.
    ///
    /// # Errors
    /// If some of the past is not there.
    pub fn gather(&self, row: &Row<'_>) -> Result<(Vec<E>, Vec<E>)> {
        self.check(&Row { new: 0, ..*row })?;
        let layout = &self.spec().layout;
        let (k_len, v_len) = (row.past * layout.k_dim, row.past * layout.v_dim);
        let mut k = vec![E::default(); layout.num_kv_heads * k_len];
        let mut v = vec![E::default(); layout.num_kv_heads * v_len];
        if row.past > 0 {
            let heads = k.par_chunks_mut(k_len).zip(v.par_chunks_mut(v_len));
            heads.enumerate().for_each(|(head, (k, v))| {
                self.gather_head(row, head, k, v);
            });
        }
        Ok((k, v))
    }

    fn gather_head(&self, row: &Row<'_>, head: usize, k: &mut [E], v: &mut [E]) {
        let layout = &self.spec().layout;
        let (group, k_dim, v_dim) = (layout.group_size, layout.k_dim, layout.v_dim);
        let mut numbers = vec![0f32; group * k_dim.max(v_dim)];
        let blocks = k.chunks_mut(group * k_dim).zip(v.chunks_mut(group * v_dim));
        for ((k, v), &block) in blocks.zip(row.table) {
            if !self.is_sealed(block) {
                let chunks = k.chunks_mut(CHUNK * k_dim).zip(v.chunks_mut(CHUNK * v_dim));
                for (i, (k, v)) in chunks.enumerate() {
                    if let Some((keys, values)) = self.chunk(block, i, head) {
                        k.copy_from_slice(&keys[..k.len()]);
                        v.copy_from_slice(&values[..v.len()]);
                    }
                }
                continue;
            }
            let page = self.head(block, head);
            page.dequantize_keys(&mut numbers[..group * k_dim]);
            k.iter_mut()
                .zip(&numbers)
                .for_each(|(k, x)| *k = E::round(*x));
            page.dequantize_values(&mut numbers[..group * v_dim]);
            v.iter_mut()
                .zip(&numbers)
                .for_each(|(v, x)| *v = E::round(*x));
            for (i, t) in page.traced().iter().map(|t| usize::from(*t)).enumerate() {
                if (t + 1) * k_dim <= k.len() {
                    let (key, value) = self.traced(block, head, i);
                    k[t * k_dim..][..k_dim].copy_from_slice(key);
                    v[t * v_dim..][..v_dim].copy_from_slice(value);
                }
            }
        }
    }
}
