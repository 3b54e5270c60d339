//! `kv-load`: load on an OpenAI-compatible server. A fixed batch that decodes at once, or requests that come when they come;
//! tokens per second, latencies, and what the KV cache holds meanwhile. Needs no host, so that its binary can be carried
//! anywhere.

mod args;
mod client;
mod compare;
mod draw;
mod load;
mod measured;
mod model;
mod plan;
mod plot;
mod prompt;
mod ratios;
mod server;
mod stats;
mod table;
#[cfg(test)]
mod tests;
mod watch;

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use clap::Parser;
use serde_json::json;

use crate::args::{Cli, Model, Run, Task};
use crate::client::{Answer, Client};
use crate::measured::{gaps, measure};

fn main() -> ExitCode {
    let done = match Cli::parse().task {
        Task::Run(args) => run(&args),
        Task::Model(args) => model(&args),
        Task::Compare(args) => server::kill_on_signal().and_then(|()| compare::compare(&args)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Run) -> Result<()> {
    let load = args.shape.load()?;
    let mut client = Client::new(&args.url, Duration::MAX)?;
    if let Some(name) = &args.key_env {
        let key = std::env::var(name)
            .with_context(|| format!("the API key: set {name}, or leave --key-env out"))?;
        client.key = Some(key);
    }
    let deadline = args.asking.deadline()?;
    let settings = args.asking.settings(client, deadline)?;
    ensure!(
        settings.client.is_up(),
        "nobody answers at {}: start the server first",
        args.url
    );
    let record = load::run(&settings, &load)?;
    let measured = measure(&load, &record, settings.scrape);
    let name = format!("{load}, seed {}, {}", args.asking.seed, args.url);
    println!("{}", table::report(&name, &measured));
    if let Some(path) = &args.asking.json {
        let all = json!({"load": load.to_string(), "seed": args.asking.seed, "url": args.url, "measured": measured});
        write(path, &serde_json::to_string_pretty(&all)?)?;
    }
    if let Some(path) = &args.asking.plot {
        write(path, &picture(&name, &record.answers))?;
    }
    ensure!(
        measured.answered > 0,
        "none of {} requests was answered: their errors are above",
        measured.requests
    );
    Ok(())
}

fn picture(name: &str, answers: &[Answer]) -> String {
    let fine = || answers.iter().filter(|a| a.error.is_none());
    let first = fine().filter_map(|a| Some(a.events.first()? - a.planned));
    let whole = fine().map(|a| a.end - a.planned);
    let ms = |seconds: &mut dyn Iterator<Item = f64>| seconds.map(|s| s * 1e3).collect();
    let mut lines = [
        ("between tokens".to_owned(), ms(&mut gaps(answers))),
        ("first token".to_owned(), ms(&mut first.into_iter())),
        ("whole answer".to_owned(), ms(&mut whole.into_iter())),
    ];
    plot::distributions(
        &format!("Share of the latencies that are no longer: {name}"),
        &mut lines,
    )
}

fn model(args: &Model) -> Result<()> {
    let start = Instant::now();
    let bytes = model::write(&args.folder, &args.shape)?;
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "{}: {:.2} GB of weights in {seconds:.1} s",
        args.folder.display(),
        bytes as f64 / 1e9
    );
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}
