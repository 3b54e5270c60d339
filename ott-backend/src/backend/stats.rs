//! What is held, in numbers, for those who watch a server.

use mistralrs_kv_backend::{KvGauge, KvStats};

use crate::cache::LayerStats;
use crate::config::OttConfig;

/// A gauge: name, help, and the number of one layer.
type Count = (
    &'static str,
    &'static str,
    fn(&LayerStats, &OttConfig) -> f64,
);

const GAUGES: [Count; 5] = [
    (
        "sealed_blocks",
        "Blocks whose tokens are quantized",
        |s, _| s.sealed_blocks as f64,
    ),
    (
        "window_tokens",
        "Tokens in full precision because they are new",
        |s, _| s.window_tokens as f64,
    ),
    (
        "traced_tokens",
        "Outlier tokens in full precision, over all heads",
        |s, _| s.traced_tokens as f64,
    ),
    (
        "extra_store_used_ratio",
        "Share of the extra store that is taken, in the sequence and head where it is largest",
        |s, c| s.most_displaced as f64 / c.extra.max(1) as f64,
    ),
    (
        "untraced_parts",
        "Sealed blocks, counted per head, that were not traced because the extra store was full",
        |s, _| s.stopped_parts as f64,
    ),
];

/// The state of a cache of these layers.
pub(super) fn stats(layers: &[LayerStats], config: &OttConfig, page_bits: f64) -> KvStats {
    let gauge = |(name, help, count): Count| KvGauge {
        name,
        help,
        by_layer: layers.iter().map(|layer| count(layer, config)).collect(),
    };
    KvStats {
        setting: config.to_string(),
        bits_per_number: Some(page_bits),
        tokens: layers.first().map(|layer| layer.tokens),
        gauges: GAUGES.map(gauge).into(),
    }
}
