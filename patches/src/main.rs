//! The project's one task tool. It materialises the patched host, turns edits in it back into patches, checks
//! that the two agree, and runs what a newcomer runs: `cargo setup`, `cargo demo`, `cargo verify`.

mod arm;
mod check;
mod doctor;
mod freshness;
mod git;
mod models;
mod nvcc;
mod patch;
mod program;
mod project;
mod refresh;
mod registry;
mod series;
mod setup;
mod tasks;
#[cfg(test)]
mod tests;
mod verify;

use std::path::Path;
use std::process::ExitCode;

use anyhow::{bail, Result};

use crate::project::Project;

const HELP: &str = "\
The tasks of this project, run from the repository's root.

cargo setup                  Make the patched host in integration-tests/host, or bring it up to date.
cargo setup --discard        The same, throwing away edits in it.
cargo setup --unpatched DIR  Put the crates as published into DIR, to run upstream's own tests.
cargo refresh                Write edits in the host back into patches/, uncommitted ones into the last patch.
cargo refresh --patch NAME   The same, uncommitted edits into the patch NAME.
cargo verify                 Everything that must hold: patches, format, lints, tests, build and tests of the host.
cargo verify fast            The same without building the host.
cargo demo [ARGS]            Fetch a small model, build, and answer with and without `--kv-cache ott`.
                             ARGS go to the demo; `-m MODEL` takes a model of yours.
cargo bench-kv [ARGS]        How fast a decoded token reads its past: other caches beside ours, in one run.
cargo eval-kv [ARGS]         How far a cache moves a model's answers from full precision, other caches beside ours.
cargo soak [ARGS]            Many clients against the server for an hour; `--minutes N` for another time.
cargo load-kv --help         Load on a server over HTTP: tokens per second, latencies, what its cache holds.
cargo doctor [HOST:PORT]     What to add when you report a problem: versions, machine, and what a server tells.
cargo fetch-nvcc             Fetch the CUDA compiler, for machines without one; says what CUDA_HOME to set.
cargo run --release --package ott-patches -- check    Only the patches.

Builds of the host and models are kept in OTT_CACHE_DIR (default: ott-mistralrs in your cache folder).
OTT_HOST_DIR puts the host elsewhere.";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (task, rest) = match args.split_first() {
        Some((task, rest)) => (task.as_str(), rest),
        None => ("help", &args[..]),
    };
    if matches!(task, "help" | "-h" | "--help")
        || (!program::is_program(task) && asks_for_help(rest))
    {
        println!("{HELP}");
        return Ok(());
    }
    let project = Project::here()?;
    let rest: Vec<&str> = rest.iter().map(String::as_str).collect();
    match (task, &rest[..]) {
        ("setup", []) => setup::setup(&project, false),
        ("setup", ["--discard"]) => setup::setup(&project, true),
        ("setup", ["--unpatched", dir]) => setup::unpatched(&project, Path::new(dir)),
        ("refresh", []) => refresh::refresh(&project, None),
        ("refresh", ["--patch", name]) => refresh::refresh(&project, Some(name)),
        ("check", []) => check::check(&project),
        ("fetch-nvcc", []) => nvcc::fetch(),
        ("doctor", []) => doctor::doctor(&project, "127.0.0.1:1234"),
        ("doctor", [address]) => doctor::doctor(&project, address),
        ("verify", []) => verify::verify(&project, false),
        ("verify", ["fast"]) => verify::verify(&project, true),
        (task, _) if program::is_program(task) => program::program(&project, task, &args[1..]),
        _ => bail!("there is no task `{}`.\n\n{HELP}", args.join(" ")),
    }
}

fn asks_for_help(args: &[String]) -> bool {
    args.iter().any(|a| a == "-h" || a == "--help")
}
