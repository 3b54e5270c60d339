//! The number formats of other caches, simulated: keys and values are rounded through each and kept as f16.
//!
//! All of these treat each token by itself and keep no window, so what a token's query sees does not depend on when
//! it was stored; rounding is all there is to them.

use anyhow::{bail, ensure, Result};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use half::f16;
use mistralrs_kv_cache::CompressedKVCache;
use turboquant::cache::{CacheConfig, PqoCache, QuantNormMode};

/// A number format.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Codec {
    /// As they come.
    F16,
    /// E4M3 with scale 1: the host's `f8e4m3`.
    Fp8,
    /// Blocks of 32 channels as llama.cpp keeps them (`-ctk`, `-ctv`).
    Ggml(GgmlDType),
    /// turboquant-rs, the setting it recommends, at so many bits.
    TurboQuant(u8),
}

impl Codec {
    /// The format of this name.
    pub fn parse(name: &str) -> Result<Self> {
        Ok(match name {
            "f16" => Self::F16,
            "fp8" => Self::Fp8,
            "q4_0" => Self::Ggml(GgmlDType::Q4_0),
            "q4_1" => Self::Ggml(GgmlDType::Q4_1),
            "q8_0" => Self::Ggml(GgmlDType::Q8_0),
            "turboquant3" => Self::TurboQuant(3),
            "turboquant4" => Self::TurboQuant(4),
            _ => bail!(
                "there is no format `{name}`: f16, fp8, q4_0, q4_1, q8_0, turboquant3, turboquant4, or a spec of ott"
            ),
        })
    }

    /// Bits of a number, scales included.
    pub fn bits(self) -> f64 {
        match self {
            Self::F16 => 16.0,
            Self::Fp8 => 8.0,
            Self::Ggml(t) => (t.type_size() * 8) as f64 / t.block_size() as f64,
            // A f16 scale for each block of 32.
            Self::TurboQuant(bits) => f64::from(bits) + 0.5,
        }
    }

    /// Keys and values `(1, num_kv_heads, tokens, channels)` as they are read back.
    pub fn round(self, k: &Tensor, v: &Tensor) -> Result<(Vec<f16>, Vec<f16>)> {
        let (k, v) = match self {
            Self::F16 => (k.clone(), v.clone()),
            Self::Fp8 => {
                let round = |x: &Tensor| x.to_dtype(DType::F8E4M3)?.to_dtype(DType::F16);
                (round(k)?, round(v)?)
            }
            Self::Ggml(dtype) => {
                let round = |x: &Tensor| {
                    let x = x.to_dtype(DType::F32)?.contiguous()?;
                    QTensor::quantize(&x, dtype)?.dequantize(&Device::Cpu)
                };
                (round(k)?, round(v)?)
            }
            Self::TurboQuant(bits) => turboquant(bits, k, v)?,
        };
        let flat = |x: Tensor| x.to_dtype(DType::F16)?.flatten_all()?.to_vec1::<f16>();
        Ok((flat(k)?, flat(v)?))
    }
}

/// What turboquant-rs gives back once it has stored all tokens: the first call returns a prompt as it came.
fn turboquant(bits: u8, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
    let (_, num_kv_heads, tokens, head_dim) = k.dims4()?;
    ensure!(
        k.dims() == v.dims(),
        "turboquant-rs wants keys and values alike"
    );
    let cache = PqoCache::new(CacheConfig {
        bits,
        head_dim,
        num_kv_heads,
        num_layers: 1,
        norm_mode: QuantNormMode::default(),
        outlier_blocks: usize::MAX,
    })?;
    let (k, v) = (k.contiguous()?, v.contiguous()?);
    cache.prefill(0, &k, &v, &k)?;
    let last = |x: &Tensor| x.narrow(2, tokens - 1, 1)?.contiguous();
    let all = cache.prefill(0, &last(&k)?, &last(&v)?, &last(&k)?)?;
    let first = |x: &Tensor| x.narrow(2, 0, tokens)?.contiguous();
    Ok((first(&all.k)?, first(&all.v)?))
}
