//! Numbers that look random and are a function of a seed alone, so that every cache is asked the same.

/// A generator (SplitMix64). What is drawn for one purpose does not move what is drawn for another: each has a stream.
pub struct Draw(u64);

impl Draw {
    /// Stream number `stream` of a seed.
    pub fn new(seed: u64, stream: u64) -> Self {
        let mut mixed = Self(seed);
        let start = mixed.next() ^ stream.wrapping_mul(0xD6E8_FEB8_6659_FD93);
        Self(start)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// From 0 to below 1, all alike.
    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A whole number from 0 to below `end`, all alike. `end` is at least 1.
    pub fn below(&mut self, end: usize) -> usize {
        ((self.unit() * end as f64) as usize).min(end - 1)
    }

    /// A wait between arrivals that know nothing of each other, in the unit of `mean`.
    pub fn exponential(&mut self, mean: f64) -> f64 {
        -mean * (1.0 - self.unit()).ln()
    }

    /// A whole number in `low..=high`, equal ratios alike: as many below as above the geometric mean.
    pub fn log_uniform(&mut self, low: usize, high: usize) -> usize {
        // Half a unit beyond both ends, so that these come as often as their neighbors.
        let (from, to) = ((low as f64 - 0.5).ln(), (high as f64 + 0.5).ln());
        let drawn = (from + self.unit() * (to - from)).exp().round();
        (drawn as usize).clamp(low, high)
    }

    /// Normal, mean 0.
    pub fn gaussian(&mut self, deviation: f64) -> f64 {
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        deviation * radius * (std::f64::consts::TAU * self.unit()).cos()
    }
}
