//! What the server tells of its caches: `GET /v1/kv_cache` and `GET /metrics`.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use integration_tests::bed::{at_rest, gauge};
use integration_tests::model::smollm2;
use integration_tests::server::{free_port, gguf_args, program, Server};
use serde_json::{json, Value};

use crate::alone;

fn ask(server: &Server, words: usize) -> Result<Value> {
    let text = "fox ".repeat(words);
    let body = json!({"model": "default", "prompt": text, "max_tokens": 4, "temperature": 0.0});
    server.post("/v1/completions", &body)
}

/// The number of a metric without labels but the model's.
fn metric(text: &str, name: &str) -> Option<f64> {
    let mut lines = text.lines();
    let line = lines.find(|line| line.strip_prefix(name).is_some_and(|l| l.starts_with('{')))?;
    line.rsplit(' ').next()?.parse().ok()
}

#[test]
fn a_cache_tells_what_it_holds() -> Result<()> {
    let _alone = alone();
    let options = ["--kv-cache", "ott", "--pa-context-len", "1024"];
    let server = Server::start(&smollm2()?, &options)?;
    let fresh = at_rest(&server)?;
    assert_eq!(fresh["object"], "kv_cache");
    assert_eq!(fresh["spec"], "ott");
    assert_eq!(
        (&fresh["blocks"], &fresh["block_size"]),
        (&json!(8), &json!(128))
    );
    let setting = fresh["setting"].as_str().context("a setting")?;
    assert!(
        setting.starts_with("k_bits=2,v_bits=2,group=128,"),
        "{setting}"
    );
    let bits = fresh["bits_per_number"].as_f64().context("bits")?;
    assert!((2.0..2.75).contains(&bits), "{bits}");

    for words in [300, 310] {
        ask(&server, words)?;
    }
    let after = at_rest(&server)?;
    // Two blocks of the first prompt are hit by the second, which has as many words and ten more.
    assert_eq!(after["hit_tokens"], 256, "{after}");
    assert_eq!(
        after["sequences"],
        fresh["sequences"].as_u64().context("a count")? + 2
    );
    assert_eq!(
        after["tokens"], 256,
        "what was not full is forgotten: {after}"
    );
    assert_eq!(gauge(&after, "sealed_blocks"), vec![2.0; 30]);
    let traced = gauge(&after, "traced_tokens");
    assert!(
        traced[..2].iter().all(|n| *n == 0.0),
        "the first layers do not trace"
    );
    assert!(
        traced[2..].iter().all(|n| (9.0..=18.0).contains(n)),
        "{traced:?}"
    );
    let number = |name: &str| after[name].as_f64();
    assert!(number("bytes_held") <= number("bytes_granted"));

    let (status, text) = server.get_any("/metrics")?;
    let text = text.as_str().context("text")?;
    assert_eq!(status, 200);
    assert!(text.ends_with("# EOF\n"), "{text}");
    assert_eq!(
        metric(text, "kv_cache_hit_tokens_total"),
        Some(256.0),
        "{text}"
    );
    assert_eq!(metric(text, "kv_cache_blocks_free"), Some(8.0));
    assert_eq!(metric(text, "kv_cache_tokens"), Some(256.0));
    let by_layer = text
        .lines()
        .filter(|l| l.starts_with("kv_cache_traced_tokens{"));
    assert_eq!(by_layer.count(), 30);
    Ok(())
}

#[test]
fn without_a_backend_there_is_nothing_to_tell() -> Result<()> {
    let _alone = alone();
    let server = Server::start(&smollm2()?, &[])?;
    for path in ["/v1/kv_cache", "/metrics"] {
        let (status, answer) = server.get_any(path)?;
        assert_eq!(status, 404, "{answer}");
        assert!(answer.to_string().contains("--kv-cache"), "{answer}");
    }
    Ok(())
}

#[test]
fn an_unloaded_model_has_no_cache() -> Result<()> {
    let _alone = alone();
    let options = ["--kv-cache", "ott", "--pa-context-len", "1024"];
    let server = Server::start(&smollm2()?, &options)?;
    let id = at_rest(&server)?["id"]
        .as_str()
        .context("an id")?
        .to_owned();
    server.post("/v1/models/unload", &json!({"model_id": &id}))?;
    assert_eq!(server.get_any("/v1/kv_cache")?.0, 404);
    server.post("/v1/models/reload", &json!({"model_id": &id}))?;
    assert_eq!(at_rest(&server)?["blocks"], 8);
    Ok(())
}

/// A backend that waits for its device to tell what it holds makes nobody else wait, even with one worker.
#[test]
fn telling_holds_no_worker_of_the_server() -> Result<()> {
    let _alone = alone();
    let port = free_port()?;
    let mut command = Command::new(program("serve-toys")?);
    command
        .env("TOKIO_WORKER_THREADS", "1")
        .args(["-p", &port.to_string(), "--model"])
        .arg(smollm2()?)
        .args(["--kv-cache", "toy-faulty:fail_times=0,stats_ms=4000"]);
    let server = Server::run(command, port)?;
    server.get_any("/health")?;
    for path in ["/metrics", "/v1/kv_cache"] {
        let asked = Instant::now();
        std::thread::scope(|scope| -> Result<()> {
            let told = scope.spawn(|| server.get_any(path));
            std::thread::sleep(Duration::from_millis(500));
            let (status, _) = server.get_any("/health")?;
            let waited = asked.elapsed();
            assert_eq!(status, 200);
            assert!(waited < Duration::from_secs(3), "{path}: {waited:?}");
            let (status, _) = told.join().expect("no client panics")?;
            assert_eq!(status, 200);
            assert!(
                asked.elapsed() >= Duration::from_secs(4),
                "it was slow to tell"
            );
            Ok(())
        })?;
    }
    Ok(())
}

/// The start of a server says where keys and values are, also where no backend was asked for.
#[test]
fn the_log_says_which_cache_is_in_use() -> Result<()> {
    let _alone = alone();
    let backend = ["--kv-cache", "ott:4bit", "--pa-context-len", "256"];
    for (options, words) in [
        (&backend[..], "the backend `ott:4bit`."),
        (
            &[],
            "the model's own, unpaged; no backend (`--kv-cache`) is in use.",
        ),
        (&["--no-kv-cache"], "none (`--no-kv-cache`)"),
    ] {
        let mut server = Command::new(program("mistralrs")?)
            .args(["--token-source", "none", "serve", "--host", "127.0.0.1"])
            .args(["-p", &free_port()?.to_string()])
            .args(gguf_args(&smollm2()?))
            .args(options)
            .env("RUST_LOG", "info")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let log = BufReader::new(server.stdout.take().context("it is piped")?);
        let said = log
            .lines()
            .map_while(Result::ok)
            .find(|line| line.contains("KV cache of `") || line.contains("listening"));
        server.kill()?;
        server.wait()?;
        let said = said.context("the server starts")?;
        assert!(said.contains(words), "{options:?}: {said}");
    }
    Ok(())
}

/// A share of memory that was asked for is the pool's size, also in RAM.
#[test]
fn a_share_of_memory_sizes_the_pool() -> Result<()> {
    let _alone = alone();
    let blocks = |options: &[&str]| -> Result<(u64, u64)> {
        let options = [&["--kv-cache", "ott"], options].concat();
        let report = at_rest(&Server::start(&smollm2()?, &options)?)?;
        let number = |name: &str| report[name].as_u64().context("a number");
        Ok((number("blocks")?, number("bytes_granted")?))
    };
    // By default as much as the model can use: 8192 tokens.
    assert_eq!(blocks(&[])?.0, 64);
    let (more, bytes) = blocks(&["--pa-memory-fraction", "0.9"])?;
    assert!(more > 1000, "{more} blocks for nine tenths of the memory");
    let memory = std::fs::read_to_string("/proc/meminfo")?;
    let total = memory.split_whitespace().nth(1).context("a number")?;
    let total = total.parse::<u64>()? * 1024;
    assert!(bytes * 10 <= total * 9, "{bytes} of {total}");
    Ok(())
}
