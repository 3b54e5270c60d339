//! Bytes and bits in plain words, and how stored bits are counted. Pure arithmetic.

use std::fmt;

use crate::cache::{Cache, Element, LayerSpec, BLOCK_STATE_BYTES};
use crate::config::{Clip, OttConfig, Rotation, Weigh};
use crate::cpu::CpuOps;
use crate::error::Result;
use crate::layout::PageLayout;

/// A model of equal layers, as far as its cache goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModelShape {
    /// Layers.
    pub layers: usize,
    /// Key/value heads.
    pub num_kv_heads: usize,
    /// Channels of a key head.
    pub k_dim: usize,
    /// Channels of a value head.
    pub v_dim: usize,
}

impl ModelShape {
    /// The layers' specs.
    ///
    /// # Errors
    /// If the layout cannot hold the heads.
    pub fn specs(&self, config: &OttConfig, ops: &'static CpuOps) -> Result<Vec<LayerSpec>> {
        let spec = |layer| {
            let (heads, k_dim, v_dim) = (self.num_kv_heads, self.k_dim, self.v_dim);
            Ok(LayerSpec {
                layer,
                config: *config,
                layout: PageLayout::new(config, layer, heads, k_dim, v_dim)?,
                ops,
            })
        };
        (0..self.layers).map(spec).collect()
    }
}

/// Stored bits per number: all bytes held for one sequence of `tokens` tokens, in a pool sized for
/// it, over `tokens x layers x heads x (k_dim + v_dim)`. Counts what is allocated: pages, window,
/// padding block, tables, and as many traced tokens as the tracing rule allows.
///
/// # Errors
/// If the layout cannot hold the heads.
pub fn stored_bits<E: Element>(
    config: &OttConfig,
    shape: &ModelShape,
    tokens: usize,
) -> Result<f64> {
    let specs = shape.specs(config, CpuOps::best()?)?;
    let blocks = tokens.div_ceil(config.group_size) + 1;
    let (_, fixed) = Cache::<E>::worst_bytes(&specs, 1);
    let pages: usize = specs.iter().map(|s| page_and_tables(s) * blocks).sum();
    let width = (shape.k_dim + shape.v_dim) * size_of::<E>();
    let traced: usize = specs.iter().map(|s| most_traced(s, blocks) * width).sum();
    let numbers = tokens * shape.layers * shape.num_kv_heads * (shape.k_dim + shape.v_dim);
    let states = blocks * BLOCK_STATE_BYTES;
    Ok(((pages + states + traced + fixed) * 8) as f64 / numbers as f64)
}

/// Bytes of a block in one layer, but for its traced tokens.
fn page_and_tables(spec: &LayerSpec) -> usize {
    let places = spec.layout.num_kv_heads * spec.layout.outliers * size_of::<u32>();
    spec.layout.page_bytes() + places
}

/// Traced tokens of one chain of blocks in one layer, at most: the pool and the extra store.
fn most_traced(spec: &LayerSpec, blocks: usize) -> usize {
    let outliers = spec.layout.outliers;
    let by_page = outliers * (blocks - 1);
    let by_rule = if outliers == 0 {
        0
    } else {
        outliers + spec.config.extra
    };
    spec.layout.num_kv_heads * by_page.min(by_rule)
}

/// What the start-up lines tell.
#[derive(Clone, Debug)]
pub struct Report<'a> {
    /// Settings.
    pub config: &'a OttConfig,
    /// Layers.
    pub layers: usize,
    /// Blocks that hold tokens.
    pub blocks: usize,
    /// Bytes of pages and tables, all blocks.
    pub pool_bytes: usize,
    /// Bytes of windows and traced tokens, at worst.
    pub window_bytes: usize,
    /// Sequences that the windows are for.
    pub max_seqs: usize,
    /// Bits per number of pages alone.
    pub page_bits: f64,
    /// Bytes of one token at 16 bits, all layers.
    pub f16_token_bytes: usize,
}

const MIB: f64 = 1024.0 * 1024.0;

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let c = self.config;
        let tokens = self.blocks * c.group_size;
        let pool = self.pool_bytes as f64 / MIB;
        let f16 = (tokens * self.f16_token_bytes) as f64 / MIB;
        let clip = match c.clip {
            Clip::None => "",
            Clip::Keys => ", key ranges clipped",
            Clip::Both => ", ranges clipped",
        };
        let rotation = match c.rotation {
            Rotation::None => "",
            Rotation::Values => ", values rotated",
        };
        let weigh = match c.weigh {
            Weigh::None => "",
            Weigh::Queries => ", keys weighed by queries",
        };
        let boost = match (c.boost, c.k_bits) {
            (0, _) => String::new(),
            (n, 2) => format!(", a third bit for {n} of 64 key channels"),
            (n, 3) => format!(", a fourth bit for {n} of 64 key channels"),
            (n, _) => format!(", a fifth bit for {n} of 64 key channels"),
        };
        writeln!(
            f,
            "OTT cache: keys at {} bits, values at {} ({:.2} with scales){clip}{weigh}{boost}{rotation}, in groups of {} tokens",
            c.k_bits, c.v_bits, self.page_bits, c.group_size
        )?;
        write!(
            f,
            "  in full precision: the newest {} to {} tokens",
            c.residual,
            c.residual + c.group_size - 1
        )?;
        match (c.outliers, c.exempt_layers.min(self.layers)) {
            (0, _) => writeln!(f, "; no outlier tokens are traced")?,
            (n, exempt) => writeln!(
                f,
                ", and per head at most {} outlier tokens ({n} at a time) from layer {exempt} on",
                n + c.extra
            )?,
        }
        writeln!(
            f,
            "  pool: {tokens} tokens in {pool:.1} MiB; f16 would take {f16:.1} MiB, {:.2} times as much",
            f16 / pool
        )?;
        write!(
            f,
            "  besides, at worst: {:.1} MiB for windows of {} sequences and for traced tokens",
            self.window_bytes as f64 / MIB,
            self.max_seqs
        )
    }
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;

    const SMOLLM2: ModelShape = ModelShape {
        layers: 30,
        num_kv_heads: 3,
        k_dim: 64,
        v_dim: 64,
    };
    const LLAMA3: ModelShape = ModelShape {
        layers: 32,
        num_kv_heads: 8,
        k_dim: 128,
        v_dim: 128,
    };

    #[test]
    fn stored_bits_table() {
        let mut table = String::new();
        for (name, shape) in [("30 x 3 x 64", SMOLLM2), ("32 x 8 x 128", LLAMA3)] {
            for options in ["", "kivi", "bits=3", "bits=4", "group=64"] {
                let config = OttConfig::parse(options).expect("valid");
                let bits = [2048, 8192, 32768].map(|tokens| {
                    let bits = stored_bits::<f16>(&config, &shape, tokens).expect("served");
                    format!("{bits:5.2} {:5.2}x", 16.0 / bits)
                });
                table += &format!("{name:12} {options:8} | {}\n", bits.join(" | "));
            }
        }
        insta::assert_snapshot!(table, @r#"
        30 x 3 x 64           |  4.40  3.63x |  2.97  5.38x |  2.62  6.12x
        30 x 3 x 64  kivi     |  4.53  3.53x |  2.91  5.49x |  2.51  6.37x
        30 x 3 x 64  bits=3   |  5.35  2.99x |  3.88  4.13x |  3.51  4.56x
        30 x 3 x 64  bits=4   |  6.41  2.50x |  4.89  3.27x |  4.51  3.54x
        30 x 3 x 64  group=64 |  3.95  4.05x |  2.98  5.38x |  2.73  5.86x
        32 x 8 x 128          |  4.15  3.85x |  2.81  5.69x |  2.47  6.47x
        32 x 8 x 128 kivi     |  4.39  3.64x |  2.79  5.74x |  2.38  6.71x
        32 x 8 x 128 bits=3   |  5.10  3.13x |  3.72  4.30x |  3.37  4.74x
        32 x 8 x 128 bits=4   |  6.17  2.59x |  4.73  3.38x |  4.38  3.66x
        32 x 8 x 128 group=64 |  3.70  4.33x |  2.80  5.71x |  2.58  6.20x
        "#);
    }

    #[test]
    fn start_up_lines() {
        let config = OttConfig::default();
        let report = Report {
            config: &config,
            layers: 30,
            blocks: 64,
            pool_bytes: 30 << 20,
            window_bytes: 10 << 20,
            max_seqs: 8,
            page_bits: 2.3828,
            f16_token_bytes: 30 * 3 * 128 * 2,
        };
        insta::assert_snapshot!(report.to_string(), @r#"
        OTT cache: keys at 2 bits, values at 2 (2.38 with scales), ranges clipped, keys weighed by queries, a third bit for 12 of 64 key channels, values rotated, in groups of 128 tokens
          in full precision: the newest 32 to 159 tokens, and per head at most 35 outlier tokens (3 at a time) from layer 2 on
          pool: 8192 tokens in 30.0 MiB; f16 would take 180.0 MiB, 6.00 times as much
          besides, at worst: 10.0 MiB for windows of 8 sequences and for traced tokens
        "#);
    }
}
