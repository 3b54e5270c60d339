//! Tables, as text, Markdown and JSON.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use serde_json::{json, Value};

/// Measurements of one thing.
#[derive(Clone, Debug, Default)]
pub struct Samples(pub Vec<f64>);

impl Samples {
    /// Add a duration, in milliseconds.
    pub fn time(&mut self, time: Duration) {
        self.0.push(time.as_secs_f64() * 1e3);
    }

    fn sorted(&self) -> Vec<f64> {
        let mut all = self.0.clone();
        all.sort_by(f64::total_cmp);
        all
    }

    /// The middle one.
    pub fn median(&self) -> f64 {
        let all = self.sorted();
        all.get(all.len() / 2).copied().unwrap_or(f64::NAN)
    }

    /// Smallest and largest.
    pub fn range(&self) -> (f64, f64) {
        let all = self.sorted();
        let end = |x: Option<&f64>| x.copied().unwrap_or(f64::NAN);
        (end(all.first()), end(all.last()))
    }
}

/// A table: what the columns are, and rows of labels and numbers.
#[derive(Clone, Debug)]
pub struct Table {
    /// One sentence: what was compared, on what.
    pub title: String,
    /// Names of columns.
    pub columns: Vec<&'static str>,
    /// As many cells as columns.
    pub rows: Vec<Vec<Value>>,
}

impl Table {
    fn cells(&self) -> Vec<Vec<String>> {
        let text = |value: &Value| match value {
            Value::String(text) => text.clone(),
            Value::Number(n) if n.is_f64() => match n.as_f64().unwrap_or(f64::NAN) {
                x if x.abs() >= 100.0 => format!("{x:.0}"),
                x if x.abs() >= 10.0 => format!("{x:.1}"),
                x => format!("{x:.3}"),
            },
            Value::Null => "-".to_owned(),
            other => other.to_string(),
        };
        let head = self.columns.iter().map(|c| (*c).to_owned()).collect();
        let rows = self.rows.iter().map(|row| row.iter().map(text).collect());
        std::iter::once(head).chain(rows).collect()
    }

    /// As Markdown, with columns aligned.
    pub fn markdown(&self) -> String {
        let cells = self.cells();
        let width = |c: usize| cells.iter().map(|row| row[c].len()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..self.columns.len()).map(width).collect();
        let line = |row: &[String]| {
            let padded = row
                .iter()
                .zip(&widths)
                .map(|(cell, w)| format!("{cell:>w$}"));
            format!("| {} |\n", padded.collect::<Vec<_>>().join(" | "))
        };
        let rule: Vec<String> = widths
            .iter()
            .map(|w| format!("{}:", "-".repeat(w - 1)))
            .collect();
        let mut text = format!("{}\n\n{}{}", self.title, line(&cells[0]), line(&rule));
        cells[1..].iter().for_each(|row| text += &line(row));
        text
    }

    fn json(&self) -> Value {
        let rows = self.rows.iter().map(|row| {
            let named = self
                .columns
                .iter()
                .zip(row)
                .map(|(c, v)| ((*c).to_owned(), v.clone()));
            Value::Object(named.collect())
        });
        json!({"title": self.title, "rows": rows.collect::<Vec<_>>()})
    }
}

/// What was measured in this run, and on what.
pub struct Report {
    machine: String,
    tables: Vec<(&'static str, Table)>,
}

impl Report {
    /// Prints the machine's name.
    pub fn new() -> Self {
        let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let name = info.lines().find_map(|l| l.strip_prefix("model name"));
        let name = name.map_or(std::env::consts::ARCH, |n| {
            n.trim_start_matches([' ', '\t', ':'])
        });
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let machine = format!("{name}, {cores} cores");
        println!("Machine: {machine}\n");
        Self {
            machine,
            tables: Vec::new(),
        }
    }

    /// Print a table, and keep it.
    pub fn print(&mut self, name: &'static str, table: &Table) {
        println!("{}", table.markdown());
        self.tables.push((name, table.clone()));
    }

    /// Write all tables to `NAME.json` and `NAME.md`.
    pub fn write(&self, folder: &Path, name: &str) -> Result<()> {
        std::fs::create_dir_all(folder)?;
        let mut text = format!("Machine: {}\n", self.machine);
        let mut all = serde_json::Map::new();
        all.insert("machine".to_owned(), json!(self.machine));
        for (part, table) in &self.tables {
            text += &format!("\n{}", table.markdown());
            all.insert((*part).to_owned(), table.json());
        }
        std::fs::write(folder.join(format!("{name}.md")), text)?;
        let all = serde_json::to_string_pretty(&all)?;
        Ok(std::fs::write(folder.join(format!("{name}.json")), all)?)
    }
}
