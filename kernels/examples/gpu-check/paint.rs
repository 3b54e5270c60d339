//! Keys, values and queries as models make them: channels with levels of their own, some small keys.

use half::f16;

/// A fixed stream of numbers.
pub struct Noise(u64);

impl Noise {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Between -1 and 1.
    pub fn number(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() >> 33) as usize % n
    }
}

/// Keys `(heads, tokens, dim)`: about one in 50 is an outlier token.
pub fn keys(noise: &mut Noise, heads: usize, tokens: usize, dim: usize) -> Vec<f16> {
    let mut all = Vec::with_capacity(heads * tokens * dim);
    for head in 0..heads {
        for _ in 0..tokens {
            let small = if noise.below(50) == 0 { 0.1 } else { 1.0 };
            for c in 0..dim {
                let level =
                    [2.0, -1.0, 1.5, -0.5, 0.7, 3.0, -1.2][c % 7] * (1.0 + head as f32 / 8.0);
                let width = [0.6, 0.9, 0.3, 0.8, 0.5][c % 5];
                all.push(f16::from_f32((level + noise.number() * width) * small));
            }
        }
    }
    all
}

/// Queries `(heads, tokens, dim)` that share a direction, of each head its own.
pub fn queries(noise: &mut Noise, heads: usize, tokens: usize, dim: usize) -> Vec<f16> {
    let mut all = Vec::with_capacity(heads * tokens * dim);
    for head in 0..heads {
        for _ in 0..tokens {
            for c in 0..dim {
                let level = [0.8, -0.3, 1.1, 0.0, -0.6][(c + head) % 5];
                let width = [0.3, 1.2, 0.1, 0.7, 2.0, 0.5, 0.9][c % 7];
                all.push(f16::from_f32(level + noise.number() * width));
            }
        }
    }
    all
}

/// Numbers between -1 and 1.
pub fn values(noise: &mut Noise, len: usize) -> Vec<f16> {
    (0..len).map(|_| f16::from_f32(noise.number())).collect()
}
