//! What is printed and written, of answers whose times are set.

use clap::CommandFactory;

use crate::args::Cli;
use crate::client::Answer;
use crate::compare::Row;
use crate::load::Record;
use crate::measured::{measure, Measured};
use crate::plan::Load;
use crate::plot::distributions;
use crate::ratios;
use crate::table::report;
use crate::watch::{Sample, Watched};

/// Sent a second late, a token each half second from 2 s after the planned arrival on.
fn answer(planned: f64, tokens: usize) -> Answer {
    let events: Vec<f64> = (0..tokens)
        .map(|i| planned + 2.0 + 0.5 * i as f64)
        .collect();
    Answer {
        planned,
        sent: planned + 1.0,
        end: events[tokens - 1],
        events,
        usage: None,
        finish: Some("length".to_owned()),
        error: None,
    }
}

fn record(answers: Vec<Answer>) -> Record {
    let sample = |bytes_held, free, preempted| Sample {
        bytes_held,
        blocks_used: 10.0 - free,
        blocks: 10.0,
        tokens: 100.0,
        preempted,
    };
    let mib = f64::from(1 << 20);
    let samples = vec![
        sample(mib, 10.0, 2.0),
        sample(3.0 * mib, 2.0, 2.0),
        sample(2.0 * mib, 4.0, 3.0),
        sample(mib, 10.0, 5.0),
    ];
    let watched = Watched {
        samples,
        setting: Some("k_bits=2,v_bits=2".to_owned()),
        kv_cache: vec![0.001, 0.002, 0.001, 0.004],
        metrics: vec![0.002; 4],
        errors: Vec::new(),
    };
    Record {
        answers,
        watched: Some(watched),
    }
}

fn open() -> Measured {
    let load: Load = "open:1:4:chat".parse().unwrap();
    let told = Answer {
        // Two tokens in each event.
        usage: Some((30, 8)),
        ..answer(1.0, 4)
    };
    let broken = Answer {
        finish: None,
        error: Some("error in the stream: the step failed".to_owned()),
        ..answer(2.0, 2)
    };
    let refused = Answer::failed(3.0, 3.25, "status 422: too long".to_owned());
    measure(
        &load,
        &record(vec![answer(0.0, 3), told, broken, refused]),
        true,
    )
}

fn batch(tokens: [usize; 2]) -> Measured {
    let load: Load = "batch:2x16+4".parse().unwrap();
    measure(
        &load,
        &record(vec![answer(0.0, tokens[0]), answer(2.0, tokens[1])]),
        false,
    )
}

#[test]
fn latencies_count_from_the_planned_arrival() {
    let m = open();
    // A second late, and a second until the first token: two.
    let first = m.first_token_ms.unwrap();
    assert_eq!((first.count, first.p50, first.max), (2, 2000.0, 2000.0));
    let whole = m.whole_answer_ms.unwrap();
    assert_eq!((whole.p50, whole.max), (3000.0, 3500.0));
    assert_eq!(m.sent_late_ms.unwrap().max, 1000.0);
    // 1 s over two tokens, and 1.5 s over the six after the first event.
    let per_token = m.per_token_ms.unwrap();
    assert_eq!((per_token.p50, per_token.max), (250.0, 500.0));
    assert_eq!(m.seconds, 4.5);
    assert_eq!(m.output_tokens, 3 + 8 + 2);
}

#[test]
fn a_batch_is_measured_between_the_last_start_and_the_first_end() {
    // 2 to 6.5 s, and 4 to 7.5 s: 2.5 s, with five tokens of each.
    let decoding = batch([10, 8]).decoding.unwrap();
    assert_eq!(
        (
            decoding.seconds,
            decoding.tokens,
            decoding.tokens_per_second
        ),
        (Some(2.5), 10.0, Some(4.0))
    );
    assert_eq!(decoding.start_seconds, 3.0);
    // 2 to 3.5 s, and 4 to 7.5 s: never both.
    let decoding = batch([4, 8]).decoding.unwrap();
    assert_eq!(decoding.tokens_per_second, None);
    insta::assert_snapshot!(decoding.note.unwrap());
}

#[test]
fn the_report_and_its_json() {
    insta::assert_snapshot!("report_open", report("open:1:4:chat, seed 1", &open()));
    insta::assert_snapshot!(
        "report_batch",
        report("batch:2x16+4, seed 1", &batch([10, 8]))
    );
    insta::assert_snapshot!("json_open", serde_json::to_string_pretty(&open()).unwrap());
    insta::assert_snapshot!(
        "json_batch",
        serde_json::to_string_pretty(&batch([4, 8])).unwrap()
    );
}

#[test]
fn the_comparison_has_ratios_of_each_load() {
    let row = |cache: &str, load: &str, repeat, measured| Row {
        server: "patched".to_owned(),
        cache: cache.to_owned(),
        load: load.to_owned(),
        repeat,
        ready_seconds: Some(1.0),
        measured,
        not_run: None,
    };
    let twice = |m: Measured| {
        let mut m = m;
        m.output_tokens_per_second *= 2.0;
        Some(m)
    };
    let cut = || {
        let mut m = open();
        m.cut = 1;
        m.output_tokens_per_second /= 8.0;
        Some(m)
    };
    let not_run = Row {
        not_run: Some("not run: the time limit was reached".to_owned()),
        ..row("ott", "batch:2x16+4", 0, None)
    };
    let rows = [
        row("host", "open:1:4:chat", 0, Some(open())),
        row("host", "batch:2x16+4", 0, Some(batch([10, 8]))),
        row("ott", "open:1:4:chat", 0, twice(open())),
        not_run,
        row("host", "open:1:4:chat", 1, Some(open())),
        row("ott", "open:1:4:chat", 1, twice(open())),
        // Does not count.
        row("ott", "open:1:4:chat", 2, cut()),
    ];
    insta::assert_snapshot!(ratios::table(&rows));
}

#[test]
fn the_picture_has_a_line_for_each_name() {
    let mut lines = [
        ("a < b".to_owned(), vec![3.0, 1.0, 30.0]),
        ("c".to_owned(), vec![]),
    ];
    insta::assert_snapshot!(distributions("Shares", &mut lines));
}

#[test]
fn help() {
    let mut all = Cli::command();
    let mut text = all.render_long_help().to_string();
    for name in ["run", "model", "compare"] {
        let task = all.find_subcommand_mut(name).unwrap();
        text += &format!("\n## {name}\n\n{}", task.render_long_help());
    }
    insta::assert_snapshot!(text);
}
