//! Greedy requests of exact lengths to a running host. Built twice: with the patched host for our tests, and
//! with the published one in `pristine`; so it knows nothing of cache backends.

use std::sync::Arc;

use anyhow::{bail, Context, Result};
use mistralrs::{
    CompletionResponse, CustomLogitsProcessor, DType, MistralRs, NormalRequest, Request,
    RequestMessage, Response, SamplingParams, StopTokens, Tensor,
};
use tokio::sync::mpsc::channel;

/// What one greedy request brought.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// The text.
    pub text: String,
    /// Each token's text and log-probability.
    pub tokens: Vec<(String, f32)>,
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

/// Complete exactly these tokens, greedily, by `max_len` tokens.
pub async fn complete(host: &MistralRs, prompt: Vec<u32>, max_len: usize) -> Result<Answer> {
    let done = completion(host, prompt, max_len).await?;
    let choice = done.choices.into_iter().next();
    let choice = choice.context("an answer has a choice")?;
    let logprobs = choice.logprobs.and_then(|l| l.content).unwrap_or_default();
    let tokens = logprobs.into_iter().map(|t| (t.token, t.logprob)).collect();
    Ok(Answer {
        text: choice.text,
        tokens,
    })
}

/// The same with all that the host says of it.
pub async fn completion(
    host: &MistralRs,
    prompt: Vec<u32>,
    max_len: usize,
) -> Result<CompletionResponse> {
    match ask(host, prompt, max_len, Want::Tokens(None)).await? {
        Response::CompletionDone(done) => Ok(done),
        _ => bail!("an answer of another kind came"),
    }
}

/// Decode `max_len` tokens after these, each the likeliest of the logits that `processor` returns.
pub async fn steered(
    host: &MistralRs,
    prompt: Vec<u32>,
    max_len: usize,
    processor: Arc<dyn CustomLogitsProcessor>,
) -> Result<()> {
    match ask(host, prompt, max_len, Want::Tokens(Some(processor))).await? {
        Response::CompletionDone(_) => Ok(()),
        _ => bail!("an answer of another kind came"),
    }
}

/// Logits of the positions of a prompt that the host computes, one row per token; those before a prefix hit
/// are left out.
pub async fn prompt_logits(host: &MistralRs, prompt: Vec<u32>) -> Result<Vec<Vec<f32>>> {
    let logits = prompt_tensor(host, prompt).await?;
    Ok(logits.to_dtype(DType::F32)?.to_vec2()?)
}

/// The same as one tensor, `(tokens, vocabulary)`.
pub async fn prompt_tensor(host: &MistralRs, prompt: Vec<u32>) -> Result<Tensor> {
    match ask(host, prompt, 0, Want::Logits).await? {
        Response::Raw { logits_chunks, .. } => {
            let logits = logits_chunks.first().context("no logits came")?;
            let vocabulary = *logits.dims().last().context("logits have a shape")?;
            Ok(logits.reshape(((), vocabulary))?)
        }
        _ => bail!("an answer of another kind came"),
    }
}

/// What a host answers, as text that differs if one bit of one logit or log-probability does.
pub async fn transcript(host: &MistralRs) -> Result<String> {
    let mut text = String::new();
    for len in [1, 5, 128, 200] {
        let logits = prompt_logits(host, prompt(len, 1)).await?;
        let bits = logits.iter().flatten().map(|x| x.to_bits());
        text += &format!("{len} tokens: logits {:016x}\n", hash(bits));
        let answer = complete(host, prompt(len, 2), 8).await?;
        for (token, logprob) in &answer.tokens {
            text += &format!("  {token:?} {:08x}\n", logprob.to_bits());
        }
    }
    Ok(text)
}

/// FNV-1a over 32-bit words.
fn hash(words: impl Iterator<Item = u32>) -> u64 {
    words.fold(0xcbf2_9ce4_8422_2325, |hash, word| {
        (hash ^ u64::from(word)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// What a request is for.
enum Want {
    /// Tokens, of logits that may be changed first.
    Tokens(Option<Arc<dyn CustomLogitsProcessor>>),
    /// The prompt's logits.
    Logits,
}

async fn ask(host: &MistralRs, prompt: Vec<u32>, max_len: usize, want: Want) -> Result<Response> {
    let (tx, mut rx) = channel(1);
    let sampling = SamplingParams {
        max_len: Some(max_len),
        // Lengths are exact: nothing ends an answer early.
        stop_toks: Some(StopTokens::Ids(Vec::new())),
        ..SamplingParams::deterministic()
    };
    let messages = RequestMessage::CompletionTokens(prompt);
    let id = host.next_request_id();
    let mut request = NormalRequest::new_simple(messages, sampling, tx, id, None, None);
    match want {
        Want::Tokens(processor) => {
            request.return_logprobs = true;
            request.logits_processors = processor.map(|processor| vec![processor]);
        }
        Want::Logits => request.return_raw_logits = true,
    }
    let request = Request::Normal(Box::new(request));
    host.get_sender(None)?.send(request).await?;
    match rx.recv().await.context("the engine hung up")? {
        Response::CompletionModelError(error, _) | Response::ModelError(error, _) => {
            bail!("{error}")
        }
        Response::InternalError(error) | Response::ValidationError(error) => bail!("{error}"),
        response => Ok(response),
    }
}
