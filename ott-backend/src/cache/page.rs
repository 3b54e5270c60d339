//! One head's part of a sealed page, read.

use crate::cpu::{Keys, Values};
use crate::layout::{f16_at, u16_at, PageLayout};
use crate::pack::{packed_len, unpack_f32};

/// One head's part of a sealed page.
#[derive(Clone, Copy, Debug)]
pub struct PageHead<'a> {
    /// Where things lie.
    pub layout: &'a PageLayout,
    /// The part's bytes.
    pub bytes: &'a [u8],
}

impl<'a> PageHead<'a> {
    /// Quantized keys.
    pub fn keys(&self) -> Keys<'a> {
        Keys {
            bits: self.layout.k_bits,
            tokens: self.layout.group_size,
            codes: &self.bytes[self.layout.k_codes.clone()],
            scale: &self.bytes[self.layout.k_scale.clone()],
            min: &self.bytes[self.layout.k_min.clone()],
            boosted: &self.bytes[self.layout.k_boosted.clone()],
            high: &self.bytes[self.layout.k_high.clone()],
        }
    }

    /// Key channels with one more bit: each channel, what the bit is worth, and the bits.
    fn high_bits(&self) -> impl Iterator<Item = (usize, f32, &'a [u8])> + 'a {
        let (keys, k_dim) = (self.keys(), self.layout.k_dim);
        let planes = keys.high.chunks_exact(packed_len(keys.tokens, 1));
        planes.enumerate().filter_map(move |(i, plane)| {
            let c = usize::from(u16_at(keys.boosted, i));
            // What no seal has written names any channel.
            let c = Some(c).filter(|c| *c < k_dim)?;
            let scale = f16_at(keys.scale, c).to_f32();
            Some((c, keys.high_worth() * scale, plane))
        })
    }

    /// Quantized values.
    pub fn values(&self) -> Values<'a> {
        Values {
            bits: self.layout.v_bits,
            tokens: self.layout.group_size,
            v_dim: self.layout.v_dim,
            codes: &self.bytes[self.layout.v_codes.clone()],
            scale: &self.bytes[self.layout.v_scale.clone()],
            min: &self.bytes[self.layout.v_min.clone()],
        }
    }

    /// Places in the group of the tokens that are traced, ascending.
    pub fn traced(&self) -> &'a [u8] {
        let slots = &self.bytes[self.layout.slots.clone()];
        // `NO_SLOT` is beyond the group; so is what no seal has written.
        let is_place = |slot: &&u8| usize::from(**slot) < self.layout.group_size;
        let len = slots.iter().take_while(is_place).count();
        &slots[..len]
    }

    /// Keys as numbers, `(k_dim, stride)`, of which the first G columns are overwritten; traced
    /// tokens read as the group's mean.
    pub fn dequantize_keys(&self, out: &mut [f32], stride: usize) {
        let keys = self.keys();
        let bytes = packed_len(keys.tokens, keys.bits);
        let channels = keys.codes.chunks_exact(bytes).zip(out.chunks_mut(stride));
        for (c, (packed, channel)) in channels.enumerate() {
            let channel = &mut channel[..keys.tokens];
            unpack_f32(packed, keys.bits, channel);
            let (scale, min) = (f16_at(keys.scale, c).to_f32(), f16_at(keys.min, c).to_f32());
            channel.iter_mut().for_each(|x| *x = *x * scale + min);
        }
        let mut bits = vec![0f32; keys.tokens];
        for (c, worth, plane) in self.high_bits() {
            unpack_f32(plane, 1, &mut bits);
            let channel = &mut out[c * stride..][..keys.tokens];
            channel
                .iter_mut()
                .zip(&bits)
                .for_each(|(x, bit)| *x += bit * worth);
        }
    }

    /// Values as numbers, `(G, v_dim)`; traced tokens read as the group's mean.
    pub fn dequantize_values(&self, out: &mut [f32]) {
        let (values, tokens) = (self.values(), self.layout.group_size);
        let token_bytes = self.layout.v_token_bytes();
        let rows = out.chunks_exact_mut(self.layout.v_dim);
        for (t, (packed, row)) in values.codes.chunks_exact(token_bytes).zip(rows).enumerate() {
            for group in 0..self.layout.v_groups() {
                let channels = self.layout.v_group(group);
                let start = packed_len(channels.start, values.bits);
                let packed = &packed[start..start + packed_len(channels.len(), values.bits)];
                let at = group * tokens + t;
                let scale = f16_at(values.scale, at).to_f32();
                let min = f16_at(values.min, at).to_f32();
                let row = &mut row[channels];
                unpack_f32(packed, values.bits, row);
                row.iter_mut().for_each(|x| *x = *x * scale + min);
            }
        }
    }
}
