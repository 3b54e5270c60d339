//! Reports in the text format of Prometheus.

use std::fmt;
use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

use crate::KvReport;

/// The media type of [`metrics`].
pub const METRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

type Labels = Vec<(&'static str, String)>;
type Gauges = Family<Labels, Gauge<f64, AtomicU64>>;
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
    for (name, help, value) in GAUGES {
        let family = Gauges::default();
        for (model, report) in models {
            let gauge = family.get_or_create(&label(model));
            gauge.set(value(report) as f64);
        }
        registry.register(name, help, family);
    }
    for (name, help, value) in COUNTERS {
        let family = Family::<Labels, Counter>::default();
        for (model, report) in models {
            let counter = family.get_or_create(&label(model));
            counter.inc_by(value(report) as u64);
        }
        registry.register(name, help, family);
    }
    of_backends(&mut registry, models);
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

/// What backends tell of themselves, each in its own words.
fn of_backends(registry: &mut Registry, models: &[(String, KvReport)]) {
    for (model, report) in models {
        let stats = &report.stats;
        let one = registry.sub_registry_with_label(("model".into(), model.clone().into()));
        let setting = vec![
            ("spec", report.spec.clone()),
            ("setting", stats.setting.clone()),
        ];
        one.register("setting", "The effective options", Info::new(setting));
        let numbers = [
            (
                "bits_per_number",
                "Stored bits per number of a full block",
                stats.bits_per_number,
            ),
            (
                "tokens",
                "Tokens stored, also of ended sequences",
                stats.tokens.map(|n| n as f64),
            ),
        ];
        for (name, help, value) in numbers {
            if let Some(value) = value {
                let gauge = Gauge::<f64, AtomicU64>::default();
                gauge.set(value);
                one.register(name, help, gauge);
            }
        }
        for gauge in &stats.gauges {
            let family = Gauges::default();
            for (layer, value) in gauge.by_layer.iter().enumerate() {
                let layer = vec![("layer", layer.to_string())];
                family.get_or_create(&layer).set(*value);
            }
            one.register(gauge.name, gauge.help, family);
        }
    }
}
