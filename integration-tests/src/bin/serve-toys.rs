//! `mistralrs-server` with the toy backends beside ours, for tests: `toy-f32`, whose answers do not depend on
//! who runs beside, and `toy-faulty`, which fails as asked.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;
use mistralrs_core::{AutoDeviceMapParams, ModelDType, ModelSelected, TokenSource};
use mistralrs_kv_backend::toy;
use mistralrs_server_core::mistralrs_for_server_builder::MistralRsForServerBuilder;
use mistralrs_server_core::mistralrs_server_router_builder::MistralRsServerRouterBuilder;

#[derive(Parser)]
struct Arguments {
    #[arg(short)]
    port: u16,
    /// A GGUF file.
    #[arg(long)]
    model: PathBuf,
    #[arg(long)]
    kv_cache: Option<String>,
    #[arg(long, default_value_t = 4096)]
    pa_context_len: usize,
    #[arg(long, default_value_t = 8)]
    max_seqs: usize,
    #[arg(long, default_value_t = 16)]
    prefix_cache_n: usize,
}

#[tokio::main]
async fn main() -> Result<()> {
    let args = Arguments::parse();
    mistralrs_core::initialize_logging();
    ott_backend::register()?;
    for provider in [toy::provider(), toy::faulty::provider()] {
        mistralrs_kv_backend::register(provider)?;
    }
    let folder = args.model.parent().context("a model lies in a folder")?;
    let file = args.model.file_name().context("a model has a name")?;
    let model = ModelSelected::GGUF {
        tok_model_id: None,
        quantized_model_id: folder.to_string_lossy().into_owned(),
        quantized_filename: file.to_string_lossy().into_owned(),
        dtype: ModelDType::Auto,
        topology: None,
        max_seq_len: AutoDeviceMapParams::DEFAULT_MAX_SEQ_LEN,
        max_batch_size: AutoDeviceMapParams::DEFAULT_MAX_BATCH_SIZE,
    };
    let mut builder = MistralRsForServerBuilder::new()
        .with_model(model)
        .with_cpu(true)
        .with_token_source(TokenSource::None)
        .with_max_seqs(args.max_seqs)
        .with_prefix_cache_n(args.prefix_cache_n);
    if let Some(spec) = args.kv_cache {
        builder = builder
            .with_kv_cache(spec)
            .with_paged_ctxt_len(args.pa_context_len);
    }
    let app = MistralRsServerRouterBuilder::new()
        .with_mistralrs(builder.build().await?)
        .build()
        .await?;
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", args.port)).await?;
    Ok(axum::serve(listener, app).await?)
}
