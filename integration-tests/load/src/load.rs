//! A load is put on a server, each request on a thread of its own.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{channel, Receiver, RecvTimeoutError, Sender};
use std::thread::{Builder, Scope, ScopedJoinHandle};
use std::time::Duration;

use anyhow::Result;

use crate::client::{Answer, Client, Clock};
use crate::plan::{plan, Load, Planned};
use crate::prompt::Prompts;
use crate::watch::{before, watch, Watched};

/// How loads are put on a server.
pub struct Settings {
    /// Where, and how it is asked.
    pub client: Client,
    /// What it is asked, and the seed of everything.
    pub prompts: Prompts,
    /// Tokens more that a sequence of a batch is asked for, for each that starts after it.
    pub stagger: usize,
    /// Between looks at the cache.
    pub sample: Duration,
    /// Whether a look scrapes `/metrics` too, and all are timed.
    pub scrape: bool,
}

/// What came of a load.
#[derive(Default)]
pub struct Record {
    /// In the order of the plan.
    pub answers: Vec<Answer>,
    /// What the cache held meanwhile, if the server tells.
    pub watched: Option<Watched>,
}

/// Counts of requests and of events with text, for who waits.
#[derive(Default)]
struct Progress {
    sent: AtomicUsize,
    ended: AtomicUsize,
    failed: AtomicUsize,
    tokens: AtomicUsize,
}

/// What threads of a load share.
struct Run<'a> {
    settings: &'a Settings,
    clock: Clock,
    progress: Progress,
}

/// A request's thread is made so many seconds before it is sent, and makes its text meanwhile.
const LEAD: f64 = 0.1;
/// Bytes. There may be thousands of threads.
const STACK: usize = 512 << 10;

/// Put the load on the server, until every request has ended.
///
/// # Errors
/// If the prompts do not suffice, or threads cannot be made.
pub fn run(settings: &Settings, load: &Load) -> Result<Record> {
    let plan = plan(load, settings.prompts.seed(), settings.stagger);
    settings.prompts.suffice(plan.len())?;
    let watched = before(settings);
    let run = Run {
        settings,
        clock: Clock::new(),
        progress: Progress::default(),
    };
    let (run, requests) = (&run, plan.len());
    std::thread::scope(|scope| {
        // When these are dropped, who watches ends.
        let (stop_watch, watch_ends) = channel();
        let (stop_tell, tell_ends) = channel();
        let watcher = move || watched.map(|watched| watch(settings, watched, &watch_ends));
        let watcher = Builder::new().spawn_scoped(scope, watcher)?;
        Builder::new().spawn_scoped(scope, move || tell(run, requests, &tell_ends))?;
        let answers = match load {
            Load::Batch { at_once, .. } => batch(scope, run, &plan, *at_once),
            Load::Open { .. } => open(scope, run, &plan),
            Load::Closed { clients, .. } => closed(scope, run, &plan, *clients),
        };
        drop((stop_watch, stop_tell));
        let watched = watcher.join().unwrap_or_default();
        Ok(Record {
            answers: answers?,
            watched,
        })
    })
}

impl Run<'_> {
    /// Ask, when it is time.
    fn ask(&self, planned: &Planned, first: Option<Sender<()>>) -> Answer {
        let (client, prompts) = (&self.settings.client, &self.settings.prompts);
        let request = client.request(&prompts.of(planned.id, planned.depth), planned.tokens);
        self.clock.wait_until(planned.at);
        self.progress.sent.fetch_add(1, Relaxed);
        let token = || {
            self.progress.tokens.fetch_add(1, Relaxed);
        };
        let answer = client.ask(&request, &self.clock, first, &token);
        self.progress.ended.fetch_add(1, Relaxed);
        self.progress
            .failed
            .fetch_add(usize::from(answer.error.is_some()), Relaxed);
        answer
    }
}

type Asked<'scope> = ScopedJoinHandle<'scope, Answer>;

/// What a thread says of its request; a panic is an answer too, so that no request is dropped.
fn join(run: &Run, planned: f64, asked: Asked) -> Answer {
    let lost = |_| lost(planned, run.clock.now());
    asked.join().unwrap_or_else(lost)
}

/// The answer to a request whose thread panicked.
fn lost(planned: f64, end: f64) -> Answer {
    let words = "kv-load panicked: see its own words above";
    Answer::failed(planned, end, words.to_owned())
}

fn batch<'scope, 'env>(
    scope: &'scope Scope<'scope, 'env>,
    run: &'env Run,
    plan: &'env [Planned],
    at_once: bool,
) -> Result<Vec<Answer>> {
    let mut asked = Vec::new();
    for planned in plan {
        let (first, is_first) = channel();
        let thread = Builder::new().stack_size(STACK);
        asked.push(thread.spawn_scoped(scope, move || run.ask(planned, Some(first)))?);
        if !at_once {
            // An error says that it ended without a token: the next one starts all the same.
            let _ = is_first.recv();
        }
    }
    Ok(asked
        .into_iter()
        .map(|asked| join(run, 0.0, asked))
        .collect())
}

fn open<'scope, 'env>(
    scope: &'scope Scope<'scope, 'env>,
    run: &'env Run,
    plan: &'env [Planned],
) -> Result<Vec<Answer>> {
    let mut asked = Vec::new();
    for planned in plan {
        run.clock.wait_until(planned.at - LEAD);
        let thread = Builder::new().stack_size(STACK);
        asked.push(thread.spawn_scoped(scope, move || run.ask(planned, None))?);
    }
    let answer = |(asked, planned): (Asked, &Planned)| Answer {
        planned: planned.at,
        ..join(run, planned.at, asked)
    };
    Ok(asked.into_iter().zip(plan).map(answer).collect())
}

fn closed<'scope, 'env>(
    scope: &'scope Scope<'scope, 'env>,
    run: &'env Run,
    plan: &'env [Planned],
    clients: usize,
) -> Result<Vec<Answer>> {
    let (done, answers) = channel();
    let next = std::sync::Arc::new(AtomicUsize::new(0));
    for _ in 0..clients.min(plan.len()) {
        let (next, done) = (next.clone(), done.clone());
        let ask = move || {
            while let Some(planned) = plan.get(next.fetch_add(1, Relaxed)) {
                let _ = done.send((planned.id, run.ask(planned, None)));
            }
        };
        Builder::new().stack_size(STACK).spawn_scoped(scope, ask)?;
    }
    drop(done);
    let mut all: Vec<Answer> = plan.iter().map(|_| lost(0.0, 0.0)).collect();
    answers
        .iter()
        .for_each(|(id, answer): (usize, Answer)| all[id] = answer);
    Ok(all)
}

/// Tell who waits how far it is, on standard error.
fn tell(run: &Run, requests: usize, end: &Receiver<()>) {
    let terminal = std::io::stderr().is_terminal();
    let every = Duration::from_secs(if terminal { 1 } else { 10 });
    let mut before = (run.clock.now(), 0);
    while end.recv_timeout(every) == Err(RecvTimeoutError::Timeout) {
        let of = |count: &AtomicUsize| count.load(Relaxed);
        let p = &run.progress;
        let now = (run.clock.now(), of(&p.tokens));
        let rate = (now.1 - before.1) as f64 / (now.0 - before.0);
        before = now;
        let (sent, ended) = (of(&p.sent), of(&p.ended));
        let line = format!(
            "{:6.0} s: {sent} of {requests} sent, {} running, {} failed, {} tokens, {rate:.1} tokens/s now",
            now.0,
            sent.saturating_sub(ended),
            of(&p.failed),
            now.1
        );
        match terminal {
            true => eprint!("\r{line:<100}"),
            false => eprintln!("{line}"),
        }
    }
    if terminal {
        eprint!("\r{:<100}\r", "");
    }
}
