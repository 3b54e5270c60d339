//! `mistralrs-server --kv-cache ott` over HTTP.

use anyhow::{Context, Result};
use integration_tests::model::smollm2;
use integration_tests::server::Server;
use serde_json::json;

use crate::alone;

#[test]
fn chat_completion_stream_and_concurrent_clients() -> Result<()> {
    let _alone = alone();
    let server = Server::start(
        &smollm2()?,
        &["--kv-cache", "ott", "--pa-context-len", "4096"],
    )?;
    let long = "The quick brown fox jumps over the lazy dog. ".repeat(25);
    let chat = |text: &str, stream: bool| {
        json!({"model": "default", "messages": [{"role": "user", "content": text}], "max_tokens": 12,
               "temperature": 0, "stream": stream})
    };
    let answer = |text: &str| -> Result<String> {
        let done = server.post("/v1/chat/completions", &chat(text, false))?;
        Ok(done["choices"][0]["message"]["content"]
            .as_str()
            .context("an answer has text")?
            .to_owned())
    };
    let alone: Vec<String> = ["Hello!", &long]
        .into_iter()
        .map(answer)
        .collect::<Result<_>>()?;

    let done = server.post(
        "/v1/completions",
        &json!({"model": "default", "prompt": long, "max_tokens": 4}),
    )?;
    assert_eq!(done["usage"]["completion_tokens"], 4, "{done}");

    let events = server.stream("/v1/chat/completions", &chat("Hello!", true))?;
    let streamed: String = events
        .iter()
        .filter_map(|e| e["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert_eq!(streamed, alone[0]);

    let ask = |i: usize| answer(if i % 2 == 0 { "Hello!" } else { &long });
    let together: Vec<String> = std::thread::scope(|scope| {
        let ask = &ask;
        let clients: Vec<_> = (0..6).map(|i| scope.spawn(move || ask(i))).collect();
        clients
            .into_iter()
            .map(|client| client.join().expect("no client panics"))
            .collect::<Result<_>>()
    })?;
    for (i, text) in together.iter().enumerate() {
        if i % 2 == 0 {
            assert_eq!(
                text, &alone[0],
                "a short prompt stays in full precision whoever runs beside it"
            );
        } else {
            assert!(!text.is_empty());
        }
    }
    Ok(())
}
