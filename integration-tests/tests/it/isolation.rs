//! An error belongs to who caused it: whoever runs beside it is answered as if alone.

use std::time::Duration;

use anyhow::{Context, Result};
use integration_tests::bed::at_rest;
use integration_tests::model::smollm2;
use integration_tests::server::Server;
use serde_json::{json, Value};

use crate::alone;

fn chat(content: &str, max_tokens: usize) -> Value {
    json!({"model": "default", "temperature": 0.0, "max_tokens": max_tokens,
           "messages": [{"role": "user", "content": content}]})
}

fn text(done: &Value) -> Result<String> {
    let text = done["choices"][0]["message"]["content"].as_str();
    Ok(text.with_context(|| done.to_string())?.to_owned())
}

/// A model that must call a tool and does not: its request ends with an error, those of its batch do not.
#[test]
fn a_tool_that_is_not_called() -> Result<()> {
    let _alone = alone();
    let options = [
        "--kv-cache",
        "ott",
        "--pa-context-len",
        "2048",
        "--max-seqs",
        "6",
    ];
    let server = Server::start(&smollm2()?, &options)?;
    let tool = json!({"type": "function", "function": {"name": "weather", "description": "Of a city",
                      "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}});
    let mut stubborn = chat("Say hello.", 4);
    stubborn["tools"] = json!([tool]);
    stubborn["tool_choice"] = json!({"type": "function", "function": {"name": "weather"}});
    let honest = chat("Count from one to twenty in words.", 48);
    let expected = text(&server.post("/v1/chat/completions", &honest)?)?;
    std::thread::scope(|scope| -> Result<()> {
        let (server, honest) = (&server, &honest);
        let ask = move || server.post_any("/v1/chat/completions", honest);
        let clients: Vec<_> = (0..4).map(|_| scope.spawn(ask)).collect();
        // In the middle of their answers.
        std::thread::sleep(Duration::from_millis(500));
        let (status, error) = server.post_any("/v1/chat/completions", &stubborn)?;
        assert!(status >= 400, "{error}");
        assert!(
            error.to_string().contains("no tools were called"),
            "{error}"
        );
        for client in clients {
            let (status, done) = client.join().expect("no client panics")?;
            assert_eq!(status, 200, "{done}");
            assert_eq!(text(&done)?, expected);
        }
        Ok(())
    })?;
    at_rest(&server)?;
    Ok(())
}

/// A backend that panics, in a prompt, in the middle of a pass or at its beginning: the server lives, tells who was
/// in that step, and answers all others.
#[test]
fn a_backend_that_panics() -> Result<()> {
    let _alone = alone();
    for fault in [
        "fail_by=panic,fail_layer=29,fail_after_steps=8,fail_times=2",
        "fail_by=panic,fail_after_steps=8,fail_times=2,fail_every=40",
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
        let mut server = Server::start_toys(&smollm2()?, &options)?;
        let ask = |i: usize| {
            let question = format!("What is {i} and one?");
            server.post_any("/v1/chat/completions", &chat(&question, 8))
        };
        let answers: Vec<(u16, Value)> = std::thread::scope(|scope| {
            let ask = &ask;
            let clients: Vec<_> = (0..12).map(|i| scope.spawn(move || ask(i))).collect();
            let join =
                |c: std::thread::ScopedJoinHandle<'_, _>| c.join().expect("no client panics");
            clients.into_iter().map(join).collect::<Result<_>>()
        })?;
        let (good, bad): (Vec<_>, Vec<_>) = answers.iter().partition(|(status, _)| *status == 200);
        assert!(!good.is_empty() && !bad.is_empty(), "{fault}: {answers:?}");
        for (_, error) in &bad {
            assert!(
                error.to_string().contains("panicked: toy-faulty"),
                "{fault}: {error}"
            );
        }
        let report = at_rest(&server)?;
        assert!(report["failed_steps"].as_u64() >= Some(2), "{report}");
        assert!(server.is_alive()?);
    }
    Ok(())
}

/// What a small model says when only a call of a tool, or JSON of a certain form, is allowed: the same as often as it
/// is asked, at once or streamed.
#[test]
fn tools_and_json_by_grammar() -> Result<()> {
    let _alone = alone();
    let options = ["--kv-cache", "ott:group=32", "--pa-context-len", "1024"];
    let server = Server::start(&smollm2()?, &options)?;
    let city = json!({"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}},
                      "required": ["city"], "additionalProperties": false});
    let call = json!({"type": "object", "properties": {"name": {"const": "weather"}, "parameters": city},
                      "required": ["name", "parameters"], "additionalProperties": false});
    let mut tool = chat("What is the weather in Paris?", 60);
    tool["tools"] =
        json!([{"type": "function", "function": {"name": "weather", "parameters": city}}]);
    tool["grammar"] = json!({"type": "json_schema", "value": call});
    let done = server.post("/v1/chat/completions", &tool)?;
    let choice = &done["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls", "{done}");
    let called = &choice["message"]["tool_calls"][0]["function"];
    assert_eq!(called["name"], "weather");
    let arguments: Value = serde_json::from_str(called["arguments"].as_str().context("text")?)?;
    assert!(
        ["Paris", "Rome"].contains(&arguments["city"].as_str().context("a city")?),
        "{done}"
    );
    tool["stream"] = json!(true);
    let events = server.stream("/v1/chat/completions", &tool)?;
    let streamed = events
        .iter()
        .find_map(|e| e["choices"][0]["delta"]["tool_calls"].get(0));
    assert_eq!(streamed.context("a call is streamed")?["function"], *called);

    let mut form = chat("Where is the Louvre?", 60);
    form["n"] = json!(2);
    form["response_format"] =
        json!({"type": "json_schema", "json_schema": {"name": "place", "schema": city}});
    let done = server.post("/v1/chat/completions", &form)?;
    let choices = done["choices"].as_array().context("choices")?;
    assert_eq!(choices.len(), 2, "{done}");
    for choice in choices {
        let text = choice["message"]["content"].as_str().context("text")?;
        let place: Value = serde_json::from_str(text).context(text.to_owned())?;
        assert!(place["city"].is_string(), "{place}");
    }
    at_rest(&server)?;
    Ok(())
}
