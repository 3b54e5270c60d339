//! A server that does what a test says, and streams as mistral.rs does.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{json, Value};

use crate::client::Client;
use crate::load::Settings;
use crate::prompt::Prompts;

/// What a client sent.
pub struct Asked {
    pub path: String,
    pub head: String,
    pub body: Value,
}

/// The other end of one request.
pub struct Wire(TcpStream);

impl Wire {
    /// A whole answer.
    pub fn put(&mut self, status: &str, body: &str) {
        let length = body.len();
        let text = format!(
            "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
        );
        let _ = self.0.write_all(text.as_bytes());
    }

    /// The head of a stream.
    pub fn stream(&mut self) {
        let head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
        let _ = self.0.write_all(head.as_bytes());
    }

    /// One event of a stream.
    pub fn event(&mut self, data: &str) {
        self.chunk(&format!("data: {data}\n\n"));
    }

    fn chunk(&mut self, text: &str) {
        let _ = self
            .0
            .write_all(format!("{:x}\r\n{text}\r\n", text.len()).as_bytes());
    }

    /// A stream of so many tokens, one an event, as mistral.rs sends it: a comment that keeps the connection alive, the
    /// reason in the last event with text, no usage.
    pub fn tokens(&mut self, count: usize) {
        self.stream();
        self.chunk(": keep-alive\n\n");
        for i in 0..count {
            let reason = (i + 1 == count).then_some("length");
            self.event(&choice(" w5", reason));
        }
        self.end();
    }

    /// The end of a stream.
    pub fn end(&mut self) {
        self.event("[DONE]");
        let _ = self.0.write_all(b"0\r\n\r\n");
    }
}

/// A chunk of a completion.
pub fn choice(text: &str, reason: Option<&str>) -> String {
    json!({"choices": [{"index": 0, "text": text, "finish_reason": reason}]}).to_string()
}

/// Start a server; its address. Each request is a thread, which runs `script`.
pub fn serve(script: impl Fn(&Asked, &mut Wire) + Send + Sync + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    let script = Arc::new(script);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let script = script.clone();
            std::thread::spawn(move || {
                if let Some(asked) = read(&stream) {
                    script(&asked, &mut Wire(stream));
                }
            });
        }
    });
    url
}

fn read(stream: &TcpStream) -> Option<Asked> {
    let mut reader = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head).ok()? == 0 {
            return None;
        }
    }
    let lower = head.to_lowercase();
    let length = lower
        .lines()
        .find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
    let mut body = vec![0; length.unwrap_or(0)];
    reader.read_exact(&mut body).ok()?;
    let path = head.split(' ').nth(1)?.to_owned();
    let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
    Some(Asked { path, head, body })
}

/// How tests ask: quick looks, a small vocabulary.
pub fn settings(url: &str) -> Settings {
    Settings {
        client: Client::new(url, Duration::from_secs(60)).unwrap(),
        prompts: Prompts::random(1000, 1, 0).unwrap(),
        stagger: 4,
        sample: Duration::from_millis(20),
        scrape: false,
    }
}
