//! `pristine FILE.gguf`: the transcript of the published host, for `tests/it/untouched.rs`.

use std::path::Path;

use anyhow::{Context, Result};
use mistralrs::{GgufModelBuilder, TokenSource};

#[path = "../../src/request.rs"]
#[allow(dead_code)]
mod request;

#[tokio::main]
async fn main() -> Result<()> {
    let path = std::env::args_os()
        .nth(1)
        .context("usage: pristine FILE.gguf")?;
    let path = Path::new(&path);
    let folder = path.parent().context("a model file lies in a folder")?;
    let file = path.file_name().context("a model file has a name")?;
    let model = GgufModelBuilder::new(folder.to_string_lossy(), vec![file.to_string_lossy()])
        .with_token_source(TokenSource::None)
        .with_force_cpu()
        .with_max_num_seqs(4)
        .with_prefix_cache_n(None)
        .build()
        .await?;
    print!("{}", request::transcript(model.inner()).await?);
    Ok(())
}
