//! Servers and caches in turn, with the same loads on each.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use serde::Serialize;

use crate::args::{seconds, Compare};
use crate::load::{self, Settings};
use crate::measured::{gaps, measure, Measured};
use crate::plan::Load;
use crate::plot::Line;
use crate::ratios;
use crate::server::{Server, Until};
use crate::write;

/// One load on one server with one cache, once.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The server's name.
    pub server: String,
    /// Its cache.
    pub cache: String,
    /// The load.
    pub load: String,
    /// From 0 on.
    pub repeat: usize,
    /// How long the server took until it answered.
    pub ready_seconds: Option<f64>,
    /// What was measured.
    pub measured: Option<Measured>,
    /// Why nothing was.
    pub not_run: Option<String>,
}

/// A server and one of its caches.
#[derive(Clone)]
struct Contender {
    server: String,
    program: PathBuf,
    cache: String,
}

/// What all contenders share.
struct Plan<'a> {
    args: &'a Compare,
    deadline: Option<Instant>,
    until: Duration,
    warm: Option<Load>,
    logs: PathBuf,
}

/// Sequences that run at once in an open loop, if the user does not say.
const OPEN: usize = 32;

/// Run all of it. Each row is printed as a line of JSON as soon as it is there; then the table.
///
/// # Errors
/// If options make no sense, files cannot be written, or a load brought no answer.
pub fn compare(args: &Compare) -> Result<()> {
    let contenders = contenders(args)?;
    let warm = match args.warm.as_str() {
        "none" => None,
        load => Some(load.parse()?),
    };
    let logs = match &args.logs {
        Some(folder) => folder.clone(),
        None => std::env::temp_dir().join(format!("kv-load-{}", std::process::id())),
    };
    fs::create_dir_all(&logs).with_context(|| format!("making {}", logs.display()))?;
    let plan = Plan {
        args,
        deadline: args.asking.deadline()?,
        until: seconds("--ready", args.ready)?,
        warm,
        logs,
    };
    let (mut rows, mut lines) = (Vec::new(), Vec::new());
    for repeat in 0..args.repeats.max(1) {
        for contender in &contenders {
            plan.contend(contender, repeat, &mut rows, &mut lines)?;
        }
    }
    println!("\n{}", ratios::table(&rows));
    if let Some(path) = &args.asking.json {
        write(path, &serde_json::to_string_pretty(&rows)?)?;
    }
    if let Some(path) = &args.asking.plot {
        let svg = crate::plot::distributions(
            "Share of the times between tokens that are no longer",
            &mut lines,
        );
        write(path, &svg)?;
    }
    let without = rows
        .iter()
        .filter(|row| row.measured.as_ref().is_none_or(|m| m.answered == 0))
        .count();
    if without == 0 && args.logs.is_none() {
        // Nobody will ask for them.
        let _ = fs::remove_dir_all(&plan.logs);
    }
    ensure!(
        without == 0,
        "{without} of {} loads brought no answer: the table says why; logs are in {}",
        rows.len(),
        plan.logs.display()
    );
    Ok(())
}

fn contenders(args: &Compare) -> Result<Vec<Contender>> {
    let mut all = Vec::new();
    for server in &args.servers {
        let (name, path) = server
            .split_once('=')
            .with_context(|| format!("`{server}` names no server: write NAME=PATH"))?;
        ensure!(
            Path::new(path).is_file(),
            "there is no program {path}: build the server `{name}` first"
        );
        for cache in &args.caches {
            all.push(Contender {
                server: name.to_owned(),
                program: fs::canonicalize(path)?,
                cache: cache.clone(),
            });
        }
    }
    Ok(all)
}

impl Plan<'_> {
    /// Start the contender and put all loads on it. A load that fails is a row.
    fn contend(
        &self,
        contender: &Contender,
        repeat: usize,
        rows: &mut Vec<Row>,
        lines: &mut Vec<Line>,
    ) -> Result<()> {
        let mut row = Row {
            server: contender.server.clone(),
            cache: contender.cache.clone(),
            load: String::new(),
            repeat,
            ready_seconds: None,
            measured: None,
            not_run: None,
        };
        let mut put = |row: Row| -> Result<()> {
            println!("{}", serde_json::to_string(&row)?);
            rows.push(row);
            Ok(())
        };
        let started = self.start(contender, repeat);
        if let Ok(server) = &started {
            row.ready_seconds = Some(server.ready.as_secs_f64());
        }
        for (i, load) in self.args.loads.iter().enumerate() {
            row.load = load.to_string();
            let run = match &started {
                Ok(server) => self.load(server, load, i as u64 + 1),
                Err(error) => Err(anyhow::anyhow!("{error:#}")),
            };
            match run {
                Ok((measured, mut line)) => {
                    line.0 = format!("{} {} {load}", row.server, row.cache);
                    // Repeats are one line.
                    match lines.iter_mut().find(|(name, _)| *name == line.0) {
                        Some((_, numbers)) => numbers.append(&mut line.1),
                        None => lines.push(line),
                    }
                    let measured = Some(measured);
                    put(Row {
                        measured,
                        ..row.clone()
                    })?;
                }
                Err(error) => {
                    let not_run = Some(format!("{error:#}"));
                    put(Row {
                        not_run,
                        ..row.clone()
                    })?;
                }
            }
        }
        Ok(())
    }

    fn start(&self, contender: &Contender, repeat: usize) -> Result<Server> {
        self.in_time()?;
        let Contender {
            server,
            cache,
            program,
        } = contender;
        eprintln!("starting {server} with the cache {cache}");
        let name = format!("{server}-{cache}-{repeat}");
        let name = name.replace(|c: char| !c.is_ascii_alphanumeric(), "-");
        let until = Until {
            patience: self.until,
            deadline: self.deadline,
        };
        let log = self.logs.join(format!("{name}.log"));
        let server = Server::start(program, &arguments(self.args, cache), log, until)?;
        server
            .told()
            .iter()
            .for_each(|line| eprintln!("    {line}"));
        if let Some(warm) = &self.warm {
            let settings = self.settings(&server, 0)?;
            let record = load::run(&settings, warm)?;
            if let Some(error) = record.answers.iter().find_map(|a| a.error.as_ref()) {
                eprintln!("    the load before the first failed: {error}");
            }
        }
        Ok(server)
    }

    /// Loads on one server do not share prompts.
    fn settings(&self, server: &Server, number: u64) -> Result<Settings> {
        let mut settings = self.args.asking.settings(server.client(), self.deadline)?;
        settings.prompts = settings.prompts.reseeded(number);
        Ok(settings)
    }

    fn load(&self, server: &Server, load: &Load, number: u64) -> Result<(Measured, Line)> {
        self.in_time()?;
        if let Some(ended) = server.ended() {
            anyhow::bail!(ended);
        }
        let settings = self.settings(server, number)?;
        let record = load::run(&settings, load)?;
        let numbers = gaps(&record.answers).map(|s| s * 1e3).collect();
        Ok((
            measure(load, &record, settings.scrape),
            (String::new(), numbers),
        ))
    }

    fn in_time(&self) -> Result<()> {
        let reached = self.deadline.is_some_and(|end| Instant::now() >= end);
        ensure!(!reached, "not run: the time limit was reached");
        Ok(())
    }
}

/// The command line of a server after `serve` and its port.
pub fn arguments(args: &Compare, cache: &str) -> Vec<String> {
    let mut all = Vec::new();
    let mut add = |words: &[&str]| all.extend(words.iter().map(|word| (*word).to_owned()));
    if cache != "host" {
        add(&["--kv-cache", cache]);
    }
    let named = |flag: &str| args.model_args.split_whitespace().any(|word| word == flag);
    args.model_args
        .split_whitespace()
        .for_each(|word| add(&[word]));
    if !named("--prefix-cache-n") {
        add(&["--prefix-cache-n", "0"]);
    }
    if let Some(budget) = args.budget {
        add(&["--pa-memory-mb", &budget.to_string()]);
    }
    let most = args
        .loads
        .iter()
        .map(|load| load.at_once().unwrap_or(OPEN))
        .max();
    let most = args.max_seqs.or(most).unwrap_or(OPEN);
    add(&["--max-seqs", &most.to_string()]);
    all
}
