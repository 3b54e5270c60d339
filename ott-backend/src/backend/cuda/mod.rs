//! The cache on an NVIDIA GPU: the same blocks and pages, in the device's memory, written and read by `ott-kernels` on the
//! device's stream. Nothing waits for the device but [`CudaCache::begin`], once per step, and what counts for watchers.

mod cache;
mod memory;
mod step;
mod tensor;

use std::sync::Arc;

use candle_core::Result;
use mistralrs_kv_backend::{KvCacheBackend, KvPlan, KvStats, KvStep};

pub use cache::CudaCache;
pub use memory::memory;

use super::{rows, seam, stats, Inspect, LastQueries};
use crate::cache::LayerStats;
use crate::config::OttConfig;
use step::CudaStep;

/// The cache of one model on one GPU.
pub struct CudaBackend {
    pub(super) cache: Arc<CudaCache>,
    pub(super) config: OttConfig,
    pub(super) description: String,
    pub(super) page_bits: f64,
}

impl Inspect for CudaBackend {
    fn num_layers(&self) -> usize {
        self.cache.num_layers()
    }

    fn stats(&self, layer: usize) -> Option<LayerStats> {
        self.cache.stats(layer).ok()
    }

    fn page(&self, layer: usize, block: usize) -> Option<Vec<u8>> {
        self.cache.page(layer, block)
    }

    fn bytes(&self) -> usize {
        self.cache.allocated_bytes()
    }
}

impl KvCacheBackend for CudaBackend {
    fn begin_step(&self, plan: KvPlan) -> Result<Arc<dyn KvStep>> {
        super::check_block_size(&plan, &self.config)?;
        let tables = self.cache.begin(&rows(&plan)).map_err(seam)?;
        Ok(Arc::new(CudaStep {
            cache: Arc::clone(&self.cache),
            tables,
            queries: LastQueries::default(),
            plan,
        }))
    }

    fn allocated(&self, _seq: usize, blocks: &[usize]) {
        self.cache.allocated(blocks);
    }

    fn released(&self, _seq: usize, blocks: &[usize]) {
        self.cache.released(blocks);
    }

    fn reset(&self) {
        self.cache.reset();
    }

    fn describe(&self) -> String {
        self.description.clone()
    }

    fn allocated_bytes(&self) -> usize {
        self.cache.allocated_bytes()
    }

    fn stats(&self) -> KvStats {
        let layers = (0..self.cache.num_layers()).filter_map(|l| self.cache.stats(l).ok());
        stats::stats(&layers.collect::<Vec<_>>(), &self.config, self.page_bits)
    }
}
