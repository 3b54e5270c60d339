//! Faults and bad manners over HTTP: an error to who caused it, the others go on, and memory comes back.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use integration_tests::bed::{at_rest, random};
use integration_tests::model::smollm2;
use integration_tests::server::Server;
use serde_json::{json, Value};

use crate::alone;

fn completion(prompt: &str, more: Value) -> Value {
    let mut body =
        json!({"model": "default", "prompt": prompt, "max_tokens": 6, "temperature": 0.0});
    for (key, value) in more.as_object().into_iter().flatten() {
        body[key] = value.clone();
    }
    body
}

fn text(done: &Value) -> Option<&str> {
    done["choices"][0]["text"].as_str()
}

/// What an honest client gets.
fn honest(server: &Server) -> Result<String> {
    let done = server.post(
        "/v1/completions",
        &completion("One, two, three,", json!({})),
    )?;
    Ok(text(&done).context("an answer has text")?.to_owned())
}

/// A backend that fails a few steps: their requests end with its error, all others are answered, and afterwards
/// everything is.
#[test]
fn failing_steps_under_load() -> Result<()> {
    let _alone = alone();
    let model = smollm2()?;
    for fault in [
        "fail_after_steps=12,fail_times=3",
        "fail_layer=29,fail_after_steps=20,fail_times=2",
    ] {
        let spec = format!("toy-faulty:{fault}");
        let options = [
            "--kv-cache",
            &spec,
            "--pa-context-len",
            "1024",
            "--max-seqs",
            "4",
        ];
        let mut server = Server::start_toys(&model, &options)?;
        let ask = |i: usize| {
            let prompt = format!("{i} and {} make", i + 1);
            server.post_any(
                "/v1/completions",
                &completion(&prompt, json!({"max_tokens": 12})),
            )
        };
        let answers: Vec<(u16, Value)> = std::thread::scope(|scope| {
            let ask = &ask;
            let clients: Vec<_> = (0..12).map(|i| scope.spawn(move || ask(i))).collect();
            let join =
                |c: std::thread::ScopedJoinHandle<'_, _>| c.join().expect("no client panics");
            clients.into_iter().map(join).collect::<Result<_>>()
        })?;
        let (good, bad): (Vec<_>, Vec<_>) = answers.iter().partition(|(status, _)| *status == 200);
        assert!(!bad.is_empty() && !good.is_empty(), "{fault}: {answers:?}");
        for (_, error) in &bad {
            assert!(error.to_string().contains("toy-faulty"), "{fault}: {error}");
        }
        assert!(good
            .iter()
            .all(|(_, done)| text(done).is_some_and(|t| !t.is_empty())));
        // Whoever asks after the last fault is answered.
        for i in 0..4 {
            let (status, done) = ask(i)?;
            assert_eq!(status, 200, "{fault}: {done}");
        }
        let report = at_rest(&server)?;
        assert!(report["failed_steps"].as_u64() >= Some(2), "{report}");
        assert!(server.is_alive()?);
    }
    Ok(())
}

/// Clients that hang up at any moment leave nothing behind.
#[test]
fn clients_that_hang_up() -> Result<()> {
    let _alone = alone();
    let options = [
        "--kv-cache",
        "ott:group=32",
        "--pa-context-len",
        "1024",
        "--max-seqs",
        "4",
    ];
    let server = Server::start(&smollm2()?, &options)?;
    let before = honest(&server)?;
    std::thread::scope(|scope| -> Result<()> {
        let server = &server;
        let clients: Vec<_> = (0..16)
            .map(|i| {
                scope.spawn(move || -> Result<()> {
                    let prompt = format!("{i} ").repeat(20 + i);
                    let body = completion(&prompt, json!({"stream": true, "max_tokens": 200}));
                    let events = random(5, &[i as u64]) as usize % 8;
                    for event in server.events("/v1/completions", &body)?.take(events) {
                        event?;
                    }
                    Ok(())
                })
            })
            .collect();
        let join = |c: std::thread::ScopedJoinHandle<'_, _>| c.join().expect("no client panics");
        clients.into_iter().try_for_each(join)
    })?;
    at_rest(&server)?;
    assert_eq!(honest(&server)?, before);
    Ok(())
}

/// Requests that no sane client sends. Each gets an answer or an error, and whoever asks next is answered as
/// before.
#[test]
fn requests_no_sane_client_sends() -> Result<()> {
    let _alone = alone();
    let options = [
        "--kv-cache",
        "ott:group=32",
        "--pa-context-len",
        "320",
        "--max-seqs",
        "4",
    ];
    let mut server = Server::start(&smollm2()?, &options)?;
    let before = honest(&server)?;
    let bodies = [
        // Refused, whatever else happens.
        (true, completion(&"word ".repeat(4000), json!({}))),
        (true, completion("x", json!({"max_tokens": -1}))),
        (true, completion("x", json!({"max_tokens": 1.5}))),
        (true, completion("x", json!({"temperature": "hot"}))),
        (true, completion("x", json!({"model": "no such model"}))),
        (true, json!({"model": "default"})),
        (true, json!([])),
        (true, json!({"model": "default", "prompt": [1, 2, 3]})),
        // Answered or refused.
        (
            false,
            completion("x", json!({"max_tokens": 1_000_000_000_000u64})),
        ),
        (false, completion("x", json!({"max_tokens": u64::MAX}))),
        (false, completion("x", json!({"max_tokens": 0}))),
        (false, completion("", json!({}))),
        (false, completion("\u{0}\u{fffd}\u{202e}", json!({}))),
        (false, completion("x", json!({"n": 0}))),
        (false, completion("x", json!({"logprobs": 1000}))),
        (
            false,
            completion("x", json!({"logit_bias": {"5": 1e39, "4000000000": 1.0}})),
        ),
        (
            false,
            completion(
                "x",
                json!({"temperature": -1.0, "top_p": 7.0, "top_k": 0, "min_p": -2.0}),
            ),
        ),
        (
            false,
            completion(
                "x",
                json!({"repetition_penalty": 0.0, "frequency_penalty": 1e30}),
            ),
        ),
        (false, completion("x", json!({"stop": vec!["z"; 5000]}))),
        (false, completion("x", json!({"stop": ""}))),
        (
            false,
            completion("x", json!({"grammar": {"type": "regex", "value": "(((("}})),
        ),
        (
            false,
            completion(
                "x",
                json!({"grammar": {"type": "json_schema", "value": {"type": 7}}}),
            ),
        ),
    ];
    for (refused, body) in &bodies {
        let shown: String = body.to_string().chars().take(120).collect();
        let start = Instant::now();
        let (status, answer) = server
            .post_any("/v1/completions", body)
            .with_context(|| shown.clone())?;
        println!(
            "{status} in {:.1?} for {shown}: {:.150}",
            start.elapsed(),
            answer.to_string()
        );
        assert!(!refused || status >= 400, "{shown}: {status} {answer}");
        ensure!(server.is_alive()?, "{shown}: the server died");
        assert_eq!(honest(&server).context(shown.clone())?, before, "{shown}");
    }
    let raw: [&[u8]; 5] = [
        b"\xff\xfe\x80 not UTF-8",
        b"{\"model\": \"default\", \"prompt\": \"\xc3\x28\"}",
        b"{\"model\": \"default\", \"prompt\": \"x\", \"logit_bias\": {\"5\": NaN}}",
        b"{\"model\": \"default\", \"prompt\": ",
        b"",
    ];
    let deep = [b"[".repeat(100_000), b"]".repeat(100_000)].concat();
    for body in raw.into_iter().chain([&deep[..]]) {
        let (status, answer) = server.post_bytes("/v1/completions", body)?;
        assert!((400..500).contains(&status), "{status}: {answer}");
    }
    assert_eq!(honest(&server)?, before);
    at_rest(&server)?;
    Ok(())
}

/// SIGTERM in the middle of an answer ends the server at once, and its client is told by the end of the stream.
#[test]
fn terminated_in_the_middle() -> Result<()> {
    let _alone = alone();
    let options = ["--kv-cache", "ott", "--pa-context-len", "4096"];
    let mut server = Server::start(&smollm2()?, &options)?;
    let body = completion(
        "Once upon a time",
        json!({"stream": true, "max_tokens": 2000}),
    );
    let mut events = server.events("/v1/completions", &body)?;
    events.next().context("an answer begins")??;
    let kill = Command::new("kill")
        .arg(server.pid().to_string())
        .status()?;
    ensure!(kill.success(), "no signal was sent");
    let start = Instant::now();
    while server.is_alive()? {
        ensure!(
            start.elapsed() < Duration::from_secs(20),
            "the server goes on"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(events.count() < 1990, "the stream ended with the server");
    Ok(())
}

/// A model file that is cut or overwritten is an error at the start, not a server.
#[test]
fn damaged_model_files() -> Result<()> {
    let _alone = alone();
    let whole = std::fs::read(smollm2()?)?;
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("damaged");
    std::fs::create_dir_all(&folder)?;
    let cut = |len: usize| whole[..len].to_vec();
    // The file's head says how many tensors there are: eight bytes from the eighth on.
    let mut many = cut(1 << 20);
    many[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
    // The first tensor's shape follows its name.
    let name = whole
        .windows(17)
        .position(|w| w == b"token_embd.weight")
        .context("a tensor")?;
    let mut shape = whole.clone();
    shape[name + 21..name + 29].copy_from_slice(&31u64.to_le_bytes());
    let damaged = [
        ("empty", vec![]),
        ("head", cut(4)),
        ("metadata", cut(100_000)),
        ("weights", cut(whole.len() / 2)),
        ("last byte", cut(whole.len() - 1)),
        (
            "magic",
            [b"GGUX".to_vec(), cut(1 << 20)[4..].to_vec()].concat(),
        ),
        ("count", many),
        ("shape", shape),
    ];
    for (what, bytes) in damaged {
        let path = folder.join("model.gguf");
        std::fs::write(&path, bytes)?;
        let start = Instant::now();
        let started = Server::start(&path, &["--kv-cache", "ott", "--pa-context-len", "1024"]);
        let error = started.map(|_| ()).expect_err(what).to_string();
        println!("{what}: {error} after {:.1?}", start.elapsed());
        assert!(
            error.contains("ended before it was ready"),
            "{what}: {error}"
        );
    }
    std::fs::remove_dir_all(&folder)?;
    Ok(())
}
