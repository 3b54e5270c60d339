//! Bytes on the device, answered before they are taken.

use mistralrs_kv_backend::{KvMemory, KvShape};
use ott_kernels::abi::PARTIAL;
use ott_kernels::plan::{lanes, most_items, CHUNK};
use ott_kernels::shape::LayerShape;

use super::tensor::kernel_dtype;
use crate::cache::LayerSpec;
use crate::config::{Rotation, Weigh};
use crate::error::{Error, Result};

/// Words of a row in a step's tables, and of all paddings between them.
const ROW_WORDS: usize = 21;
const PADDING_WORDS: usize = 20;

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

/// Chunks of the window in each layer: a sequence's unsealed tokens are fewer than G + R.
pub fn chunks(spec: &LayerSpec, max_seqs: usize) -> usize {
    max_seqs.saturating_mul((spec.layout.group_size + spec.config.residual) / CHUNK)
}

/// Numbers in f32 that the parts of a step's contexts need in the layer that needs most.
pub fn sums(shape: &KvShape) -> usize {
    let layers = shape.layers.iter().map(|l| {
        let items = most_items(
            shape.max_seqs,
            shape.block_size,
            lanes(l.num_heads, l.num_kv_heads),
        );
        items.saturating_mul(l.num_heads * (l.v_dim + PARTIAL))
    });
    layers.max().unwrap_or(0)
}

/// Bytes of a step's tables, at most; two steps may be alive.
fn tables(shape: &KvShape) -> usize {
    let blocks = shape.max_seq_len / shape.block_size + 2;
    let words = |lanes: usize| {
        let rows = shape
            .max_seqs
            .saturating_mul(ROW_WORDS + 2 + lanes + 3 * blocks);
        rows.saturating_add(4 * most_items(shape.max_seqs, shape.block_size, lanes) + PADDING_WORDS)
    };
    let mut all: Vec<usize> = lanes_of(shape);
    all.sort_unstable();
    all.dedup();
    let words: usize = all.into_iter().map(words).sum();
    2 * words * size_of::<u32>()
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
        chunk.saturating_mul(chunks(spec, shape.max_seqs).max(1))
    });
    let windows = windows.fold(0, usize::saturating_add);
    let beside = sums(shape) * size_of::<f32>() + tables(shape) + FAULTS;
    Ok(KvMemory {
        per_block: shapes.iter().map(|l| l.block_bytes(dtype.size())).sum(),
        fixed: windows.saturating_add(beside),
    })
}

/// Bytes of the layers' faults and of what a layer holds at least: a traced token and its place.
const FAULTS: usize = 1 << 20;
