//! The online softmax of many rows of scores.

use crate::cache::Element;
use crate::cpu::CpuOps;

/// Scores that are bent at a time.
const PART: usize = 32;

/// Weighted sums of values so far, relative to the largest score so far.
pub struct Softmax {
    ops: &'static CpuOps,
    softcap: Option<f32>,
    /// By row: the largest score.
    max: Vec<f32>,
    /// By row: the sum of weights.
    total: Vec<f32>,
    /// `(rows, v_dim)`: values times weights, summed.
    pub sums: Vec<f32>,
    v_dim: usize,
}

impl Softmax {
    /// Nothing seen yet.
    pub fn new(ops: &'static CpuOps, softcap: Option<f32>, rows: usize, v_dim: usize) -> Self {
        Self {
            ops,
            softcap,
            max: vec![f32::NEG_INFINITY; rows],
            total: vec![0.0; rows],
            sums: vec![0.0; rows * v_dim],
            v_dim,
        }
    }

    /// Turn row `i`'s scores of the next tokens, of which it sees the first `seen`, into weights
    /// relative to the new maximum; sums so far are brought to it.
    pub fn weigh(&mut self, i: usize, scores: &mut [f32], seen: usize) {
        let (scores, hidden) = scores.split_at_mut(seen);
        hidden.fill(0.0);
        if scores.is_empty() {
            return;
        }
        if let Some(softcap) = self.softcap {
            self.bend(scores, softcap);
        }
        let max = (self.ops.max)(scores);
        if max > self.max[i] {
            let shrink = (self.max[i] - max).exp();
            self.total[i] *= shrink;
            let sums = &mut self.sums[i * self.v_dim..(i + 1) * self.v_dim];
            sums.iter_mut().for_each(|x| *x *= shrink);
            self.max[i] = max;
        }
        self.total[i] += (self.ops.exp_sum)(scores, self.max[i]);
    }

    /// `softcap * tanh(score / softcap)`, by `tanh |x| = (1 - e) / (1 + e)`, `e = exp(-2 |x|)`.
    fn bend(&self, scores: &mut [f32], softcap: f32) {
        let mut powers = [0f32; PART];
        for scores in scores.chunks_mut(PART) {
            let powers = &mut powers[..scores.len()];
            for (power, score) in powers.iter_mut().zip(&*scores) {
                *power = (score / softcap).abs() * -2.0;
            }
            (self.ops.exp_sum)(powers, 0.0);
            for (score, e) in scores.iter_mut().zip(&*powers) {
                *score = (softcap * (1.0 - e) / (1.0 + e)).copysign(*score);
            }
        }
    }

    /// Means of values: the sums over the totals, row by row.
    pub fn finish<'a, E: Element>(&mut self, out: impl Iterator<Item = &'a mut [E]>) {
        let rows = self.sums.chunks_exact_mut(self.v_dim).zip(&self.total);
        for ((sums, total), out) in rows.zip(out) {
            let inverse = 1.0 / total;
            sums.iter_mut().for_each(|x| *x *= inverse);
            E::narrow(sums, out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bent_scores() {
        for ops in CpuOps::available() {
            let softmax = Softmax::new(ops, Some(50.0), 1, 1);
            let scores: Vec<f32> = (-999..1000).map(|i| i as f32 * 0.25).collect();
            let mut bent = scores.clone();
            softmax.bend(&mut bent, 50.0);
            for (score, bent) in scores.iter().zip(bent) {
                let want = 50.0 * (f64::from(*score) / 50.0).tanh();
                let error = (f64::from(bent) - want).abs();
                assert!(error < 1e-5, "{score} became {bent}, off by {error}");
            }
        }
    }
}
