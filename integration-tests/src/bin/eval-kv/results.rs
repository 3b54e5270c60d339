//! What was measured: kept as JSON as soon as it is there, shown as Markdown and as a plot.

use std::path::Path;

use anyhow::Result;
use integration_tests::report::Table;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::compare::Summary;
use crate::greedy::Greedy;
use crate::kept::{model_name, Kept};
use crate::needle::Needles;
use crate::{plot, Way};

/// What was asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Key {
    pub model: String,
    pub text: String,
    pub tokens: usize,
    /// `decode`, `pass`, `batch` or `prefix`.
    pub way: String,
    pub base: String,
    pub spec: String,
}

/// What came out.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Outcome {
    #[serde(flatten)]
    pub key: Key,
    /// Codes, scales and minima of a number.
    pub page_bits: f64,
    /// All that is held, over the text's numbers.
    pub stored_bits: Option<f64>,
    /// Traced tokens of each layer, over its kv heads.
    pub traced: Vec<usize>,
    pub seconds: f64,
    #[serde(flatten)]
    pub summary: Summary,
}

impl Outcome {
    pub fn key(model: &Path, text: &str, tokens: usize, way: Way, spec: &str, base: &str) -> Key {
        Key {
            model: model_name(model),
            text: text.to_owned(),
            tokens,
            way: format!("{way:?}").to_lowercase(),
            base: base.to_owned(),
            spec: spec.to_owned(),
        }
    }
}

/// All results of a folder.
pub struct Results(Kept<Outcome>);

impl Results {
    /// What earlier runs left in `folder`.
    pub fn open(folder: Option<&Path>) -> Result<Self> {
        Ok(Self(Kept::open(folder, "eval-kv.json")?))
    }

    pub fn has(&self, key: &Key) -> bool {
        self.0.all().iter().any(|outcome| outcome.key == *key)
    }

    /// Keep and write.
    pub fn add(&mut self, outcome: Outcome) -> Result<()> {
        let s = &outcome.summary;
        eprintln!(
            "  {}: divergence {:.4}, top-1 {:.1} %, perplexity {:.2} (x {:.4}), {:.2} bits, {:.0} s",
            outcome.key.spec, s.mean, s.top1 * 100.0, s.perplexity, s.ratio, outcome.page_bits, outcome.seconds
        );
        self.0.add(outcome)?;
        let all = self.0.all();
        self.0.write("eval-kv.md", &self.markdown())?;
        self.0.write("eval-kv.svg", &plot::bits(all))?;
        self.0
            .write("eval-kv-position.svg", &plot::positions(all))?;
        self.0.write("eval-kv-layers.svg", &plot::layers(all))
    }

    /// A table for each model, text, length and way.
    pub fn markdown(&self) -> String {
        let mut left: Vec<&Outcome> = self.0.all().iter().collect();
        let mut text = String::new();
        while let Some(first) = left.first() {
            let alike = |o: &&Outcome| {
                let spec = first.key.spec.clone();
                Key {
                    spec,
                    ..o.key.clone()
                } == first.key
            };
            let (rows, others) = left.iter().partition::<Vec<_>, _>(|o| alike(o));
            text += &table(&rows).markdown();
            text.push('\n');
            left = others;
        }
        text
    }
}

fn table(outcomes: &[&Outcome]) -> Table {
    let title = outcomes.first().map_or(String::new(), |o| {
        let Key {
            model,
            text,
            tokens,
            way,
            base,
            ..
        } = &o.key;
        format!(
            "{model}, {text}, {tokens} tokens, way `{way}`, against `{base}`; divergence in nats"
        )
    });
    let rows = outcomes.iter().map(|o| {
        let s = &o.summary;
        let number = |x: f64, digits: usize| json!(format!("{x:.digits$}"));
        let traced = match (o.traced.iter().max(), o.traced.iter().sum::<usize>()) {
            (Some(most), sum) if sum > 0 => {
                format!("{:.1}, {most}", sum as f64 / o.traced.len() as f64)
            }
            _ => "-".to_owned(),
        };
        let quarters = s.quarters.map(|q| format!("{q:.4}")).join(" ");
        vec![
            json!(o.key.spec),
            number(o.page_bits, 2),
            o.stored_bits.map_or(json!("-"), |bits| number(bits, 2)),
            number(s.mean, 4),
            number(s.median, 4),
            number(s.p99, 3),
            number(s.p999, 3),
            number(s.top1 * 100.0, 1),
            number(s.perplexity, 2),
            number(s.ratio, 4),
            json!(quarters),
            json!(traced),
        ]
    });
    Table {
        title,
        columns: vec![
            "cache",
            "page bits",
            "stored bits",
            "mean",
            "median",
            "99 %",
            "99.9 %",
            "top-1 %",
            "perplexity",
            "ratio",
            "mean of quarters",
            "traced a layer: mean, most",
        ],
        rows: rows.collect(),
    }
}

/// Needles found, by depth.
pub fn needles(all: &[Needles]) -> Table {
    let rows = all.iter().map(|n| {
        let marks: String = n.found.iter().map(|f| if *f { '+' } else { '-' }).collect();
        let found = n.found.iter().filter(|f| **f).count();
        let count = format!("{found} of {}", n.found.len());
        vec![
            json!(n.model),
            json!(n.tokens),
            json!(n.spec),
            json!(count),
            json!(marks),
        ]
    });
    Table {
        title: "Needles found, at depths of 5 to 95 %".to_owned(),
        columns: vec!["model", "tokens", "cache", "found", "by depth"],
        rows: rows.collect(),
    }
}

/// Greedy answers.
pub fn greedy(all: &[Greedy]) -> Table {
    let rows = all.iter().map(|g| {
        let agreed = format!("{} of {}", g.agreed, g.of);
        vec![json!(g.model), json!(g.spec), json!(g.text), json!(agreed)]
    });
    Table {
        title: "Greedy answers: tokens before the first that differs".to_owned(),
        columns: vec!["model", "cache", "text", "agreed"],
        rows: rows.collect(),
    }
}
