//! The one way this tool talks to git: hermetic (nobody's configuration, hooks or locale), quiet, and an
//! error is git's own words.

use std::ffi::OsStr;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{bail, Context, Result};

/// Variables by which a caller (a hook, a rebase) would point git at another repository.
const LEAKS: [&str; 4] = [
    "GIT_INDEX_FILE",
    "GIT_PREFIX",
    "GIT_OBJECT_DIRECTORY",
    "GIT_COMMON_DIR",
];

/// A date for the commits that `cargo setup` makes, so that their ids are a function of their content.
pub const SETUP_DATE: &str = "2006-07-24T01:21:28Z";

/// A repository's work tree, and git to run in it.
pub struct Git {
    dir: PathBuf,
    date: Option<&'static str>,
}

impl Git {
    /// Runs git in `dir`.
    pub fn at(dir: &Path) -> Self {
        Self {
            dir: dir.to_path_buf(),
            date: None,
        }
    }

    /// The same, with every new commit dated `date`.
    pub fn dated(dir: &Path, date: &'static str) -> Self {
        Self {
            dir: dir.to_path_buf(),
            date: Some(date),
        }
    }

    /// Runs git and returns its standard output.
    pub fn out<A: AsRef<OsStr>>(&self, args: &[A]) -> Result<String> {
        self.pipe(args, "")
    }

    /// Runs git for one short answer, trimmed.
    pub fn line<A: AsRef<OsStr>>(&self, args: &[A]) -> Result<String> {
        Ok(self.out(args)?.trim().to_string())
    }

    /// Whether git exits with success.
    pub fn ok<A: AsRef<OsStr>>(&self, args: &[A]) -> bool {
        self.out(args).is_ok()
    }

    /// Runs git with `input` on its standard input.
    pub fn pipe<A: AsRef<OsStr>>(&self, args: &[A], input: &str) -> Result<String> {
        let mut child = self
            .command(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("git is needed and could not be started: is it installed and on PATH?")?;
        let mut stdin = child.stdin.take().context("git's standard input")?;
        let input = input.to_string();
        let writer = std::thread::spawn(move || stdin.write_all(input.as_bytes()));
        let output = child.wait_with_output()?;
        let written = writer.join().expect("the writer does not panic");
        if !output.status.success() {
            let args: Vec<_> = args.iter().map(|a| a.as_ref().to_string_lossy()).collect();
            bail!(
                "`git {}` failed in {}:\n{}",
                args.join(" "),
                self.dir.display(),
                String::from_utf8_lossy(&output.stderr).trim_end()
            );
        }
        written.context("writing to git")?;
        String::from_utf8(output.stdout).context("git answered in something else than UTF-8")
    }

    fn command<A: AsRef<OsStr>>(&self, args: &[A]) -> Command {
        let mut git = Command::new("git");
        for leak in LEAKS {
            git.env_remove(leak);
        }
        // Named outright: were the host's repository damaged, git would look upward and find the checkout's.
        git.current_dir(&self.dir)
            .env("GIT_DIR", self.dir.join(".git"))
            .env("GIT_WORK_TREE", &self.dir)
            .env("GIT_CONFIG_GLOBAL", null_device())
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .env("GIT_TERMINAL_PROMPT", "0")
            .env("GIT_EDITOR", "true")
            .env("GIT_SEQUENCE_EDITOR", "true")
            .env("LC_ALL", "C")
            .args(["-c", "user.name=cargo setup"])
            .args(["-c", "user.email=setup@localhost"])
            .args(["-c", "safe.directory=*"])
            .args(["-c", "core.autocrlf=false"])
            .args(["-c", "core.hooksPath=/dev/null"])
            .args(["-c", "gc.auto=0"])
            .args(args);
        if let Some(date) = self.date {
            git.env("GIT_AUTHOR_DATE", date)
                .env("GIT_COMMITTER_DATE", date);
        }
        git
    }
}

fn null_device() -> &'static str {
    if cfg!(windows) {
        "NUL"
    } else {
        "/dev/null"
    }
}
