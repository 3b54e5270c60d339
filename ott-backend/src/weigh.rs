//! What a key's error costs, as the sequence's own queries tell.
//!
//! A score errs by `q . e`, e the error of a key, so channels count by what queries put there. Of the queries' second
//! moments two parts are kept, each channel's mean square and the products of the means, which is what one direction
//! that all queries share looks like:
//!
//! ```text
//! E (q . e)^2  ~  sum_c d_c e_c^2 + (m . e)^2        d_c = E q_c^2 - m_c^2,  m = E q
//! ```
//!
//! The first says which channels are worth one more bit. The second lets the codes of a token make up for each other:
//! channel after channel is rounded after what the channels before it did to `m . e` has been taken into account
//! (LDLQ, arXiv 2307.13304, in closed form for a diagonal and one direction).

use crate::quantize::{code, levels, sum, Affine};

/// Queries of every 16th token, the last of 16, stand for all: so few say as much as all of them.
pub const SAMPLED: usize = 16;

/// The weights of one kv head's channels in one group.
#[derive(Clone, Debug, PartialEq)]
pub struct Weights {
    /// `(k_dim)`: mean query.
    mean: Vec<f32>,
    /// `(k_dim)`: mean square.
    square: Vec<f32>,
    /// A 64th of a channel's mean square on average: no channel is worth nothing.
    floor: f32,
}

/// How a channel takes its part in the sum over the channels before it, in the order of encoding.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Feedback {
    /// What it takes of `sum m e`.
    pub gain: f32,
    /// What its own error adds: m.
    pub mean: f32,
}

impl Weights {
    /// From samples `(2, k_dim)`: means over the query heads, and roots of their mean squares. `None`
    /// if there is nothing to weigh by: all queries are zero, or too large for a sum of squares.
    pub fn of<'a>(samples: impl Iterator<Item = &'a [f32]>, k_dim: usize) -> Option<Self> {
        let (mut mean, mut square) = (vec![0f32; k_dim], vec![0f32; k_dim]);
        let mut count = 0f32;
        for sample in samples {
            let (means, roots) = sample.split_at(k_dim);
            for c in 0..k_dim {
                mean[c] += means[c];
                square[c] += roots[c] * roots[c];
            }
            count += 1.0;
        }
        for c in 0..k_dim {
            mean[c] /= count;
            square[c] /= count;
        }
        let floor = sum(&square, |x| x) / (64 * k_dim) as f32;
        (floor.is_finite() && floor > 0.0).then_some(Self {
            mean,
            square,
            floor,
        })
    }

    /// What a sum of squared errors of channel `c` counts.
    pub fn error(&self, c: usize, squared: f32) -> f32 {
        squared * self.square[c]
    }

    /// How each channel of `order` takes its part.
    pub fn feedback(&self, order: &[usize]) -> Vec<Feedback> {
        let mut parts = vec![
            Feedback {
                gain: 0.0,
                mean: 0.0
            };
            order.len()
        ];
        // What later channels, the first in this loop, leave of the direction's weight.
        let mut left = 1f32;
        for (part, &c) in parts.iter_mut().zip(order).rev() {
            let mean = self.mean[c];
            let own = (self.square[c] - mean * mean).max(0.0) + self.floor;
            let all = own + left * (mean * mean);
            part.gain = left * mean / all;
            part.mean = mean;
            left = left * own / all;
        }
        parts
    }
}

/// Codes of one channel, by tokens, after the channels before it: `sums` has of each token what their
/// errors come to, `sum m e`, and takes this channel's.
#[inline(always)]
pub fn encode_fed_back(
    x: &[f32],
    affine: Affine,
    bits: u8,
    part: Feedback,
    sums: &mut [f32],
    codes: &mut [u8],
) {
    let (scale, min, levels) = (affine.scale.to_f32(), affine.min.to_f32(), levels(bits));
    for ((c, &x), sum) in codes.iter_mut().zip(x).zip(sums) {
        let code = match scale == 0.0 {
            true => 0.0,
            false => code(x + part.gain * *sum, scale, min, levels),
        };
        *c = code as u8;
        *sum += part.mean * (x - (code * scale + min));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two queries along one direction and one across.
    fn weights() -> Weights {
        let samples: [[f32; 6]; 2] = [
            [1.0, 2.0, -1.0, 1.0, 2.0, 1.5],
            [1.0, 2.0, -1.0, 1.5, 2.0, 1.0],
        ];
        Weights::of(samples.iter().map(|s| &s[..]), 3).expect("not zero")
    }

    #[test]
    fn nothing_to_weigh_by() {
        assert_eq!(Weights::of([&[0f32; 6][..]].into_iter(), 3), None);
        assert_eq!(Weights::of([&[f32::MAX; 6][..]].into_iter(), 3), None);
        assert_eq!(Weights::of([&[f32::NAN; 6][..]].into_iter(), 3), None);
        assert_eq!(Weights::of(std::iter::empty(), 3), None);
    }

    /// The gains are those that minimize the whole sum, if later channels could be any number.
    #[test]
    fn gains_are_what_least_squares_asks() {
        let weights = weights();
        let order = [2usize, 0, 1];
        let parts = weights.feedback(&order);
        let own = |c: usize| {
            f64::from((weights.square[c] - weights.mean[c] * weights.mean[c]).max(0.0))
                + f64::from(weights.floor)
        };
        // What is left to pay of (m . e)^2 = acc^2 once the channels of `after` are free: 1 / (1 + sum m^2 / d).
        let left = |after: &[usize]| {
            let sum: f64 = after
                .iter()
                .map(|&c| f64::from(weights.mean[c]).powi(2) / own(c))
                .sum();
            1.0 / (1.0 + sum)
        };
        for i in 0..3 {
            let (c, s) = (order[i], left(&order[i + 1..]));
            let mean = f64::from(weights.mean[c]);
            let gain = s * mean / (own(c) + s * mean * mean);
            assert!(
                (f64::from(parts[i].gain) - gain).abs() < 1e-5,
                "{i}: {parts:?}"
            );
            assert_eq!(parts[i].mean, weights.mean[c]);
        }
    }
}
