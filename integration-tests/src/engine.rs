//! One loaded model and greedy requests to it.

use std::path::Path;
use std::sync::Arc;

use anyhow::{bail, Context, Result};
use mistralrs::{GgufModelBuilder, MistralRs, Model, PagedAttentionMetaBuilder, TokenSource};
use mistralrs_core::{
    CompletionResponse, MemoryGpuConfig, NormalRequest, Request, RequestMessage, Response,
    SamplingParams, StopTokens,
};
use tokio::sync::mpsc::channel;

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
}

/// What one greedy request brought.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// The text.
    pub text: String,
    /// Each token's text and log-probability.
    pub tokens: Vec<(String, f32)>,
}

/// A model in the real engine.
pub struct Engine {
    model: Model,
}

impl Engine {
    /// Load a GGUF file on the CPU, offline.
    pub async fn load(path: &Path, setup: &Setup) -> Result<Self> {
        let folder = path
            .parent()
            .context("a model file lies in a folder")?
            .to_string_lossy();
        let file = path
            .file_name()
            .context("a model file has a name")?
            .to_string_lossy();
        let mut builder = GgufModelBuilder::new(folder, vec![file])
            .with_token_source(TokenSource::None)
            .with_force_cpu()
            .with_max_num_seqs(setup.max_seqs)
            .with_prefix_cache_n(setup.prefix_cache.then_some(16));
        if let Some(spec) = &setup.kv_cache {
            let pool = MemoryGpuConfig::ContextSize(setup.pool_tokens);
            let paged = PagedAttentionMetaBuilder::default()
                .with_gpu_memory(pool)
                .build()?;
            builder = builder.with_paged_attn(paged).with_kv_cache(spec);
        }
        Ok(Self {
            model: builder.build().await?,
        })
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
        let done = self.request(prompt, max_len).await?;
        let choice = done
            .choices
            .into_iter()
            .next()
            .context("an answer has a choice")?;
        let tokens = choice.logprobs.map(|l| {
            l.content
                .into_iter()
                .map(|t| (t.token, t.logprob))
                .collect()
        });
        Ok(Answer {
            text: choice.text,
            tokens: tokens.unwrap_or_default(),
        })
    }

    async fn request(&self, prompt: Vec<u32>, max_len: usize) -> Result<CompletionResponse> {
        let (tx, mut rx) = channel(1);
        let sampling = SamplingParams {
            max_len: Some(max_len),
            // Lengths are exact: nothing ends an answer early.
            stop_toks: Some(StopTokens::Ids(Vec::new())),
            ..SamplingParams::deterministic()
        };
        let mut request = NormalRequest::new_simple(
            RequestMessage::CompletionTokens(prompt),
            sampling,
            tx,
            self.runner().next_request_id(),
            None,
            None,
        );
        request.return_logprobs = true;
        self.runner()
            .get_sender(None)?
            .send(Request::Normal(Box::new(request)))
            .await?;
        match rx.recv().await.context("the engine hung up")? {
            Response::CompletionDone(done) => Ok(done),
            Response::CompletionModelError(error, _) | Response::ModelError(error, _) => {
                bail!("{error}")
            }
            Response::InternalError(error) | Response::ValidationError(error) => bail!("{error}"),
            _ => bail!("an answer of another kind came"),
        }
    }

    /// Logits of every position of a prompt, one row per token.
    pub async fn prompt_logits(&self, prompt: Vec<u32>) -> Result<Vec<Vec<f32>>> {
        let (tx, mut rx) = channel(1);
        let sampling = SamplingParams {
            max_len: Some(0),
            ..SamplingParams::deterministic()
        };
        let mut request = NormalRequest::new_simple(
            RequestMessage::CompletionTokens(prompt),
            sampling,
            tx,
            self.runner().next_request_id(),
            None,
            None,
        );
        request.return_raw_logits = true;
        self.runner()
            .get_sender(None)?
            .send(Request::Normal(Box::new(request)))
            .await?;
        match rx.recv().await.context("the engine hung up")? {
            Response::Raw { logits_chunks, .. } => {
                let logits = logits_chunks.first().context("no logits came")?;
                let logits = if logits.rank() == 3 {
                    logits.squeeze(0)?
                } else {
                    logits.clone()
                };
                Ok(logits.to_dtype(candle_core::DType::F32)?.to_vec2()?)
            }
            Response::InternalError(error) | Response::ValidationError(error) => bail!("{error}"),
            _ => bail!("an answer of another kind came"),
        }
    }
}

/// Token ids of a prompt: arbitrary but fixed, and never special tokens.
pub fn prompt(len: usize, seed: u32) -> Vec<u32> {
    let mut x = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    (0..len)
        .map(|_| {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            200 + (x >> 16) % 20_000
        })
        .collect()
}

/// Shared between tests: loading takes seconds.
pub type Shared = Arc<Engine>;
