//! The cache on an NVIDIA GPU: the same blocks and pages, in the device's memory, written and read by `ott-kernels` on the
//! device's stream. Nothing waits for the device but the end of a step.

mod cache;
mod memory;
mod step;
mod tensor;

use std::sync::Arc;

use candle_core::Result;
use mistralrs_kv_backend::{KvCacheBackend, KvFault, KvPlan, KvStats, KvStep};
use ott_kernels::cache::Traced;

pub use cache::CudaCache;
pub use memory::memory;

use super::{rows, seam, stats, Inspect};
use crate::cache::LayerStats;
use crate::config::OttConfig;
use crate::error::Error;
use cache::told;
use step::CudaStep;

/// The cache of one model on one GPU.
pub struct CudaBackend {
    pub(super) cache: Arc<CudaCache>,
    pub(super) config: OttConfig,
    pub(super) description: String,
    pub(super) page_bits: f64,
}

impl CudaBackend {
    fn layer_stats(&self) -> Vec<LayerStats> {
        let Ok((counts, traced)) = self.cache.layers.stats() else {
            return Vec::new();
        };
        let layer = |traced: Traced| LayerStats {
            sealed_blocks: counts.pages,
            traced_tokens: traced.tokens,
            staging_chunks: counts.chunks,
            tokens: counts.tokens,
            window_tokens: counts.window,
            most_displaced: traced.displaced,
            stopped_parts: traced.stopped,
        };
        traced.into_iter().map(layer).collect()
    }
}

impl Inspect for CudaBackend {
    fn num_layers(&self) -> usize {
        self.cache.layers.num_layers()
    }

    fn stats(&self, layer: usize) -> Option<LayerStats> {
        self.layer_stats().get(layer).copied()
    }

    fn page(&self, layer: usize, block: usize) -> Option<Vec<u8>> {
        self.cache.layers.page(layer, block)
    }

    fn bytes(&self) -> usize {
        self.cache.layers.allocated_bytes()
    }
}

impl KvCacheBackend for CudaBackend {
    fn begin_step(&self, plan: KvPlan) -> Result<Arc<dyn KvStep>> {
        super::check_block_size(&plan, &self.config)?;
        let step = self.cache.layers.begin(&rows(&plan));
        Ok(Arc::new(CudaStep {
            cache: Arc::clone(&self.cache),
            step: step.map_err(told).map_err(seam)?,
            plan,
        }))
    }

    fn end_step(&self) -> Result<Vec<KvFault>> {
        let faults = self.cache.layers.end().map_err(told).map_err(seam)?;
        let fault = |fault: ott_kernels::cache::Fault| KvFault {
            seq: fault.seq,
            error: Error::NotRepresentableOnGpu { layer: fault.layer }.to_string(),
        };
        Ok(faults.into_iter().map(fault).collect())
    }

    fn allocated(&self, _seq: usize, blocks: &[usize]) {
        self.cache.layers.allocated(blocks);
    }

    fn released(&self, seq: usize, blocks: &[usize]) -> Vec<usize> {
        self.cache.layers.released(seq, blocks)
    }

    fn reset(&self) {
        self.cache.layers.reset();
    }

    fn describe(&self) -> String {
        self.description.clone()
    }

    fn allocated_bytes(&self) -> usize {
        self.cache.layers.allocated_bytes()
    }

    fn stats(&self) -> KvStats {
        stats::stats(&self.layer_stats(), &self.config, self.page_bits)
    }
}
