//! Tokens per second of a real model in the real engine, at depth.
//!
//! Prompts are read once; every measurement after that finds them in the prefix cache. A decoded token costs
//! the difference between an answer of many tokens and one of a single token, so that what both do cancels.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use integration_tests::engine::{prompt, Engine, Setup};
use integration_tests::request::complete;
use serde_json::{json, Value};

use crate::report::{Samples, Table};

/// What to measure.
pub struct Runs<'a> {
    pub model: &'a Path,
    pub depths: &'a [usize],
    pub batches: &'a [usize],
    pub specs: &'a [String],
    pub tokens: usize,
    pub repeats: usize,
}

/// One cache at one depth.
struct Lane {
    name: String,
    engine: Engine,
    prefill: Duration,
    peak_mib: f64,
    decode: Samples,
}

/// Measure all depths and batches.
pub async fn run(runs: &Runs<'_>) -> Result<Table> {
    let mut rows = Vec::new();
    for &depth in runs.depths {
        for &batch in runs.batches {
            eprintln!("engine: depth {depth}, {batch} at once");
            rows.extend(measure(runs, depth, batch).await?);
        }
    }
    Ok(Table {
        title: format!(
            "Through the engine, {}: tokens per second of all sequences together, median of {} measurements of \
             {} tokens (slowest to fastest), caches interleaved; peak is the process's resident memory above \
             what the loaded models took.",
            runs.model.file_name().unwrap_or_default().to_string_lossy(),
            runs.repeats,
            runs.tokens
        ),
        columns: vec![
            "depth", "batch", "cache", "prefill tok/s", "ratio", "decode tok/s", "slowest", "fastest", "ratio ",
            "peak MiB",
        ],
        rows,
    })
}

async fn measure(runs: &Runs<'_>, depth: usize, batch: usize) -> Result<Vec<Vec<Value>>> {
    let prompts: Vec<Vec<u32>> = (0..batch).map(|i| prompt(depth, i as u32 + 1)).collect();
    let mut lanes = Vec::new();
    for spec in std::iter::once(None).chain(runs.specs.iter().map(Some)) {
        let setup = Setup {
            kv_cache: spec.cloned(),
            // Prompt, answer, and a block of slack for each sequence.
            pool_tokens: batch * (depth + runs.tokens + 128).next_multiple_of(128),
            max_seqs: batch,
            prefix_cache: true,
        };
        let engine = Engine::load(runs.model, &setup).await?;
        let before = reset_peak();
        let start = Instant::now();
        ask(&engine, &prompts, 1).await?;
        lanes.push(Lane {
            name: spec.map_or("upstream f16".to_owned(), Clone::clone),
            engine,
            prefill: start.elapsed(),
            peak_mib: peak() - before,
            decode: Samples::default(),
        });
    }
    for _ in 0..runs.repeats {
        for lane in &mut lanes {
            let one = ask(&lane.engine, &prompts, 1).await?;
            let many = ask(&lane.engine, &prompts, 1 + runs.tokens).await?;
            let seconds = many.saturating_sub(one).as_secs_f64();
            lane.decode.0.push((batch * runs.tokens) as f64 / seconds);
        }
    }
    let first = lanes.first().context("the host's own cache comes first")?;
    let base = (first.prefill.as_secs_f64(), first.decode.median());
    let rows = lanes.iter().map(|lane| {
        let prefill = lane.prefill.as_secs_f64();
        let (slow, fast) = lane.decode.range();
        vec![
            json!(depth),
            json!(batch),
            json!(lane.name),
            json!((batch * depth) as f64 / prefill),
            json!(base.0 / prefill),
            json!(lane.decode.median()),
            json!(slow),
            json!(fast),
            json!(lane.decode.median() / base.1),
            json!(lane.peak_mib),
        ]
    });
    Ok(rows.collect())
}

/// How long it takes to answer all prompts at once.
async fn ask(engine: &Engine, prompts: &[Vec<u32>], tokens: usize) -> Result<Duration> {
    let start = Instant::now();
    let one = |prompt: &Vec<u32>| complete(engine.runner(), prompt.clone(), tokens);
    for answer in futures::future::try_join_all(prompts.iter().map(one)).await? {
        let found = answer.tokens.len();
        anyhow::ensure!(
            found == tokens,
            "an answer has {found} tokens, not {tokens}"
        );
    }
    Ok(start.elapsed())
}

/// Forget the peak of resident memory; what is resident now, in MiB. 0 where the system does not tell.
fn reset_peak() -> f64 {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
    status("VmRSS:")
}

fn peak() -> f64 {
    status("VmHWM:")
}

fn status(field: &str) -> f64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix(field));
    let kib = line.and_then(|l| l.split_whitespace().next()?.parse::<f64>().ok());
    kib.unwrap_or(0.0) / 1024.0
}
