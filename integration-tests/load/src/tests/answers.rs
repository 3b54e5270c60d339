//! What the client makes of streams.

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::json;

use super::double::{choice, serve, settings};
use crate::load::{run, Settings};
use crate::measured::{measure, Measured};
use crate::plan::{plan, Load};
use crate::stats::Spread;

fn measured(settings: &Settings, load: &str) -> Measured {
    let load: Load = load.parse().unwrap();
    measure(&load, &run(settings, &load).unwrap(), settings.scrape)
}

#[test]
fn a_batch_counts_the_tokens_while_all_decode() {
    let asked = Arc::new(Mutex::new(Vec::new()));
    let seen = asked.clone();
    // Every sequence goes on until all three have come.
    let started = Arc::new(AtomicUsize::new(0));
    let url = serve(move |asked, wire| {
        if asked.path != "/v1/completions" {
            return wire.put("404 Not Found", "no");
        }
        seen.lock().unwrap().push(asked.body.clone());
        let tokens = asked.body["max_tokens"].as_u64().unwrap();
        wire.stream();
        wire.event(&choice(" w9", None));
        started.fetch_add(1, SeqCst);
        while started.load(SeqCst) < 3 {
            std::thread::sleep(Duration::from_millis(1));
        }
        for _ in 1..tokens {
            std::thread::sleep(Duration::from_millis(5));
            wire.event(&choice(" w9", None));
        }
        wire.event(&choice("", Some("length")));
        wire.end();
    });
    let m = measured(&settings(&url), "batch:3x10+20");
    assert_eq!(
        (m.answered, m.failed, m.output_tokens),
        (3, 0, 28 + 24 + 20)
    );
    assert_eq!(m.finish_reasons, [("length".to_owned(), 3)].into());
    assert_eq!(m.tokens_counted_by, "events");
    let decoding = m.decoding.unwrap();
    // All of the shortest but its first, and at most as many more as others did meanwhile.
    assert!((19.0..=70.0).contains(&decoding.tokens), "{decoding:?}");
    assert!(decoding.seconds.unwrap() >= 19.0 * 0.005, "{decoding:?}");
    assert_eq!(decoding.note, None);
    assert!(m.cache.is_none());
    let asked = asked.lock().unwrap();
    let prompts: HashSet<&str> = asked
        .iter()
        .map(|body| body["prompt"].as_str().unwrap())
        .collect();
    assert_eq!(prompts.len(), 3);
    assert_eq!(asked[0]["temperature"], 0);
    assert_eq!(asked[0]["stream_options"]["include_usage"], true);
}

#[test]
fn sequences_that_never_decode_at_once_have_no_rate() {
    let url = serve(|_, wire| wire.tokens(3));
    // Each ends before the next one is asked.
    let mut settings = settings(&url);
    settings.stagger = 0;
    let decoding = measured(&settings, "batch:40x4+2").decoding.unwrap();
    assert_eq!(decoding.tokens_per_second, None, "{decoding:?}");
    assert!(decoding.note.unwrap().contains("raise --stagger"));
}

#[test]
fn the_servers_count_is_preferred() {
    // Two tokens an event, and a usage that says so.
    let usage = json!({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 10}});
    let url = serve(move |_, wire| {
        wire.stream();
        (0..5).for_each(|_| wire.event(&choice(" a b", None)));
        wire.event(&choice("", Some("stop")));
        wire.event(&usage.to_string());
        wire.end();
    });
    let m = measured(&settings(&url), "closed:2:4:8/10");
    assert_eq!((m.output_tokens, m.prompt_tokens), (40, Some(28)));
    assert_eq!(m.tokens_counted_by, "usage");
    assert_eq!(m.between_tokens_ms.unwrap().count, 4 * 4);
}

#[test]
fn chat_counts_what_brings_text() {
    let url = serve(|asked, wire| {
        assert_eq!(asked.path, "/v1/chat/completions");
        assert_eq!(asked.body["messages"][0]["role"], "user");
        assert!(asked.head.contains("Bearer secret"), "{}", asked.head);
        assert_eq!(asked.body["ignore_eos"], true);
        wire.stream();
        for (content, reason) in [("", None), ("a", None), ("b", Some("stop"))] {
            let delta = json!({"role": "assistant", "content": content});
            wire.event(
                &json!({"choices": [{"delta": delta, "finish_reason": reason}]}).to_string(),
            );
        }
        wire.end();
    });
    let mut settings = settings(&url);
    settings.client.chat = true;
    settings.client.key = Some("secret".to_owned());
    settings
        .client
        .more
        .insert("ignore_eos".to_owned(), json!(true));
    let m = measured(&settings, "closed:1:2:8/10");
    assert_eq!((m.failed, m.output_tokens), (0, 4), "{:?}", m.errors);
}

#[test]
fn every_failure_is_counted() {
    let number = AtomicUsize::new(0);
    let url = serve(move |asked, wire| {
        if asked.path != "/v1/completions" {
            return wire.put("404 Not Found", "no");
        }
        match number.fetch_add(1, SeqCst) {
            // As mistral.rs says it: in mid-stream, before [DONE].
            0 => {
                wire.stream();
                wire.event(&choice(" a", None));
                wire.event(
                    &json!({"error": {"message": "the step failed", "type": "server_error"}})
                        .to_string(),
                );
                wire.end();
            }
            1 => wire.put(
                "422 Unprocessable Entity",
                "{\"message\": \"the prompt is too long\"}",
            ),
            // Hangs up.
            2 => {
                wire.stream();
                wire.event(&choice(" a", None));
            }
            _ => wire.tokens(3),
        }
    });
    let m = measured(&settings(&url), "closed:1:5:8/4");
    assert_eq!((m.requests, m.answered, m.failed), (5, 2, 3));
    assert_eq!(m.errors[0], "error in the stream: the step failed");
    assert!(
        m.errors[1].starts_with("status 422: ") && m.errors[1].contains("too long"),
        "{:?}",
        m.errors
    );
    assert_eq!(m.errors.len(), 3);
    // What failed has no latency of an answer, but its tokens came.
    assert_eq!(m.whole_answer_ms.unwrap().count, 2);
    assert_eq!(m.output_tokens, 1 + 1 + 6);
}

#[test]
fn arrivals_do_not_wait_for_a_server_that_stalls() {
    let load: Load = "open:200:60:8/2".parse().unwrap();
    let arrivals: Vec<f64> = plan(&load, 1, 4).iter().map(|r| r.at).collect();
    let (came, here) = (AtomicUsize::new(0), arrivals.len());
    // Nobody is answered before all have come: a client that waits for answers would wait for ever.
    let url = serve(move |asked, wire| {
        if asked.path != "/v1/completions" {
            return wire.put("404 Not Found", "no");
        }
        came.fetch_add(1, SeqCst);
        while came.load(SeqCst) < here {
            std::thread::sleep(Duration::from_millis(1));
        }
        wire.tokens(2);
    });
    let m = measured(&settings(&url), "open:200:60:8/2");
    assert_eq!(m.answered, 60, "{:?}", m.errors);
    // So each waited until the last arrival, from its own.
    let last = arrivals[59];
    let mut least: Vec<f64> = arrivals.iter().map(|at| 1e3 * (last - at)).collect();
    let (found, least) = (m.first_token_ms.unwrap(), Spread::of(&mut least).unwrap());
    let pairs = [
        (found.p50, least.p50),
        (found.p95, least.p95),
        (found.p99, least.p99),
        (found.max, least.max),
    ];
    assert!(
        pairs.iter().all(|(found, least)| found >= least),
        "{pairs:?}"
    );
    assert!(least.p99 > 200.0 && m.seconds >= last - arrivals[0]);
}

#[test]
fn the_cache_is_watched_where_the_server_tells() {
    let looks = AtomicUsize::new(0);
    let url = serve(move |asked, wire| match asked.path.as_str() {
        "/v1/kv_cache" => {
            let look = looks.fetch_add(1, SeqCst);
            // Free before and after, full meanwhile.
            let free = if look == 1 { 2 } else { 10 };
            let cache = json!({"bytes_held": 1000, "blocks": 10, "free_blocks": free, "tokens": 5, "preempted": 3 + look.min(4), "setting": "s"});
            wire.put("200 OK", &json!({"data": [cache]}).to_string());
        }
        "/metrics" => wire.put("200 OK", "# EOF"),
        _ => {
            std::thread::sleep(Duration::from_millis(100));
            wire.tokens(2);
        }
    });
    let mut settings = settings(&url);
    settings.scrape = true;
    let m = measured(&settings, "closed:1:4:8/2");
    let cache = m.cache.unwrap();
    assert_eq!(
        (cache.bytes_held.peak, cache.bytes_held.mean),
        (1000.0, 1000.0)
    );
    assert_eq!((cache.blocks_used.peak, cache.blocks), (8.0, 10.0));
    assert!(cache.samples >= 3 && cache.preemptions >= 2.0, "{cache:?}");
    assert_eq!(cache.setting.as_deref(), Some("s"));
    let scrapes = m.scrapes.unwrap();
    assert_eq!(scrapes.metrics_ms.unwrap().count, cache.samples);
    assert_eq!(scrapes.kv_cache_ms.unwrap().count, cache.samples);
    assert_eq!(scrapes.failed, 0);
}
