//! The tracing rule: which tokens of a group stay in full precision.
//!
//! The magnitude of a token is the L1 norm of its key over the head's channels (OTT, section 4.1).
//! Among the N members of the pool and the G tokens of a group, the N smallest win the pool.
//!
//! - Of equal magnitudes the older token wins: a member before a token, an earlier token before a
//!   later one.
//! - A token that wins is traced: full precision for ever, even if it is displaced later. One that
//!   does not win is quantized with its group.
//! - Each displaced member takes a place of the extra store. If a group would displace more members
//!   than places are left, tracing stops before this group, for good: nothing of it or of any later
//!   group of the chain is traced.
//!
//! So the tokens traced are a function of the prefix, at most N + extra of a chain are, and sealing
//! a page needs the state after the page before it and nothing else.

use crate::layout::{PageLayout, NO_SLOT, STOPPED};

/// The outlier pool of one kv head after some page.
#[derive(Clone, Debug, PartialEq)]
pub struct TraceState {
    /// Magnitudes of the members, ascending; `+inf` where a place is free.
    pub pool: Vec<f32>,
    /// Members displaced so far, or [`STOPPED`].
    pub extra: u8,
}

impl TraceState {
    /// Before the first page.
    pub fn new(outliers: usize) -> Self {
        Self {
            pool: vec![f32::INFINITY; outliers],
            extra: 0,
        }
    }

    /// The state after the page of which `bytes` is one head's part.
    pub fn read(layout: &PageLayout, bytes: &[u8]) -> Self {
        let pool = bytes[layout.pool.clone()].chunks_exact(4);
        Self {
            pool: pool
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                .collect(),
            extra: if layout.outliers == 0 {
                0
            } else {
                bytes[layout.extra]
            },
        }
    }

    /// Write this state and the places of the tokens traced in the page.
    pub fn write(&self, traced: &[u8], layout: &PageLayout, bytes: &mut [u8]) {
        if layout.outliers == 0 {
            return;
        }
        let pool = bytes[layout.pool.clone()].chunks_exact_mut(4);
        for (bytes, magnitude) in pool.zip(&self.pool) {
            bytes.copy_from_slice(&magnitude.to_le_bytes());
        }
        let slots = &mut bytes[layout.slots.clone()];
        slots.fill(NO_SLOT);
        slots[..traced.len()].copy_from_slice(traced);
        bytes[layout.extra] = self.extra;
    }

    /// The state after a group with these magnitudes, and the places in the group of the tokens
    /// that are traced, ascending. `capacity`: places of the extra store.
    pub fn trace(&self, magnitudes: &[f32], capacity: usize) -> (Self, Vec<u8>) {
        if self.extra == STOPPED || self.pool.is_empty() {
            return (self.clone(), Vec::new());
        }
        let members = self.pool.iter().map(|m| (*m, None));
        let tokens = (0u8..).zip(magnitudes).map(|(t, m)| (*m, Some(t)));
        // A stable sort keeps older before younger; free places are +inf and come last.
        let mut ranked: Vec<(f32, Option<u8>)> = members
            .filter(|(m, _)| m.is_finite())
            .chain(tokens)
            .collect();
        ranked.sort_by(|a, b| a.0.total_cmp(&b.0));
        let (winners, losers) = ranked.split_at(self.pool.len().min(ranked.len()));
        let displaced = losers.iter().filter(|(_, token)| token.is_none()).count();
        if usize::from(self.extra) + displaced > capacity {
            let stopped = Self {
                extra: STOPPED,
                ..self.clone()
            };
            return (stopped, Vec::new());
        }
        let mut traced: Vec<u8> = winners.iter().filter_map(|(_, token)| *token).collect();
        traced.sort_unstable();
        let mut after = Self {
            pool: winners.iter().map(|(m, _)| *m).collect(),
            extra: self.extra + displaced as u8,
        };
        after.pool.resize(self.pool.len(), f32::INFINITY);
        (after, traced)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(pool: &[f32], extra: u8) -> TraceState {
        TraceState {
            pool: pool.to_vec(),
            extra,
        }
    }

    #[test]
    fn the_smallest_win() {
        let (after, traced) = TraceState::new(2).trace(&[5.0, 1.0, 3.0, 2.0], 4);
        assert_eq!((after, traced), (state(&[1.0, 2.0], 0), vec![1, 3]));
    }

    #[test]
    fn the_older_wins_a_tie() {
        let (after, traced) = state(&[1.0, 2.0], 0).trace(&[2.0, 2.0, 9.0], 4);
        assert_eq!((after, traced), (state(&[1.0, 2.0], 0), vec![]));
        let (after, traced) = TraceState::new(1).trace(&[2.0, 2.0], 4);
        assert_eq!((after, traced), (state(&[2.0], 0), vec![0]));
    }

    #[test]
    fn a_group_may_displace_several() {
        let (after, traced) = state(&[3.0, 4.0, 5.0], 1).trace(&[1.0, 9.0, 2.0], 3);
        assert_eq!((after, traced), (state(&[1.0, 2.0, 3.0], 3), vec![0, 2]));
    }

    #[test]
    fn tracing_stops_for_good_when_the_store_cannot_take_all() {
        let (after, traced) = state(&[3.0, 4.0, 5.0], 2).trace(&[1.0, 9.0, 2.0], 3);
        assert_eq!(
            (&after, traced),
            (&state(&[3.0, 4.0, 5.0], STOPPED), vec![])
        );
        let (after, traced) = after.trace(&[1.0, 9.0, 9.0], 3);
        assert_eq!((after.extra, traced), (STOPPED, vec![]));
    }

    #[test]
    fn a_full_store_is_no_stop_until_someone_is_displaced() {
        let (after, _) = state(&[1.0], 3).trace(&[2.0], 3);
        assert_eq!(after, state(&[1.0], 3));
    }
}
