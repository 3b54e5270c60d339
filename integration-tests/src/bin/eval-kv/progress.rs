//! How far a run is, on one line of standard error.

use std::io::{IsTerminal, Write};
use std::time::Instant;

/// Counts steps.
pub struct Progress {
    what: &'static str,
    steps: usize,
    start: Instant,
}

impl Progress {
    pub fn new(what: &'static str, steps: usize) -> Self {
        Self {
            what,
            steps,
            start: Instant::now(),
        }
    }

    /// `done` steps are done.
    pub fn at(&self, done: usize) {
        if !std::io::stderr().is_terminal() || !(done.is_multiple_of(16) || done == self.steps) {
            return;
        }
        let left = self.start.elapsed().as_secs_f64() / done.max(1) as f64;
        let left = left * self.steps.saturating_sub(done) as f64;
        let (what, steps) = (self.what, self.steps);
        eprint!("\r  {what}: {done} of {steps}, {left:.0} s left    ");
        if done == self.steps {
            eprintln!();
        }
        let _ = std::io::stderr().flush();
    }
}
