//! What is known of a model before its weights are read.

use std::collections::BTreeMap;

use serde_json::Value;

/// A model about to be loaded.
#[derive(Clone, Copy, Debug)]
pub struct KvModelSource<'a> {
    /// What to call the model in messages: its id or its file.
    pub name: &'a str,
    /// `config.json`, for models in the Hugging Face layout.
    pub config_json: Option<&'a str>,
    /// Scalar metadata of a GGUF file as text, by key (`general.architecture`, ...).
    pub gguf: Option<&'a BTreeMap<String, String>>,
}

/// Shapes, where the metadata tell them. Sizes that differ between layers are `None`.
impl KvModelSource<'_> {
    /// Decoder layers.
    pub fn num_layers(&self) -> Option<usize> {
        self.facts().ok()?.number("num_hidden_layers")
    }

    /// Query heads.
    pub fn num_heads(&self) -> Option<usize> {
        self.facts().ok()?.number("num_attention_heads")
    }

    /// Key/value heads.
    pub fn num_kv_heads(&self) -> Option<usize> {
        let facts = self.facts().ok()?;
        match facts.has("num_key_value_heads") {
            true => facts.number("num_key_value_heads"),
            false => facts.number("num_attention_heads"),
        }
    }

    /// Channels of a key head and of a value head.
    pub fn head_dims(&self) -> Option<(usize, usize)> {
        let facts = self.facts().ok()?;
        if facts.has("kv_lora_rank") {
            return None;
        }
        let even = || {
            let heads = facts.number("num_attention_heads").filter(|n| *n > 0)?;
            Some(facts.number("hidden_size")? / heads)
        };
        let k = facts.number("head_dim").or_else(even)?;
        Some((k, facts.number("v_head_dim").unwrap_or(k)))
    }

    /// Longest sequence, in tokens.
    pub fn max_seq_len(&self) -> Option<usize> {
        self.facts().ok()?.number("max_position_embeddings")
    }

    /// # Errors
    /// If `config.json` is no JSON; the text is serde's.
    pub(crate) fn facts(&self) -> Result<Facts<'_>, serde_json::Error> {
        let json = self.config_json.map(serde_json::from_str).transpose()?;
        let gguf = self.gguf.map(|map| {
            let architecture = map.get("general.architecture").map_or("", String::as_str);
            (map, architecture)
        });
        Ok(Facts { json, gguf })
    }
}

/// Metadata of either layout, asked by the names of `config.json`.
pub(crate) struct Facts<'a> {
    json: Option<Value>,
    gguf: Option<(&'a BTreeMap<String, String>, &'a str)>,
}

/// Names in `config.json`, and in GGUF after the architecture's name.
const GGUF_NAMES: [(&str, &str); 10] = [
    ("attention_chunk_size", "attention.chunk_size"),
    ("head_dim", "attention.key_length"),
    ("hidden_size", "embedding_length"),
    ("kv_lora_rank", "attention.kv_lora_rank"),
    ("max_position_embeddings", "context_length"),
    ("num_attention_heads", "attention.head_count"),
    ("num_hidden_layers", "block_count"),
    ("num_key_value_heads", "attention.head_count_kv"),
    ("num_kv_shared_layers", "attention.shared_kv_layers"),
    ("v_head_dim", "attention.value_length"),
];

impl Facts<'_> {
    pub fn number(&self, name: &str) -> Option<usize> {
        match self.json_value(name) {
            Some(value) => usize::try_from(value.as_u64()?).ok(),
            None => self.gguf_value(name)?.parse().ok(),
        }
    }

    pub fn flag(&self, name: &str) -> Option<bool> {
        self.json_value(name)?.as_bool()
    }

    pub fn has(&self, name: &str) -> bool {
        self.json_value(name).is_some() || self.gguf_value(name).is_some()
    }

    /// Whether `config.json` has an entry outside the language model's own part.
    pub fn has_outside_text(&self, name: &str) -> bool {
        self.json
            .as_ref()
            .and_then(|json| json.get(name))
            .is_some_and(|v| !v.is_null())
    }

    /// `layer_types` of `config.json`: empty if it does not say.
    pub fn layer_types(&self) -> Vec<&str> {
        let types = self.json_value("layer_types").and_then(Value::as_array);
        types
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect()
    }

    /// All names that the model's architecture goes by, as written.
    pub fn architectures(&self) -> Vec<&str> {
        let class = self
            .json
            .as_ref()
            .and_then(|json| json.get("architectures")?.get(0)?.as_str());
        let outer = self
            .json
            .as_ref()
            .and_then(|json| json.get("model_type")?.as_str());
        let inner = self.json_value("model_type").and_then(Value::as_str);
        let gguf = self.gguf.map(|(_, architecture)| architecture);
        [class, outer, inner, gguf].into_iter().flatten().collect()
    }

    /// Whether the architecture's name begins with that of one of `families` (`gpt_oss` is in
    /// `GptOssForCausalLM` as well as in `gpt-oss`). Returns the family.
    pub fn family<'f>(&self, families: &[&'f str]) -> Option<&'f str> {
        let plain = |name: &str| -> String {
            name.chars()
                .filter(char::is_ascii_alphanumeric)
                .collect::<String>()
                .to_ascii_lowercase()
        };
        let ours: Vec<String> = self.architectures().into_iter().map(plain).collect();
        families
            .iter()
            .copied()
            .find(|f| ours.iter().any(|name| name.starts_with(&plain(f))))
    }

    /// The language model's entry wins over the outer one; `null` counts as absent.
    fn json_value(&self, name: &str) -> Option<&Value> {
        let json = self.json.as_ref()?;
        let inner = json.get("text_config").and_then(|text| text.get(name));
        inner
            .or_else(|| json.get(name))
            .filter(|value| !value.is_null())
    }

    fn gguf_value(&self, name: &str) -> Option<&str> {
        let (map, architecture) = self.gguf?;
        let (_, key) = GGUF_NAMES.iter().find(|(json, _)| *json == name)?;
        map.get(&format!("{architecture}.{key}"))
            .map(String::as_str)
    }
}
