//! What cannot be served is refused before the weights are read, with a way out.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;
use integration_tests::server::program;

/// What `mistralrs serve` says of a model folder that holds a configuration and no weights.
fn refusal(name: &str, config: &str, args: &[&str]) -> Result<String> {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&folder)?;
    std::fs::write(folder.join("config.json"), config)?;
    std::fs::write(folder.join("tokenizer.json"), "{}")?;
    for weights in ["model.safetensors", "model.ggml"] {
        std::fs::write(folder.join(weights), "no weights")?;
    }
    said(
        Command::new(program("mistralrs")?)
            .args(["--token-source", "none", "serve", "--cpu", "-m"])
            .arg(&folder)
            .args(args),
    )
    .map(|text| text.replace(&*folder.to_string_lossy(), "MODEL"))
}

/// The error of a program that must fail, without log lines and backtrace.
fn said(command: &mut Command) -> Result<String> {
    let output = command
        .env("RUST_BACKTRACE", "0")
        .env("RUST_LOG", "off")
        .output()?;
    assert!(!output.status.success(), "{command:?} succeeded");
    let text = String::from_utf8(output.stderr)?;
    Ok(text
        .split("\nStack backtrace")
        .next()
        .unwrap_or_default()
        .trim()
        .to_owned())
}

pub const LLAMA: &str = r#"{"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": 64,
 "intermediate_size": 64, "vocab_size": 16, "num_hidden_layers": 2, "num_attention_heads": 1,
 "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 128}"#;

#[test]
fn contradictions_and_bad_specs() -> Result<()> {
    let cases: [(&str, &[&str]); 8] = [
        ("unknown backend", &["--kv-cache", "zip"]),
        ("unknown option", &["--kv-cache", "ott:speed=9"]),
        ("bad value", &["--kv-cache", "ott:bits=5"]),
        (
            "paged attention off",
            &["--kv-cache", "ott", "--paged-attn", "off"],
        ),
        (
            "cache type",
            &["--kv-cache", "ott", "--pa-cache-type", "f8e4m3"],
        ),
        ("no cache", &["--kv-cache", "ott", "--no-kv-cache"]),
        (
            "block size",
            &["--kv-cache", "ott", "--pa-block-size", "16"],
        ),
        (
            "GGML",
            &["--kv-cache", "ott", "--format", "ggml", "-f", "model.ggml"],
        ),
    ];
    let mut all = String::new();
    for (what, args) in cases {
        all += &format!("{what}:\n{}\n\n", refusal("llama", LLAMA, args)?);
    }
    insta::assert_snapshot!(all);
    Ok(())
}

/// Without a backend, too: there a panic came after the weights were read, and with one a server that never listened.
#[test]
fn no_sequences_at_once() -> Result<()> {
    for cache in [&["--kv-cache", "ott"][..], &[]] {
        let args = [cache, &["--max-seqs", "0"]].concat();
        let said = refusal("llama", LLAMA, &args)?;
        assert_eq!(
            said,
            "Error: 0 is no number of sequences to run at once (`--max-seqs`, `max_seqs`, \
             `with_max_num_seqs`): every request would wait for ever. Give 1 or more, or leave it out."
        );
    }
    Ok(())
}

#[test]
fn models_no_backend_can_serve() -> Result<()> {
    let cases = [
        (
            "latent attention",
            "DeepseekV3ForCausalLM",
            r#""model_type": "deepseek_v3", "kv_lora_rank": 512"#,
        ),
        (
            "sliding window",
            "MistralForCausalLM",
            r#""model_type": "mistral", "sliding_window": 64"#,
        ),
        (
            "attention sinks",
            "GptOssForCausalLM",
            r#""model_type": "gpt_oss", "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]"#,
        ),
        (
            "hybrid",
            "Qwen3NextForCausalLM",
            r#""model_type": "qwen3_next", "full_attention_interval": 2"#,
        ),
        (
            "shared caches",
            "Gemma3nForConditionalGeneration",
            r#""model_type": "gemma3n", "num_kv_shared_layers": 1"#,
        ),
    ];
    let mut all = String::new();
    for (what, architecture, fields) in cases {
        let config = LLAMA.replace("LlamaForCausalLM", architecture).replacen(
            '{',
            &format!("{{{fields}, "),
            1,
        );
        let folder = what.replace(' ', "-");
        let said = refusal(&folder, &config, &["--kv-cache", "ott"])?;
        all += &format!("{what}:\n{said}\n\n");
    }
    insta::assert_snapshot!(all);
    Ok(())
}

/// The folders of these tests hold no weights: what can be served gets as far as to miss them.
#[test]
fn what_can_be_served_is_not_refused() -> Result<()> {
    let said = refusal("llama", LLAMA, &["--kv-cache", "ott"])?;
    assert!(!said.contains("KV-cache backend"), "{said}");
    Ok(())
}

#[test]
fn help_names_the_option() -> Result<()> {
    let help = Command::new(program("mistralrs-server")?)
        .arg("--help")
        .output()?;
    let help = String::from_utf8(help.stdout)?;
    assert!(
        help.contains("--kv-cache <SPEC>") && help.contains("registered: ott"),
        "{help}"
    );
    Ok(())
}
