//! `mistralrs serve` with one cache, until it is dropped.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};

use crate::client::Client;

/// The running one, for the handler of Ctrl-C. There is one at a time: two would share the machine.
static RUNNING: Mutex<Option<Child>> = Mutex::new(None);

const HOST: &str = "127.0.0.1";
/// Words of a server's log that tell how its cache was made.
const TOLD: [&str; 5] = [
    "KV-cache backend",
    "OTT cache",
    "on the GPU",
    "pool:",
    "besides",
];
/// Of a log that is told after a failure, in bytes.
const END: usize = 2000;

/// A running server; killed when dropped.
pub struct Server {
    client: Client,
    log: PathBuf,
    /// How long it took until it answered.
    pub ready: Duration,
}

/// Have a server killed when this program is interrupted or told to end.
///
/// # Errors
/// If the system does not allow it.
pub fn kill_on_signal() -> Result<()> {
    let handler = || {
        kill();
        std::process::exit(130);
    };
    ctrlc::set_handler(handler).context("catching Ctrl-C")
}

fn running() -> std::sync::MutexGuard<'static, Option<Child>> {
    // What a panic left behind is killed all the same.
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

fn kill() {
    if let Some(mut child) = running().take() {
        let _ = child.kill();
        let _ = child.wait();
    }
}

impl Server {
    /// Start a program with these arguments, its words going to `log`, and wait until it answers, for at most `patience`
    /// and not after `deadline`.
    ///
    /// # Errors
    /// If it does not get ready: with the end of its log.
    pub fn start(program: &Path, arguments: &[String], log: PathBuf, until: Until) -> Result<Self> {
        let port = TcpListener::bind((HOST, 0))?.local_addr()?.port();
        let mut command = Command::new(program);
        command
            .args(["--token-source", "none", "serve", "--host", HOST])
            .args(["-p", &port.to_string()])
            .args(arguments);
        if std::env::var_os("RUST_LOG").is_none() {
            command.env("RUST_LOG", "info");
        }
        let file = File::create(&log).with_context(|| format!("writing {}", log.display()))?;
        command
            .stdin(Stdio::null())
            .stderr(file.try_clone()?)
            .stdout(file);
        let child = command.spawn().with_context(|| {
            format!("starting {}: give NAME=PATH of a server", program.display())
        })?;
        *running() = Some(child);
        let start = Instant::now();
        let mut server = Self {
            client: Client::new(
                &format!("http://{HOST}:{port}/v1"),
                Duration::from_secs(600),
            )?,
            log,
            ready: Duration::ZERO,
        };
        while !server.client.is_up() {
            let status = match running().as_mut() {
                Some(child) => child.try_wait()?,
                None => bail!("the server was killed"),
            };
            if let Some(status) = status {
                bail!(
                    "the server ended before it was ready ({status}): {}",
                    server.end_of_log()
                );
            }
            if start.elapsed() > until.patience {
                bail!(
                    "the server was not ready after {:?}: {}",
                    until.patience,
                    server.end_of_log()
                );
            }
            if until.deadline.is_some_and(|end| Instant::now() > end) {
                bail!("the server was not ready when the time limit was reached");
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        server.ready = start.elapsed();
        Ok(server)
    }

    /// Who asks it.
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// What it said of its cache.
    pub fn told(&self) -> Vec<String> {
        let words = words(&self.log);
        let lines = words
            .lines()
            .filter(|line| TOLD.iter().any(|word| line.contains(word)));
        lines.map(|line| line.trim().to_owned()).collect()
    }

    /// Its last words.
    pub fn end_of_log(&self) -> String {
        let words = words(&self.log);
        let mut from = words.len().saturating_sub(END);
        while !words.is_char_boundary(from) {
            from += 1;
        }
        format!("{}: {}", self.log.display(), words[from..].trim())
    }

    /// Whether it has ended by itself, and how.
    pub fn ended(&self) -> Option<String> {
        let status = running().as_mut()?.try_wait().ok()??;
        Some(format!(
            "the server ended ({status}): {}",
            self.end_of_log()
        ))
    }
}

/// How long to wait for a server.
#[derive(Clone, Copy)]
pub struct Until {
    /// From its start.
    pub patience: Duration,
    /// No longer than this.
    pub deadline: Option<Instant>,
}

impl Drop for Server {
    fn drop(&mut self) {
        kill();
    }
}

/// A log without colors.
fn words(log: &Path) -> String {
    let bytes = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let mut parts = text.split('\u{1b}');
    let mut words = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        // `[1;31m` ends with its letter.
        words += part
            .split_once(|c: char| c.is_ascii_alphabetic())
            .map_or("", |(_, rest)| rest);
    }
    words
}
