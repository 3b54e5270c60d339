//! How answers end, streamed and not: where the pool ends, at a stop string, at a grammar's end, every choice, and
//! with an error that clients can read.

use std::process::Command;

use anyhow::{ensure, Context, Result};
use integration_tests::bed::at_rest;
use integration_tests::model::smollm2;
use integration_tests::server::{free_port, gguf_args, program, Server};
use serde_json::{json, Value};

use crate::alone;

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// A request of the kind that `path` takes, greedy.
fn body(path: &str, prompt: &str, more: Value) -> Value {
    let mut body = json!({"model": "default", "temperature": 0.0});
    match path {
        CHAT => body["messages"] = json!([{"role": "user", "content": prompt}]),
        _ => body["prompt"] = json!(prompt),
    }
    for (key, value) in more.as_object().into_iter().flatten() {
        body[key] = value.clone();
    }
    body
}

/// The only choice of an answer: its text and why it ended.
fn ending(done: &Value) -> Result<(String, String)> {
    let choice = &done["choices"][0];
    let text = choice["text"]
        .as_str()
        .or(choice["message"]["content"].as_str());
    let why = choice["finish_reason"].as_str();
    Ok((
        text.with_context(|| done.to_string())?.to_owned(),
        why.with_context(|| done.to_string())?.to_owned(),
    ))
}

/// The events of a streamed answer, each of which is JSON, up to the `[DONE]` that must be the last.
fn events(server: &Server, path: &str, body: &Value) -> Result<Vec<Value>> {
    let mut body = body.clone();
    body["stream"] = json!(true);
    let (status, answer) = server.post_any(path, &body)?;
    ensure!(status == 200, "status {status}: {answer}");
    let text = answer.as_str().context("a stream")?;
    let mut events: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("data: "))
        .collect();
    ensure!(
        events.pop() == Some("[DONE]"),
        "no [DONE] at the end: {text}"
    );
    let parse = |event: &str| serde_json::from_str(event).with_context(|| event.to_owned());
    events.into_iter().map(parse).collect()
}

/// Text and end of each of `n` choices, as streamed.
fn streamed(server: &Server, path: &str, body: &Value, n: usize) -> Result<Vec<(String, String)>> {
    let mut choices = vec![(String::new(), String::new()); n];
    for event in events(server, path, body)? {
        let chunks = event["choices"].as_array();
        let chunks = chunks.with_context(|| event.to_string())?;
        let mut seen = vec![false; n];
        for chunk in chunks {
            let index = chunk["index"].as_u64().context("an index")? as usize;
            ensure!(!seen[index], "two of one choice in an event: {event}");
            seen[index] = true;
            let (text, why) = &mut choices[index];
            ensure!(why.is_empty(), "a choice goes on after its end: {event}");
            let new = chunk["text"]
                .as_str()
                .or(chunk["delta"]["content"].as_str());
            *text += new.unwrap_or_default();
            *why = chunk["finish_reason"]
                .as_str()
                .unwrap_or_default()
                .to_owned();
        }
    }
    for (text, why) in &choices {
        ensure!(!why.is_empty(), "a choice does not end: {text:?}");
    }
    Ok(choices)
}

/// An answer for which the pool has no more room ends there with `length`, and what was made is kept.
#[test]
fn an_answer_that_outgrows_the_pool() -> Result<()> {
    let _alone = alone();
    // Without hits, with which an answer may be another one.
    let options = [
        "--kv-cache",
        "ott:group=32",
        "--pa-context-len",
        "64",
        "--prefix-cache-n",
        "0",
    ];
    let server = Server::start(&smollm2()?, &options)?;
    let report = at_rest(&server)?;
    let size = |what: &str| report[what].as_u64().context("a size");
    let pool = size("blocks")? * size("block_size")?;
    for path in [COMPLETIONS, CHAT] {
        let mut first = None;
        for more in [json!({"max_tokens": 500}), json!({})] {
            let ask = body(path, "Once upon a time", more);
            let done = server.post(path, &ask)?;
            let (text, why) = ending(&done)?;
            assert_eq!(why, "length", "{done}");
            assert_eq!(done["usage"]["total_tokens"], pool, "{done}");
            let streams = streamed(&server, path, &ask, 1)?;
            assert_eq!(streams, [(text.clone(), why)]);
            assert!(text.len() > 60, "{text}");
            assert_eq!(*first.get_or_insert(text.clone()), text);
        }
    }
    // A prompt that does not fit is refused, and it is the prompt that is blamed.
    let long = body(COMPLETIONS, &"word ".repeat(200), json!({"max_tokens": 4}));
    let (status, error) = server.post_any(COMPLETIONS, &long)?;
    assert_eq!(status, 422, "{error}");
    assert!(
        error.to_string().contains("send a shorter prompt"),
        "{error}"
    );
    at_rest(&server)?;
    Ok(())
}

/// An error in mid-stream is JSON of the form that OpenAI's clients raise, and then the stream ends.
#[test]
fn an_error_in_a_stream() -> Result<()> {
    let _alone = alone();
    let spec = "toy-faulty:fail_layer=3,fail_after_steps=6,fail_every=6";
    let options = ["--kv-cache", spec, "--pa-context-len", "256"];
    let server = Server::start_toys(&smollm2()?, &options)?;
    for path in [COMPLETIONS, CHAT] {
        let mid_answer = body(path, "Once upon a time", json!({"max_tokens": 12}));
        let too_long = body(path, &"word ".repeat(400), json!({"max_tokens": 12}));
        let cases = [
            (mid_answer, "server_error", "toy-faulty"),
            (too_long, "invalid_request_error", "needs room for 4"),
        ];
        for (ask, kind, says) in cases {
            let events = events(&server, path, &ask)?;
            let error = &events.last().context("an event")?["error"];
            assert_eq!(error["type"], kind, "{events:?}");
            let message = error["message"].as_str().context("a message")?;
            assert!(message.contains(says), "{message}");
            let of_answer = &events[..events.len() - 1];
            assert!(
                of_answer.iter().all(|e| e["choices"].is_array()),
                "{events:?}"
            );
            assert_eq!(of_answer.is_empty(), kind == "invalid_request_error");
        }
    }
    at_rest(&server)?;
    Ok(())
}

/// Whoever looks for a fault with `RUST_BACKTRACE` keeps its frames in the log: clients get the sentence.
#[test]
fn errors_carry_no_backtrace() -> Result<()> {
    let _alone = alone();
    let port = free_port()?;
    let mut command = Command::new(program("mistralrs-server")?);
    command
        .env("RUST_BACKTRACE", "1")
        .args(["--token-source", "none", "--host", "127.0.0.1"])
        .args(["-p", &port.to_string()])
        .args(gguf_args(&smollm2()?))
        .args(["--kv-cache", "ott", "--pa-context-len", "1024"]);
    let server = Server::run(command, port)?;
    let tool = json!({"type": "function", "function": {"name": "weather", "description": "Of a city",
                      "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}});
    let choice = json!({"type": "function", "function": {"name": "weather"}});
    let more = json!({"max_tokens": 4, "tools": [tool], "tool_choice": choice});
    let (status, error) = server.post_any(CHAT, &body(CHAT, "Say hello.", more))?;
    assert_eq!(status, 500, "{error}");
    let message = error["message"].as_str().context("a message")?;
    assert_eq!(
        message,
        "Tool choice was required but no tools were called."
    );
    Ok(())
}

/// Several choices that end at different tokens: each is streamed to its end.
#[test]
fn choices_streamed_at_once_all_end() -> Result<()> {
    let _alone = alone();
    let options = ["--kv-cache", "ott", "--pa-context-len", "1024"];
    let server = Server::start(&smollm2()?, &options)?;
    for path in [CHAT, COMPLETIONS] {
        let more = json!({"n": 3, "temperature": 1.4, "max_tokens": 24, "stop": ["a", "o"]});
        let ask = body(path, "Write a word, then another.", more);
        for _ in 0..3 {
            let choices = streamed(&server, path, &ask, 3)?;
            assert!(choices.iter().any(|(_, why)| why == "stop"), "{choices:?}");
        }
    }
    Ok(())
}

/// A stop string over several tokens is left out of a stream, as it is of an answer at once.
#[test]
fn a_stop_string_is_not_streamed() -> Result<()> {
    let _alone = alone();
    let options = ["--kv-cache", "ott", "--pa-context-len", "1024"];
    let server = Server::start(&smollm2()?, &options)?;
    for path in [COMPLETIONS, CHAT] {
        let ask = |more| body(path, "Count: one, two, three,", more);
        let (all, end) = ending(&server.post(path, &ask(json!({"max_tokens": 30})))?)?;
        // From within a word to within another.
        let stop: String = all.chars().skip(10).take(14).collect();
        let more = json!({"max_tokens": 30, "stop": [stop, "never said"]});
        let (text, why) = ending(&server.post(path, &ask(more.clone()))?)?;
        assert_eq!(why, "stop");
        assert_eq!(all.find(&stop), Some(text.len()));
        assert!(all.starts_with(&text));
        assert_eq!(streamed(&server, path, &ask(more), 1)?, [(text, why)]);
        // What only begins like one is streamed.
        let more = json!({"max_tokens": 30, "stop": [format!("{stop}~")]});
        let whole = streamed(&server, path, &ask(more), 1)?;
        assert_eq!(whole, [(all, end)]);
    }
    Ok(())
}

/// The tokenizer's end token, which ends a grammar, is not the one of this model's chat template.
#[test]
fn an_answer_of_a_form_ends_with_it() -> Result<()> {
    let _alone = alone();
    let city = json!({"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}},
                      "required": ["city"], "additionalProperties": false});
    let form = json!({"type": "json_schema", "json_schema": {"name": "p", "schema": city}});
    for options in [&["--kv-cache", "ott", "--pa-context-len", "1024"][..], &[]] {
        let server = Server::start(&smollm2()?, options)?;
        let more = json!({"max_tokens": 60, "response_format": form});
        let ask = body(CHAT, "Where is the Louvre?", more);
        let done = server.post(CHAT, &ask)?;
        let (text, why) = ending(&done)?;
        assert_eq!(why, "stop", "{done}");
        let place: Value = serde_json::from_str(&text).context(text.clone())?;
        assert!(place["city"].is_string());
        assert!(
            done["usage"]["completion_tokens"].as_u64() < Some(30),
            "{done}"
        );
        assert_eq!(streamed(&server, CHAT, &ask, 1)?, [(text, why)]);
    }
    Ok(())
}

/// The only model, unloaded, comes back when the default one is asked.
#[test]
fn the_default_model_comes_back() -> Result<()> {
    let _alone = alone();
    let options = ["--kv-cache", "ott", "--pa-context-len", "1024"];
    let server = Server::start(&smollm2()?, &options)?;
    let id = at_rest(&server)?["id"].clone();
    let ask = body(CHAT, "Hello!", json!({"max_tokens": 4}));
    let before = ending(&server.post(CHAT, &ask)?)?;
    server.post("/v1/models/unload", &json!({"model_id": id}))?;
    assert_eq!(ending(&server.post(CHAT, &ask)?)?, before);
    Ok(())
}
