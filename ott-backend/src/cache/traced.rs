//! Traced tokens: full precision for as long as their page lives.

use std::mem::size_of;

use super::element::Element;
use crate::layout::PageLayout;

/// Tokens that are allocated together.
const SEGMENT: usize = 64;

/// Bytes of tables that a token costs at worst: its share of a pointer and a place in the free
/// list, both in vectors that double.
const TABLE_BYTES: usize = 2 * size_of::<u32>() + 1;

/// No token.
pub const NONE: u32 = u32::MAX;

/// Places for one key and one value of one head each. Few tokens are traced, so that places are
/// made in segments when they are needed, and kept.
#[derive(Debug)]
pub struct TracedStore<E> {
    segments: Vec<Box<[E]>>,
    free: Vec<u32>,
    k_dim: usize,
    width: usize,
}

impl<E: Element> TracedStore<E> {
    /// An empty store.
    pub fn new(layout: &PageLayout) -> Self {
        Self {
            segments: Vec::new(),
            free: Vec::new(),
            k_dim: layout.k_dim,
            width: layout.k_dim + layout.v_dim,
        }
    }

    /// Bytes that each token adds at worst, and bytes beside them at worst.
    pub fn worst_bytes(layout: &PageLayout) -> (usize, usize) {
        let token = (layout.k_dim + layout.v_dim) * size_of::<E>() + TABLE_BYTES;
        // A segment that is begun for one token, and the smallest vectors of Rust.
        (token, SEGMENT * token + 4 * size_of::<Box<[E]>>())
    }

    /// Bytes held now.
    pub fn allocated_bytes(&self) -> usize {
        self.segments.len() * SEGMENT * self.width * size_of::<E>()
            + self.segments.capacity() * size_of::<Box<[E]>>()
            + self.free.capacity() * size_of::<u32>()
    }

    /// Tokens held.
    pub fn in_use(&self) -> usize {
        self.segments.len() * SEGMENT - self.free.len()
    }

    /// Keep a token; where it is.
    pub fn insert(&mut self, k: &[E], v: &[E]) -> u32 {
        if self.free.is_empty() {
            let first = (self.segments.len() * SEGMENT) as u32;
            self.free.extend((first..first + SEGMENT as u32).rev());
            self.segments
                .push(vec![E::default(); SEGMENT * self.width].into());
        }
        let Some(place) = self.free.pop() else {
            return NONE; // A segment was just added.
        };
        let (segment, at) = self.locate(place);
        let token = &mut self.segments[segment][at..at + self.width];
        token[..self.k_dim].copy_from_slice(k);
        token[self.k_dim..].copy_from_slice(v);
        place
    }

    /// Forget a token.
    pub fn remove(&mut self, place: u32) {
        self.free.push(place);
    }

    /// Key and value.
    pub fn token(&self, place: u32) -> (&[E], &[E]) {
        let (segment, at) = self.locate(place);
        self.segments[segment][at..at + self.width].split_at(self.k_dim)
    }

    /// Forget all tokens.
    pub fn reset(&mut self) {
        self.free.clear();
        self.free
            .extend((0..(self.segments.len() * SEGMENT) as u32).rev());
    }

    fn locate(&self, place: u32) -> (usize, usize) {
        let place = place as usize;
        (place / SEGMENT, place % SEGMENT * self.width)
    }
}
