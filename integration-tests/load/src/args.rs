//! What the user asks for.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use clap::{Args, Parser, Subcommand};
use serde_json::{Map, Value};

use crate::client::Client;
use crate::load::Settings;
use crate::model::Shape;
use crate::plan::{Load, Mix, Range};
use crate::prompt::Prompts;

/// Load on an OpenAI-compatible server: tokens per second, latencies, and what its KV cache holds meanwhile
#[derive(Parser)]
#[command(name = "kv-load")]
pub struct Cli {
    /// What to do
    #[command(subcommand)]
    pub task: Task,
}

/// The tasks.
#[derive(Subcommand)]
pub enum Task {
    /// Put one load on a running server
    Run(Box<Run>),
    /// Write a model of random weights
    Model(Model),
    /// Start servers and caches in turn, and put the same loads on each
    Compare(Box<Compare>),
}

/// A model to write.
#[derive(Args)]
pub struct Model {
    /// Where it goes
    #[arg(long)]
    pub folder: PathBuf,
    #[command(flatten)]
    pub shape: Shape,
}

/// How requests are made; the same for all loads.
#[derive(Args)]
pub struct Asking {
    /// Chat completions instead of completions
    #[arg(long)]
    pub chat: bool,
    /// The name of the model in requests
    #[arg(long, default_value = "default")]
    pub model: String,
    /// More fields of each request, as JSON: '{"ignore_eos": true}'
    #[arg(long, value_name = "JSON")]
    pub more: Option<String>,
    /// Words of the random model, of which prompts are made
    #[arg(long, default_value_t = 128_256)]
    pub vocabulary: usize,
    /// Cut prompts from this text instead; depths are in words then
    #[arg(long, value_name = "FILE")]
    pub text: Option<PathBuf>,
    /// Tokens at the beginning that all prompts have in common
    #[arg(long, value_name = "TOKENS", default_value_t = 0)]
    pub shared: usize,
    /// The same seed asks the same at the same times
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Tokens more that a sequence of a batch is asked for, for each that starts after it: as many as it decodes while a prompt is run
    #[arg(long, value_name = "TOKENS", default_value_t = 4)]
    pub stagger: usize,
    /// Longest time of a request, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600.0)]
    pub timeout: f64,
    /// How often the server is asked what its cache holds, where it has /v1/kv_cache
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    pub sample: f64,
    /// Scrape /metrics and /v1/kv_cache each so many seconds during a load, and report how long that takes
    #[arg(long, value_name = "SECONDS")]
    pub scrape: Option<f64>,
    /// End everything after so many seconds; what was cut or not run is told
    #[arg(long, value_name = "SECONDS")]
    pub limit: Option<f64>,
    /// Write the results as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Draw the distribution of latencies as SVG
    #[arg(long, value_name = "FILE")]
    pub plot: Option<PathBuf>,
}

/// One load on a running server.
#[derive(Args)]
pub struct Run {
    /// Where OpenAI's paths begin: http://HOST:PORT/v1
    #[arg(long)]
    pub url: String,
    /// Name of the environment variable that holds the API key
    #[arg(long, value_name = "NAME")]
    pub key_env: Option<String>,
    #[command(flatten)]
    pub shape: LoadArgs,
    #[command(flatten)]
    pub asking: Asking,
}

/// One of the shapes of a load.
#[derive(Args)]
pub struct LoadArgs {
    /// A load in one word, as `compare` takes it
    #[arg(long, value_name = "LOAD", group = "shape")]
    pub load: Option<Load>,
    /// Fixed batch: so many sequences that all decode at once
    #[arg(long, value_name = "N", group = "shape")]
    pub batch: Option<usize>,
    /// Of a batch: tokens of each prompt
    #[arg(long, default_value_t = 4096)]
    pub depth: usize,
    /// Of a batch: tokens that each decodes, at least
    #[arg(long, default_value_t = 64)]
    pub tokens: usize,
    /// Of a batch: send all requests at once, not each after the first token of the one before
    #[arg(long)]
    pub at_once: bool,
    /// Open loop: requests per second, with Poisson arrivals that wait for nobody
    #[arg(long, value_name = "R", group = "shape")]
    pub rate: Option<f64>,
    /// Closed loop: so many clients that ask one request after the other
    #[arg(long, value_name = "CLIENTS", group = "shape")]
    pub closed: Option<usize>,
    /// Of a loop: how many requests
    #[arg(long, value_name = "K", default_value_t = 100)]
    pub requests: usize,
    /// Of a loop: chat, document, writing, mixed, or DEPTH/TOKENS such as 64-1024/32-256
    #[arg(long, default_value = "chat")]
    pub mix: Mix,
    /// Of a loop, instead of a mix: tokens of prompts, LOW-HIGH
    #[arg(long, requires = "tokens_range", conflicts_with = "mix")]
    pub depth_range: Option<Range>,
    /// Of a loop, instead of a mix: tokens of answers, LOW-HIGH
    #[arg(long, requires = "depth_range")]
    pub tokens_range: Option<Range>,
}

/// Servers and caches in turn.
#[derive(Args)]
pub struct Compare {
    /// A server's program: NAME=PATH
    #[arg(long = "server", value_name = "NAME=PATH", required = true, num_args = 1..)]
    pub servers: Vec<String>,
    /// A cache: `host` for the host's own, or what `--kv-cache` takes
    #[arg(long = "cache", value_name = "CACHE", num_args = 1.., default_values = ["host", "ott"])]
    pub caches: Vec<String>,
    /// batch:8x4096+64, burst:8x4096+64, open:RATE:REQUESTS:MIX or closed:CLIENTS:REQUESTS:MIX
    #[arg(long = "load", value_name = "LOAD", required = true, num_args = 1..)]
    pub loads: Vec<Load>,
    /// Arguments that name the model and more, separated by spaces: "-m DIR"
    #[arg(long, value_name = "ARGS", allow_hyphen_values = true)]
    pub model_args: String,
    /// Bytes for the cache, in MiB (`--pa-memory-mb`); the server's default if not given
    #[arg(long, value_name = "MIB")]
    pub budget: Option<usize>,
    /// Sequences that run at once; by default those of the largest load, 32 for an open loop
    #[arg(long, value_name = "N")]
    pub max_seqs: Option<usize>,
    /// How often each server is started with each cache, in turn
    #[arg(long, default_value_t = 1)]
    pub repeats: usize,
    /// The load before the first that counts; `none` leaves it out
    #[arg(long, value_name = "LOAD", default_value = "burst:2x256+8")]
    pub warm: String,
    /// Longest time until a server is ready, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600.0)]
    pub ready: f64,
    /// Where logs of servers are kept; a folder of the system's otherwise
    #[arg(long, value_name = "FOLDER")]
    pub logs: Option<PathBuf>,
    #[command(flatten)]
    pub asking: Asking,
}

impl LoadArgs {
    /// The load that is meant.
    ///
    /// # Errors
    /// If none is, or it asks for nothing.
    pub fn load(&self) -> Result<Load> {
        let mix = match (self.depth_range, self.tokens_range) {
            (Some(depth), Some(tokens)) => Mix::of(depth, tokens),
            _ => self.mix.clone(),
        };
        let requests = self.requests;
        let load = match (&self.load, self.batch, self.rate, self.closed) {
            (Some(load), ..) => load.clone(),
            (_, Some(sequences), ..) => Load::Batch {
                sequences,
                depth: self.depth,
                tokens: self.tokens,
                at_once: self.at_once,
            },
            (_, _, Some(rate), _) => Load::Open {
                rate,
                requests,
                mix,
            },
            (_, _, _, Some(clients)) => Load::Closed {
                clients,
                requests,
                mix,
            },
            _ => bail!("which load? Give --batch N, --rate R, --closed CLIENTS or --load LOAD"),
        };
        load.checked()
    }
}

impl Asking {
    /// When everything must have ended; from now on.
    ///
    /// # Errors
    /// If a time is none.
    pub fn deadline(&self) -> Result<Option<Instant>> {
        let limit = self
            .limit
            .map(|limit| seconds("--limit", limit))
            .transpose()?;
        Ok(limit.map(|limit| Instant::now() + limit))
    }

    /// How loads are put on the server of `client`.
    ///
    /// # Errors
    /// If an option makes no sense.
    pub fn settings(&self, mut client: Client, deadline: Option<Instant>) -> Result<Settings> {
        client.model.clone_from(&self.model);
        client.chat = self.chat;
        client.timeout = seconds("--timeout", self.timeout)?;
        client.deadline = deadline;
        client.more = self.more()?;
        let sample = seconds("--sample and --scrape", self.scrape.unwrap_or(self.sample))?;
        let prompts = match &self.text {
            Some(path) => Prompts::text(path, self.seed, self.shared)?,
            None => Prompts::random(self.vocabulary, self.seed, self.shared)?,
        };
        Ok(Settings {
            client,
            prompts,
            stagger: self.stagger,
            sample,
            scrape: self.scrape.is_some(),
        })
    }

    fn more(&self) -> Result<Map<String, Value>> {
        let Some(text) = &self.more else {
            return Ok(Map::new());
        };
        serde_json::from_str(text).with_context(|| {
            format!("--more `{text}` is no JSON object: write '{{\"name\": value}}'")
        })
    }
}

/// A time that an option names.
///
/// # Errors
/// If it is none.
pub fn seconds(option: &str, seconds: f64) -> Result<Duration> {
    // A year: beyond it clocks overflow.
    ensure!(
        seconds > 0.0 && seconds < 3.2e7,
        "{option} {seconds} is no time: give seconds, above 0"
    );
    Ok(Duration::from_secs_f64(seconds))
}
