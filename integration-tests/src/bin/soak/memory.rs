//! Memory of a process while it works.

use std::fmt;
use std::sync::mpsc::{channel, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

/// Watches a process from now on.
pub struct Memory {
    stop: Sender<()>,
    thread: JoinHandle<Vec<usize>>,
}

/// MiB of resident memory, in equal steps of time.
pub struct Curve(Vec<usize>);

impl Memory {
    /// Look every ten seconds.
    pub fn watch(pid: u32) -> Self {
        let (stop, stopped) = channel();
        let thread = std::thread::spawn(move || {
            let mut curve = vec![resident(pid)];
            while stopped.recv_timeout(Duration::from_secs(10)) == Err(RecvTimeoutError::Timeout) {
                curve.push(resident(pid));
            }
            curve.push(resident(pid));
            curve
        });
        Self { stop, thread }
    }

    /// What was seen.
    pub fn end(self) -> Curve {
        drop(self.stop);
        Curve(self.thread.join().unwrap_or_default())
    }
}

impl fmt::Display for Curve {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = |part: usize| {
            self.0
                .get(self.0.len().saturating_sub(1) * part / 8)
                .unwrap_or(&0)
        };
        write!(
            f,
            "resident, in eighths of the time: {:?} MiB",
            (0..=8).map(at).collect::<Vec<_>>()
        )
    }
}

/// MiB of memory of a process, as the system counts it; 0 if it does not tell.
fn resident(pid: u32) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<usize>().ok());
    kib.unwrap_or(0) / 1024
}
