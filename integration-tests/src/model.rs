//! Model files: where they are, and a form in which the host's CPU matmuls are fast.

use std::fs::File;
use std::io::{BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{bail, Context, Result};
use candle_core::quantized::gguf_file::{self, Content, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::Device;
use ott_backend::report::ModelShape;

/// SmolLM2-135M-Instruct as the Python registry carries it (llama, 30 layers, 9/3 heads of 64).
pub const SMOLLM2: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

/// The folder that `cargo demo` and `cargo verify` keep models in.
pub fn folder() -> Result<PathBuf> {
    let set = |name: &str| {
        std::env::var_os(name)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    };
    let cache = match (set("OTT_CACHE_DIR"), set("XDG_CACHE_HOME")) {
        (Some(dir), _) => dir,
        (None, Some(cache)) => cache.join("ott-mistralrs"),
        (None, None) => std::env::home_dir()
            .context("there is no home folder: set OTT_CACHE_DIR")?
            .join(".cache/ott-mistralrs"),
    };
    Ok(cache.join("models"))
}

/// SmolLM2 with 8-bit weights.
pub fn smollm2() -> Result<PathBuf> {
    fast(&folder()?.join(SMOLLM2))
}

/// `path` if the host multiplies its weights fast, or else a copy beside it with 8-bit weights: the
/// host has no SIMD for Q4_1 and Q5 on the CPU. Made once.
pub fn fast(path: &Path) -> Result<PathBuf> {
    if path.is_dir() {
        return Ok(path.to_owned());
    }
    let mut reader = BufReader::new(File::open(path).with_context(|| {
        format!(
            "{} is missing: `cargo verify` and `cargo demo` fetch it",
            path.display()
        )
    })?);
    let content = Content::read(&mut reader)?;
    let slow = |t: GgmlDType| matches!(t, GgmlDType::Q4_1 | GgmlDType::Q5_0 | GgmlDType::Q5_1);
    if !content
        .tensor_infos
        .values()
        .any(|info| slow(info.ggml_dtype))
    {
        return Ok(path.to_owned());
    }
    converted(path, GgmlDType::Q8_0)
}

/// A copy of `path` beside it whose weights are f32, made once. With quantized weights the host rounds activations
/// to 8 bits before each matmul, which moves answers as much as a 4-bit cache does.
///
/// A folder of safetensors stays as it is.
pub fn exact(path: &Path) -> Result<PathBuf> {
    if path.is_dir() {
        return Ok(path.to_owned());
    }
    converted(path, GgmlDType::F32)
}

/// A copy of `path` beside it that ends after its first `layers` layers, made once. Its answers mean nothing, but a
/// server does with it all that it does with the whole, several times as often.
pub fn shallow(path: &Path, layers: usize) -> Result<PathBuf> {
    copied(path, &format!("{layers}-layers"), |content| {
        let key = content
            .metadata
            .keys()
            .find(|key| key.ends_with(".block_count"))
            .cloned()
            .context("the file says how many layers it has")?;
        let count = u32::try_from(layers)?;
        content.metadata.insert(key, Value::U32(count));
        content.tensor_infos.retain(|name, _| {
            let layer = name.strip_prefix("blk.").and_then(|n| n.split('.').next());
            layer.is_none_or(|n| n.parse().is_ok_and(|n: usize| n < layers))
        });
        Ok(None)
    })
}

fn converted(path: &Path, dtype: GgmlDType) -> Result<PathBuf> {
    copied(path, &format!("{dtype:?}"), |_| Ok(Some(dtype)))
}

/// A copy of `path` beside it, made once. `edit` changes what is copied and chooses how quantized weights are kept:
/// `None` as they are.
fn copied(
    path: &Path,
    name: &str,
    edit: impl FnOnce(&mut Content) -> Result<Option<GgmlDType>>,
) -> Result<PathBuf> {
    let copy = path.with_extension(format!("{name}.gguf"));
    if !copy.exists() {
        eprintln!("Making {} (once)", copy.display());
        let mut reader = BufReader::new(File::open(path)?);
        let mut content = Content::read(&mut reader)?;
        let dtype = edit(&mut content)?;
        let partial = copy.with_extension(format!("partial-{}", std::process::id()));
        convert(&content, &mut reader, &partial, dtype)?;
        std::fs::rename(&partial, &copy)?;
    }
    Ok(copy)
}

fn convert(
    content: &Content,
    reader: &mut BufReader<File>,
    to: &Path,
    dtype: Option<GgmlDType>,
) -> Result<()> {
    let mut tensors = Vec::with_capacity(content.tensor_infos.len());
    for name in content.tensor_infos.keys() {
        let tensor = content.tensor(reader, name, &Device::Cpu)?;
        let plain = matches!(
            tensor.dtype(),
            GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16
        );
        let tensor = match dtype {
            Some(dtype) if !plain => QTensor::quantize(&tensor.dequantize(&Device::Cpu)?, dtype)?,
            _ => tensor,
        };
        tensors.push((name.as_str(), tensor));
    }
    let tensors: Vec<_> = tensors
        .iter()
        .map(|(name, tensor)| (*name, tensor))
        .collect();
    let metadata: Vec<_> = content
        .metadata
        .iter()
        .map(|(key, value)| (key.as_str(), value))
        .collect();
    let mut writer = BufWriter::new(File::create(to)?);
    gguf_file::write(&mut writer, &metadata, &tensors)?;
    Ok(writer.flush()?)
}

/// The cache's shape, from the file's metadata or the folder's configuration.
pub fn shape(path: &Path) -> Result<ModelShape> {
    if path.is_dir() {
        return folder_shape(path);
    }
    let content = Content::read(&mut BufReader::new(File::open(path)?))?;
    let Some(Value::String(arch)) = content.metadata.get("general.architecture") else {
        bail!("{} names no architecture", path.display());
    };
    let number = |key: &str| -> Result<usize> {
        let key = format!("{arch}.{key}");
        let value = content
            .metadata
            .get(&key)
            .with_context(|| format!("no `{key}` in the file"))?;
        Ok(value.to_u32()? as usize)
    };
    let heads = number("attention.head_count")?;
    let dim =
        |key: &str| number(key).or_else(|_| anyhow::Ok(number("embedding_length")? / heads.max(1)));
    Ok(ModelShape {
        layers: number("block_count")?,
        num_kv_heads: number("attention.head_count_kv").unwrap_or(heads),
        k_dim: dim("attention.key_length")?,
        v_dim: dim("attention.value_length")?,
    })
}

fn folder_shape(path: &Path) -> Result<ModelShape> {
    let config = std::fs::read_to_string(path.join("config.json"))?;
    let config: serde_json::Value = serde_json::from_str(&config)?;
    let number = |key: &str| -> Result<usize> {
        let value = config[key].as_u64();
        Ok(value.with_context(|| format!("no `{key}` in config.json"))? as usize)
    };
    let heads = number("num_attention_heads")?;
    let dim = number("head_dim").or_else(|_| anyhow::Ok(number("hidden_size")? / heads.max(1)))?;
    Ok(ModelShape {
        layers: number("num_hidden_layers")?,
        num_kv_heads: number("num_key_value_heads").unwrap_or(heads),
        k_dim: dim,
        v_dim: dim,
    })
}

/// Bytes of one token's keys and values in f16, all layers, from the file's metadata.
pub fn f16_bytes_per_token(path: &Path) -> Result<usize> {
    let shape = shape(path)?;
    Ok(shape.layers * shape.num_kv_heads * (shape.k_dim + shape.v_dim) * 2)
}
