//! One model in the real engine, with a cache of one's choice.

use std::path::Path;

use anyhow::{Context, Result};
use either::Either;
use mistralrs::{
    GgufModelBuilder, MistralRs, Model, ModelDType, PagedAttentionMetaBuilder, TextModelBuilder,
    TokenSource,
};
use mistralrs_core::{MemoryGpuConfig, PagedAttentionConfig};

use crate::request;
pub use crate::request::{prompt, Answer};

/// How a model is loaded.
#[derive(Clone, Debug)]
pub struct Setup {
    /// What stands after `--kv-cache`; `None` for the host's own cache.
    pub kv_cache: Option<String>,
    /// Tokens in the pool, if a backend is chosen.
    pub pool_tokens: usize,
    /// Most sequences that run at once.
    pub max_seqs: usize,
    /// Whether full blocks are shared between sequences.
    pub prefix_cache: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            kv_cache: None,
            pool_tokens: 4096,
            max_seqs: 4,
            prefix_cache: false,
        }
    }
}

impl Setup {
    /// The defaults with a backend.
    pub fn with(kv_cache: &str) -> Self {
        Self {
            kv_cache: Some(kv_cache.to_owned()),
            ..Self::default()
        }
    }

    fn paged(&self) -> Result<PagedAttentionConfig> {
        let pool = MemoryGpuConfig::ContextSize(self.pool_tokens);
        PagedAttentionMetaBuilder::default()
            .with_gpu_memory(pool)
            .build()
    }
}

/// What loads a GGUF file on the CPU, offline.
pub fn builder(path: &Path, setup: &Setup) -> Result<GgufModelBuilder> {
    let folder = path
        .parent()
        .context("a model file lies in a folder")?
        .to_string_lossy();
    let file = path
        .file_name()
        .context("a model file has a name")?
        .to_string_lossy();
    let builder = GgufModelBuilder::new(folder, vec![file])
        .with_token_source(TokenSource::None)
        .with_force_cpu()
        .with_max_num_seqs(setup.max_seqs)
        .with_prefix_cache_n(setup.prefix_cache.then_some(16));
    Ok(match &setup.kv_cache {
        Some(spec) => builder.with_paged_attn(setup.paged()?).with_kv_cache(spec),
        None => builder,
    })
}

/// What loads a folder of safetensors on the CPU, offline, in f32.
fn folder_builder(path: &Path, setup: &Setup) -> Result<TextModelBuilder> {
    let builder = TextModelBuilder::new(path.display())
        .with_token_source(TokenSource::None)
        .with_force_cpu()
        .with_dtype(ModelDType::F32)
        .with_max_num_seqs(setup.max_seqs)
        .with_prefix_cache_n(setup.prefix_cache.then_some(16));
    Ok(match &setup.kv_cache {
        Some(spec) => builder.with_paged_attn(setup.paged()?).with_kv_cache(spec),
        None => builder,
    })
}

/// A model in the real engine.
pub struct Engine {
    model: Model,
}

impl Engine {
    /// Load a GGUF file or a folder of safetensors on the CPU, offline.
    pub async fn load(path: &Path, setup: &Setup) -> Result<Self> {
        // The host takes a file's folder apart from its name, and a name alone has none.
        let path = &std::path::absolute(path)?;
        let model = match path.is_dir() {
            true => folder_builder(path, setup)?.build().await?,
            false => builder(path, setup)?.build().await?,
        };
        Ok(Self { model })
    }

    /// The host's runner.
    pub fn runner(&self) -> &MistralRs {
        self.model.inner()
    }

    /// The model, for chat requests.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Complete exactly these tokens, greedily, by `max_len` tokens.
    pub async fn complete(&self, prompt: Vec<u32>, max_len: usize) -> Result<Answer> {
        request::complete(self.runner(), prompt, max_len).await
    }

    /// Logits of the positions of a prompt that the host computes: those after a prefix hit.
    pub async fn prompt_logits(&self, prompt: Vec<u32>) -> Result<Vec<Vec<f32>>> {
        request::prompt_logits(self.runner(), prompt).await
    }

    /// Token ids of a text, without special tokens.
    pub async fn tokenize(&self, text: &str) -> Result<Vec<u32>> {
        let text = Either::Right(text.to_owned());
        Ok(self.model.tokenize(text, None, false, false, None).await?)
    }
}
