//! Percentiles.

use serde::Serialize;

/// What a set of numbers looks like, in their unit.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// How many there are.
    pub count: usize,
    /// Their mean.
    pub mean: f64,
    /// The least of them that half do not exceed.
    pub p50: f64,
    /// The same of 95 in 100.
    pub p95: f64,
    /// The same of 99 in 100.
    pub p99: f64,
    /// The largest.
    pub max: f64,
}

impl Spread {
    /// Of these numbers, which get sorted; nothing if there are none.
    pub fn of(numbers: &mut [f64]) -> Option<Self> {
        numbers.sort_by(f64::total_cmp);
        let max = *numbers.last()?;
        Some(Self {
            count: numbers.len(),
            mean: numbers.iter().sum::<f64>() / numbers.len() as f64,
            p50: percentile(numbers, 50),
            p95: percentile(numbers, 95),
            p99: percentile(numbers, 99),
            max,
        })
    }
}

/// The least of sorted numbers that `percent` in 100 of them do not exceed (nearest rank: always one of them).
pub fn percentile(sorted: &[f64], percent: usize) -> f64 {
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted[rank.max(1) - 1]
}
