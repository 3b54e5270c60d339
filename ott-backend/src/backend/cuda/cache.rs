//! The cache of a model on one GPU, from the shapes that the seam tells.

use candle_core::{CudaDevice, DType, Device};
use mistralrs_kv_backend::KvShape;
use ott_kernels::cache::{CacheError, DeviceCache};
use ott_kernels::device::Kernels;

use super::memory::{shapes, sums};
use super::tensor::kernel_dtype;
use crate::cache::LayerSpec;
use crate::error::{Error, Result};

/// The cache of all layers of a model on one GPU, and what its tensors are.
pub struct CudaCache {
    pub(super) layers: DeviceCache,
    pub(super) device: Device,
    pub(super) dtype: DType,
}

/// What the driver said, as an error of ours.
pub fn failed(error: impl std::fmt::Display) -> Error {
    let what = format!("{error:#}").into();
    Error::Cuda { what }
}

/// An error of the cache, as one of ours.
pub fn told(error: CacheError) -> Error {
    match error {
        CacheError::Refused(refused) => refused.into(),
        error => failed(error),
    }
}

impl CudaCache {
    /// An empty cache: all its memory is taken now.
    ///
    /// # Errors
    /// If the device is too old or has too little memory.
    pub fn new(
        specs: &[LayerSpec],
        shape: &KvShape,
        num_blocks: usize,
        device: &CudaDevice,
    ) -> Result<Self> {
        let kernels = Kernels::new(&device.cuda_stream()).map_err(failed)?;
        let dtype = kernel_dtype(shape.dtype).ok_or(Error::Dtype {
            dtype: shape.dtype.as_str(),
        })?;
        let heads = shape.layers.iter().map(|layer| layer.num_heads);
        let shapes: Vec<_> = shapes(specs).into_iter().zip(heads).collect();
        let chunks = specs.first().map_or(0, |spec| spec.chunks(shape.max_seqs));
        let residual = specs.first().map_or(0, |spec| spec.config.residual);
        let pool = (num_blocks, chunks);
        let layers = DeviceCache::new(kernels, &shapes, dtype, pool, residual, sums(shape));
        Ok(Self {
            layers: layers.map_err(told)?,
            device: Device::Cuda(device.clone()),
            dtype: shape.dtype,
        })
    }

    /// How many layers attend on tensor cores.
    pub fn tuned_layers(&self) -> usize {
        self.layers.tuned_layers()
    }
}
