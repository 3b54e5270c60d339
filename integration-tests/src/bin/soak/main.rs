//! `cargo soak`: the test bed for as long as you like. Prints a line per round, and fails if anything was wrong.

mod memory;
mod rounds;

use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{ensure, Result};
use clap::Parser;
use integration_tests::bed::{Bed, Length, Outcome, TIE};
use integration_tests::model::{fast, shallow};
use integration_tests::server::Server;

use memory::Memory;
use rounds::{Round, BACKENDS, HOST};

/// Many clients against the server, in rounds with different caches, until time is over and enough was asked.
#[derive(Parser)]
struct Arguments {
    /// A GGUF file.
    #[arg(short, long)]
    model: PathBuf,
    /// Minutes, at least.
    #[arg(long, default_value_t = 60)]
    minutes: u64,
    /// Requests, at least.
    #[arg(long, default_value_t = 0)]
    requests: usize,
    /// Requests in flight.
    #[arg(long, default_value_t = 12)]
    clients: usize,
    /// Sequences that run at once.
    #[arg(long, default_value_t = 6)]
    max_seqs: usize,
    /// Where the rounds' seeds begin; a failure names its own.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Minutes of a round.
    #[arg(long, default_value_t = 5)]
    round: u64,
    /// Short prompts and answers, in smaller pools: several times as many requests.
    #[arg(long)]
    short: bool,
    /// Only the model's first layers: several times as many requests, whose answers mean nothing.
    #[arg(long)]
    layers: Option<usize>,
    /// The host's own cache instead of the backends.
    #[arg(long)]
    host_cache: bool,
}

fn main() -> Result<()> {
    let args = Arguments::parse();
    let mut model = fast(&args.model)?;
    if let Some(layers) = args.layers {
        model = shallow(&model, layers)?;
    }
    let rounds: &[Round] = if args.host_cache { &HOST } else { &BACKENDS };
    let (start, total) = (Instant::now(), Duration::from_secs(60 * args.minutes));
    let mut sum = Sum::default();
    while start.elapsed() < total || sum.requests < args.requests {
        let round = &rounds[sum.rounds % rounds.len()];
        let seed = args.seed + sum.rounds as u64;
        sum.add(&run(&args, &model, round, seed)?);
        println!("  so far {} s: {sum:?}", start.elapsed().as_secs());
        std::io::stdout().flush()?;
    }
    ensure!(sum.wrong == 0, "{} wrong", sum.wrong);
    Ok(())
}

/// One server, from its start to its end.
fn run(args: &Arguments, model: &std::path::Path, round: &Round, seed: u64) -> Result<Outcome> {
    let length = if args.short {
        Length::Short
    } else {
        Length::Full
    };
    let options = round.options(length, args.max_seqs);
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let mut server = match round.is_toy() {
        true => Server::start_toys(model, &options)?,
        false => Server::start(model, &options)?,
    };
    let bed = Bed {
        seed,
        distinct: 24,
        length,
        requests: usize::MAX,
        time: Duration::from_secs(60 * args.round),
        clients: args.clients,
        judged_tokens: round.judged_tokens,
        budget: TIE,
        faults: round.is_faulty(),
    };
    let memory = Memory::watch(server.pid());
    let outcome = bed.run(&server)?;
    println!("{}", line(&round.name(length), &bed, &outcome));
    println!("  {}", memory.end());
    for why in &outcome.wrong {
        println!("  WRONG: {why}");
    }
    ensure!(server.is_alive()?, "the server died");
    Ok(outcome)
}

/// What all rounds brought.
#[derive(Debug, Default)]
struct Sum {
    rounds: usize,
    requests: usize,
    answered: usize,
    compared: usize,
    hung_up: usize,
    failed_as_asked: usize,
    preempted: u64,
    evicted_blocks: u64,
    hit_tokens: u64,
    failed_steps: u64,
    wrong: usize,
}

impl Sum {
    fn add(&mut self, o: &Outcome) {
        let count = |name: &str| o.report[name].as_u64().unwrap_or(0);
        self.rounds += 1;
        self.requests += o.answered + o.hung_up + o.failed;
        self.answered += o.answered;
        self.compared += o.judged;
        self.hung_up += o.hung_up;
        self.failed_as_asked += o.failed;
        self.preempted += count("preempted");
        self.evicted_blocks += count("evicted_blocks");
        self.hit_tokens += count("hit_tokens");
        self.failed_steps += count("failed_steps");
        self.wrong += o.wrong.len();
    }
}

/// A round in one line.
fn line(name: &str, bed: &Bed, o: &Outcome) -> String {
    let r = &o.report;
    format!(
        "{name}, seed {}, {} clients, {:.0} s: {} answered, {} compared ({} ties, log-probabilities within {:.3}), \
         {} hung up, {} failed as asked; {} sequences, {} preempted, {} blocks evicted, {} of {} prompt tokens hit, \
         {} steps, {} failed; {} wrong",
        bed.seed, bed.clients, o.seconds, o.answered, o.judged, o.ties, o.largest, o.hung_up, o.failed, r["sequences"],
        r["preempted"], r["evicted_blocks"], r["hit_tokens"], r["prompt_tokens"], r["steps"], r["failed_steps"],
        o.wrong.len()
    )
}
