//! How far one row of logits is from another, and what many such rows say.

use serde::{Deserialize, Serialize};

/// One position: the distribution of the next token, against the one in full precision.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Kullback-Leibler divergence from full precision, nats.
    pub kld: f64,
    /// Whether the likeliest token is the same.
    pub agrees: bool,
    /// Negative log-likelihood of the text's next token, nats.
    pub loss: f64,
    /// The same in full precision.
    pub base_loss: f64,
}

/// Compare logits `found` with those of full precision, where the text goes on with `next`.
pub fn compare(base: &[f32], found: &[f32], next: u32) -> Sample {
    let (log_p, log_q) = (LogSoftmax::of(base), LogSoftmax::of(found));
    let terms = base.iter().zip(found).map(|(&p, &q)| {
        let (p, q) = (log_p.at(p), log_q.at(q));
        f64::from((p as f32).exp()) * (p - q)
    });
    let at = |x: &[f32]| x.get(next as usize).copied().unwrap_or(f32::NEG_INFINITY);
    Sample {
        kld: terms.sum::<f64>().max(0.0),
        agrees: log_p.best == log_q.best,
        loss: -log_q.at(at(found)),
        base_loss: -log_p.at(at(base)),
    }
}

struct LogSoftmax {
    offset: f64,
    best: usize,
}

impl LogSoftmax {
    fn of(logits: &[f32]) -> Self {
        let likeliest = logits.iter().copied().enumerate();
        let (best, max) = likeliest.fold((0, f32::NEG_INFINITY), |best, x| match x.1 > best.1 {
            true => x,
            false => best,
        });
        let sum: f64 = logits.iter().map(|x| f64::from((x - max).exp())).sum();
        Self {
            offset: f64::from(max) + sum.ln(),
            best,
        }
    }

    fn at(&self, logit: f32) -> f64 {
        f64::from(logit) - self.offset
    }
}

/// What a text's positions say together.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Summary {
    pub positions: usize,
    /// Divergence, nats.
    pub mean: f64,
    pub median: f64,
    pub p99: f64,
    pub p999: f64,
    /// Share of positions whose likeliest token is the same.
    pub top1: f64,
    pub perplexity: f64,
    /// Perplexity over that of full precision.
    pub ratio: f64,
    /// Mean divergence of each quarter of the text.
    pub quarters: [f64; 4],
    /// Mean divergence of each 32nd of the text.
    #[serde(default)]
    pub by_position: Vec<f64>,
}

impl Summary {
    /// Of the samples in the order of the text.
    pub fn of(samples: &[Sample]) -> Self {
        let mean = |samples: &[Sample], f: fn(&Sample) -> f64| {
            samples.iter().map(f).sum::<f64>() / samples.len().max(1) as f64
        };
        let mut sorted: Vec<f64> = samples.iter().map(|s| s.kld).collect();
        sorted.sort_by(f64::total_cmp);
        let quantile = |q: f64| {
            let at = (q * sorted.len() as f64) as usize;
            let at = at.min(sorted.len().saturating_sub(1));
            sorted.get(at).copied().unwrap_or(f64::NAN)
        };
        let (loss, base) = (mean(samples, |s| s.loss), mean(samples, |s| s.base_loss));
        let part = samples.len().div_ceil(32).max(1);
        let mut quarters = [0.0; 4];
        let size = samples.len().div_ceil(4).max(1);
        for (quarter, part) in quarters.iter_mut().zip(samples.chunks(size)) {
            *quarter = mean(part, |s| s.kld);
        }
        Self {
            positions: samples.len(),
            mean: mean(samples, |s| s.kld),
            median: quantile(0.5),
            p99: quantile(0.99),
            p999: quantile(0.999),
            top1: mean(samples, |s| f64::from(u8::from(s.agrees))),
            perplexity: loss.exp(),
            ratio: (loss - base).exp(),
            quarters,
            by_position: samples.chunks(part).map(|p| mean(p, |s| s.kld)).collect(),
        }
    }
}
