//! Tokens per second of a real model in the real engine, at depth.
//!
//! The host times the answers itself; what a request took beside them is its prompt. Ours finds a prompt in its prefix
//! cache when it comes again; upstream's cache on the CPU reads it anew, which is why deep runs take their time. So the
//! first request of each cache measures both halves.

use std::path::Path;

use anyhow::{ensure, Result};
use integration_tests::engine::{prompt, Engine, Setup};
use integration_tests::plot::{Axis, Plot};
use integration_tests::report::{Samples, Table};
use integration_tests::request::completion;
use serde_json::{json, Value};

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
    /// Seconds.
    prefill: f64,
    peak_mib: f64,
    decode: Samples,
}

/// All caches at one depth, as many sequences at once; the host's own first.
pub struct Point {
    depth: usize,
    batch: usize,
    lanes: Vec<Lane>,
}

/// Measure all depths and batches.
pub async fn run(runs: &Runs<'_>) -> Result<Vec<Point>> {
    let mut points = Vec::new();
    for &depth in runs.depths {
        for &batch in runs.batches {
            eprintln!("engine: depth {depth}, {batch} at once");
            points.push(measure(runs, depth, batch).await?);
        }
    }
    Ok(points)
}

/// What was measured, and on what.
pub fn table(runs: &Runs<'_>, points: &[Point]) -> Table {
    Table {
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
        rows: points.iter().flat_map(Point::rows).collect(),
    }
}

/// Decoded tokens per second against depth.
pub fn plot(points: &[Point]) -> String {
    let deepest = points.iter().map(|p| p.depth).max().unwrap_or(1);
    let lanes = || {
        points
            .iter()
            .flat_map(|p| p.lanes.iter().map(move |l| (p, l)))
    };
    let rates = lanes().map(|(_, lane)| lane.decode.median());
    let y = Axis::decades(rates, "tokens per second of all sequences".to_owned());
    let mut plot = Plot::new(Axis::linear(deepest as f64, "tokens before"), y);
    let mut lines: Vec<(String, Vec<(f64, f64)>)> = Vec::new();
    for (point, lane) in lanes() {
        let name = format!("{}, {} at once", lane.name, point.batch);
        let at = (point.depth as f64, lane.decode.median());
        match lines.iter_mut().find(|(known, _)| *known == name) {
            Some((_, line)) => line.push(at),
            None => lines.push((name, vec![at])),
        }
    }
    for (name, line) in &lines {
        plot.line(name, line);
    }
    plot.finish()
}

impl Point {
    fn rows(&self) -> impl Iterator<Item = Vec<Value>> + '_ {
        let base = &self.lanes[0];
        self.lanes.iter().map(|lane| {
            let (slow, fast) = lane.decode.range();
            vec![
                json!(self.depth),
                json!(self.batch),
                json!(lane.name),
                json!((self.batch * self.depth) as f64 / lane.prefill),
                json!(base.prefill / lane.prefill),
                json!(lane.decode.median()),
                json!(slow),
                json!(fast),
                json!(lane.decode.median() / base.decode.median()),
                json!(lane.peak_mib),
            ]
        })
    }
}

async fn measure(runs: &Runs<'_>, depth: usize, batch: usize) -> Result<Point> {
    let prompts: Vec<Vec<u32>> = (0..batch).map(|i| prompt(depth, i as u32 + 1)).collect();
    let mut lanes = Vec::new();
    let mut engines = Vec::new();
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
        let (prefill, decode) = ask(&engine, &prompts, runs.tokens).await?;
        lanes.push(Lane {
            name: spec.map_or("upstream f16".to_owned(), Clone::clone),
            prefill,
            peak_mib: peak() - before,
            decode: Samples(vec![decode]),
        });
        engines.push(engine);
    }
    for _ in 1..runs.repeats {
        for (lane, engine) in lanes.iter_mut().zip(&engines) {
            let (_, decode) = ask(engine, &prompts, runs.tokens).await?;
            lane.decode.0.push(decode);
        }
    }
    Ok(Point {
        depth,
        batch,
        lanes,
    })
}

/// Answer all prompts at once: seconds until all have their first token, and then tokens per second of all together.
async fn ask(engine: &Engine, prompts: &[Vec<u32>], tokens: usize) -> Result<(f64, f64)> {
    let start = std::time::Instant::now();
    let one = |prompt: &Vec<u32>| completion(engine.runner(), prompt.clone(), 1 + tokens);
    let answers = futures::future::try_join_all(prompts.iter().map(one)).await?;
    let total = start.elapsed().as_secs_f64();
    let mut decode = total;
    for answer in &answers {
        let found = answer.usage.completion_tokens;
        ensure!(
            found == 1 + tokens,
            "an answer has {found} tokens, not {}",
            1 + tokens
        );
        // The prompt that was read last has the shortest time of its own; the others waited for it.
        decode = decode.min(f64::from(answer.usage.total_completion_time_sec));
    }
    Ok((total - decode, (prompts.len() * tokens) as f64 / decode))
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
