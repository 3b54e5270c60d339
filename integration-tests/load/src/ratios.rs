//! The table at the end of a comparison.

use crate::compare::Row;
use crate::measured::Measured;
use crate::stats::{percentile, Spread};
use crate::table::{aligned, digits, mib};

const COLUMNS: [&str; 11] = [
    "load",
    "server",
    "cache",
    "tokens/s",
    "least to most",
    "ratio",
    "first token p50, p99 ms",
    "between tokens p50, p99 ms",
    "MiB held",
    "preemptions",
    "remarks",
];

/// Tokens per second of all sequences of a batch, of all answers in a loop. Nothing of a load that the time limit cut: it has no rate to compare.
fn rate(measured: &Measured) -> Option<f64> {
    if measured.cut > 0 {
        return None;
    }
    match &measured.decoding {
        Some(decoding) => decoding.tokens_per_second,
        None => Some(measured.output_tokens_per_second),
    }
}

/// One row for each load, server and cache, repeats together: the median, and the ratio to the first server and cache
/// of that load.
pub fn table(rows: &[Row]) -> String {
    let mut cells = vec![COLUMNS.map(str::to_owned).to_vec()];
    let mut keys: Vec<(&str, &str, &str)> = Vec::new();
    for row in rows {
        let key = (&*row.load, &*row.server, &*row.cache);
        if !keys.contains(&key) {
            keys.push(key);
        }
    }
    // By load, in the order in which they came.
    let loads: Vec<&str> = keys.iter().map(|key| key.0).collect();
    keys.sort_by_key(|key| loads.iter().position(|load| *load == key.0));
    let mut base: Option<(&str, Option<f64>)> = None;
    for (load, server, cache) in keys {
        let of = |row: &&Row| row.load == load && row.server == server && row.cache == cache;
        let rows: Vec<&Row> = rows.iter().filter(of).collect();
        let rates = Rates::of(&rows);
        if base.is_none_or(|(of, _)| of != load) {
            base = Some((load, rates.median));
        }
        let ratio = base.and_then(|(_, base)| Some(rates.median? / base?));
        let names = [load, server, cache].map(str::to_owned);
        cells.push([&names[..], &numbers(&rows, &rates, ratio)].concat());
    }
    // Remarks are long.
    aligned(COLUMNS.len() - 1, &cells)
}

/// Of the repeats of one row.
struct Rates {
    median: Option<f64>,
    range: Option<(f64, f64)>,
}

impl Rates {
    fn of(rows: &[&Row]) -> Self {
        let rates = rows.iter().filter_map(|row| rate(row.measured.as_ref()?));
        let mut rates: Vec<f64> = rates.collect();
        rates.sort_by(f64::total_cmp);
        Self {
            median: (!rates.is_empty()).then(|| percentile(&rates, 50)),
            range: rates.first().copied().zip(rates.last().copied()),
        }
    }
}

fn numbers(rows: &[&Row], rates: &Rates, ratio: Option<f64>) -> Vec<String> {
    let dash = || "-".to_owned();
    let measured: Vec<&Measured> = rows
        .iter()
        .filter_map(|row| row.measured.as_ref())
        .collect();
    // The worst of the repeats: nothing is averaged away.
    let worst = |spread: fn(&Measured) -> Option<Spread>| {
        let spreads: Vec<Spread> = measured.iter().filter_map(|m| spread(m)).collect();
        let most = |number: fn(&Spread) -> f64| spreads.iter().map(number).fold(0.0, f64::max);
        match spreads.is_empty() {
            true => dash(),
            false => format!("{}, {}", digits(most(|s| s.p50)), digits(most(|s| s.p99))),
        }
    };
    let cache = |number: fn(&Measured) -> Option<f64>| {
        measured.iter().filter_map(|m| number(m)).reduce(f64::max)
    };
    let held = cache(|m| Some(m.cache.as_ref()?.bytes_held.peak));
    let preempted = cache(|m| Some(m.cache.as_ref()?.preemptions));
    vec![
        rates.median.map_or_else(dash, digits),
        rates.range.map_or_else(dash, |(least, most)| {
            format!("{} to {}", digits(least), digits(most))
        }),
        ratio.map_or_else(dash, digits),
        worst(|m| m.first_token_ms),
        worst(|m| m.between_tokens_ms),
        held.map_or_else(dash, mib),
        preempted.map_or_else(dash, |n| n.to_string()),
        remarks(rows),
    ]
}

/// What went wrong, in few words.
fn remarks(rows: &[&Row]) -> String {
    let mut remarks: Vec<String> = Vec::new();
    for row in rows {
        remarks.extend(row.not_run.clone());
        let Some(measured) = &row.measured else {
            continue;
        };
        if measured.failed > 0 {
            remarks.push(format!(
                "{} of {} failed: {}",
                measured.failed,
                measured.requests,
                measured.errors.join("; ")
            ));
        } else if let Some(note) = measured.decoding.as_ref().and_then(|d| d.note.clone()) {
            remarks.push(note);
        }
    }
    remarks.dedup();
    let line = remarks.join("; ").replace('\n', " ");
    // The whole of it is in the JSON.
    match line.char_indices().nth(160) {
        Some((end, _)) => format!("{}...", &line[..end]),
        None => line,
    }
}
