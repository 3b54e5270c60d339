//! What a load is, and its requests: when each comes, how long its prompt is, how many tokens it asks for.

use std::fmt;
use std::str::FromStr;

use anyhow::{bail, ensure, Context, Error, Result};

use crate::draw::Draw;

/// Whole numbers from `low` to `high`, both among them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Range {
    low: usize,
    high: usize,
}

impl Range {
    const fn new(low: usize, high: usize) -> Self {
        Self { low, high }
    }
}

impl FromStr for Range {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (low, high) = text.split_once('-').unwrap_or((text, text));
        let range = Self::new(number(low)?, number(high)?);
        ensure!(
            1 <= range.low && range.low <= range.high,
            "`{text}` is no range: write LOW-HIGH with 1 <= LOW <= HIGH, or one number"
        );
        Ok(range)
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.low == self.high {
            true => write!(f, "{}", self.low),
            false => write!(f, "{}-{}", self.low, self.high),
        }
    }
}

/// One kind of request: what share of all it is, tokens of the prompt, tokens of the answer.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Part {
    share: f64,
    depth: Range,
    tokens: Range,
}

const fn part(share: f64, depth: (usize, usize), tokens: (usize, usize)) -> Part {
    Part {
        share,
        depth: Range::new(depth.0, depth.1),
        tokens: Range::new(tokens.0, tokens.1),
    }
}

const CHAT: Part = part(1.0, (64, 1024), (32, 256));
const DOCUMENT: Part = part(1.0, (2048, 16384), (64, 256));
const WRITING: Part = part(1.0, (32, 256), (256, 1024));
/// Mixes by name. `mixed` has few long prompts among many short ones: those who wait behind them see it.
const MIXES: [(&str, &[Part]); 4] = [
    ("chat", &[CHAT]),
    ("document", &[DOCUMENT]),
    ("writing", &[WRITING]),
    (
        "mixed",
        &[
            Part { share: 0.7, ..CHAT },
            Part {
                share: 0.15,
                ..DOCUMENT
            },
            Part {
                share: 0.15,
                ..WRITING
            },
        ],
    ),
];

/// Kinds of requests. Lengths are drawn log-uniform.
#[derive(Clone, Debug, PartialEq)]
pub struct Mix {
    name: String,
    parts: Vec<Part>,
}

impl Mix {
    /// One kind of request: tokens of the prompt and of the answer.
    pub fn of(depth: Range, tokens: Range) -> Self {
        let share = 1.0;
        Self {
            name: format!("{depth}/{tokens}"),
            parts: vec![Part {
                share,
                depth,
                tokens,
            }],
        }
    }

    fn draw(&self, draw: &mut Draw) -> (usize, usize) {
        let mut left = draw.unit();
        let chosen = self.parts.iter().find(|part| {
            left -= part.share;
            left < 0.0
        });
        let Part { depth, tokens, .. } = chosen.unwrap_or(&self.parts[0]);
        let depth = draw.log_uniform(depth.low, depth.high);
        (depth, draw.log_uniform(tokens.low, tokens.high))
    }

    /// Names with their lengths, one a line.
    pub fn all() -> String {
        let line = |(name, parts): &(&str, &[Part])| {
            let part = |p: &Part| format!("{:.0} % {}/{}", 100.0 * p.share, p.depth, p.tokens);
            let parts: Vec<String> = parts.iter().map(part).collect();
            format!("  {name:<9} {}\n", parts.join(", "))
        };
        MIXES.iter().map(line).collect()
    }
}

impl FromStr for Mix {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if let Some((depth, tokens)) = text.split_once('/') {
            return Ok(Self::of(depth.parse()?, tokens.parse()?));
        }
        let found = MIXES.iter().find(|(name, _)| *name == text);
        let Some((name, parts)) = found else {
            bail!(
                "there is no mix `{text}`: write DEPTH/TOKENS, such as 64-1024/32-256, or one of\n{}",
                Self::all()
            );
        };
        Ok(Self {
            name: (*name).to_owned(),
            parts: parts.to_vec(),
        })
    }
}

impl fmt::Display for Mix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// A load on a server.
#[derive(Clone, Debug, PartialEq)]
pub enum Load {
    /// So many sequences that all decode at once, each `tokens` behind `depth`. Each comes when the one before it has
    /// its first token, or all of them at once.
    Batch {
        sequences: usize,
        depth: usize,
        tokens: usize,
        at_once: bool,
    },
    /// Requests come when they come, whether or not others were answered.
    Open {
        /// Requests per second.
        rate: f64,
        requests: usize,
        mix: Mix,
    },
    /// So many clients, each of which asks again when it has its answer.
    Closed {
        clients: usize,
        requests: usize,
        mix: Mix,
    },
}

impl Load {
    /// Most sequences that can be running at once; nothing if that depends on the server.
    pub fn at_once(&self) -> Option<usize> {
        match self {
            Self::Batch { sequences, .. } => Some(*sequences),
            Self::Open { .. } => None,
            Self::Closed { clients, .. } => Some(*clients),
        }
    }
}

fn number(text: &str) -> Result<usize> {
    text.trim()
        .parse()
        .with_context(|| format!("`{text}` is no whole number"))
}

const LOADS: &str = "write batch:8x4096+64 (8 sequences, 64 tokens each behind 4096), burst:8x4096+64 (the same, all \
                     sent at once), open:2.5:100:chat (2.5 requests a second, 100 of them, of this mix) or \
                     closed:4:100:64-1024/32-256 (4 clients)";

impl FromStr for Load {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let load = parse(text).with_context(|| format!("`{text}` is no load: {LOADS}"))?;
        load.checked()
    }
}

fn parse(text: &str) -> Result<Load> {
    let parts: Vec<&str> = text.split(':').collect();
    match parts[..] {
        [shape @ ("batch" | "burst"), numbers] => {
            let (sequences, rest) = numbers.split_once('x').context("there is no `x`")?;
            let (depth, tokens) = rest.split_once('+').context("there is no `+`")?;
            Ok(Load::Batch {
                sequences: number(sequences)?,
                depth: number(depth)?,
                tokens: number(tokens)?,
                at_once: shape == "burst",
            })
        }
        ["open", rate, requests, mix] => Ok(Load::Open {
            rate: rate.parse().context("the rate is no number")?,
            requests: number(requests)?,
            mix: mix.parse()?,
        }),
        ["closed", clients, requests, mix] => Ok(Load::Closed {
            clients: number(clients)?,
            requests: number(requests)?,
            mix: mix.parse()?,
        }),
        _ => bail!("it has another form"),
    }
}

impl Load {
    /// Itself.
    ///
    /// # Errors
    /// If it asks for nothing.
    pub fn checked(self) -> Result<Self> {
        let fine = match &self {
            Self::Batch {
                sequences,
                depth,
                tokens,
                ..
            } => *sequences > 0 && *depth > 0 && *tokens > 1,
            Self::Open { rate, requests, .. } => rate.is_finite() && *rate > 0.0 && *requests > 0,
            Self::Closed {
                clients, requests, ..
            } => *clients > 0 && *requests > 0,
        };
        ensure!(
            fine,
            "`{self}` asks for nothing: every number must be above 0, and a batch needs 2 tokens, between which is time"
        );
        Ok(self)
    }
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Batch {
                sequences,
                depth,
                tokens,
                at_once,
            } => {
                let shape = if *at_once { "burst" } else { "batch" };
                write!(f, "{shape}:{sequences}x{depth}+{tokens}")
            }
            Self::Open {
                rate,
                requests,
                mix,
            } => write!(f, "open:{rate}:{requests}:{mix}"),
            Self::Closed {
                clients,
                requests,
                mix,
            } => write!(f, "closed:{clients}:{requests}:{mix}"),
        }
    }
}

/// One request of a load.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Planned {
    /// From 0 on; its prompt follows from it.
    pub id: usize,
    /// Seconds after the load began; 0 where it follows another.
    pub at: f64,
    /// Tokens of the prompt.
    pub depth: usize,
    /// Tokens that it asks for.
    pub tokens: usize,
}

/// Streams of a seed.
const ARRIVALS: u64 = 1;
const LENGTHS: u64 = 2;

/// The requests of a load, in order: a function of the arguments alone. `stagger` are the tokens that a sequence of a batch
/// is asked for more, for each that starts after it, so that it still decodes when the last has started.
pub fn plan(load: &Load, seed: u64, stagger: usize) -> Vec<Planned> {
    match load {
        Load::Batch {
            sequences,
            depth,
            tokens,
            ..
        } => {
            let request = |id| Planned {
                id,
                at: 0.0,
                depth: *depth,
                tokens: tokens + stagger * (sequences - 1 - id),
            };
            (0..*sequences).map(request).collect()
        }
        Load::Open {
            rate,
            requests,
            mix,
        } => {
            let mut arrivals = Draw::new(seed, ARRIVALS);
            drawn(seed, *requests, mix, || arrivals.exponential(1.0 / rate))
        }
        Load::Closed { requests, mix, .. } => drawn(seed, *requests, mix, || 0.0),
    }
}

/// Requests of a mix; `wait` gives the seconds from one to the next.
fn drawn(seed: u64, requests: usize, mix: &Mix, mut wait: impl FnMut() -> f64) -> Vec<Planned> {
    let (mut lengths, mut at) = (Draw::new(seed, LENGTHS), 0.0);
    let request = |id| {
        at += wait();
        let (depth, tokens) = mix.draw(&mut lengths);
        Planned {
            id,
            at,
            depth,
            tokens,
        }
    };
    (0..requests).map(request).collect()
}
