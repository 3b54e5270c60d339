//! `cargo eval-kv`: how far a KV cache moves a real model's answers from full precision, text by text.
//!
//! `--way decode` decodes each text token by token in the engine; `--way pass` reads it as prompts in which every token
//! sees what it would see when decoded, through the same cache, in a tenth of the time.

mod baseline;
mod codec;
mod compare;
mod greedy;
mod kept;
mod measure;
mod needle;
mod pass;
mod plot;
mod progress;
mod results;
mod teacher;
mod texts;
mod traced;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Parser, ValueEnum};
use integration_tests::model::{exact, fast, folder, SMOLLM2};
use kept::Kept;

/// Compare KV caches with full precision.
#[derive(Parser)]
struct Args {
    /// A GGUF file or a folder of safetensors (default: SmolLM2-135M).
    #[arg(short, long)]
    model: Option<PathBuf>,
    /// What is asked.
    #[arg(long, value_enum, default_value_t = Task::Texts)]
    task: Task,
    /// Texts: prose, technical, code, maths, languages.
    #[arg(long, value_delimiter = ',', default_value = "prose")]
    texts: Vec<String>,
    /// Tokens of each text, at most; for needles a list of lengths.
    #[arg(long, value_delimiter = ',', default_value = "2048")]
    tokens: Vec<usize>,
    /// Caches: specs of ott, or formats of other caches (`--way pass` only): fp8, q4_0, q8_0, turboquant3, ...;
    /// `host` is the host's own cache. `SPEC@12` is SPEC in layer 12 alone, `SPEC@largest` and `SPEC@random` trace
    /// other tokens (`--way pass` only).
    #[arg(
        long,
        value_delimiter = ';',
        default_value = "f16;fp8;turboquant4;q4_0;turboquant3;ott;ott:paper;ott:kivi;ott:outliers=0;ott:paper,outliers=0;\
                         ott:k_bits=3;ott:bits=3;ott:bits=4"
    )]
    specs: Vec<String>,
    /// How texts are read.
    #[arg(long, value_enum, default_value_t = Way::Pass)]
    way: Way,
    /// What full precision is: `host`, its own cache and attention; or `f16`, the same in our faster attention.
    #[arg(long, default_value = "host")]
    base: String,
    /// Print which tokens are traced (`--way pass` only).
    #[arg(long)]
    traced: bool,
    /// Keep the file's quantized weights instead of f32: what users run, but noisier.
    #[arg(long)]
    quantized_weights: bool,
    /// A run of a minute, to see that everything works.
    #[arg(long)]
    quick: bool,
    /// Where results are kept: what is there already is not measured again.
    #[arg(long)]
    out: Option<PathBuf>,
}

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Task {
    /// Divergence from full precision over texts.
    Texts,
    /// Numbers that a long text names once.
    Needles,
    /// Tokens of greedy answers before the first that differs.
    Greedy,
}

/// How a text is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Way {
    /// Decoded token by token.
    Decode,
    /// As prompts, through the cache.
    Pass,
    /// Decoded token by token, all texts at once.
    Batch,
    /// Three quarters by one request; the rest by another one, which hits them.
    Prefix,
}

fn main() -> Result<()> {
    let mut args = Args::parse();
    if args.quick {
        args.tokens = vec![320];
        args.specs = ["f16", "ott", "ott:bits=4"].map(String::from).to_vec();
    }
    let model = args
        .model
        .map_or_else(|| anyhow::Ok(folder()?.join(SMOLLM2)), Ok)?;
    let model = match args.quantized_weights {
        true => fast(&model)?,
        false => exact(&model)?,
    };
    let files = folder()?.join("logits");
    std::fs::create_dir_all(&files)?;
    let pass = std::sync::Arc::new(pass::Pass::default());
    mistralrs_kv_backend::register(pass.clone())?;
    ott_backend::register()?;
    let bench = measure::Bench {
        model: &model,
        files: &files,
        base: &args.base,
        way: args.way,
        pass: &pass,
        traced: args.traced,
    };
    let (out, specs) = (args.out.as_deref(), &args.specs);
    let runtime = tokio::runtime::Runtime::new()?;
    let text = match args.task {
        Task::Texts => {
            let mut results = results::Results::open(out)?;
            // A batch is all texts at once.
            let size = if args.way == Way::Batch {
                args.texts.len()
            } else {
                1
            };
            for (texts, tokens) in args
                .texts
                .chunks(size)
                .flat_map(|t| args.tokens.iter().map(move |n| (t, *n)))
            {
                runtime.block_on(bench.run(texts, tokens, specs, &mut results))?;
            }
            results.markdown()
        }
        Task::Needles => {
            let mut kept = Kept::open(out, "eval-kv-needles.json")?;
            runtime.block_on(bench.needles(&args.tokens, specs, &mut kept))?;
            let text = results::needles(kept.all()).markdown();
            kept.write("eval-kv-needles.md", &text)?;
            text
        }
        Task::Greedy => {
            let mut kept = Kept::open(out, "eval-kv-greedy.json")?;
            runtime.block_on(bench.greedy(&args.texts, specs, &mut kept))?;
            let text = results::greedy(kept.all()).markdown();
            kept.write("eval-kv-greedy.md", &text)?;
            text
        }
    };
    println!("{text}");
    Ok(())
}
