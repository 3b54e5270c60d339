//! Reports in the text format of Prometheus.

use std::fmt;
use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeMetric, MetricEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use crate::KvReport;

/// The media type of [`metrics`].
pub const METRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

type Labels = Vec<(&'static str, String)>;
type Gauges = Family<Labels, Gauge<f64, AtomicU64>>;
type NamedGauges = Vec<(&'static str, &'static str, Gauges)>;
type Count = (&'static str, &'static str, fn(&KvReport) -> usize);

/// What goes up and down.
const GAUGES: [Count; 7] = [
    ("bytes_granted", "Bytes of the whole cache, at worst", |r| {
        r.bytes_granted
    }),
    ("bytes_held", "Bytes allocated", |r| r.bytes_held),
    (
        "bytes_used",
        "Bytes of the blocks of running sequences, at worst",
        |r| r.bytes_used,
    ),
    ("bytes_free", "Bytes of the other blocks, at worst", |r| {
        r.bytes_free
    }),
    ("blocks", "Blocks that can hold tokens", |r| r.blocks),
    ("blocks_free", "Blocks of no running sequence", |r| {
        r.free_blocks
    }),
    ("block_tokens", "Tokens per block", |r| r.block_size),
];

/// What only grows.
const COUNTERS: [Count; 7] = [
    (
        "blocks_evicted",
        "Blocks with tokens to hit, handed out for others",
        |r| r.evicted_blocks,
    ),
    (
        "sequences",
        "Sequences whose prompt was run, each once",
        |r| r.sequences,
    ),
    (
        "preemptions",
        "Times that a sequence lost tokens it had computed",
        |r| r.preempted,
    ),
    ("prompt_tokens", "Tokens of those prompts", |r| {
        r.prompt_tokens
    }),
    (
        "hit_tokens",
        "Those of them that were stored already",
        |r| r.hit_tokens,
    ),
    ("steps", "Forward passes", |r| r.steps),
    ("steps_failed", "Forward passes that failed", |r| {
        r.failed_steps
    }),
];

/// The caches of models, by the models' names.
///
/// # Errors
/// If the text cannot be written, which strings always can.
pub fn metrics(models: &[(String, KvReport)]) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("kv_cache");
    let label = |model: &String| vec![("model", model.clone())];
    let mut families = Vec::new();
    for (name, help, value) in GAUGES {
        for (model, report) in models {
            let gauge = family(&mut families, name, help).get_or_create(&label(model));
            gauge.set(value(report) as f64);
        }
    }
    for (name, help, value) in COUNTERS {
        let family = Family::<Labels, Counter>::default();
        for (model, report) in models {
            let counter = family.get_or_create(&label(model));
            counter.inc_by(value(report) as u64);
        }
        registry.register(name, help, family);
    }
    registry.register("setting", "The effective options", Settings::of(models));
    of_backends(&mut families, models);
    for (name, help, family) in families {
        registry.register(name, help, family);
    }
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

/// The settings of all models: one family, as [`Info`](prometheus_client::metrics::info::Info) is of one model.
#[derive(Debug)]
struct Settings(Vec<Labels>);

impl Settings {
    fn of(models: &[(String, KvReport)]) -> Self {
        let labels = |(model, report): &(String, KvReport)| {
            vec![
                ("model", model.clone()),
                ("spec", report.spec.clone()),
                ("setting", report.stats.setting.clone()),
            ]
        };
        Self(models.iter().map(labels).collect())
    }
}

impl EncodeMetric for Settings {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|one| encoder.encode_info(one))
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Info
    }
}

/// What backends tell of themselves, each in its own words.
fn of_backends(families: &mut NamedGauges, models: &[(String, KvReport)]) {
    let bits = "Stored bits per number of a full block";
    let tokens = "Tokens stored, also of ended sequences";
    for (model, report) in models {
        let stats = &report.stats;
        let mut set = |name, help, layer: Option<usize>, value| {
            let mut labels = vec![("model", model.clone())];
            labels.extend(layer.map(|layer| ("layer", layer.to_string())));
            let family = family(families, name, help);
            family.get_or_create(&labels).set(value);
        };
        if let Some(value) = stats.bits_per_number {
            set("bits_per_number", bits, None, value);
        }
        if let Some(value) = stats.tokens {
            set("tokens", tokens, None, value as f64);
        }
        for gauge in &stats.gauges {
            for (layer, value) in gauge.by_layer.iter().enumerate() {
                set(gauge.name, gauge.help, Some(layer), *value);
            }
        }
    }
}

/// The family of a name: OpenMetrics allows one description of it, whatever the number of models, and wants
/// all of its samples together.
fn family<'f>(families: &'f mut NamedGauges, name: &'static str, help: &'static str) -> &'f Gauges {
    let known = families.iter().position(|f| f.0 == name);
    let at = known.unwrap_or_else(|| {
        families.push((name, help, Gauges::default()));
        families.len() - 1
    });
    &families[at].2
}
