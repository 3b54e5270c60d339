//! The real `mistralrs-server` on a loopback port.

use std::io::{BufRead, BufReader, Read};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use serde_json::Value;

/// How long loading a small model may take on a busy machine.
const READY: Duration = Duration::from_secs(120);

/// A program of the patched host, beside the running one.
pub fn program(name: &str) -> Result<PathBuf> {
    let exe = std::env::current_exe()?;
    let release = exe
        .ancestors()
        .find(|dir| dir.ends_with("release"))
        .context("built by cargo")?;
    let path = release.join(format!("{name}{}", std::env::consts::EXE_SUFFIX));
    if !path.exists() {
        bail!("{} is not built: run `cargo verify`", path.display());
    }
    Ok(path)
}

/// A port of this machine that nobody listens on.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// Arguments that load a GGUF file offline, before any others.
pub fn gguf_args(path: &Path) -> Vec<String> {
    let folder = path
        .parent()
        .unwrap_or(Path::new("."))
        .to_string_lossy()
        .into_owned();
    let file = path
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    ["--cpu", "--format", "gguf", "-m", &folder, "-f", &file]
        .map(String::from)
        .to_vec()
}

/// A running server; killed when dropped.
pub struct Server {
    child: Child,
    port: u16,
}

impl Server {
    /// Start `mistralrs-server` with a model and more arguments, and wait until it answers.
    pub fn start(model: &Path, more: &[&str]) -> Result<Self> {
        let port = free_port()?;
        let mut command = Command::new(program("mistralrs-server")?);
        command
            .args(["--token-source", "none", "--host", "127.0.0.1"])
            .args(["-p", &port.to_string()])
            .args(gguf_args(model))
            .args(more);
        Self::run(command, port)
    }

    /// Start a server that will listen on `port`, and wait until it answers.
    pub fn run(mut command: Command, port: u16) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let start = Instant::now();
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            if let Some(status) = child.try_wait()? {
                bail!("the server ended before it was ready ({status})");
            }
            if start.elapsed() > READY {
                let _ = child.kill();
                bail!("the server was not ready after {READY:?}");
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(Self { child, port })
    }

    /// GET a path; the answer's JSON.
    pub fn get(&self, path: &str) -> Result<Value> {
        let url = format!("http://127.0.0.1:{}{path}", self.port);
        Ok(ureq::get(&url).call()?.body_mut().read_json()?)
    }

    /// POST JSON to a path; the answer's JSON.
    pub fn post(&self, path: &str, body: &Value) -> Result<Value> {
        let url = format!("http://127.0.0.1:{}{path}", self.port);
        Ok(ureq::post(&url).send_json(body)?.body_mut().read_json()?)
    }

    /// POST JSON to a path and collect the streamed events.
    pub fn stream(&self, path: &str, body: &Value) -> Result<Vec<Value>> {
        let url = format!("http://127.0.0.1:{}{path}", self.port);
        let reader: Box<dyn Read> =
            Box::new(ureq::post(&url).send_json(body)?.into_body().into_reader());
        let mut events = Vec::new();
        for line in BufReader::new(reader).lines() {
            match line?.strip_prefix("data: ") {
                Some("[DONE]") => break,
                Some(event) => events.push(serde_json::from_str(event)?),
                None => {}
            }
        }
        Ok(events)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
