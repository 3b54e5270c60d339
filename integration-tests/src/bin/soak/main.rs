//! `cargo soak`: the test bed for as long as you like. Prints a line per round, and fails if anything was wrong.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{ensure, Result};
use clap::Parser;
use integration_tests::bed::{Bed, Outcome, TIE};
use integration_tests::model::fast;
use integration_tests::server::Server;

/// Many clients against the server, in rounds with different caches, until the time is over.
#[derive(Parser)]
struct Arguments {
    /// A GGUF file.
    #[arg(short, long)]
    model: PathBuf,
    /// Minutes.
    #[arg(long, default_value_t = 60)]
    minutes: u64,
    /// Requests in flight.
    #[arg(long, default_value_t = 12)]
    clients: usize,
    /// Where the rounds' seeds begin; a failure names its own.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Minutes of a round.
    #[arg(long, default_value_t = 5)]
    round: u64,
}

/// Servers, and up to how many tokens their answers are what they are alone.
const ROUNDS: [(&str, bool, &[&str], usize); 4] = [
    // Blocks of 16 tokens, and few: waiting, preemption, eviction all the time.
    (
        "toy-f32, pool of 640",
        true,
        &[
            "--kv-cache",
            "toy-f32:block=16",
            "--pa-context-len",
            "640",
            "--max-seqs",
            "6",
        ],
        usize::MAX,
    ),
    // Nothing is hit or preempted, so that the numbers stored do not depend on others.
    (
        "ott, roomy",
        false,
        &[
            "--kv-cache",
            "ott",
            "--pa-context-len",
            "8192",
            "--max-seqs",
            "6",
            "--prefix-cache-n",
            "0",
        ],
        usize::MAX,
    ),
    // What fits into one block is never hit, and stays in the window.
    (
        "ott, pool of 1024",
        false,
        &[
            "--kv-cache",
            "ott",
            "--pa-context-len",
            "1024",
            "--max-seqs",
            "6",
        ],
        127,
    ),
    (
        "ott:group=32, pool of 512",
        false,
        &[
            "--kv-cache",
            "ott:group=32",
            "--pa-context-len",
            "512",
            "--max-seqs",
            "6",
        ],
        31,
    ),
];

fn main() -> Result<()> {
    let args = Arguments::parse();
    let model = fast(&args.model)?;
    let (start, total) = (Instant::now(), Duration::from_secs(60 * args.minutes));
    let (mut wrong, mut requests, mut round) = (0, 0, 0);
    while start.elapsed() < total {
        let (name, toys, options, judged_tokens) = ROUNDS[round % ROUNDS.len()];
        let mut server = match toys {
            true => Server::start_toys(&model, options)?,
            false => Server::start(&model, options)?,
        };
        let bed = Bed {
            seed: args.seed + round as u64,
            distinct: 24,
            requests: usize::MAX,
            time: Duration::from_secs(60 * args.round).min(total.saturating_sub(start.elapsed())),
            clients: args.clients,
            judged_tokens,
            budget: TIE,
        };
        let before = resident(server.pid());
        let outcome = bed.run(&server)?;
        println!("{}", line(name, &bed, &outcome));
        println!(
            "    resident: {before} MiB at the start, {} MiB at the end",
            resident(server.pid())
        );
        for why in &outcome.wrong {
            println!("  WRONG: {why}");
        }
        ensure!(server.is_alive()?, "the server died");
        wrong += outcome.wrong.len();
        requests += outcome.answered + outcome.hung_up;
        round += 1;
    }
    println!("{requests} requests in {round} rounds, {wrong} wrong");
    ensure!(wrong == 0, "{wrong} wrong");
    Ok(())
}

/// A round in one line.
fn line(name: &str, bed: &Bed, o: &Outcome) -> String {
    let r = &o.report;
    format!(
        "{name}, seed {}, {} clients, {:.0} s: {} answered, {} compared ({} ties, log-probabilities within {:.3}), \
         {} hung up; {} sequences, {} preempted, {} blocks evicted, {} of {} prompt tokens hit, {} steps, {} failed; {} wrong",
        bed.seed, bed.clients, o.seconds, o.answered, o.judged, o.ties, o.largest, o.hung_up, r["sequences"],
        r["preempted"], r["evicted_blocks"], r["hit_tokens"], r["prompt_tokens"], r["steps"], r["failed_steps"],
        o.wrong.len()
    )
}

/// MiB of memory of a process, as the system counts it; 0 if it does not tell.
fn resident(pid: u32) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<usize>().ok());
    kib.unwrap_or(0) / 1024
}
