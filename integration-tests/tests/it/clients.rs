//! Clients that people use: the official OpenAI library for Python, curl, and the server's own page in a browser.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{ensure, Result};
use integration_tests::bed::at_rest;
use integration_tests::model::{folder, smollm2};
use integration_tests::server::Server;

use crate::alone;

const OPTIONS: [&str; 4] = ["--kv-cache", "ott:group=32", "--pa-context-len", "1024"];

/// A Python that has a module, made once; `None` where there is no Python or no registry.
fn python(module: &str, version: &str) -> Option<PathBuf> {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("python-{module}"));
    let python = folder.join("bin/python");
    let works = |args: &[&str]| run(Command::new(&python).args(args)).is_ok();
    if works(&["-c", &format!("import {module}")]) {
        return Some(python);
    }
    run(Command::new("python3").args(["-m", "venv"]).arg(&folder)).ok()?;
    let package = format!("{module}{version}");
    works(&["-m", "pip", "install", "--quiet", &package]).then_some(python)
}

/// A browser that is installed.
fn chromium() -> Option<PathBuf> {
    let names = ["chromium", "chromium-browser", "google-chrome"];
    let folders: Vec<PathBuf> = std::env::split_paths(&std::env::var_os("PATH")?).collect();
    let programs = names
        .iter()
        .flat_map(|name| folders.iter().map(move |f| f.join(name)));
    programs.into_iter().find(|program| program.is_file())
}

fn run(command: &mut Command) -> Result<Output> {
    let output = command.output()?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {error}");
    Ok(output)
}

/// Client libraries that people use, in an environment of their own beside the models: made once for each list of
/// versions, and in seconds where pip has them.
const LIBRARIES: &str = include_str!("../clients/requirements.txt");

fn libraries() -> Option<PathBuf> {
    let place = folder().ok()?.with_file_name("clients");
    let (python, made) = (place.join("bin/python"), place.join("made.txt"));
    if std::fs::read_to_string(&made).is_ok_and(|list| list == LIBRARIES) {
        return Some(python);
    }
    let list = scripts().join("requirements.txt");
    let venv = ["-m", "venv", "--clear"];
    let install = ["-m", "pip", "install", "--quiet", "--requirement"];
    let done = run(Command::new("python3").args(venv).arg(&place))
        .and_then(|_| run(Command::new(&python).args(install).arg(list)));
    if let Err(error) = done {
        eprintln!("{error:#}");
        return None;
    }
    std::fs::write(made, LIBRARIES).ok()?;
    Some(python)
}

fn scripts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients")
}

/// Run scripts with a library each against one server; whatever they did, the cache is at rest after it.
fn ask_with(scripts_of: &[&str]) -> Result<()> {
    let _alone = alone();
    let Some(python) = libraries() else {
        eprintln!(
            "SKIPPED: client libraries cannot be installed here: {scripts_of:?} were not tried"
        );
        return Ok(());
    };
    // Without hits, an answer asked again is the same answer.
    let server = Server::start(
        &smollm2()?,
        &[&OPTIONS[..], &["--prefix-cache-n", "0"]].concat(),
    )?;
    let url = format!("http://127.0.0.1:{}/v1", server.port());
    for script in scripts_of {
        let output = run(Command::new(&python).arg(scripts().join(script)).arg(&url))?;
        println!("{}", String::from_utf8_lossy(&output.stdout));
    }
    at_rest(&server)?;
    Ok(())
}

#[test]
fn the_openai_client_for_python() -> Result<()> {
    ask_with(&["chat.py", "with_openai.py"])
}

#[test]
fn langchain_litellm_and_llama_index() -> Result<()> {
    ask_with(&[
        "with_langchain.py",
        "with_litellm.py",
        "with_llama_index.py",
    ])
}

/// An answer that a schema describes, as an object.
#[test]
fn typed_answers() -> Result<()> {
    ask_with(&["with_parse.py", "with_instructor.py"])
}

/// A chat of two questions in the built-in page, and a picture of it in the target folder.
#[test]
fn the_built_in_page() -> Result<()> {
    let _alone = alone();
    let (Some(browser), Some(python)) = (chromium(), python("playwright", ">=1.40,<2")) else {
        eprintln!(
            "SKIPPED: there is no Chromium here, or Playwright for Python cannot be installed"
        );
        return Ok(());
    };
    let server = Server::start(&smollm2()?, &[&OPTIONS[..], &["--ui"]].concat())?;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/page.py");
    let picture = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("page.png");
    let url = format!("http://127.0.0.1:{}/ui", server.port());
    let output = run(Command::new(python)
        .arg(script)
        .arg(url)
        .arg(browser)
        .arg(&picture))?;
    println!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        picture.display()
    );
    let report = at_rest(&server)?;
    assert!(
        report["steps"].as_u64() > Some(3),
        "the cache was in use: {report}"
    );
    Ok(())
}

#[test]
fn curl() -> Result<()> {
    let _alone = alone();
    if run(Command::new("curl").arg("--version")).is_err() {
        eprintln!("SKIPPED: there is no curl here");
        return Ok(());
    }
    let server = Server::start(&smollm2()?, &OPTIONS)?;
    let curl = |path: &str, more: &[&str]| -> Result<String> {
        let url = format!("http://127.0.0.1:{}{path}", server.port());
        let output = run(Command::new("curl")
            .args(["-sS", "--max-time", "120"])
            .args(more)
            .arg(url))?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let json = ["-H", "Content-Type: application/json", "-d"];
    let body =
        r#"{"model": "default", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}"#;
    let answer = curl("/v1/chat/completions", &[&json[..], &[body]].concat())?;
    ensure!(answer.contains(r#""object":"chat.completion""#), "{answer}");
    let streamed = body.replace("\"max", "\"stream\": true, \"max");
    let events = curl(
        "/v1/chat/completions",
        &[&["-N"], &json[..], &[&streamed]].concat(),
    )?;
    ensure!(events.trim_end().ends_with("data: [DONE]"), "{events}");
    ensure!(curl("/metrics", &[])?.contains("kv_cache_steps_total"));
    ensure!(curl("/v1/kv_cache", &[])?.contains(r#""object":"kv_cache""#));
    Ok(())
}
