//! A differential test bed over HTTP: each request is asked alone first; then many clients ask them at once, of
//! a server whose pool is too small for all, and every answer must be what it was alone.
//!
//! Everything follows from a seed but the order in which answers come.

mod ask;
mod judge;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use serde_json::Value;

pub use ask::{asks, random, Answer, Ask, Choice, Length};
pub use judge::{agree, TIE};

use crate::server::Server;

/// How long blocks may take to come back after the last answer.
const REST: Duration = Duration::from_secs(60);

/// What is asked of a server.
#[derive(Clone, Debug)]
pub struct Bed {
    /// Decides what is asked, in which order, and who hangs up.
    pub seed: u64,
    /// Different requests.
    pub distinct: usize,
    /// How long they and their answers are.
    pub length: Length,
    /// Requests in all.
    pub requests: usize,
    /// And no longer than this.
    pub time: Duration,
    /// Requests in flight.
    pub clients: usize,
    /// An answer is compared if prompt and answer are no longer. Longer ones must be answered.
    pub judged_tokens: usize,
    /// By how much log-probabilities may differ.
    pub budget: f32,
    /// Whether steps of the backend fail as asked: who is told so got no wrong answer.
    pub faults: bool,
}

/// How `toy-faulty` says that it fails as asked.
const AS_ASKED: &str = "toy-faulty: ";

/// What came of it.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Requests answered in full.
    pub answered: usize,
    /// Answers compared with those alone.
    pub judged: usize,
    /// Of them, answers that left the other at a tie: two tokens of nearly the same probability.
    pub ties: usize,
    /// Clients that hung up in the middle.
    pub hung_up: usize,
    /// Requests that ended with the error of a step that failed as asked.
    pub failed: usize,
    /// The largest difference of a log-probability.
    pub largest: f32,
    /// What went wrong.
    pub wrong: Vec<String>,
    /// The server's own report at the end; null if it keeps none.
    pub report: Value,
    /// Seconds of the storm.
    pub seconds: f32,
}

impl Bed {
    /// Ask everything alone, then at once, then see whether the server is at rest and as it was.
    ///
    /// # Errors
    /// If the server does not answer one of the requests that are asked alone.
    pub fn run(&self, server: &Server) -> Result<Outcome> {
        let asks = asks(self.seed, self.distinct, self.length);
        let alone = |ask: &Ask| ask.answer(server).with_context(|| ask.body.to_string());
        let expected: Vec<Answer> = asks.iter().map(alone).collect::<Result<_>>()?;
        let outcome = Mutex::new(Outcome::default());
        let (start, next) = (Instant::now(), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..self.clients {
                scope.spawn(|| loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= self.requests || start.elapsed() > self.time {
                        break;
                    }
                    let which = random(self.seed, &[1, number as u64]) as usize % asks.len();
                    self.ask(server, number, &asks[which], &expected[which], &outcome);
                });
            }
        });
        let mut outcome = outcome.into_inner().unwrap_or_else(PoisonError::into_inner);
        outcome.seconds = start.elapsed().as_secs_f32();
        match at_rest(server) {
            Ok(report) => outcome.report = report,
            Err(error) => outcome.wrong.push(format!("{error:#}")),
        }
        // Whatever happened, a request alone is answered as before.
        let after = Mutex::new(outcome);
        for i in 0..asks.len().min(4) {
            self.ask(server, usize::MAX, &asks[i], &expected[i], &after);
        }
        Ok(after.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    fn is_asked(&self, error: &anyhow::Error) -> bool {
        self.faults && format!("{error:#}").contains(AS_ASKED)
    }

    fn ask(
        &self,
        server: &Server,
        number: usize,
        ask: &Ask,
        expected: &Answer,
        outcome: &Mutex<Outcome>,
    ) {
        let impatient = random(self.seed, &[2, number as u64]).is_multiple_of(6);
        let lock = || outcome.lock().unwrap_or_else(PoisonError::into_inner);
        let wrong = |why: String| {
            let seed = self.seed;
            let why = format!("seed {seed}, request {number}: {why}\n    {}", ask.body);
            lock().wrong.push(why);
        };
        if impatient && number != usize::MAX {
            let events = random(self.seed, &[3, number as u64]) as usize % 6;
            match ask.hang_up(server, events) {
                Ok(()) => lock().hung_up += 1,
                Err(error) if self.is_asked(&error) => lock().failed += 1,
                Err(error) => wrong(format!("{error:#}")),
            }
            return;
        }
        let streamed = random(self.seed, &[4, number as u64]).is_multiple_of(2);
        let answer = match streamed {
            true => ask.streamed(server),
            false => ask.answer(server),
        };
        match answer {
            Err(error) if self.is_asked(&error) => lock().failed += 1,
            Err(error) => wrong(format!("no answer: {error:#}")),
            Ok(_) if expected.tokens > self.judged_tokens => lock().answered += 1,
            Ok(answer) => {
                let verdict = agree(expected, &answer, self.budget);
                let mut outcome = lock();
                outcome.answered += 1;
                outcome.judged += 1;
                match verdict {
                    Ok(verdict) => {
                        outcome.ties += usize::from(verdict.tie);
                        outcome.largest = outcome.largest.max(verdict.largest);
                    }
                    Err(error) => {
                        drop(outcome);
                        wrong(format!("{error}, streamed: {streamed}"));
                    }
                }
            }
        }
    }
}

/// No block is in use, and none of what only running sequences hold is left. The cache's report.
///
/// # Errors
/// If that is not so in time.
pub fn at_rest(server: &Server) -> Result<Value> {
    let start = Instant::now();
    loop {
        let (status, caches) = server.get_any("/v1/kv_cache")?;
        if status == 404 {
            return Ok(Value::Null); // The host's own cache tells nothing.
        }
        let report = &caches["data"][0];
        let sum = |name: &str| gauge(report, name).iter().sum::<f64>();
        let held = sum("window_tokens") + sum("owned_blocks");
        if report["free_blocks"] == report["blocks"] && held == 0.0 {
            return Ok(report.clone());
        }
        if start.elapsed() > REST {
            bail!("no rest after {REST:?}: {held} tokens or blocks are held, {report}");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A gauge of a report, by layer; empty if the backend has none of this name.
pub fn gauge(report: &Value, name: &str) -> Vec<f64> {
    let gauges = report["gauges"].as_array().into_iter().flatten();
    let by_layer = gauges
        .filter(|gauge| gauge["name"] == name)
        .filter_map(|gauge| gauge["by_layer"].as_array());
    by_layer.flatten().filter_map(Value::as_f64).collect()
}
