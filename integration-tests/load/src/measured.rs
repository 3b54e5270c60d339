//! From what came when to what is reported.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::client::{Answer, LIMIT};
use crate::load::Record;
use crate::plan::Load;
use crate::stats::Spread;
use crate::watch::{Sample, Watched};

/// What a load measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Measured {
    /// Requests of the plan.
    pub requests: usize,
    /// Those that were answered to their end.
    pub answered: usize,
    /// The others.
    pub failed: usize,
    /// Of these, those that `--limit` ended or did not let begin: then rates are of a part.
    pub cut: usize,
    /// The first few different reasons.
    pub errors: Vec<String>,
    /// How often answers ended for which reason, in the server's words.
    pub finish_reasons: BTreeMap<String, usize>,
    /// From the first planned arrival to the last end.
    pub seconds: f64,
    /// Answered ones, over those seconds.
    pub requests_per_second: f64,
    /// Tokens of all prompts, if the server told of every answered request.
    pub prompt_tokens: Option<u64>,
    /// Tokens that came, also those of requests that failed later.
    pub output_tokens: u64,
    /// Over those seconds.
    pub output_tokens_per_second: f64,
    /// `usage` if the server told the counts of all answers, `events` if each event with text counts as a token.
    pub tokens_counted_by: String,
    /// Of a batch.
    pub decoding: Option<Decoding>,
    /// From the planned arrival, milliseconds.
    pub first_token_ms: Option<Spread>,
    /// Between events of an answer, milliseconds.
    pub between_tokens_ms: Option<Spread>,
    /// Of one answer: from its first token to its last, over the tokens after the first. Milliseconds.
    pub per_token_ms: Option<Spread>,
    /// From the planned arrival to the end, milliseconds.
    pub whole_answer_ms: Option<Spread>,
    /// How late this program was itself, milliseconds.
    pub sent_late_ms: Option<Spread>,
    /// What the cache held; nothing if the server does not tell.
    pub cache: Option<Held>,
    /// How long the server took to tell; nothing if that was not asked for.
    pub scrapes: Option<Scrapes>,
}

/// The time in which all sequences of a batch were decoding.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Decoding {
    /// How many there were.
    pub sequences: usize,
    /// From the first request to the last first token: prompts, and what was decoded beside them.
    pub start_seconds: f64,
    /// From the last first token to the first end; nothing if there was no such time.
    pub seconds: Option<f64>,
    /// Tokens that came then.
    pub tokens: f64,
    /// Of all sequences together.
    pub tokens_per_second: Option<f64>,
    /// Why there is no rate, and what to do.
    pub note: Option<String>,
}

/// What a cache held during a load.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Held {
    /// What is in effect, in the server's words.
    pub setting: Option<String>,
    /// How often it was asked.
    pub samples: usize,
    /// Bytes allocated.
    pub bytes_held: Level,
    /// Blocks of running sequences.
    pub blocks_used: Level,
    /// Blocks of the pool.
    pub blocks: f64,
    /// Tokens stored.
    pub tokens: Level,
    /// How often a sequence lost computed tokens during the load.
    pub preemptions: f64,
}

/// A number that goes up and down.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Level {
    /// The largest.
    pub peak: f64,
    /// While requests were running.
    pub mean: f64,
}

/// How long scrapes took during the load.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Scrapes {
    /// `GET /v1/kv_cache`, milliseconds.
    pub kv_cache_ms: Option<Spread>,
    /// `GET /metrics`, milliseconds.
    pub metrics_ms: Option<Spread>,
    /// Those not answered.
    pub failed: usize,
    /// The first few reasons.
    pub errors: Vec<String>,
}

/// Reasons that are told; the others are counted only.
const TOLD: usize = 3;

impl Answer {
    /// Tokens of each event, on average. An event may bring more than one, or none: the server's count is the right one.
    fn tokens_per_event(&self) -> f64 {
        match self.usage {
            Some((_, tokens)) if !self.events.is_empty() => {
                tokens as f64 / self.events.len() as f64
            }
            _ => 1.0,
        }
    }

    fn tokens(&self) -> u64 {
        self.usage
            .map_or(self.events.len() as u64, |(_, tokens)| tokens)
    }

    /// Seconds from the first to the last, for each token after the first.
    fn per_token(&self) -> Option<f64> {
        let (first, last) = (self.events.first()?, self.events.last()?);
        let after = self.tokens() as f64 - self.tokens_per_event();
        (self.events.len() > 1 && after > 0.0).then(|| (last - first) / after)
    }
}

/// What a record says.
pub fn measure(load: &Load, record: &Record, scraped: bool) -> Measured {
    let answers = &record.answers;
    let fine: Vec<&Answer> = answers.iter().filter(|a| a.error.is_none()).collect();
    let errors: Vec<&String> = answers.iter().filter_map(|a| a.error.as_ref()).collect();
    let mut finish_reasons = BTreeMap::new();
    for reason in fine.iter().filter_map(|a| a.finish.clone()) {
        *finish_reasons.entry(reason).or_default() += 1;
    }
    let begin = answers
        .iter()
        .map(|a| a.planned)
        .fold(f64::INFINITY, f64::min);
    let end = answers.iter().map(|a| a.end).fold(0.0, f64::max);
    let seconds = (end - begin).max(1e-9);
    let output_tokens = answers.iter().map(Answer::tokens).sum();
    let prompts = fine.iter().map(|a| a.usage.map(|(prompt, _)| prompt));
    let batch = matches!(load, Load::Batch { .. });
    let late: Vec<f64> = answers.iter().map(|a| a.sent - a.planned).collect();
    Measured {
        requests: answers.len(),
        answered: fine.len(),
        failed: errors.len(),
        cut: errors.iter().filter(|e| e.ends_with(LIMIT)).count(),
        errors: different(&errors),
        finish_reasons,
        seconds,
        requests_per_second: fine.len() as f64 / seconds,
        prompt_tokens: prompts.sum::<Option<u64>>().filter(|_| !fine.is_empty()),
        output_tokens,
        output_tokens_per_second: output_tokens as f64 / seconds,
        tokens_counted_by: counted_by(answers),
        decoding: batch.then(|| decoding(answers)),
        first_token_ms: spread(
            fine.iter()
                .filter_map(|a| Some(a.events.first()? - a.planned)),
        ),
        between_tokens_ms: spread(gaps(answers)),
        per_token_ms: spread(fine.iter().filter_map(|a| a.per_token())),
        whole_answer_ms: spread(fine.iter().map(|a| a.end - a.planned)),
        sent_late_ms: spread(late.into_iter()),
        cache: record.watched.as_ref().and_then(held),
        scrapes: record.watched.as_ref().filter(|_| scraped).map(scrapes),
    }
}

/// The first few of them that differ.
fn different(errors: &[&String]) -> Vec<String> {
    let mut told: Vec<String> = Vec::new();
    for error in errors {
        if told.len() < TOLD && !told.contains(error) {
            told.push((*error).clone());
        }
    }
    told
}

/// Seconds between events of each answer, also of those that failed later.
pub fn gaps(answers: &[Answer]) -> impl Iterator<Item = f64> + '_ {
    answers
        .iter()
        .flat_map(|a| a.events.windows(2).map(|pair| pair[1] - pair[0]))
}

fn spread(seconds: impl Iterator<Item = f64>) -> Option<Spread> {
    Spread::of(&mut seconds.map(|s| s * 1e3).collect::<Vec<_>>())
}

fn counted_by(answers: &[Answer]) -> String {
    let came: Vec<&Answer> = answers.iter().filter(|a| !a.events.is_empty()).collect();
    let told = came.iter().filter(|a| a.usage.is_some()).count();
    match told {
        0 => "events".to_owned(),
        _ if told == came.len() => "usage".to_owned(),
        _ => format!("usage of {told}, events of {}", came.len() - told),
    }
}

/// Tokens per second of all sequences, while all of them were decoding.
fn decoding(answers: &[Answer]) -> Decoding {
    let ends = |a: &Answer| Some((*a.events.first()?, *a.events.last()?));
    let ends: Vec<(f64, f64)> = answers.iter().filter_map(ends).collect();
    let begin = ends.iter().map(|(first, _)| *first).fold(0.0, f64::max);
    let end = ends
        .iter()
        .map(|(_, last)| *last)
        .fold(f64::INFINITY, f64::min);
    let sent = answers.iter().map(|a| a.sent).fold(f64::INFINITY, f64::min);
    let failed = answers.iter().filter(|a| a.error.is_some()).count();
    let note = if ends.len() < answers.len() || failed > 0 {
        let all = answers.len();
        Some(format!(
            "{} of {all} sequences decoded, {failed} failed: no rate of all",
            ends.len()
        ))
    } else if end <= begin {
        Some("the first sequence ended before the last had started: raise --stagger, or lower the batch".to_owned())
    } else {
        None
    };
    let inside = |a: &Answer| {
        let events = a
            .events
            .iter()
            .filter(|t| begin < **t && **t <= end)
            .count();
        events as f64 * a.tokens_per_event()
    };
    let all = note.is_none();
    let tokens = if all {
        answers.iter().map(inside).sum()
    } else {
        0.0
    };
    Decoding {
        sequences: answers.len(),
        start_seconds: (begin - sent).max(0.0),
        seconds: all.then_some(end - begin),
        tokens,
        tokens_per_second: all.then(|| tokens / (end - begin)),
        note,
    }
}

fn held(watched: &Watched) -> Option<Held> {
    let (first, last) = (watched.samples.first()?, watched.samples.last()?);
    let level = |number: fn(&Sample) -> f64| {
        let all = watched.samples.iter().map(number);
        // The first and the last look are outside the load.
        let inside = match watched.samples.len() {
            n @ 3.. => &watched.samples[1..n - 1],
            _ => &watched.samples[..],
        };
        Level {
            peak: all.fold(0.0, f64::max),
            mean: inside.iter().map(number).sum::<f64>() / inside.len() as f64,
        }
    };
    Some(Held {
        setting: watched.setting.clone(),
        samples: watched.samples.len(),
        bytes_held: level(|s| s.bytes_held),
        blocks_used: level(|s| s.blocks_used),
        blocks: last.blocks,
        tokens: level(|s| s.tokens),
        preemptions: last.preempted - first.preempted,
    })
}

fn scrapes(watched: &Watched) -> Scrapes {
    Scrapes {
        kv_cache_ms: spread(watched.kv_cache.iter().copied()),
        metrics_ms: spread(watched.metrics.iter().copied()),
        failed: watched.errors.len(),
        errors: watched.errors.iter().take(TOLD).cloned().collect(),
    }
}
