//! Attention of one query over some tokens, summed in the order of mistral.rs's CPU attention
//! (`flash_attn_cpu_single_q` of mistralrs-core 0.8.1), hence equal to it bit for bit.

use std::ops::Range;

use crate::KvAttn;

/// Tokens that are folded into one partial softmax.
const TILE: usize = 16;

/// One query head: where its key and value lie in a slot.
pub(super) struct Head<'a> {
    pub q: &'a [f32],
    pub k: Range<usize>,
    pub v: Range<usize>,
    pub attn: KvAttn,
}

/// A softmax over some tokens, not divided by its `sum` yet.
struct Partial {
    max: f32,
    sum: f32,
    out: Vec<f32>,
}

impl Head<'_> {
    /// `out = softmax(q . k) v` over `context`, the slots of the tokens that are seen.
    pub fn attend(&self, context: &[&[f32]], out: &mut [f32]) {
        let tiles = context.chunks(TILE).map(|tile| self.tile(tile));
        if let Some(all) = tiles.reduce(Partial::merge) {
            let inverse = 1.0 / all.sum;
            out.iter_mut()
                .zip(&all.out)
                .for_each(|(o, x)| *o = x * inverse);
        }
    }

    fn tile(&self, tokens: &[&[f32]]) -> Partial {
        let mut max = f32::NEG_INFINITY;
        let mut sum = 0.0;
        let mut out = vec![0.0; self.v.len()];
        for kv in tokens {
            let mut score = dot(self.q, &kv[self.k.clone()]) * self.attn.scale;
            if let Some(softcap) = self.attn.softcap {
                score = softcap * (score / softcap).tanh();
            }
            let (mut shrink, mut weight) = (1.0, 1.0);
            if score > max {
                shrink = (max - score).exp();
                max = score;
            } else {
                weight = (score - max).exp();
            }
            for (o, x) in out.iter_mut().zip(&kv[self.v.clone()]) {
                *o = *o * shrink + x * weight;
            }
            sum = sum * shrink + weight;
        }
        Partial { max, sum, out }
    }
}

impl Partial {
    fn merge(self, other: Self) -> Self {
        let (mut high, low) = if self.max >= other.max {
            (self, other)
        } else {
            (other, self)
        };
        let factor = (low.max - high.max).exp();
        high.out
            .iter_mut()
            .zip(&low.out)
            .for_each(|(h, l)| *h += l * factor);
        high.sum += low.sum * factor;
        high
    }
}

/// `a . b`, summed by fours.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a4, b4) = (a.chunks_exact(4), b.chunks_exact(4));
    let (a_rest, b_rest) = (a4.remainder(), b4.remainder());
    let fours = a4.zip(b4).fold(0f32, |sum, (a, b)| {
        sum + (a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3])
    });
    a_rest
        .iter()
        .zip(b_rest)
        .fold(fours, |sum, (a, b)| sum + a * b)
}
