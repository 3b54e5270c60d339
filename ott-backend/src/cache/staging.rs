//! Full-precision tokens that are not sealed yet, in chunks of 32 tokens.

use std::mem::size_of;

use super::element::Element;
use crate::config::{OttConfig, Weigh};
use crate::layout::PageLayout;
use crate::weigh::SAMPLED;

use super::CHUNK;

/// Bytes of tables that a chunk costs at worst: its pointer, in a vector that doubles and begins with four.
const TABLE_BYTES: usize = 4 * size_of::<Box<[u8]>>();

/// Chunks of one layer: each holds all kv heads, per head 32 keys and then 32 values, and after them, per head, the
/// samples of these tokens' queries, where keys are weighed by them.
///
/// Chunks are made when they are first needed, and kept.
#[derive(Debug)]
pub struct Staging<E> {
    chunks: Vec<Box<[E]>>,
    heads: usize,
    k_dim: usize,
    v_dim: usize,
    /// Numbers of a head's samples.
    samples: usize,
}

/// Numbers of a chunk's samples, per head.
fn samples(layout: &PageLayout, config: &OttConfig) -> usize {
    match config.weigh {
        Weigh::None => 0,
        Weigh::Queries => CHUNK / SAMPLED * 2 * layout.k_dim,
    }
}

impl<E: Element> Staging<E> {
    /// An empty store.
    pub fn new(layout: &PageLayout, config: &OttConfig) -> Self {
        Self {
            chunks: Vec::new(),
            heads: layout.num_kv_heads,
            k_dim: layout.k_dim,
            v_dim: layout.v_dim,
            samples: samples(layout, config),
        }
    }

    /// Bytes of a store of `limit` chunks at worst.
    pub fn worst_bytes(layout: &PageLayout, config: &OttConfig, limit: usize) -> usize {
        let of_head = CHUNK * (layout.k_dim + layout.v_dim) + samples(layout, config);
        let numbers = layout.num_kv_heads * of_head;
        limit.saturating_mul(numbers * size_of::<E>() + TABLE_BYTES)
    }

    /// Bytes held now.
    pub fn allocated_bytes(&self) -> usize {
        let numbers: usize = self.chunks.iter().map(|c| c.len()).sum();
        let tables = self.chunks.capacity() * size_of::<Box<[E]>>();
        numbers * size_of::<E>() + tables
    }

    /// Make chunks up to number `last`.
    pub fn make(&mut self, last: u32) {
        let numbers = self.heads * (CHUNK * (self.k_dim + self.v_dim) + self.samples);
        while self.chunks.len() <= last as usize {
            self.chunks.push(vec![E::default(); numbers].into());
        }
    }

    /// Keys `(32, k_dim)` and values `(32, v_dim)` of one head.
    pub fn head(&self, chunk: u32, head: usize) -> (&[E], &[E]) {
        let size = CHUNK * (self.k_dim + self.v_dim);
        self.chunks[chunk as usize][head * size..][..size].split_at(CHUNK * self.k_dim)
    }

    /// Key and value of one token.
    pub fn token(&self, chunk: u32, head: usize, t: usize) -> (&[E], &[E]) {
        let (k, v) = self.head(chunk, head);
        (
            &k[t * self.k_dim..][..self.k_dim],
            &v[t * self.v_dim..][..self.v_dim],
        )
    }

    /// Write one token.
    pub fn write(&mut self, chunk: u32, head: usize, t: usize, k: &[E], v: &[E]) {
        let size = CHUNK * (self.k_dim + self.v_dim);
        let head = &mut self.chunks[chunk as usize][head * size..][..size];
        let (keys, values) = head.split_at_mut(CHUNK * self.k_dim);
        keys[t * self.k_dim..][..self.k_dim].copy_from_slice(k);
        values[t * self.v_dim..][..self.v_dim].copy_from_slice(v);
    }

    /// Sample `i` of a chunk, `(2, k_dim)`.
    pub fn sample(&self, chunk: u32, head: usize, i: usize) -> &[E] {
        &self.chunks[chunk as usize][self.sample_at(head, i)..][..2 * self.k_dim]
    }

    /// Write one sample.
    pub fn write_sample(&mut self, chunk: u32, head: usize, i: usize, sample: &[E]) {
        let at = self.sample_at(head, i);
        self.chunks[chunk as usize][at..][..2 * self.k_dim].copy_from_slice(sample);
    }

    fn sample_at(&self, head: usize, i: usize) -> usize {
        let tokens = self.heads * CHUNK * (self.k_dim + self.v_dim);
        tokens + head * self.samples + i * 2 * self.k_dim
    }
}
