//! What the server tells of its cache while a load runs, and how long it takes to tell.

use std::sync::mpsc::{Receiver, RecvTimeoutError};

use serde_json::Value;

use crate::client::Clock;
use crate::load::Settings;

/// One look at the cache.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sample {
    /// Allocated.
    pub bytes_held: f64,
    /// Blocks of running sequences.
    pub blocks_used: f64,
    /// Blocks of the pool.
    pub blocks: f64,
    /// Tokens stored.
    pub tokens: f64,
    /// How often a sequence lost computed tokens, ever.
    pub preempted: f64,
}

/// All looks of one load.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Watched {
    /// The first before the first request, the last after the last; none if the server tells nothing.
    pub samples: Vec<Sample>,
    /// What is in effect, in the server's words.
    pub setting: Option<String>,
    /// Seconds that each `GET /v1/kv_cache` took.
    pub kv_cache: Vec<f64>,
    /// Seconds that each `GET /metrics` took.
    pub metrics: Vec<f64>,
    /// Why one was not answered.
    pub errors: Vec<String>,
}

/// Look before the load begins; nothing if the server has nothing to look at.
pub fn before(settings: &Settings) -> Option<Watched> {
    let mut watched = Watched::default();
    look(settings, &mut watched).then_some(watched)
}

/// Look every so often until `end` hangs up, and once more.
pub fn watch(settings: &Settings, mut watched: Watched, end: &Receiver<()>) -> Watched {
    let every = settings.sample;
    while end.recv_timeout(every) == Err(RecvTimeoutError::Timeout) {
        look(settings, &mut watched);
    }
    look(settings, &mut watched);
    watched
}

/// One look; whether there is anything to see.
fn look(settings: &Settings, watched: &mut Watched) -> bool {
    let clock = Clock::new();
    match settings.client.kv_cache() {
        Ok(Some(told)) => {
            watched.kv_cache.push(clock.now());
            watched.samples.push(sample(&told));
            let setting = told["data"][0]["setting"].as_str();
            watched.setting = setting.map(str::to_owned);
        }
        Ok(None) => return false,
        Err(error) => watched.errors.push(format!("/v1/kv_cache: {error:#}")),
    }
    if settings.scrape {
        let clock = Clock::new();
        match settings.client.metrics() {
            Ok(()) => watched.metrics.push(clock.now()),
            Err(error) => watched.errors.push(format!("/metrics: {error:#}")),
        }
    }
    true
}

/// All caches of the server together.
fn sample(told: &Value) -> Sample {
    let none = Vec::new();
    let caches = told["data"].as_array().unwrap_or(&none);
    let sum = |name: &str| {
        caches
            .iter()
            .filter_map(|cache| cache[name].as_f64())
            .sum::<f64>()
    };
    Sample {
        bytes_held: sum("bytes_held"),
        blocks_used: sum("blocks") - sum("free_blocks"),
        blocks: sum("blocks"),
        tokens: sum("tokens"),
        preempted: sum("preempted"),
    }
}
