//! What ends a load or a comparison before its end, and command lines of servers.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use clap::Parser;
use serde_json::Value;

use super::double::{choice, serve, settings};
use crate::args::{Cli, Compare, Task};
use crate::compare::{arguments, compare};
use crate::load::run;
use crate::measured::measure;
use crate::plan::Load;

fn comparison(words: &[&str]) -> Box<Compare> {
    let words = [&["kv-load", "compare"], words].concat();
    match Cli::try_parse_from(words).unwrap().task {
        Task::Compare(args) => args,
        _ => unreachable!(),
    }
}

#[test]
fn at_the_limit_requests_are_cut_and_told() {
    let url = serve(|asked, wire| {
        if asked.path != "/v1/completions" {
            return wire.put("404 Not Found", "no");
        }
        wire.stream();
        wire.event(&choice(" a", None));
        // Until the client has gone.
        std::thread::sleep(Duration::from_secs(60));
    });
    let mut settings = settings(&url);
    settings.client.deadline = Some(Instant::now() + Duration::from_millis(300));
    let load: Load = "closed:2:5:8/4".parse().unwrap();
    let m = measure(&load, &run(&settings, &load).unwrap(), false);
    assert_eq!((m.answered, m.failed, m.cut), (0, 5, 5));
    assert_eq!(
        m.errors.len(),
        2,
        "two were cut, three not sent: {:?}",
        m.errors
    );
    assert!(
        m.errors
            .iter()
            .all(|error| error.contains("the time limit was reached")),
        "{:?}",
        m.errors
    );
    assert!(m.seconds < 30.0);
}

#[test]
fn the_command_line_names_model_cache_and_budget() {
    let loads = ["--load", "batch:8x64+8", "closed:12:20:chat"];
    let args = [
        "--server",
        "a=x",
        "--model-args",
        "-m DIR --isq q8_0",
        "--budget",
        "512",
    ];
    let args = comparison(&[&args[..], &loads[..]].concat());
    let lines = ["host", "ott:4bit"].map(|cache| arguments(&args, cache).join(" "));
    insta::assert_snapshot!(lines.join("\n"));
    let more = "-m DIR --prefix-cache-n 16";
    let open = comparison(&[
        "--server",
        "a=x",
        "--model-args",
        more,
        "--load",
        "open:1:5:chat",
    ]);
    insta::assert_snapshot!(arguments(&open, "ott").join(" "));
}

fn script(folder: &Path, text: &str) -> String {
    let path = folder.join("server.sh");
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    format!("broken={}", path.display())
}

/// One test, since there is one server at a time: one that ends, and one that never gets ready and is killed.
#[test]
fn a_server_that_does_not_start_is_a_row_that_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let (json, logs) = (folder.path().join("rows.json"), folder.path().join("logs"));
    let files = [
        "--json",
        json.to_str().unwrap(),
        "--logs",
        logs.to_str().unwrap(),
    ];
    let words = "--load batch:2x8+4 open:9:3:8/2 --cache host --model-args -m";
    let common: Vec<&str> = words.split(' ').collect();
    let compared = |text: &str, more: &[&str]| -> (String, Vec<Value>) {
        let server = script(folder.path(), text);
        let args = comparison(&[&["--server", &server], &common[..], &files[..], more].concat());
        let error = format!("{:#}", compare(&args).unwrap_err());
        (
            error,
            serde_json::from_slice(&fs::read(&json).unwrap()).unwrap(),
        )
    };
    let (error, rows) = compared("#!/bin/sh\necho 'there is no model' >&2\nexit 3\n", &[]);
    assert!(
        error.starts_with("2 of 2 loads brought no answer"),
        "{error}"
    );
    for (row, load) in rows.iter().zip(["batch:2x8+4", "open:9:3:8/2"]) {
        assert_eq!(
            (&row["load"], &row["measured"]),
            (&load.into(), &Value::Null)
        );
        let why = row["not_run"].as_str().unwrap();
        assert!(
            why.contains("exit status: 3") && why.ends_with("there is no model"),
            "{why}"
        );
    }
    let pid = folder.path().join("pid");
    let sleeps = format!("#!/bin/sh\necho $$ > {}\nexec sleep 60\n", pid.display());
    let (_, rows) = compared(&sleeps, &["--limit", "1"]);
    assert_eq!(rows.len(), 2);
    assert!(
        rows[0]["not_run"]
            .as_str()
            .unwrap()
            .contains("the time limit was reached"),
        "{rows:?}"
    );
    let pid = fs::read_to_string(pid).unwrap();
    assert!(
        !Path::new(&format!("/proc/{}", pid.trim())).exists(),
        "it still runs"
    );
}

#[test]
fn a_text_that_is_too_short_is_refused_before_anything_is_asked() {
    let asked = std::sync::Arc::new(AtomicUsize::new(0));
    let seen = asked.clone();
    let url = serve(move |_, wire| {
        seen.fetch_add(1, SeqCst);
        wire.tokens(1);
    });
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), "only three words").unwrap();
    let mut settings = settings(&url);
    settings.prompts = crate::prompt::Prompts::text(file.path(), 1, 0).unwrap();
    assert!(run(&settings, &"closed:1:3:8/4".parse().unwrap()).is_err());
    assert_eq!(asked.load(SeqCst), 0);
}
