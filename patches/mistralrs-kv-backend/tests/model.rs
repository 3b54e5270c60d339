//! Refusals and shapes of real models' metadata, abridged.

use std::collections::BTreeMap;

use mistralrs_kv_backend::{check_servable, KvModelSource};

const fn config<'a>(name: &'a str, json: &'a str) -> KvModelSource<'a> {
    KvModelSource {
        name,
        config_json: Some(json),
        gguf: None,
    }
}

fn gguf(entries: &[(&str, &str)]) -> BTreeMap<String, String> {
    entries
        .iter()
        .map(|(k, v)| (k.to_string(), v.to_string()))
        .collect()
}

const REFUSED: [(&str, &str); 13] = [
    (
        "DeepSeek-V3",
        r#"{"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
            "kv_lora_rank": 512, "num_hidden_layers": 61, "max_position_embeddings": 163840}"#,
    ),
    (
        "gpt-oss-20b",
        r#"{"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "sliding_window": 128,
            "num_hidden_layers": 4, "max_position_embeddings": 131072,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]}"#,
    ),
    (
        "Mistral-7B-v0.1",
        r#"{"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 4096,
            "num_hidden_layers": 32, "max_position_embeddings": 32768}"#,
    ),
    (
        "starcoder2-3b",
        r#"{"architectures": ["Starcoder2ForCausalLM"], "sliding_window": 4096,
            "num_hidden_layers": 30, "max_position_embeddings": 16384}"#,
    ),
    (
        "Phi-3-mini-4k",
        r#"{"architectures": ["Phi3ForCausalLM"], "sliding_window": 2047,
            "num_hidden_layers": 32, "max_position_embeddings": 4096}"#,
    ),
    (
        "gemma-2-2b",
        r#"{"architectures": ["Gemma2ForCausalLM"], "sliding_window": 4096,
            "num_hidden_layers": 26, "max_position_embeddings": 8192}"#,
    ),
    (
        "gemma-3-4b",
        r#"{"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3",
            "text_config": {"model_type": "gemma3_text", "sliding_window": 1024, "num_hidden_layers": 34},
            "vision_config": {"num_hidden_layers": 27}}"#,
    ),
    (
        "gemma-3n",
        r#"{"architectures": ["Gemma3nForConditionalGeneration"],
            "text_config": {"sliding_window": 512, "num_hidden_layers": 30, "num_kv_shared_layers": 10,
                            "sliding_window_pattern": 5, "max_position_embeddings": 32768},
            "audio_config": {}}"#,
    ),
    (
        "Qwen3 with its window on",
        r#"{"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": true, "sliding_window": 4096,
            "max_window_layers": 30, "num_hidden_layers": 36, "max_position_embeddings": 40960}"#,
    ),
    (
        "Llama-4-Scout",
        r#"{"architectures": ["Llama4ForConditionalGeneration"], "vision_config": {},
            "text_config": {"attention_chunk_size": 8192, "max_position_embeddings": 10485760}}"#,
    ),
    (
        "Qwen3-Next",
        r#"{"architectures": ["Qwen3NextForCausalLM"], "full_attention_interval": 4}"#,
    ),
    (
        "granite-4.0-h",
        r#"{"architectures": ["GraniteMoeHybridForCausalLM"], "layer_types": ["mamba", "attention"]}"#,
    ),
    ("broken", "{"),
];

#[test]
fn refusals() {
    let told =
        REFUSED.map(|(name, json)| check_servable(&config(name, json)).unwrap_err().to_string());
    insta::assert_snapshot!(told.join("\n\n"));
}

#[test]
fn gguf_refusals() {
    let deepseek = gguf(&[
        ("general.architecture", "deepseek2"),
        ("deepseek2.attention.kv_lora_rank", "512"),
    ]);
    let sinks = gguf(&[("general.architecture", "gpt-oss")]);
    let told = [("DeepSeek-V2.gguf", deepseek), ("gpt-oss.gguf", sinks)].map(|(name, map)| {
        let source = KvModelSource {
            name,
            config_json: None,
            gguf: Some(&map),
        };
        check_servable(&source).unwrap_err().to_string()
    });
    insta::assert_snapshot!(told.join("\n\n"));
}

/// Windows that no sequence reaches, or that are off, are no reason.
#[test]
fn served() {
    let served = [
        r#"{"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 131072}"#,
        r#"{"architectures": ["MistralForCausalLM"], "sliding_window": null}"#,
        r#"{"architectures": ["Phi3ForCausalLM"], "sliding_window": 262144, "max_position_embeddings": 131072}"#,
        r#"{"architectures": ["MistralForCausalLM"], "sliding_window": 32768, "max_position_embeddings": 32768}"#,
        r#"{"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": false, "sliding_window": 32768,
            "max_position_embeddings": 1010000, "num_hidden_layers": 28}"#,
        r#"{"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": true, "sliding_window": 4096,
            "max_window_layers": 28, "num_hidden_layers": 28, "max_position_embeddings": 32768}"#,
        r#"{"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": true, "sliding_window": 4096,
            "layer_types": ["full_attention"], "max_position_embeddings": 32768}"#,
        r#"{"num_kv_shared_layers": 0}"#,
        "{}",
    ];
    for json in served {
        assert_eq!(check_servable(&config("served", json)), Ok(()), "{json}");
    }
    let phi = gguf(&[
        ("general.architecture", "phi3"),
        ("phi3.attention.sliding_window", "2047"),
        ("phi3.context_length", "4096"),
    ]);
    let unknown = KvModelSource {
        name: "unknown",
        config_json: None,
        gguf: None,
    };
    assert_eq!(check_servable(&unknown), Ok(()));
    assert_eq!(
        check_servable(&KvModelSource {
            gguf: Some(&phi),
            ..unknown
        }),
        Ok(())
    );
}

fn shape(source: &KvModelSource<'_>) -> String {
    format!(
        "layers {:?}, heads {:?}, kv heads {:?}, dims {:?}, tokens {:?}",
        source.num_layers(),
        source.num_heads(),
        source.num_kv_heads(),
        source.head_dims(),
        source.max_seq_len(),
    )
}

#[test]
fn shapes() {
    let smollm = gguf(&[
        ("general.architecture", "llama"),
        ("llama.block_count", "30"),
        ("llama.embedding_length", "576"),
        ("llama.attention.head_count", "9"),
        ("llama.attention.head_count_kv", "3"),
        ("llama.context_length", "8192"),
    ]);
    let sources = [
        KvModelSource {
            name: "",
            config_json: None,
            gguf: Some(&smollm),
        },
        config(
            "",
            r#"{"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8,
                "head_dim": 128, "num_hidden_layers": 28, "max_position_embeddings": 40960}"#,
        ),
        config(
            "",
            r#"{"hidden_size": 2560, "num_attention_heads": 32, "head_dim": null}"#,
        ),
        config(
            "",
            r#"{"text_config": {"hidden_size": 64, "num_attention_heads": 2}, "hidden_size": 9}"#,
        ),
        config(
            "",
            r#"{"kv_lora_rank": 512, "hidden_size": 64, "num_attention_heads": 2}"#,
        ),
        config("", "{"),
    ];
    insta::assert_snapshot!(sources.map(|source| shape(&source)).join("\n"));
}
