//! The real `mistralrs-server` on a loopback port.

use std::io::{BufRead, BufReader};
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
        .filter(|folder| !folder.as_os_str().is_empty())
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

    /// Start the server that has the toy backends, with a model and more arguments.
    pub fn start_toys(model: &Path, more: &[&str]) -> Result<Self> {
        let port = free_port()?;
        let mut command = Command::new(program("serve-toys")?);
        command
            .args(["-p", &port.to_string(), "--model"])
            .arg(model)
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

    /// The process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The port on the loopback device.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Whether the process runs.
    ///
    /// # Errors
    /// If the system does not tell.
    pub fn is_alive(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    /// GET a path; the answer's JSON.
    pub fn get(&self, path: &str) -> Result<Value> {
        expect_ok(self.get_any(path)?)
    }

    /// POST JSON to a path; the answer's JSON.
    pub fn post(&self, path: &str, body: &Value) -> Result<Value> {
        expect_ok(self.post_any(path, body)?)
    }

    /// GET a path; status and JSON, or text as JSON.
    pub fn get_any(&self, path: &str) -> Result<(u16, Value)> {
        status_and_json(agent().get(self.url(path)).call()?)
    }

    /// POST JSON to a path; status and JSON, or text as JSON.
    pub fn post_any(&self, path: &str, body: &Value) -> Result<(u16, Value)> {
        status_and_json(agent().post(self.url(path)).send_json(body)?)
    }

    /// POST bytes that may be no JSON; status and JSON, or text as JSON.
    pub fn post_bytes(&self, path: &str, body: &[u8]) -> Result<(u16, Value)> {
        let request = agent()
            .post(self.url(path))
            .content_type("application/json");
        status_and_json(request.send(body)?)
    }

    /// POST JSON to a path and collect the streamed events.
    pub fn stream(&self, path: &str, body: &Value) -> Result<Vec<Value>> {
        self.events(path, body)?.collect()
    }

    /// POST JSON to a path; the streamed events as they come. To drop them is to hang up.
    pub fn events(
        &self,
        path: &str,
        body: &Value,
    ) -> Result<impl Iterator<Item = Result<Value>> + use<>> {
        let mut answer = agent().post(self.url(path)).send_json(body)?;
        if answer.status() != 200 {
            bail!(
                "status {}: {}",
                answer.status(),
                answer.body_mut().read_to_string()?
            );
        }
        let lines = BufReader::new(answer.into_body().into_reader()).lines();
        let event = |line: std::io::Result<String>| match line {
            Ok(line) => {
                let event = line.strip_prefix("data: ").map(str::to_owned);
                event.map(|event| serde_json::from_str(&event).with_context(|| event.clone()))
            }
            Err(error) => Some(Err(error.into())),
        };
        let is_more =
            |line: &std::io::Result<String>| !matches!(line, Ok(line) if line == "data: [DONE]");
        Ok(lines.take_while(is_more).filter_map(event))
    }
}

/// How long any answer may take: longer is a hang.
const HANG: Duration = Duration::from_secs(300);

fn agent() -> ureq::Agent {
    let config = ureq::Agent::config_builder()
        .timeout_global(Some(HANG))
        .http_status_as_error(false);
    config.build().into()
}

fn status_and_json(mut answer: ureq::http::Response<ureq::Body>) -> Result<(u16, Value)> {
    let text = answer.body_mut().read_to_string()?;
    let json = serde_json::from_str(&text).unwrap_or(Value::String(text));
    Ok((answer.status().as_u16(), json))
}

fn expect_ok((status, json): (u16, Value)) -> Result<Value> {
    if status != 200 {
        bail!("status {status}: {json}");
    }
    Ok(json)
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
