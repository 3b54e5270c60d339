//! OTT in plain lines: one key/value head of one sequence in one layer.
//!
//! The judge of `src`, with which it shares no code: written from the papers (OTT, arXiv 2505.10938;
//! KIVI, arXiv 2402.02750) and the rules of `docs/algorithm.md`, slow, and meant to be read. Tokens
//! are `Vec<f32>`s that the caller has rounded to the activation dtype already; attention is in f64.
#![allow(dead_code)] // Each suite uses a part.

use std::collections::BTreeMap;

use half::f16;

/// Channels of a value that share a scale and a minimum, at most.
pub const VALUE_GROUP: usize = 128;

/// The paper's letters: G, R, N and the bits b.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rules {
    /// G: tokens sealed together.
    pub group: usize,
    /// R: newest tokens kept in full precision, at least.
    pub residual: usize,
    /// N: members of the outlier pool.
    pub outliers: usize,
    /// Tokens that lost their place in the pool and stay traced, at most.
    pub extra: usize,
    /// First layers, which do not trace.
    pub exempt_layers: usize,
    pub k_bits: u32,
    pub v_bits: u32,
    /// Scales and minima are rounded to f16 before codes are made from them.
    pub f16_ranges: bool,
    /// Of every 64 key channels, how many get one more bit.
    pub boost: usize,
    /// Values are quantised in another basis.
    pub rotate: bool,
}

impl Rules {
    /// The paper's setting, with the ranges in f16 that both papers store.
    pub const PAPER: Self = Self {
        group: 128,
        residual: 32,
        outliers: 3,
        extra: 32,
        exempt_layers: 2,
        k_bits: 2,
        v_bits: 2,
        f16_ranges: true,
        boost: 0,
        rotate: false,
    };

    /// What holds in a layer: the first ones do not trace.
    pub fn in_layer(mut self, layer: usize) -> Self {
        if layer < self.exempt_layers {
            self.outliers = 0;
        }
        self
    }
}

/// Key and value of one token.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    pub k: Vec<f32>,
    pub v: Vec<f32>,
}

impl Token {
    /// L1 norm of the key over the channels of the head.
    pub fn magnitude(&self) -> f64 {
        self.k.iter().map(|x| f64::from(x.abs())).sum()
    }
}

/// `value = code * scale + min`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Range {
    pub scale: f32,
    pub min: f32,
}

impl Range {
    /// The smallest range over `values`: KIVI's s and z.
    pub fn of(values: &[f32], bits: u32, in_f16: bool) -> Self {
        let min = values.iter().copied().fold(f32::INFINITY, f32::min);
        let max = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let steps = (2u32.pow(bits) - 1) as f32;
        let scale = (max - min) / steps;
        let stored = |x: f32| if in_f16 { f16::from_f32(x).to_f32() } else { x };
        Self {
            scale: stored(scale),
            min: stored(min),
        }
    }

    /// KIVI's Q(X), to the nearest code, halves to the even one.
    pub fn code(self, x: f32, bits: u32) -> u8 {
        if self.scale == 0.0 {
            return 0;
        }
        let steps = (2u32.pow(bits) - 1) as f32;
        ((x - self.min) / self.scale)
            .round_ties_even()
            .clamp(0.0, steps) as u8
    }

    /// KIVI's X'.
    pub fn value(self, code: u8) -> f32 {
        f32::from(code) * self.scale + self.min
    }
}

/// G sealed tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Sealed {
    /// `[channel]`.
    pub k_ranges: Vec<Range>,
    /// `[token][channel]`.
    pub k_codes: Vec<Vec<u8>>,
    /// `[token][channel / VALUE_GROUP]`.
    pub v_ranges: Vec<Vec<Range>>,
    /// `[token][channel]`.
    pub v_codes: Vec<Vec<u8>>,
    /// Key channels of three bits, ascending.
    pub boosted: Vec<usize>,
    rotated: bool,
}

/// What one key/value head has stored of one sequence.
#[derive(Clone, Debug)]
pub struct Head {
    rules: Rules,
    pub sealed: Vec<Sealed>,
    /// Full precision, by position; never forgotten.
    pub traced: BTreeMap<usize, Token>,
    /// Positions of the pool's members: the traced tokens of smallest magnitude.
    pub pool: Vec<usize>,
    /// Tracing has stopped for good: the extra store was too small.
    pub stopped: bool,
    /// The newest tokens.
    pub window: Vec<Token>,
}

impl Head {
    pub fn new(rules: Rules) -> Self {
        Self {
            rules,
            sealed: vec![],
            traced: BTreeMap::new(),
            pool: vec![],
            stopped: false,
            window: vec![],
        }
    }

    /// Tokens stored.
    pub fn len(&self) -> usize {
        self.sealed.len() * self.rules.group + self.window.len()
    }

    /// One new token: enters the window; when that holds R + G, the oldest G are sealed.
    pub fn push(&mut self, token: Token) {
        self.window.push(token);
        if self.window.len() == self.rules.residual + self.rules.group {
            self.seal();
        }
    }

    /// Seal every full group, whatever the window is left with: what happens when the sequence ends
    /// and others may share its pages.
    pub fn flush(&mut self) {
        while self.window.len() >= self.rules.group {
            self.seal();
        }
    }

    /// A step begins after which there are `tokens` tokens: stored groups that then have R newer tokens are sealed before
    /// the new ones attend.
    pub fn begin(&mut self, tokens: usize) {
        let Rules {
            group, residual, ..
        } = self.rules;
        while self.window.len() >= group && (self.sealed.len() + 1) * group + residual <= tokens {
            self.seal();
        }
    }

    fn seal(&mut self) {
        let start = self.sealed.len() * self.rules.group;
        let mut group: Vec<Token> = self.window.drain(..self.rules.group).collect();
        let traced = self.trace(start, &group);
        replace_by_mean(&mut group, &traced);
        self.sealed.push(quantize(&group, &traced, self.rules));
    }

    /// Which tokens of the group (by index) win a place in the pool; they are traced from now on.
    fn trace(&mut self, start: usize, group: &[Token]) -> Vec<usize> {
        let Rules {
            outliers, extra, ..
        } = self.rules;
        if self.stopped {
            return vec![];
        }
        let members = self.pool.iter().map(|p| (self.traced[p].magnitude(), *p));
        let tokens = (start..).zip(group).map(|(p, t)| (t.magnitude(), p));
        let mut ranking: Vec<(f64, usize)> = members.chain(tokens).collect();
        ranking.sort_by(|a, b| a.0.total_cmp(&b.0)); // Stable: of equals the older wins.
        let winners: Vec<usize> = ranking.iter().take(outliers).map(|w| w.1).collect();
        let displaced = self.pool.iter().filter(|p| !winners.contains(p)).count();
        if self.traced.len() - self.pool.len() + displaced > extra {
            self.stopped = true; // The extra store cannot take all that lose their place.
            return vec![];
        }
        let traced: Vec<usize> = winners.iter().copied().filter(|p| *p >= start).collect();
        for p in &traced {
            self.traced.insert(*p, group[p - start].clone());
        }
        self.pool = winners;
        traced.into_iter().map(|p| p - start).collect()
    }

    /// Every stored token as attention sees it.
    pub fn past(&self) -> Vec<Token> {
        let pages = self.sealed.iter().flat_map(dequantize).enumerate();
        let old = pages.map(|(p, token)| self.traced.get(&p).cloned().unwrap_or(token));
        old.chain(self.window.iter().cloned()).collect()
    }

    /// Attention of one query over everything stored: three tiers, one softmax.
    pub fn attend(&self, q: &[f32], scale: f32, softcap: Option<f32>) -> Vec<f64> {
        attend(&self.past(), q, scale, softcap)
    }
}

/// Traced tokens of a group become its mean over the others, so that they stretch no range.
fn replace_by_mean(group: &mut [Token], traced: &[usize]) {
    let others = |i: &usize| !traced.contains(i);
    let kept: Vec<Token> = (0..group.len())
        .filter(others)
        .map(|i| group[i].clone())
        .collect();
    let mean = |part: fn(&Token) -> &Vec<f32>| -> Vec<f32> {
        let sum = |c: usize| kept.iter().map(|t| f64::from(part(t)[c])).sum::<f64>();
        let dim = part(&group[0]).len();
        (0..dim)
            .map(|c| (sum(c) / kept.len() as f64) as f32)
            .collect()
    };
    let (k, v) = (mean(|t| &t.k), mean(|t| &t.v));
    for i in traced {
        group[*i] = Token {
            k: k.clone(),
            v: v.clone(),
        };
    }
}

/// The key channels whose error is largest, traced tokens not counted.
fn worst(group: &[Token], traced: &[usize], ranges: &[Range], rules: Rules) -> Vec<usize> {
    let error = |c: usize| {
        let kept = (0..group.len()).filter(|t| !traced.contains(t));
        kept.map(|t| {
            let (x, range) = (group[t].k[c], ranges[c]);
            f64::from(x - range.value(range.code(x, rules.k_bits))).powi(2)
        })
        .sum::<f64>()
    };
    let mut channels: Vec<usize> = (0..ranges.len()).collect();
    channels.sort_by(|a, b| error(*b).total_cmp(&error(*a)));
    channels.truncate(rules.boost * ranges.len() / 64);
    channels.sort_unstable();
    channels
}

/// A Hadamard matrix over blocks of the largest power of two that divides the channels, 128 at most; in f32 and in the
/// order of docs/layout.md, because the last bit of a value decides now and then on that of its scale.
pub fn rotate(v: &[f32]) -> Vec<f32> {
    let width = (1usize << v.len().trailing_zeros()).min(128);
    let mut x = v.to_vec();
    let mut distance = 1;
    while distance < width {
        let pairs = |i: usize, x: &[f32]| match i & distance {
            0 => x[i] + x[i + distance],
            _ => x[i - distance] - x[i],
        };
        x = (0..x.len()).map(|i| pairs(i, &x)).collect();
        distance *= 2;
    }
    let factor = 1.0 / (width as f32).sqrt();
    x.iter().map(|x| x * factor).collect()
}

/// By what rotated values are divided when they are kept: the least power of two that is no smaller than the root of
/// the matrix's width, so that no channel grows.
fn headroom(channels: usize) -> f32 {
    let width = (1usize << channels.trailing_zeros()).min(128);
    let mut divisor = 1usize;
    while divisor * divisor < width {
        divisor *= 2;
    }
    divisor as f32
}

/// Keys by channel over the group's tokens, values by token over groups of channels.
pub fn quantize(group: &[Token], traced: &[usize], rules: Rules) -> Sealed {
    let turned = |t: &Token| Token {
        k: t.k.clone(),
        v: if rules.rotate {
            rotate(&t.v)
                .iter()
                .map(|x| x / headroom(t.v.len()))
                .collect()
        } else {
            t.v.clone()
        },
    };
    let group: Vec<Token> = group.iter().map(turned).collect();
    let Rules {
        k_bits,
        v_bits,
        f16_ranges,
        ..
    } = rules;
    let channel = |c: usize| group.iter().map(|t| t.k[c]).collect::<Vec<f32>>();
    let mut k_ranges: Vec<Range> = (0..group[0].k.len())
        .map(|c| Range::of(&channel(c), k_bits, f16_ranges))
        .collect();
    let boosted = worst(&group, traced, &k_ranges, rules);
    for c in &boosted {
        k_ranges[*c] = Range::of(&channel(*c), k_bits + 1, f16_ranges);
    }
    let v_ranges = |t: &Token| -> Vec<Range> {
        let parts = t.v.chunks(VALUE_GROUP);
        parts
            .map(|part| Range::of(part, v_bits, f16_ranges))
            .collect()
    };
    let v_ranges: Vec<Vec<Range>> = group.iter().map(v_ranges).collect();
    let k_codes = |t: &Token| {
        let channels = t.k.iter().zip(&k_ranges).enumerate();
        channels
            .map(|(c, (x, range))| range.code(*x, k_bits + u32::from(boosted.contains(&c))))
            .collect()
    };
    let v_codes = |(t, ranges): (&Token, &Vec<Range>)| {
        let channels = t.v.iter().enumerate();
        channels
            .map(|(c, x)| ranges[c / VALUE_GROUP].code(*x, v_bits))
            .collect()
    };
    Sealed {
        k_codes: group.iter().map(k_codes).collect(),
        v_codes: group.iter().zip(&v_ranges).map(v_codes).collect(),
        k_ranges,
        v_ranges,
        boosted,
        rotated: rules.rotate,
    }
}

/// The tokens that a sealed group stands for.
pub fn dequantize(sealed: &Sealed) -> Vec<Token> {
    let turned = |v: Vec<f32>| match sealed.rotated {
        true => rotate(&v).iter().map(|x| x * headroom(v.len())).collect(),
        false => v,
    };
    let token = |t: usize| Token {
        k: (sealed.k_codes[t].iter().zip(&sealed.k_ranges))
            .map(|(code, range)| range.value(*code))
            .collect(),
        v: turned(
            (sealed.v_codes[t].iter().enumerate())
                .map(|(c, code)| sealed.v_ranges[t][c / VALUE_GROUP].value(*code))
                .collect(),
        ),
    };
    (0..sealed.k_codes.len()).map(token).collect()
}

/// Plain softmax attention of one query.
pub fn attend(tokens: &[Token], q: &[f32], scale: f32, softcap: Option<f32>) -> Vec<f64> {
    let score = |t: &Token| {
        let products = q
            .iter()
            .zip(&t.k)
            .map(|(q, k)| f64::from(*q) * f64::from(*k));
        let score = products.sum::<f64>() * f64::from(scale);
        softcap
            .map(f64::from)
            .map_or(score, |cap| cap * (score / cap).tanh())
    };
    let scores: Vec<f64> = tokens.iter().map(score).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let channel = |c: usize| {
        let terms = tokens
            .iter()
            .zip(&weights)
            .map(|(t, w)| w * f64::from(t.v[c]));
        terms.sum::<f64>() / sum
    };
    (0..tokens[0].v.len()).map(channel).collect()
}
