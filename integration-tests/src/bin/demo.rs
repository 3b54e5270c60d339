//! `cargo demo`: one long prompt, answered with the host's own cache and with `--kv-cache ott`.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use integration_tests::engine::{Engine, Setup};
use integration_tests::model::{f16_bytes_per_token, fast};
use mistralrs::{RequestBuilder, TextMessageRole};

/// Answer one long prompt twice: with the host's own KV cache, and with another.
#[derive(Parser)]
struct Args {
    /// A GGUF file, or the folder of the one named by `-f`.
    #[arg(short, long)]
    model: PathBuf,
    /// The file's name, if `-m` is a folder.
    #[arg(short, long)]
    file: Option<String>,
    /// The cache to compare with the host's own.
    #[arg(long, default_value = "ott")]
    kv_cache: String,
    /// Entries of the log that the prompt consists of; 100 are about 2000 tokens.
    #[arg(long, default_value_t = 100)]
    entries: usize,
    /// Tokens to generate.
    #[arg(long, default_value_t = 64)]
    tokens: usize,
}

struct Outcome {
    name: String,
    answer: String,
    prompt_tokens: usize,
    prompt_rate: f32,
    decode_rate: f32,
    bytes_per_token: f64,
}

#[tokio::main]
async fn main() -> Result<()> {
    let args = Args::parse();
    ott_backend::register()?;
    let path = match &args.file {
        Some(file) => args.model.join(file),
        None => args.model.clone(),
    };
    let path = fast(&path)?;
    let prompt = harbour_log(args.entries);
    println!("Model: {}", path.display());
    println!(
        "Prompt: {} entries of a harbour log and a question about one of them",
        args.entries
    );
    let f16 = f16_bytes_per_token(&path)? as f64;
    let own = Setup {
        max_seqs: 1,
        ..Setup::default()
    };
    let first = answer(&path, &own, &prompt, args.tokens, f16).await?;
    let other = Setup {
        pool_tokens: first.prompt_tokens + args.tokens,
        kv_cache: Some(args.kv_cache),
        ..own
    };
    let second = answer(&path, &other, &prompt, args.tokens, f16).await?;
    let outcomes = [first, second];
    table(&outcomes, f16);
    Ok(())
}

async fn answer(
    path: &std::path::Path,
    setup: &Setup,
    prompt: &str,
    tokens: usize,
    f16: f64,
) -> Result<Outcome> {
    let spec = setup.kv_cache.as_deref();
    let name = spec.map_or("upstream f16".to_owned(), |spec| {
        format!("--kv-cache {spec}")
    });
    let engine = Engine::load(path, setup).await?;
    let progress = Progress::start(&name);
    let request = RequestBuilder::new()
        .set_deterministic_sampler()
        .set_sampler_max_len(tokens)
        .add_message(TextMessageRole::User, prompt);
    let done = engine.model().send_chat_request(request).await;
    progress.stop();
    let done = done?;
    let text = done
        .choices
        .first()
        .and_then(|c| c.message.content.clone())
        .context("no answer came")?;
    let held = (done.usage.prompt_tokens + done.usage.completion_tokens) as f64;
    let bytes = match spec {
        None => f16,
        Some(_) => ott_backend::provider()
            .caches()
            .last()
            .map_or(f16, |cache| cache.bytes() as f64 / held),
    };
    Ok(Outcome {
        name,
        answer: text.split_whitespace().collect::<Vec<_>>().join(" "),
        prompt_tokens: done.usage.prompt_tokens,
        prompt_rate: done.usage.avg_prompt_tok_per_sec,
        decode_rate: done.usage.avg_compl_tok_per_sec,
        bytes_per_token: bytes,
    })
}

fn table(outcomes: &[Outcome], f16: f64) {
    println!(
        "\n{:<18} {:>7} {:>12} {:>12} {:>16} {:>7}",
        "cache", "prompt", "prompt tok/s", "decode tok/s", "KV bytes/token", "ratio"
    );
    for o in outcomes {
        println!(
            "{:<18} {:>7} {:>12.1} {:>12.1} {:>16.0} {:>6.1}x",
            o.name,
            o.prompt_tokens,
            o.prompt_rate,
            o.decode_rate,
            o.bytes_per_token,
            f16 / o.bytes_per_token
        );
    }
    println!("\nKV bytes are all that is allocated, with the pool sized for this conversation.\n");
    for o in outcomes {
        println!("{}: {}", o.name, o.answer);
    }
}

/// A log with one fact to find in its middle.
fn harbour_log(entries: usize) -> String {
    let ships = [
        "Albatross",
        "Borealis",
        "Cormorant",
        "Dauntless",
        "Endeavour",
        "Falcon",
        "Gannet",
    ];
    let cargoes = [
        "timber", "salt", "wool", "copper", "barley", "slate", "rope",
    ];
    let ports = ["Bergen", "Lisbon", "Riga", "Cork", "Genoa"];
    let mut text = String::from("This is the log of a harbour.\n");
    for i in 0..entries {
        if i == entries / 2 {
            text += "Note: the lighthouse keeper is called Miriam Holt.\n";
        }
        let (ship, cargo, port) = (
            ships[i % 7],
            cargoes[(i * 3 + i / 7) % 7],
            ports[(i * 2 + i / 5) % 5],
        );
        text += &format!("Day {}: the {ship} came from {port} with {cargo}.\n", i + 1);
    }
    text + "\nWhat is the name of the lighthouse keeper? Answer in one sentence."
}

/// Shows that work goes on: nothing is known of a prompt until it is done.
struct Progress {
    done: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<()>,
}

impl Progress {
    fn start(name: &str) -> Self {
        let done = Arc::new(AtomicBool::new(false));
        let (stop, name, terminal) = (
            done.clone(),
            name.to_owned(),
            std::io::stdout().is_terminal(),
        );
        let thread = std::thread::spawn(move || {
            let start = Instant::now();
            let mut shown = 0;
            while !stop.load(Ordering::Relaxed) {
                let seconds = start.elapsed().as_secs();
                if terminal || seconds >= shown + 15 {
                    shown = seconds;
                    let end = if terminal { "\r" } else { "\n" };
                    print!("{name}: reading the prompt and answering, {seconds} s{end}");
                    let _ = std::io::stdout().flush();
                }
                std::thread::sleep(Duration::from_millis(250));
            }
            println!(
                "{name}: done in {:.0} s{:40}",
                start.elapsed().as_secs_f32(),
                ""
            );
        });
        Self { done, thread }
    }

    fn stop(self) {
        self.done.store(true, Ordering::Relaxed);
        let _ = self.thread.join();
    }
}
