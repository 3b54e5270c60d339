//! Tokens per second of a real model in the real engine, at depth.
//!
//! The host times both halves of each request itself. Ours finds a prompt in its prefix cache when it comes again;
//! upstream's cache on the CPU reads it anew, which is why deep runs take their time.

use std::path::Path;

use anyhow::{ensure, Context, Result};
use integration_tests::engine::{prompt, Engine, Setup};
use integration_tests::request::completion;
use serde_json::{json, Value};

use integration_tests::report::{Samples, Table};

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
    /// Seconds.
    prefill: f64,
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
            "depth", "batch", "cache", "prefill tok/s", "prefill ratio", "decode tok/s", "slowest", "fastest", "decode ratio",
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
        let start = std::time::Instant::now();
        ask(&engine, &prompts, 1).await?;
        lanes.push(Lane {
            name: spec.map_or("upstream f16".to_owned(), Clone::clone),
            engine,
            prefill: start.elapsed().as_secs_f64(),
            peak_mib: peak() - before,
            decode: Samples::default(),
        });
    }
    for _ in 0..runs.repeats {
        for lane in &mut lanes {
            lane.decode
                .0
                .push(ask(&lane.engine, &prompts, 1 + runs.tokens).await?);
        }
    }
    let first = lanes.first().context("the host's own cache comes first")?;
    let base = (first.prefill, first.decode.median());
    let rows = lanes.iter().map(|lane| {
        let prefill = lane.prefill;
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

/// Answer all prompts at once; tokens per second of all answers together, after their first tokens.
async fn ask(engine: &Engine, prompts: &[Vec<u32>], tokens: usize) -> Result<f64> {
    let one = |prompt: &Vec<u32>| completion(engine.runner(), prompt.clone(), tokens);
    let answers = futures::future::try_join_all(prompts.iter().map(one)).await?;
    for answer in &answers {
        let found = answer.usage.completion_tokens;
        ensure!(
            found == tokens,
            "an answer has {found} tokens, not {tokens}"
        );
    }
    let rates = answers
        .iter()
        .map(|a| f64::from(a.usage.avg_compl_tok_per_sec));
    Ok(rates.sum())
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
