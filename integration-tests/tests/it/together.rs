//! Clients that ask at once: a common beginning is computed once, and who leaves takes the work along.

use std::io::Write;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use integration_tests::bed::at_rest;
use integration_tests::model::smollm2;
use integration_tests::server::Server;
use serde_json::{json, Value};

use crate::alone;

fn count(report: &Value, what: &str) -> Result<u64> {
    report[what].as_u64().with_context(|| what.to_owned())
}

/// Tokens of the prompts, as the answers count them.
fn prompt_tokens(answers: &[Value]) -> Result<u64> {
    let of = |answer: &Value| count(&answer["usage"], "prompt_tokens");
    answers.iter().map(of).sum()
}

/// Ask all, some at once; the answers.
fn ask_all(server: &Server, path: &str, asks: &[Value], at_once: usize) -> Result<Vec<Value>> {
    let mut answers = Vec::new();
    for asks in asks.chunks(at_once) {
        let together: Result<Vec<Value>> = std::thread::scope(|scope| {
            let ask = |body| scope.spawn(move || server.post(path, body));
            let clients: Vec<_> = asks.iter().map(ask).collect();
            let join = |c: std::thread::ScopedJoinHandle<'_, _>| c.join().expect("no panic");
            clients.into_iter().map(join).collect()
        });
        answers.extend(together?);
    }
    Ok(answers)
}

/// Six clients with one system prompt: at once they hit what they hit in turn, in no more time.
#[test]
fn a_system_prompt_is_computed_once() -> Result<()> {
    let _alone = alone();
    let options = ["--kv-cache", "ott", "--pa-context-len", "8192"];
    let server = Server::start(&smollm2()?, &options)?;
    let mut times = Vec::new();
    for (rules, at_once) in [("A", 6), ("B", 1), ("C", 6), ("D", 1)] {
        let rules = format!("Rules {rules}. {}", "harbour ship crane ".repeat(100));
        let ask = |i: usize| {
            let question = format!("Question: {}", "word ".repeat(3 + 2 * i));
            json!({"model": "default", "temperature": 0.0, "max_tokens": 4, "messages": [
                   {"role": "system", "content": rules}, {"role": "user", "content": question}]})
        };
        let before = at_rest(&server)?;
        let asks: Vec<Value> = (0..6).map(ask).collect();
        let start = Instant::now();
        let answers = ask_all(&server, "/v1/chat/completions", &asks, at_once)?;
        times.push(start.elapsed().as_secs_f32());
        let after = at_rest(&server)?;
        let grown = |what| Ok::<_, anyhow::Error>(count(&after, what)? - count(&before, what)?);
        // Two full blocks of the rules, for all but the first.
        assert_eq!(grown("hit_tokens")?, 5 * 256, "{at_once} at once");
        assert_eq!(grown("preempted")?, 0);
        assert_eq!(grown("sequences")?, 6);
        assert_eq!(grown("prompt_tokens")?, prompt_tokens(&answers)?);
    }
    println!("{times:.2?} s, at once and in turn, twice");
    let (at_once, in_turn) = (times[0] + times[2], times[1] + times[3]);
    assert!(at_once <= 1.1 * in_turn, "{times:?}");
    Ok(())
}

/// Prompts of unequal length in an empty pool: none is preempted, and each is counted once.
#[test]
fn prompts_that_wait_their_turn_are_not_preempted() -> Result<()> {
    let _alone = alone();
    let options = ["--kv-cache", "ott", "--pa-context-len", "8192"];
    let server = Server::start(&smollm2()?, &options)?;
    let before = at_rest(&server)?;
    let asks = [("one ", 20), ("two ", 40), ("six ", 60)].map(
        |(word, times)| json!({"model": "default", "prompt": word.repeat(times), "max_tokens": 2}),
    );
    let answers = ask_all(&server, "/v1/completions", &asks, 3)?;
    let after = at_rest(&server)?;
    let prompts = prompt_tokens(&answers)?;
    for (what, grown) in [
        ("preempted", 0),
        ("prompt_tokens", prompts),
        ("sequences", 3),
    ] {
        assert_eq!(
            count(&after, what)? - count(&before, what)?,
            grown,
            "{what}"
        );
    }
    Ok(())
}

/// Answers that outgrow the pool together: the younger is preempted and computed anew, and still counted once.
#[test]
fn a_preempted_sequence_is_counted_once() -> Result<()> {
    let _alone = alone();
    let options = ["--kv-cache", "ott:group=32", "--pa-context-len", "160"];
    let server = Server::start(&smollm2()?, &options)?;
    let before = at_rest(&server)?;
    let asks = ["one ", "two "].map(|word| {
        json!({"model": "default", "prompt": word.repeat(20), "max_tokens": 90, "temperature": 0.0})
    });
    let answers = ask_all(&server, "/v1/completions", &asks, 2)?;
    let after = at_rest(&server)?;
    let grown = |what| Ok::<_, anyhow::Error>(count(&after, what)? - count(&before, what)?);
    assert!(grown("preempted")? > 0, "{after}");
    assert_eq!(grown("sequences")?, 2);
    assert_eq!(grown("prompt_tokens")?, prompt_tokens(&answers)?);
    assert_eq!(grown("hit_tokens")?, 0);
    Ok(())
}

/// Send a request and do not wait for its answer.
fn leave(server: &Server, body: &Value) -> Result<TcpStream> {
    let mut client = TcpStream::connect(("127.0.0.1", server.port()))?;
    let body = body.to_string();
    let length = body.len();
    write!(
        client,
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
         Content-Length: {length}\r\n\r\n{body}"
    )?;
    Ok(client)
}

/// Clients that lose patience with answers of a minute, one that runs and one that waits: who comes next is served
/// at once.
#[test]
fn who_leaves_takes_the_work_along() -> Result<()> {
    let _alone = alone();
    for options in [&["--kv-cache", "ott", "--pa-context-len", "4096"][..], &[]] {
        let options = [options, &["--max-seqs", "1"]].concat();
        let server = Server::start(&smollm2()?, &options)?;
        let ask = |prompt: &str, tokens: usize| json!({"model": "default", "prompt": prompt, "max_tokens": tokens, "temperature": 0.0});
        let gone: Vec<_> = ["Once upon a time", "It was a dark night"]
            .iter()
            .map(|prompt| leave(&server, &ask(prompt, 3000)))
            .collect::<Result<_>>()?;
        std::thread::sleep(Duration::from_millis(700));
        drop(gone);
        let start = Instant::now();
        let done = server.post("/v1/completions", &ask("Hello", 4))?;
        let waited = start.elapsed();
        println!("waited {waited:.2?}");
        ensure!(waited < Duration::from_secs(8), "waited {waited:?}: {done}");
        at_rest(&server)?;
    }
    Ok(())
}
