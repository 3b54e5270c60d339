//! Tables on standard output.

use crate::measured::{Decoding, Held, Level, Measured};
use crate::stats::Spread;

const MIB: f64 = (1 << 20) as f64;

/// A number with about three digits.
pub fn digits(number: f64) -> String {
    match number.abs() {
        x if x >= 100.0 => format!("{number:.0}"),
        x if x >= 10.0 => format!("{number:.1}"),
        x if x >= 1.0 => format!("{number:.2}"),
        _ => format!("{number:.3}"),
    }
}

/// The same in MiB.
pub fn mib(bytes: f64) -> String {
    digits(bytes / MIB)
}

/// Rows with columns aligned: the first to the left, the others to the right. What follows `columns` columns is not
/// padded.
pub fn aligned(columns: usize, rows: &[Vec<String>]) -> String {
    let cell = |row: &[String], c: usize| row.get(c).cloned().unwrap_or_default();
    let width = |c: usize| rows.iter().map(|row| cell(row, c).chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|c| width(c).unwrap_or(0)).collect();
    let line = |row: &Vec<String>| {
        let mut line = format!("{:<w$}", cell(row, 0), w = widths[0]);
        for (c, w) in widths.iter().enumerate().skip(1) {
            line += &format!("  {:>w$}", cell(row, c));
        }
        for cell in row.iter().skip(columns) {
            line += &format!("  {cell}");
        }
        line.trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}

/// What one load measured, for people.
pub fn report(name: &str, measured: &Measured) -> String {
    let mut text = format!("{name}\n\n");
    for (what, value) in facts(measured) {
        text += &format!("{what:<16} {value}\n");
    }
    let row = |name: &str, spread: &Option<Spread>| {
        let numbers = |s: &Spread| [s.p50, s.p95, s.p99, s.max].map(digits).to_vec();
        let numbers = spread
            .as_ref()
            .map(numbers)
            .unwrap_or(vec!["-".to_owned(); 4]);
        [vec![name.to_owned()], numbers].concat()
    };
    let mut rows = vec![["milliseconds", "p50", "p95", "p99", "max"]
        .map(str::to_owned)
        .to_vec()];
    rows.push(row("first token", &measured.first_token_ms));
    rows.push(row("between tokens", &measured.between_tokens_ms));
    rows.push(row("per token", &measured.per_token_ms));
    rows.push(row("whole answer", &measured.whole_answer_ms));
    rows.push(row("sent late", &measured.sent_late_ms));
    if let Some(scrapes) = &measured.scrapes {
        rows.push(row("/v1/kv_cache", &scrapes.kv_cache_ms));
        rows.push(row("/metrics", &scrapes.metrics_ms));
    }
    text + "\n" + &aligned(5, &rows)
}

/// What it is, and its value in words.
type Fact = (&'static str, String);

fn facts(m: &Measured) -> Vec<Fact> {
    let reasons: Vec<String> = m
        .finish_reasons
        .iter()
        .map(|(reason, n)| format!("{reason} {n}"))
        .collect();
    let mut facts = vec![
        (
            "requests",
            format!(
                "{}, {} answered, {} failed",
                m.requests, m.answered, m.failed
            ),
        ),
        ("ended by", reasons.join(", ")),
    ];
    facts.extend(m.errors.iter().map(|error| ("error", error.clone())));
    let prompt = m
        .prompt_tokens
        .map_or("not told".to_owned(), |n| n.to_string());
    let rate = digits(m.requests_per_second);
    facts.push(("requests/s", format!("{rate} over {} s", digits(m.seconds))));
    let tokens = format!(
        "{} ({} output tokens, by {})",
        digits(m.output_tokens_per_second),
        m.output_tokens,
        m.tokens_counted_by
    );
    facts.push(("output tokens/s", tokens));
    facts.push(("prompt tokens", prompt));
    facts.extend(m.decoding.iter().flat_map(decoding));
    facts.extend(m.cache.iter().flat_map(held));
    if let Some(scrapes) = m.scrapes.as_ref().filter(|s| s.failed > 0) {
        facts.push((
            "scrapes failed",
            format!("{}: {}", scrapes.failed, scrapes.errors.join("; ")),
        ));
    }
    facts
}

fn decoding(d: &Decoding) -> Vec<Fact> {
    let all = match (d.tokens_per_second, d.seconds) {
        (Some(rate), Some(seconds)) => {
            let (rate, tokens, seconds) = (digits(rate), digits(d.tokens), digits(seconds));
            let sequences = d.sequences;
            format!("{rate} tokens/s of {sequences} sequences, {tokens} tokens in {seconds} s")
        }
        _ => d.note.clone().unwrap_or_default(),
    };
    let start = digits(d.start_seconds);
    vec![
        ("all decoding", all),
        ("all started", format!("after {start} s")),
    ]
}

fn held(cache: &Held) -> Vec<Fact> {
    let of = |level: &Level, unit: fn(f64) -> String| {
        let (peak, mean) = (unit(level.peak), unit(level.mean));
        format!("{peak} at most, {mean} on average")
    };
    let blocks = of(&cache.blocks_used, digits);
    vec![
        ("KV cache", cache.setting.clone().unwrap_or_default()),
        ("MiB held", of(&cache.bytes_held, mib)),
        ("blocks in use", format!("{blocks} of {}", cache.blocks)),
        ("preemptions", cache.preemptions.to_string()),
    ]
}
