//! What cannot be served is refused before the weights are read, with a way out.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;
use integration_tests::model::smollm2;
use integration_tests::server::{gguf_args, program};

/// A model folder that holds a configuration and no weights, so that what is taken ends where weights are read.
pub fn no_weights(name: &str, config: &str) -> Result<PathBuf> {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&folder)?;
    std::fs::write(folder.join("config.json"), config)?;
    std::fs::write(folder.join("tokenizer.json"), "{}")?;
    for weights in ["model.safetensors", "model.ggml"] {
        std::fs::write(folder.join(weights), "no weights")?;
    }
    Ok(folder)
}

/// What `mistralrs serve` says of a model folder that holds a configuration and no weights.
fn refusal(name: &str, config: &str, args: &[&str]) -> Result<String> {
    let folder = no_weights(name, config)?;
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
    Ok(failure(command)?.1)
}

/// The exit status of a program that must fail, and its error without log lines and backtrace.
pub fn failure(command: &mut Command) -> Result<(Option<i32>, String)> {
    let output = command
        .env("RUST_BACKTRACE", "0")
        .env("RUST_LOG", "off")
        .output()?;
    assert!(!output.status.success(), "{command:?} succeeded");
    let text = String::from_utf8(output.stderr)?;
    let text = text.split("\nStack backtrace").next().unwrap_or_default();
    Ok((output.status.code(), text.trim().to_owned()))
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

/// A pool that no machine can hold is refused with a sentence of its own, before the weights are read.
#[test]
fn pools_that_no_machine_holds() -> Result<()> {
    let model = smollm2()?;
    for (args, words) in [
        (
            &["--pa-memory-mb", "100000000"][..],
            "a KV cache of 100000000 MiB was asked for (`--pa-memory-mb`), and the device has ",
        ),
        (
            &["--pa-context-len", "100000000"],
            " MiB for 100000128 tokens (`--pa-context-len`) of 32 running sequences (`--max-seqs`), and the device has ",
        ),
        (
            &["--max-seqs", "100000", "--pa-context-len", "512"],
            " MiB for 100000 running sequences (`--max-seqs`), and the device has ",
        ),
        (
            &["--pa-memory-fraction", "1.5"],
            "1.5 is no share of a device's memory",
        ),
        // Numbers whose sums do not fit a number.
        (&["--pa-memory-mb", "18446744073709551615"], "the device has "),
        (&["--pa-context-len", "18446744073709551615"], "the device has "),
        (&["--max-seqs", "1000000000000000000"], "the device has "),
    ] {
        let said = said(
            Command::new(program("mistralrs-server")?)
                .args(["--token-source", "none", "--host", "127.0.0.1", "--kv-cache", "ott"])
                .args(gguf_args(&model))
                .args(args),
        )?;
        assert!(said.contains(words), "{args:?}: {said}");
        assert!(!said.contains("panicked"), "{args:?}: {said}");
    }
    Ok(())
}

#[test]
fn help_names_the_option() -> Result<()> {
    let help = Command::new(program("mistralrs-server")?)
        .arg("--help")
        .output()?;
    let help = String::from_utf8(help.stdout)?;
    let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
    for words in [
        "--kv-cache <SPEC>",
        "registered: ott; presets: ott, ott:3bit, ott:4bit, ott:paper, ott:kivi]",
        "on a CPU (with --kv-cache), to what the model can use, 32768 tokens at most",
        "with --kv-cache on a CPU, of RAM",
    ] {
        assert!(help.contains(words), "{words}: {help}");
    }
    Ok(())
}

#[test]
fn the_version_names_backend_and_revision() -> Result<()> {
    let version = |name: &str, flag: &str| -> Result<String> {
        let output = Command::new(program(name)?).arg(flag).output()?;
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    };
    let version_of = version("mistralrs", "--version")?;
    let ours = concat!("mistralrs 0.8.1 (ott ", "0.1.0");
    assert!(version_of.starts_with(ours), "{version_of}");
    // `cargo verify` names one to the build and to this test.
    if let Ok(revision) = std::env::var("MISTRALRS_REVISION") {
        let words = format!("revision {revision})");
        assert!(version_of.ends_with(&words), "{version_of}");
    }
    assert_eq!(version("mistralrs-server", "--version")?, version_of);
    assert_eq!(version("mistralrs-server", "-V")?, version_of);
    let twice = said(Command::new(program("mistralrs-server")?).args(["serve", "-m", "x"]))?;
    assert!(twice.contains("leave `serve` out"), "{twice}");
    Ok(())
}
