//! Bytes on the device, answered before they are taken.

use mistralrs_kv_backend::{KvMemory, KvShape};
use ott_kernels::abi::{ITEM_FIRST, PARTIAL};
use ott_kernels::plan::{lanes, most_items};
use ott_kernels::prompt::scratch_bytes;
use ott_kernels::shape::LayerShape;

use super::tensor::kernel_dtype;
use crate::cache::LayerSpec;
use crate::config::{Rotation, Weigh};
use crate::error::{Error, Result};

/// Words of a row in a step's tables, with its fault, and of all paddings between them.
const ROW_WORDS: usize = 22;
const PADDING_WORDS: usize = 24;
/// Words of an item.
const ITEM_WORDS: usize = 4 + ITEM_FIRST;

/// What kernels are told of the layers.
pub fn shapes(specs: &[LayerSpec]) -> Vec<LayerShape> {
    let shape = |spec: &LayerSpec| {
        let (layout, config) = (&spec.layout, &spec.config);
        LayerShape {
            layer: spec.layer,
            num_kv_heads: layout.num_kv_heads,
            k_dim: layout.k_dim,
            v_dim: layout.v_dim,
            group_size: layout.group_size,
            k_bits: layout.k_bits,
            v_bits: layout.v_bits,
            outliers: layout.outliers,
            extra: config.extra,
            clip: config.clip as u32,
            boosted: layout.boosted,
            rotate: config.rotation == Rotation::Values,
            weigh: config.weigh == Weigh::Queries,
            head_bytes: layout.head_bytes,
        }
    };
    specs.iter().map(shape).collect()
}

/// Numbers in f32 that the parts of a step's contexts need in the layer that needs most.
pub fn sums(shape: &KvShape) -> usize {
    let layers = shape.layers.iter().map(|l| {
        let items = most_items(
            shape.max_seqs,
            shape.block_size,
            lanes(l.num_heads, l.num_kv_heads),
        );
        items.saturating_mul(l.num_heads.saturating_mul(l.v_dim + PARTIAL))
    });
    layers.max().unwrap_or(0)
}

/// Bytes of a step's tables, at most; two steps may be alive.
fn tables(shape: &KvShape) -> usize {
    let blocks = shape.max_seq_len / shape.block_size + 2;
    let words = |lanes: usize| {
        let of_row = blocks
            .saturating_mul(3)
            .saturating_add(ROW_WORDS + 2 + lanes);
        let rows = shape.max_seqs.saturating_mul(of_row);
        let items = most_items(shape.max_seqs, shape.block_size, lanes).saturating_mul(ITEM_WORDS);
        rows.saturating_add(items).saturating_add(PADDING_WORDS)
    };
    let mut all: Vec<usize> = lanes_of(shape);
    all.sort_unstable();
    all.dedup();
    let words = all.into_iter().map(words).fold(0, usize::saturating_add);
    words.saturating_mul(2 * size_of::<u32>())
}

/// Blocks of threads per item, by layer.
fn lanes_of(shape: &KvShape) -> Vec<usize> {
    let layers = shape.layers.iter();
    layers.map(|l| lanes(l.num_heads, l.num_kv_heads)).collect()
}

/// Bytes of a pool for these layers.
///
/// # Errors
/// If the kernels do not serve the dtype.
pub fn memory(specs: &[LayerSpec], shape: &KvShape) -> Result<KvMemory> {
    let dtype = kernel_dtype(shape.dtype).ok_or(Error::Dtype {
        dtype: shape.dtype.as_str(),
    })?;
    let shapes = shapes(specs);
    let windows = shapes.iter().zip(specs).map(|(layer, spec)| {
        let chunk = layer.chunk_bytes(dtype.size()) + layer.sample_bytes(dtype.size());
        chunk.saturating_mul(spec.chunks(shape.max_seqs).max(1))
    });
    let windows = windows.fold(0, usize::saturating_add);
    let prompts = shapes.iter().map(|l| scratch_bytes(l.v_dim));
    let sums = sums(shape).saturating_mul(size_of::<f32>());
    let beside = [sums, tables(shape), prompts.max().unwrap_or(0), LEAST];
    Ok(KvMemory {
        per_block: shapes.iter().map(|l| l.block_bytes(dtype.size())).sum(),
        fixed: beside.into_iter().fold(windows, usize::saturating_add),
    })
}

/// Bytes of what layers hold at least: a traced token and its place each.
const LEAST: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};
    use mistralrs_kv_backend::KvLayer;

    use super::*;
    use crate::config::OttConfig;
    use crate::cpu::CpuOps;
    use crate::report::ModelShape;

    #[test]
    fn no_shape_is_too_large_to_be_sized() {
        let model = ModelShape {
            layers: 2,
            num_kv_heads: 8,
            k_dim: 128,
            v_dim: 128,
        };
        let ops = CpuOps::best().expect("known");
        let specs = model.specs(&OttConfig::default(), ops).expect("served");
        let fixed = |max_seqs, max_seq_len| {
            let layer = KvLayer {
                num_heads: 32,
                num_kv_heads: 8,
                k_dim: 128,
                v_dim: 128,
                device: Device::Cpu,
            };
            let shape = KvShape {
                layers: vec![layer; 2],
                dtype: DType::F16,
                block_size: 128,
                max_seq_len,
                max_seqs,
                options: String::new(),
            };
            memory(&specs, &shape).expect("served").fixed
        };
        let usual = fixed(8, 8192);
        for absurd in [usize::MAX, usize::MAX / 2, usize::MAX / 160, 1 << 60] {
            assert!(fixed(absurd, 8192) > 1 << 60, "{absurd} sequences");
            assert!(fixed(8, absurd) >= usual, "{absurd} tokens");
        }
    }
}
