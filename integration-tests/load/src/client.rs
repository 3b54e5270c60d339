//! One request: what is sent, and when each part of the answer came.

use std::io::{BufRead, BufReader};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use serde_json::{json, Map, Value};

/// Where a server is and how it is asked.
#[derive(Clone)]
pub struct Client {
    /// Without a slash at the end; OpenAI's paths follow, such as `/completions`.
    url: String,
    /// The name of the model.
    pub model: String,
    /// Chat completions instead of completions.
    pub chat: bool,
    /// More fields of each request.
    pub more: Map<String, Value>,
    /// Sent as a bearer token.
    pub key: Option<String>,
    /// A request takes no longer.
    pub timeout: Duration,
    /// No request goes on after it.
    pub deadline: Option<Instant>,
    agent: ureq::Agent,
}

/// What became of one request. Times are seconds since the load began.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer {
    /// When the plan wanted it to be sent. Latencies count from here.
    pub planned: f64,
    /// When it was sent.
    pub sent: f64,
    /// When events with text came.
    pub events: Vec<f64>,
    /// When it ended.
    pub end: f64,
    /// Tokens of the prompt and of the answer, if the server told.
    pub usage: Option<(u64, u64)>,
    /// Why the answer ended, in the server's word.
    pub finish: Option<String>,
    /// Why there is none, or not all of it.
    pub error: Option<String>,
}

impl Answer {
    /// None, for this reason.
    pub fn failed(planned: f64, at: f64, error: String) -> Self {
        Self {
            planned,
            sent: at,
            end: at,
            error: Some(error),
            ..Self::default()
        }
    }
}

/// How the errors of requests end that had no time.
pub const LIMIT: &str = "the time limit was reached";
/// How long a GET of a few lines may take.
const SHORT: Duration = Duration::from_secs(30);
/// Longest part of a refusal that is kept, in characters.
const KEPT: usize = 300;

impl Client {
    /// Of the server whose OpenAI paths begin with `url`.
    ///
    /// # Errors
    /// If it is no address that this program can ask.
    pub fn new(url: &str, timeout: Duration) -> Result<Self> {
        ensure!(
            url.starts_with("http://"),
            "`{url}` is no address for this program: write http://HOST:PORT/v1 (there is no TLS in it)"
        );
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            // A request that meets a connection which the server is closing would be an error of ours.
            .max_idle_connections(0)
            .build();
        Ok(Self {
            url: url.trim_end_matches('/').to_owned(),
            model: "default".to_owned(),
            chat: false,
            more: Map::new(),
            key: None,
            timeout,
            deadline: None,
            agent: config.into(),
        })
    }

    /// The address of a path that is not OpenAI's, which stands beside `/v1`.
    fn beside(&self, path: &str) -> String {
        format!(
            "{}{path}",
            self.url.strip_suffix("/v1").unwrap_or(&self.url)
        )
    }

    /// The state of KV caches; `None` if the server has no such path.
    ///
    /// # Errors
    /// If there is no answer.
    pub fn kv_cache(&self) -> Result<Option<Value>> {
        let (status, text) = self.get(&format!("{}/kv_cache", self.url))?;
        match status {
            200 => Ok(Some(serde_json::from_str(&text)?)),
            _ => Ok(None),
        }
    }

    /// The page for Prometheus.
    ///
    /// # Errors
    /// If there is none.
    pub fn metrics(&self) -> Result<()> {
        let (status, text) = self.get(&self.beside("/metrics"))?;
        ensure!(status == 200, "status {status}: {}", cut(&text));
        Ok(())
    }

    /// Whether anything answers, whatever it says.
    pub fn is_up(&self) -> bool {
        self.get(&format!("{}/models", self.url)).is_ok()
    }

    fn get(&self, url: &str) -> Result<(u16, String)> {
        let mut request = self.agent.get(url);
        if let Some(key) = &self.key {
            request = request.header("Authorization", &format!("Bearer {key}"));
        }
        let limit = self.left()?.min(SHORT);
        let request = request.config().timeout_global(Some(limit)).build();
        let mut answer = request.call()?;
        let text = answer.body_mut().read_to_string()?;
        Ok((answer.status().as_u16(), text))
    }

    /// How long a request may take that begins now.
    fn left(&self) -> Result<Duration> {
        let left = self
            .deadline
            .map(|end| end.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            bail!("not sent: {LIMIT}");
        }
        Ok(left.map_or(self.timeout, |left| left.min(self.timeout)))
    }

    fn body(&self, prompt: &str, tokens: usize) -> Value {
        let mut body = json!({
            "model": self.model, "max_tokens": tokens, "temperature": 0, "stream": true,
            "stream_options": {"include_usage": true},
        });
        match self.chat {
            true => body["messages"] = json!([{"role": "user", "content": prompt}]),
            false => body["prompt"] = json!(prompt),
        }
        for (name, value) in &self.more {
            body[name] = value.clone();
        }
        body
    }

    /// What asks for `tokens` tokens after `prompt`.
    pub fn request(&self, prompt: &str, tokens: usize) -> Vec<u8> {
        self.body(prompt, tokens).to_string().into_bytes()
    }

    /// Send a request now and read the answer to its end. `first` is told at the first token, and dropped at the end;
    /// `token` is called for each event with text.
    pub fn ask(
        &self,
        request: &[u8],
        clock: &Clock,
        first: Option<Sender<()>>,
        token: &dyn Fn(),
    ) -> Answer {
        let sent = clock.now();
        let mut answer = Answer {
            planned: sent,
            sent,
            ..Answer::default()
        };
        let heard = |answer: &mut Answer| {
            answer.events.push(clock.now());
            token();
            if let (1, Some(first)) = (answer.events.len(), &first) {
                // Nobody waits any more if the load is over.
                let _ = first.send(());
            }
        };
        if let Err(error) = self.stream(request, &mut answer, heard) {
            answer.error = Some(self.why(&error));
        }
        answer.end = clock.now();
        answer
    }

    fn why(&self, error: &anyhow::Error) -> String {
        let limit = self.deadline.is_some_and(|end| Instant::now() >= end);
        match limit && !error.to_string().ends_with(LIMIT) {
            true => format!("cut: {LIMIT}"),
            false => format!("{error:#}"),
        }
    }

    fn stream(
        &self,
        request: &[u8],
        answer: &mut Answer,
        mut heard: impl FnMut(&mut Answer),
    ) -> Result<()> {
        let path = if self.chat {
            "/chat/completions"
        } else {
            "/completions"
        };
        let mut post = self.agent.post(format!("{}{path}", self.url));
        if let Some(key) = &self.key {
            post = post.header("Authorization", &format!("Bearer {key}"));
        }
        let post = post.content_type("application/json");
        let post = post.config().timeout_global(Some(self.left()?)).build();
        let mut response = post.send(request)?;
        if response.status() != 200 {
            let text = response.body_mut().read_to_string().unwrap_or_default();
            bail!("status {}: {}", response.status().as_u16(), cut(&text));
        }
        let mut done = false;
        for line in BufReader::new(response.into_body().into_reader()).lines() {
            // Comments keep the connection alive, empty lines end events.
            let line = line.context("reading the stream")?;
            let Some(data) = line.strip_prefix("data:").map(str::trim) else {
                continue;
            };
            if data == "[DONE]" {
                done = true;
                break;
            }
            let event = serde_json::from_str(data)
                .with_context(|| format!("an event is no JSON: {}", cut(data)))?;
            if event_of(&event, answer)? {
                heard(answer);
            }
        }
        ensure!(
            done || answer.finish.is_some(),
            "the stream broke off after {} events with text",
            answer.events.len()
        );
        Ok(())
    }
}

/// Take what an event tells; whether it brings text.
fn event_of(event: &Value, answer: &mut Answer) -> Result<bool> {
    if let Some(error) = event.get("error").filter(|error| !error.is_null()) {
        let message = error.get("message").and_then(Value::as_str);
        let text = message.map_or_else(|| error.to_string(), str::to_owned);
        bail!("error in the stream: {}", cut(&text));
    }
    let count = |name: &str| event["usage"][name].as_u64();
    if let (Some(prompt), Some(completion)) = (count("prompt_tokens"), count("completion_tokens")) {
        answer.usage = Some((prompt, completion));
    }
    let Some(choice) = event["choices"].get(0) else {
        return Ok(false);
    };
    if let Some(reason) = choice["finish_reason"].as_str() {
        answer.finish = Some(reason.to_owned());
    }
    let delta = &choice["delta"];
    let texts = [
        &choice["text"],
        &delta["content"],
        &delta["reasoning_content"],
    ];
    let has_text = texts
        .iter()
        .any(|text| text.as_str().is_some_and(|text| !text.is_empty()));
    Ok(has_text
        || delta["tool_calls"]
            .as_array()
            .is_some_and(|calls| !calls.is_empty()))
}

/// The first characters.
fn cut(text: &str) -> String {
    match text.char_indices().nth(KEPT) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

/// Seconds since a load began.
#[derive(Clone, Copy)]
pub struct Clock(Instant);

impl Clock {
    /// Begins now.
    pub fn new() -> Self {
        Self(Instant::now())
    }

    /// Seconds since then.
    pub fn now(&self) -> f64 {
        self.0.elapsed().as_secs_f64()
    }

    /// Sleep until so many seconds after it began.
    pub fn wait_until(&self, seconds: f64) {
        let left = seconds - self.now();
        if left > 0.0 {
            std::thread::sleep(Duration::from_secs_f64(left));
        }
    }
}
