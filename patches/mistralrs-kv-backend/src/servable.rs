//! Models that no backend of this seam can serve, known from their metadata alone.

use std::fmt;

use crate::model::Facts;
use crate::KvModelSource;

/// Why a model is not served: all reasons, not the first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvRefusal {
    /// The model, as its source names it.
    pub model: String,
    /// Clauses that go on from "the model cannot be served:".
    pub reasons: Vec<String>,
}

impl fmt::Display for KvRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the model `{}` cannot be served with a KV-cache backend:",
            self.model
        )?;
        for reason in &self.reasons {
            write!(f, "\n  - {reason}")?;
        }
        write!(f, "\nRun it without --kv-cache, or choose another model.")
    }
}

impl std::error::Error for KvRefusal {}

/// Refuse a model that no backend can serve, whatever it does with the bytes: the seam carries
/// keys and values of each layer and causal attention over all of them, nothing else.
///
/// Metadata that is absent refuses nothing: the host checks the loaded model again.
///
/// # Errors
/// With every reason that is known.
pub fn check_servable(source: &KvModelSource<'_>) -> Result<(), KvRefusal> {
    let reasons: Vec<String> = match source.facts() {
        Ok(facts) => RULES.iter().filter_map(|rule| rule(&facts)).collect(),
        Err(error) => vec![format!("its config.json is not valid JSON ({error})")],
    };
    if reasons.is_empty() {
        return Ok(());
    }
    Err(KvRefusal {
        model: source.name.to_owned(),
        reasons,
    })
}

type Rule = fn(&Facts<'_>) -> Option<String>;

const RULES: [Rule; 7] = [
    latent_attention,
    attention_sinks,
    shared_layers,
    sliding_window,
    chunked_attention,
    recurrent_layers,
    other_modalities,
];

/// Multi-head latent attention: DeepSeek V2 and V3, GLM 4 MoE Lite.
fn latent_attention(facts: &Facts<'_>) -> Option<String> {
    let rank = facts.number("kv_lora_rank")?;
    Some(format!(
        "all layers store one latent vector of {rank} channels per token (kv_lora_rank) instead of \
         keys and values"
    ))
}

fn attention_sinks(facts: &Facts<'_>) -> Option<String> {
    let family = facts.family(&["gpt_oss"])?;
    Some(format!(
        "the softmax of {family} has learned attention sinks in all layers"
    ))
}

/// Layers that read what other layers stored.
fn shared_layers(facts: &Facts<'_>) -> Option<String> {
    match facts.number("num_kv_shared_layers") {
        Some(0) => None,
        Some(n) => Some(format!(
            "its last {n} layers read the keys and values of other layers (num_kv_shared_layers)"
        )),
        None => facts
            .family(&["gemma3n", "gemma4"])
            .map(|family| format!("layers of {family} read the keys and values of other layers")),
    }
}

/// Windows shorter than the longest sequence. Only `config.json` is asked: the host's GGUF models
/// attend to all tokens whatever the file says, so that a backend changes nothing there.
fn sliding_window(facts: &Facts<'_>) -> Option<String> {
    let window = facts.number("sliding_window")?;
    let max = facts.number("max_position_embeddings");
    let layers = windowed_layers(facts);
    if layers == Some(0) || max.is_some_and(|max| max <= window) {
        return None;
    }
    let layers = match (layers, facts.number("num_hidden_layers")) {
        (Some(some), Some(all)) if some < all => format!("{some} of {all} layers"),
        _ => "all layers".to_owned(),
    };
    let max = max.map_or("longer".to_owned(), |max| {
        format!("up to {max} tokens long")
    });
    Some(format!(
        "{layers} see the newest {window} tokens only (sliding_window), sequences may be {max}, and \
         a backend attends to every stored token"
    ))
}

/// How many layers have the window, if known. Qwen's configurations carry windows that are
/// switched off; the flag is off by default there.
fn windowed_layers(facts: &Facts<'_>) -> Option<usize> {
    let qwen = facts.family(&["qwen"]).is_some();
    if !facts.flag("use_sliding_window").unwrap_or(!qwen) {
        return Some(0);
    }
    let types = facts.layer_types();
    if !types.is_empty() {
        return Some(types.iter().filter(|t| **t == "sliding_attention").count());
    }
    let all = facts.number("num_hidden_layers")?;
    if let Some(first) = facts.number("max_window_layers").filter(|_| qwen) {
        return Some(all.saturating_sub(first));
    }
    Some(match facts.family(&["gemma2", "gemma3"]) {
        Some("gemma2") => all.div_ceil(2),
        Some(_) => all - all / facts.number("sliding_window_pattern").unwrap_or(6).max(1),
        None => all,
    })
}

fn chunked_attention(facts: &Facts<'_>) -> Option<String> {
    let chunk = facts.number("attention_chunk_size")?;
    let max = facts.number("max_position_embeddings");
    if max.is_some_and(|max| max <= chunk) {
        return None;
    }
    Some(format!(
        "some layers attend within chunks of {chunk} tokens only (attention_chunk_size), and a \
         backend attends to every stored token"
    ))
}

fn recurrent_layers(facts: &Facts<'_>) -> Option<String> {
    let types = facts.layer_types();
    let recurrent = types
        .iter()
        .find(|t| matches!(**t, "mamba" | "linear_attention"))
        .copied();
    let families = ["granitemoehybrid", "qwen3_next", "qwen3_5"];
    let what = recurrent.or_else(|| facts.family(&families))?;
    Some(format!(
        "some layers keep recurrent state instead of keys and values ({what})"
    ))
}

/// Prompts with images or audio take paths of the host that the seam does not cover.
fn other_modalities(facts: &Facts<'_>) -> Option<String> {
    let parts = [
        "vision_config",
        "audio_config",
        "img_processor",
        "audio_processor",
    ];
    let part = parts.into_iter().find(|part| facts.has_outside_text(part));
    let class = || {
        facts
            .architectures()
            .into_iter()
            .find(|a| a.ends_with("ForConditionalGeneration"))
    };
    let what = part.or_else(class)?;
    Some(format!(
        "it takes images or audio beside text ({what}); only text models are served"
    ))
}
