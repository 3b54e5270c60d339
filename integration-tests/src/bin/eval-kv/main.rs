//! `cargo eval-kv`: how far a KV cache moves a real model's answers from full precision, text by text.
//!
//! `--way decode` decodes each text token by token in the engine; `--way pass` reads it as one prompt in which every
//! token sees what it would see when decoded, through the same cache, in a tenth of the time.

mod baseline;
mod codec;
mod compare;
mod measure;
mod pass;
mod plot;
mod progress;
mod results;
mod teacher;
mod texts;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Parser, ValueEnum};
use integration_tests::model::{exact, fast, folder, SMOLLM2};

/// Compare KV caches with full precision.
#[derive(Parser)]
struct Args {
    /// A GGUF file (default: SmolLM2-135M).
    #[arg(short, long)]
    model: Option<PathBuf>,
    /// Texts: prose, technical, code, maths, languages.
    #[arg(long, value_delimiter = ',', default_value = "prose")]
    texts: Vec<String>,
    /// Tokens of each text, at most.
    #[arg(long, default_value_t = 2048)]
    tokens: usize,
    /// Caches: specs of ott, or formats of other caches (`--way pass` only): fp8, q4_0, q8_0, turboquant3, ...;
    /// `host` is the host's own cache.
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

/// How a text is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Way {
    /// Decoded token by token.
    Decode,
    /// As one prompt, through the cache.
    Pass,
}

fn main() -> Result<()> {
    let mut args = Args::parse();
    if args.quick {
        args.tokens = 320;
        args.specs = ["host", "ott", "ott:bits=4"].map(String::from).to_vec();
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
    };
    let mut results = results::Results::open(args.out.as_deref())?;
    let runtime = tokio::runtime::Runtime::new()?;
    for text in &args.texts {
        runtime.block_on(bench.run(text, args.tokens, &args.specs, &mut results))?;
    }
    println!("{}", results.markdown());
    Ok(())
}
