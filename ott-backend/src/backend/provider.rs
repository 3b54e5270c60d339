//! What the host asks before there is a cache.

use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use candle_core::{DType, Device};
use half::{bf16, f16};
use mistralrs_kv_backend::{
    KvAbout, KvBackendProvider, KvCacheBackend, KvMemory, KvModelSource, KvShape,
};

#[cfg(feature = "cuda")]
use super::cuda;
use super::{Activation, Inspect, OttBackend};
use crate::cache::{Cache, LayerSpec};
use crate::config::OttConfig;
use crate::cpu::CpuOps;
use crate::error::{Error, Result};
use crate::layout::PageLayout;
use crate::report::Report;

/// Make `ott` available to the host by name. Applications call this once, early in `main`.
///
/// # Errors
/// If a backend of this name is registered already.
pub fn register() -> anyhow::Result<()> {
    mistralrs_kv_backend::register(provider())
}

/// The provider that [`register`] registers; through it tests reach the caches of loaded models.
pub fn provider() -> Arc<OttProvider> {
    static PROVIDER: OnceLock<Arc<OttProvider>> = OnceLock::new();
    Arc::clone(PROVIDER.get_or_init(Arc::default))
}

/// The kind of cache named `ott`.
#[derive(Default)]
pub struct OttProvider {
    caches: Mutex<Vec<Weak<dyn Inspect>>>,
}

impl OttProvider {
    /// The caches in use, oldest first.
    pub fn caches(&self) -> Vec<Arc<dyn Inspect>> {
        let caches = self.caches.lock().unwrap_or_else(PoisonError::into_inner);
        caches.iter().filter_map(Weak::upgrade).collect()
    }

    fn open<E: Activation>(
        &self,
        shape: &KvShape,
        num_blocks: usize,
    ) -> Result<Arc<OttBackend<E>>> {
        let config = OttConfig::parse(&shape.options)?;
        let specs = specs(&config, shape)?;
        let report = report(
            &config,
            &specs,
            shape,
            num_blocks,
            cpu_memory::<E>(&specs, shape),
        );
        let (description, page_bits) = (report.to_string(), report.page_bits);
        let backend = Arc::new(OttBackend {
            cache: Arc::new(Cache::new(specs, num_blocks, shape.max_seqs)),
            config,
            num_heads: shape.layers.iter().map(|l| l.num_heads).collect(),
            description,
            page_bits,
            step: Mutex::default(),
        });
        let inspect: Arc<dyn Inspect> = backend.clone();
        self.remember(&inspect);
        Ok(backend)
    }

    #[cfg(feature = "cuda")]
    fn open_cuda(
        &self,
        shape: &KvShape,
        num_blocks: usize,
        device: &candle_core::CudaDevice,
    ) -> Result<Arc<cuda::CudaBackend>> {
        let config = OttConfig::parse(&shape.options)?;
        let specs = specs(&config, shape)?;
        let memory = cuda::memory(&specs, shape)?;
        let report = report(&config, &specs, shape, num_blocks, memory);
        let page_bits = report.page_bits;
        let cache = cuda::CudaCache::new(&specs, shape, num_blocks, device)?;
        let description = format!(
            "{report}\n  on the GPU; {} of {} layers attend on tensor cores",
            cache.tuned_layers(),
            specs.len()
        );
        let backend = Arc::new(cuda::CudaBackend {
            cache: Arc::new(cache),
            config,
            description,
            page_bits,
        });
        let inspect: Arc<dyn Inspect> = backend.clone();
        self.remember(&inspect);
        Ok(backend)
    }

    fn remember(&self, cache: &Arc<dyn Inspect>) {
        let mut caches = self.caches.lock().unwrap_or_else(PoisonError::into_inner);
        caches.retain(|cache| cache.strong_count() > 0);
        caches.push(Arc::downgrade(cache));
    }
}

impl KvBackendProvider for OttProvider {
    fn name(&self) -> &'static str {
        "ott"
    }

    fn about(&self) -> KvAbout {
        KvAbout {
            version: env!("CARGO_PKG_VERSION"),
            presets: &OttConfig::PRESETS,
        }
    }

    fn check_options(&self, options: &str) -> anyhow::Result<()> {
        OttConfig::parse(options)?;
        CpuOps::best()?;
        Ok(())
    }

    fn check_model(&self, source: &KvModelSource<'_>, options: &str) -> anyhow::Result<()> {
        let config = OttConfig::parse(options)?;
        if let Some(layers) = source.num_layers() {
            config.check_layers(layers)?;
        }
        if let Some((k_dim, v_dim)) = source.head_dims() {
            PageLayout::new(&config, 0, 1, k_dim, v_dim)
                .map_err(|error| anyhow::anyhow!("the model `{}`: {error}", source.name))?;
        }
        Ok(())
    }

    fn block_size(&self, user: Option<usize>, options: &str) -> anyhow::Result<usize> {
        let group = OttConfig::parse(options)?.group_size;
        match user {
            Some(asked) if asked != group => Err(Error::BlockSize { asked, group }.into()),
            _ => Ok(group),
        }
    }

    fn memory(&self, shape: &KvShape) -> anyhow::Result<KvMemory> {
        let config = OttConfig::parse(&shape.options)?;
        let specs = specs(&config, shape)?;
        #[cfg(feature = "cuda")]
        if gpu(shape).is_some() {
            return Ok(cuda::memory(&specs, shape)?);
        }
        Ok(match shape.dtype {
            DType::F16 => cpu_memory::<f16>(&specs, shape),
            DType::BF16 => cpu_memory::<bf16>(&specs, shape),
            DType::F32 => cpu_memory::<f32>(&specs, shape),
            other => return Err(dtype(other).into()),
        })
    }

    fn create(&self, shape: KvShape, num_blocks: usize) -> anyhow::Result<Arc<dyn KvCacheBackend>> {
        #[cfg(feature = "cuda")]
        if let Some(device) = gpu(&shape) {
            return Ok(self.open_cuda(&shape, num_blocks, device)?);
        }
        Ok(match shape.dtype {
            DType::F16 => self.open::<f16>(&shape, num_blocks)?,
            DType::BF16 => self.open::<bf16>(&shape, num_blocks)?,
            DType::F32 => self.open::<f32>(&shape, num_blocks)?,
            other => return Err(dtype(other).into()),
        })
    }
}

fn dtype(dtype: DType) -> Error {
    Error::Dtype {
        dtype: dtype.as_str(),
    }
}

fn cpu_memory<E: Activation>(specs: &[LayerSpec], shape: &KvShape) -> KvMemory {
    let (per_block, fixed) = Cache::<E>::worst_bytes(specs, shape.max_seqs);
    KvMemory { per_block, fixed }
}

/// The GPU on which the layers lie.
#[cfg(feature = "cuda")]
fn gpu(shape: &KvShape) -> Option<&candle_core::CudaDevice> {
    match &shape.layers.first()?.device {
        Device::Cuda(device) => Some(device),
        _ => None,
    }
}

/// One device that is served, for all layers.
fn check_devices(shape: &KvShape) -> Result<()> {
    for l in &shape.layers {
        match l.device {
            Device::Cuda(_) if !cfg!(feature = "cuda") => {
                return Err(Error::Device { kind: "CUDA" })
            }
            Device::Metal(_) => return Err(Error::Device { kind: "Metal" }),
            _ => {}
        }
        if !l.device.same_device(&shape.layers[0].device) {
            return Err(Error::Split);
        }
    }
    Ok(())
}

/// The layers, or why they are not served.
fn specs(config: &OttConfig, shape: &KvShape) -> Result<Vec<LayerSpec>> {
    if shape.block_size != config.group_size {
        return Err(Error::BlockSize {
            asked: shape.block_size,
            group: config.group_size,
        });
    }
    check_devices(shape)?;
    let ops = CpuOps::best()?;
    let spec = |(layer, l): (usize, &mistralrs_kv_backend::KvLayer)| {
        if l.num_kv_heads == 0 || !l.num_heads.is_multiple_of(l.num_kv_heads) {
            return Err(Error::Heads {
                layer,
                num_heads: l.num_heads,
                num_kv_heads: l.num_kv_heads,
            });
        }
        Ok(LayerSpec {
            layer,
            config: *config,
            layout: PageLayout::new(config, layer, l.num_kv_heads, l.k_dim, l.v_dim)?,
            ops,
        })
    };
    shape.layers.iter().enumerate().map(spec).collect()
}

fn report<'a>(
    config: &'a OttConfig,
    specs: &[LayerSpec],
    shape: &KvShape,
    num_blocks: usize,
    memory: KvMemory,
) -> Report<'a> {
    let numbers: usize = specs
        .iter()
        .map(|s| s.layout.num_kv_heads * (s.layout.k_dim + s.layout.v_dim))
        .sum();
    let page_bytes: usize = specs.iter().map(|s| s.layout.page_bytes()).sum();
    let blocks = num_blocks.saturating_sub(1);
    let pool_bytes = num_blocks * page_bytes;
    Report {
        config,
        layers: specs.len(),
        blocks,
        pool_bytes,
        window_bytes: num_blocks * memory.per_block + memory.fixed - pool_bytes,
        max_seqs: shape.max_seqs,
        page_bits: (page_bytes * 8) as f64 / (numbers * config.group_size).max(1) as f64,
        f16_token_bytes: numbers * 2,
    }
}

#[cfg(test)]
mod tests {
    use mistralrs_kv_backend::KvLayer;

    use super::*;

    fn shape(change: impl FnOnce(&mut KvShape)) -> KvShape {
        let layer = KvLayer {
            num_heads: 9,
            num_kv_heads: 3,
            k_dim: 64,
            v_dim: 64,
            device: Device::Cpu,
        };
        let mut shape = KvShape {
            layers: vec![layer; 30],
            dtype: DType::F16,
            block_size: 128,
            max_seq_len: 8192,
            max_seqs: 2,
            options: String::new(),
        };
        change(&mut shape);
        shape
    }

    #[test]
    fn refusals() {
        let provider = OttProvider::default();
        let source = KvModelSource {
            name: "odd",
            config_json: Some(r#"{"head_dim": 84, "num_attention_heads": 8}"#),
            gguf: None,
        };
        let refused = [
            provider.block_size(Some(32), "").map(drop),
            provider.check_model(&source, ""),
            provider
                .memory(&shape(|s| s.layers[1].v_dim = 60))
                .map(drop),
            provider
                .memory(&shape(|s| s.layers[0].num_heads = 10))
                .map(drop),
            provider.memory(&shape(|s| s.dtype = DType::U8)).map(drop),
            provider.memory(&shape(|s| s.block_size = 64)).map(drop),
            Err(Error::Device { kind: "CUDA" }.into()),
            Err(Error::Split.into()),
            Err(Error::Device { kind: "Metal" }.into()),
            Err(Error::CpuOps {
                name: "sse9".into(),
                available: vec!["scalar", "avx2"],
            }
            .into()),
        ];
        let messages = refused.map(|r| r.expect_err("refused").to_string());
        insta::assert_snapshot!(messages.join("\n"), @r#"
        blocks of 32 tokens were asked for, but a block of the ott cache is one group of 128: leave the block size out, or set `group` to it (32, 64 or 128)
        the model `odd`: layer 0 has key heads of 84 channels; the ott cache packs heads of 8 to 1024 channels, in multiples of 8: run this model without --kv-cache
        layer 1 has value heads of 60 channels; the ott cache packs heads of 8 to 1024 channels, in multiples of 8: run this model without --kv-cache
        layer 0 has 10 query heads for 3 key/value heads, which is no whole ratio: run this model without --kv-cache
        the ott cache takes activations in f16, bf16 or f32, not u8
        blocks of 64 tokens were asked for, but a block of the ott cache is one group of 128: leave the block size out, or set `group` to it (32, 64 or 128)
        this build has no CUDA kernels of the ott cache: build with the feature `cuda`, or run with --cpu
        the layers of this model lie on several devices; the ott cache runs on one GPU, or on the CPU: load the whole model on one device, or run with --cpu or without --kv-cache
        the ott cache does not run on Metal. Run with --cpu, or without --kv-cache
        OTT_CPU=sse9: this machine has no such inner loops. It has scalar, avx2; without OTT_CPU the last one is taken
        "#);
    }

    #[test]
    fn a_cache_describes_itself_and_can_be_looked_at() {
        let provider = OttProvider::default();
        let shape = shape(|_| {});
        let memory = provider.memory(&shape).expect("served");
        let cache = provider.create(shape, 65).expect("served");
        assert!(cache.allocated_bytes() <= 65 * memory.per_block + memory.fixed);
        assert_eq!(provider.caches().len(), 1);
        assert_eq!(provider.caches()[0].bytes(), cache.allocated_bytes());
        insta::assert_snapshot!(cache.describe(), @r#"
        OTT cache: keys at 2 bits, values at 2 (2.49 with scales), ranges clipped, keys weighed by queries, a third bit for 12 of 64 key channels, values rotated, in groups of 128 tokens
          in full precision: the newest 32 to 159 tokens, and per head at most 35 outlier tokens (3 at a time) from layer 2 on
          pool: 8192 tokens in 28.5 MiB; f16 would take 180.0 MiB, 6.32 times as much
          besides, at worst: 12.1 MiB for windows of 2 sequences and for traced tokens
        "#);
        drop(cache);
        assert!(provider.caches().is_empty());
    }
}
