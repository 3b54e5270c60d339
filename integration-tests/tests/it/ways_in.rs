//! The ways to switch the cache on that no other test takes: a configuration file, one model beside another,
//! and a model that is unloaded and loaded again.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use integration_tests::engine::{builder, Setup};
use integration_tests::model::smollm2;
use integration_tests::server::{free_port, program, Server};
use mistralrs::{MultiModelBuilder, RequestBuilder, TextMessageRole};
use serde_json::json;

use crate::{alone, block_on};

/// A configuration file with the cache in it.
fn configuration(model: &Path, port: u16) -> Result<PathBuf> {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("ways-in.toml");
    let folder = model.parent().context("a model lies in a folder")?;
    let file = model.file_name().context("a model has a name")?;
    let text = format!(
        "command = \"serve\"\n\n[global]\ntoken_source = \"none\"\n\n[server]\nhost = \"127.0.0.1\"\nport = {port}\n\n\
         [paged_attn]\nkv_cache = \"ott:k_bits=4\"\ncontext_len = 2048\n\n\
         [[models]]\nkind = \"auto\"\nmodel_id = {folder:?}\nformat = {{ format = \"gguf\", quantized_file = {file:?} }}\n\
         device = {{ cpu = true }}\n"
    );
    std::fs::write(&path, text)?;
    Ok(path)
}

/// The id that the server gives its one model.
fn model_id(server: &Server) -> Result<String> {
    let models = server.get("/v1/models")?;
    let models = models["data"].as_array().context("a list of models")?;
    let mut ids = models.iter().filter_map(|m| m["id"].as_str());
    let id = ids.find(|id| *id != "default");
    Ok(id.context("the server lists its model")?.to_owned())
}

/// The greedy answer to a prompt of a few blocks.
fn ask(server: &Server, model: &str) -> Result<String> {
    let text = "The quick brown fox jumps over the lazy dog. ".repeat(25);
    let body = json!({"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 8,
                      "temperature": 0});
    let done = server.post("/v1/chat/completions", &body)?;
    let text = done["choices"][0]["message"]["content"].as_str();
    Ok(text.context("an answer has text")?.to_owned())
}

#[test]
fn a_configuration_file() -> Result<()> {
    let _alone = alone();
    let port = free_port()?;
    let mut command = Command::new(program("mistralrs")?);
    command
        .args(["from-config", "--file"])
        .arg(configuration(&smollm2()?, port)?);
    let from_file = Server::run(command, port)?;
    let answer = ask(&from_file, &model_id(&from_file)?)?;
    drop(from_file);
    let options = ["--kv-cache", "ott:k_bits=4", "--pa-context-len", "2048"];
    let from_options = Server::start(&smollm2()?, &options)?;
    assert_eq!(answer, ask(&from_options, "default")?);
    Ok(())
}

#[test]
fn a_model_unloaded_and_loaded_again() -> Result<()> {
    let _alone = alone();
    let options = ["--kv-cache", "ott", "--pa-context-len", "2048"];
    let server = Server::start(&smollm2()?, &options)?;
    let id = model_id(&server)?;
    let before = ask(&server, &id)?;
    for (step, status) in [("unload", "unloaded"), ("reload", "loaded")] {
        let done = server.post(&format!("/v1/models/{step}"), &json!({"model_id": &id}))?;
        assert_eq!(done["status"], status, "{done}");
    }
    assert_eq!(ask(&server, &id)?, before);
    Ok(())
}

#[test]
fn a_model_with_the_cache_beside_one_without() -> Result<()> {
    let _alone = alone();
    block_on(async {
        let path = smollm2()?;
        // The host tells models apart by their folders.
        let other = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("other-folder");
        std::fs::create_dir_all(&other)?;
        let other = other.join("model.gguf");
        if !other.exists() {
            std::os::unix::fs::symlink(&path, &other)?;
        }
        let both = MultiModelBuilder::new()
            .add_model_with_alias("with", builder(&path, &Setup::with("ott"))?)
            .add_model_with_alias("without", builder(&other, &Setup::default())?)
            .build()
            .await?;
        // Shorter than a group and a window: nothing is quantized, so the two must agree.
        let request = || {
            RequestBuilder::new()
                .add_message(TextMessageRole::User, "Name three colors.")
                .set_sampler_max_len(12)
                .set_deterministic_sampler()
        };
        let mut answers = Vec::new();
        for model in ["with", "without", "with"] {
            let done = both
                .send_chat_request_with_model(request(), Some(model))
                .await?;
            answers.push(done.choices[0].message.content.clone());
        }
        assert!(answers[0].is_some());
        assert_eq!(answers[0], answers[1]);
        assert_eq!(answers[0], answers[2]);
        Ok(())
    })
}

/// What `tune` writes is what it was asked for, and `from-config` reads it.
#[test]
fn a_tuned_configuration_keeps_the_cache() -> Result<()> {
    let folder = crate::options::folder()?;
    let path = folder.join("tuned.toml");
    for (size, key) in [
        (["--pa-context-len", "1024"], "context_len = 1024"),
        (["--pa-memory-fraction", "1"], "memory_fraction = 1.0"),
    ] {
        let tuned = Command::new(program("mistralrs")?)
            .args(["--token-source", "none", "tune", "--cpu", "-m"])
            .arg(&folder)
            .args(["--kv-cache", "ott:4bit"])
            .args(size)
            .arg("--emit-config")
            .arg(&path)
            .output()?;
        let text = std::fs::read_to_string(&path)?;
        assert!(tuned.status.success(), "{tuned:?}");
        let table = format!("[paged_attn]\nkv_cache = \"ott:4bit\"\n{key}\n");
        assert!(text.contains(&table), "{text}");
        // It is not about where models come from.
        let text = text.replacen(
            "[server]",
            "[global]\ntoken_source = \"none\"\n\n[server]",
            1,
        );
        std::fs::write(&path, text)?;
        let read = Command::new(program("mistralrs")?)
            .args(["from-config", "--file"])
            .arg(&path)
            .output()?;
        let said = String::from_utf8_lossy(&read.stderr);
        assert!(!said.contains("Failed to parse"), "{said}");
    }
    Ok(())
}
