//! `cargo doctor`: all that is needed to look into a problem, as text to copy.

use std::io::{Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::process::Command;
use std::time::Duration;

use anyhow::{ensure, Context, Result};

use crate::project::Project;

/// What a server tells of itself: its version and machine, its caches.
const PATHS: [&str; 2] = ["/v1/system/info", "/v1/kv_cache"];
/// A server that is busy answers late.
const PATIENCE: Duration = Duration::from_secs(10);

/// Print versions, machine and settings, and what the server at `address` (`HOST:PORT`) tells.
pub fn doctor(project: &Project, address: &str) -> Result<()> {
    println!("# ott-mistralrs");
    let root = project.root.to_string_lossy();
    let git = ["-C", &root, "describe", "--always", "--dirty", "--tags"];
    println!("revision: {}", words("git", &git));
    for crate_ in project.patched()? {
        println!("host: {} {}", crate_.name, crate_.version);
    }
    println!("compiler: {}", words("rustc", &["-V"]));
    println!("\n# Machine");
    println!("system: {}", words("uname", &["-srm"]));
    let cores = std::thread::available_parallelism().map_or(0, |n| n.get());
    println!("cores: {cores}");
    for (file, line) in [
        ("/proc/cpuinfo", "model name"),
        ("/proc/cpuinfo", "flags"),
        ("/proc/meminfo", "MemTotal"),
        ("/proc/meminfo", "MemAvailable"),
    ] {
        println!("{}", first_line(file, line));
    }
    println!("\n# Environment");
    for (name, value) in std::env::vars().filter(|(name, _)| ours(name)) {
        println!("{name}={value}");
    }
    println!("\n# Server at {address}");
    for path in PATHS {
        let answer = get(address, path).unwrap_or_else(|error| format!("no answer: {error:#}"));
        println!("{path}: {answer}");
    }
    println!(
        "\nAdd the command line, the start-up lines of the log that speak of the KV cache, and the request that went wrong."
    );
    Ok(())
}

/// Whether a variable changes what we do. Others are nobody's business.
fn ours(name: &str) -> bool {
    name.starts_with("OTT_") || name == "RUSTFLAGS" || name == "RAYON_NUM_THREADS"
}

/// What a program says, or that it does not.
fn words(program: &str, args: &[&str]) -> String {
    match Command::new(program).args(args).output() {
        Ok(output) if output.status.success() => {
            String::from_utf8_lossy(&output.stdout).trim().to_owned()
        }
        _ => format!("`{program}` does not tell"),
    }
}

/// The first line of a file that begins so.
fn first_line(file: &str, begin: &str) -> String {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with(begin));
    line.map_or_else(|| format!("{begin}: not told"), str::to_owned)
}

/// The body of what a server answers to GET.
fn get(address: &str, path: &str) -> Result<String> {
    let socket = address.to_socket_addrs()?.next();
    let socket = socket.context("an address is HOST:PORT")?;
    let mut stream = TcpStream::connect_timeout(&socket, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    // 1.0: the answer comes whole, and then the connection ends.
    let request = format!("GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP")?;
    let status = head.lines().next().unwrap_or_default();
    ensure!(status.contains(" 200"), "{status}: {body}");
    Ok(body.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    /// A server that gives one answer.
    fn answering(answer: &'static str) -> Result<String> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?.to_string();
        let server = std::thread::spawn(move || -> Result<()> {
            let (mut stream, _) = listener.accept()?;
            let (mut request, mut part) = (Vec::new(), [0; 512]);
            while !request.ends_with(b"\r\n\r\n") {
                let len = stream.read(&mut part)?;
                ensure!(len > 0, "half a request");
                request.extend_from_slice(&part[..len]);
            }
            ensure!(request.starts_with(b"GET /v1/kv_cache HTTP/1.0\r\n"));
            Ok(stream.write_all(answer.as_bytes())?)
        });
        let body = get(&address, "/v1/kv_cache");
        server.join().unwrap()?;
        body
    }

    #[test]
    fn a_server_is_asked() {
        let body = answering("HTTP/1.0 200 OK\r\na: b\r\n\r\n{\"data\": []}").unwrap();
        assert_eq!(body, "{\"data\": []}");
        let error = answering("HTTP/1.0 404 Not Found\r\n\r\nnone").unwrap_err();
        assert_eq!(error.to_string(), "HTTP/1.0 404 Not Found: none");
    }

    #[test]
    fn secrets_are_left_out() {
        assert!(ours("OTT_CPU") && ours("RUSTFLAGS"));
        assert!(!ours("HF_TOKEN") && !ours("HOME"));
    }
}
