//! `cargo bench-kv`: how fast a decoded token reads its past, in one layer and through the engine, with the
//! host's own cache and with others, interleaved in one run.
//!
//! Times on a shared machine are noisy: read the ratios of one run, and the spread beside each median.

mod attention;
mod contenders;
mod engine;
mod layer;

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;
use integration_tests::model::{fast, smollm2};
use integration_tests::report::Report;

/// Compare KV caches on this machine.
#[derive(Parser)]
struct Args {
    /// A GGUF file for the runs through the engine (default: SmolLM2-135M).
    #[arg(short, long)]
    model: Option<PathBuf>,
    /// Depths of the runs through the engine, in tokens.
    #[arg(long, value_delimiter = ',', default_values_t = [512, 1024, 2048, 4096])]
    depths: Vec<usize>,
    /// Sequences at once of the runs through the engine.
    #[arg(long, value_delimiter = ',', default_values_t = [1])]
    batches: Vec<usize>,
    /// Caches of the runs through the engine, beside the host's own.
    #[arg(long, value_delimiter = ';', default_value = "ott")]
    specs: Vec<String>,
    /// Tokens decoded for each measurement through the engine.
    #[arg(long, default_value_t = 32)]
    tokens: usize,
    /// Measurements of each number.
    #[arg(long, default_value_t = 5)]
    repeats: usize,
    /// Only this part: `layer` or `engine`.
    #[arg(long)]
    only: Option<String>,
    /// A run of seconds, to see that everything works.
    #[arg(long)]
    quick: bool,
    /// Where bench-kv.json, bench-kv.md and bench-kv.svg are written; nowhere by default.
    #[arg(long)]
    out: Option<PathBuf>,
}

fn main() -> Result<()> {
    let mut args = Args::parse();
    if args.quick {
        (args.depths, args.batches) = (vec![256], vec![1]);
        (args.tokens, args.repeats) = (4, 1);
    }
    let part = |name: &str| args.only.as_deref().is_none_or(|only| only == name);
    let mut report = Report::new();
    if part("layer") {
        report.print("layer", &layer::run(args.quick, args.repeats)?);
    }
    if part("engine") {
        let model = match &args.model {
            Some(path) => fast(path)?,
            None => smollm2()?,
        };
        ott_backend::register()?;
        let runs = engine::Runs {
            model: &model,
            depths: &args.depths,
            batches: &args.batches,
            specs: &args.specs,
            tokens: args.tokens,
            repeats: args.repeats,
        };
        let points = tokio::runtime::Runtime::new()?.block_on(engine::run(&runs))?;
        report.print("engine", &engine::table(&runs, &points));
        if let Some(folder) = &args.out {
            std::fs::create_dir_all(folder)?;
            std::fs::write(folder.join("bench-kv.svg"), engine::plot(&points))?;
        }
    }
    match &args.out {
        Some(folder) => report.write(folder, "bench-kv"),
        None => Ok(()),
    }
}
