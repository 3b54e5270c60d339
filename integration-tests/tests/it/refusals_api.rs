//! What the Rust API can build and no backend can serve: refused before the weights are read, too.

use std::path::{Path, PathBuf};

use anyhow::Result;
use integration_tests::model::smollm2;
use mistralrs::{
    AnyMoeConfig, AnyMoeExpertType, AnyMoeModelBuilder, GgufLoraModelBuilder, GgufModelBuilder,
    GgufXLoraModelBuilder, Model, SpeculativeConfig, TextModelBuilder, TextSpeculativeBuilder,
    TokenSource, XLoraModelBuilder,
};
use mistralrs_core::Ordering;

use crate::block_on;
use crate::refusals::{no_weights, LLAMA};

/// A folder with a llama configuration and no weights, and an adapter `first` that holds nothing.
fn folder(name: &str) -> Result<PathBuf> {
    let folder = no_weights(name, LLAMA)?;
    let adapter = r#"{"r": 1, "lora_alpha": 1.0, "lora_dropout": null, "target_modules": []}"#;
    std::fs::write(folder.join("first.json"), adapter)?;
    std::fs::write(folder.join("first.safetensors"), "no weights")?;
    Ok(folder)
}

fn text(folder: &Path) -> TextModelBuilder {
    TextModelBuilder::new(folder.display())
        .with_token_source(TokenSource::None)
        .with_force_cpu()
        .with_kv_cache("ott")
}

fn gguf(path: &Path) -> GgufModelBuilder {
    let folder = path.parent().unwrap_or(Path::new(".")).display();
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    GgufModelBuilder::new(folder, vec![file])
        .with_token_source(TokenSource::None)
        .with_force_cpu()
        .with_kv_cache("ott")
}

fn ordering(base: &Path) -> Ordering {
    Ordering {
        adapters: Some(vec!["first".to_owned()]),
        layers: None,
        base_model_id: base.display().to_string(),
        preload_adapters: None,
    }
}

fn error(built: Result<Model>) -> String {
    match built {
        Ok(_) => "it was built".to_owned(),
        Err(error) => error.to_string(),
    }
}

#[test]
fn no_sequences_at_once() -> Result<()> {
    let _alone = crate::alone();
    let llama = folder("api-max-seqs")?;
    let plain = TextModelBuilder::new(llama.display())
        .with_token_source(TokenSource::None)
        .with_force_cpu();
    for builder in [text(&llama), plain] {
        let said = error(block_on(builder.with_max_num_seqs(0).build()));
        assert!(said.starts_with("0 is no number of sequences"), "{said}");
    }
    let said = error(block_on(gguf(&smollm2()?).with_max_num_seqs(0).build()));
    assert!(said.starts_with("0 is no number of sequences"), "{said}");
    Ok(())
}

#[test]
fn models_without_paged_attention() -> Result<()> {
    let _alone = crate::alone();
    let llama = folder("api")?;
    let model = smollm2()?;
    let base = model.parent().unwrap_or(Path::new("."));
    let mut all = String::new();
    let mut tell = |what: &str, said: String| all += &format!("{what}:\n{said}\n\n");
    block_on(async {
        let built = XLoraModelBuilder::from_text_model_builder(
            text(&llama),
            llama.display(),
            ordering(&llama),
        );
        tell("X-LoRA", error(built.build().await));
        let built = GgufXLoraModelBuilder::from_gguf_model_builder(
            gguf(&model),
            llama.display(),
            ordering(base),
        );
        tell("GGUF and X-LoRA", error(built.build().await));
        let built = GgufLoraModelBuilder::from_gguf_model_builder(
            gguf(&model),
            llama.display(),
            ordering(base),
        );
        tell("GGUF and LoRA", error(built.build().await));
        let experts = AnyMoeConfig {
            hidden_size: 64,
            lr: 1e-3,
            epochs: 1,
            batch_size: 1,
            expert_type: AnyMoeExpertType::FineTuned,
            gate_model_id: None,
            training: false,
            loss_csv_path: None,
        };
        let path = llama.display().to_string();
        let built = AnyMoeModelBuilder::from_text_builder(
            text(&llama),
            experts,
            &path,
            "model.layers",
            "mlp",
            vec![&path],
            vec![0],
        );
        tell("AnyMoE", error(built.build().await));
    });
    let draft = SpeculativeConfig { gamma: 2 };
    let built = TextSpeculativeBuilder::new(text(&llama), text(&llama), draft);
    tell(
        "speculative",
        built
            .err()
            .map_or("it was built".to_owned(), |e| e.to_string()),
    );
    let bare = text(&llama).with_no_kv_cache();
    tell("no cache", error(block_on(bare.build())));
    insta::assert_snapshot!(all);
    Ok(())
}
