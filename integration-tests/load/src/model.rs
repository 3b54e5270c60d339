//! A model of random bf16 weights in Llama's shape, and a tokenizer of plain words: time does not depend on what weights
//! say.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use anyhow::{ensure, Context, Result};
use clap::Args;
use serde_json::{json, Map, Value};

use crate::draw::Draw;

/// The shape of a model; by default that of Llama 3.1 8B.
#[derive(Args, Clone, Debug)]
pub struct Shape {
    /// Layers
    #[arg(long, default_value_t = 32)]
    pub layers: usize,
    /// Channels of a token between layers
    #[arg(long, default_value_t = 4096)]
    pub hidden: usize,
    /// Channels inside a layer's feed-forward part
    #[arg(long, default_value_t = 14336)]
    pub ffn: usize,
    /// Query heads
    #[arg(long, default_value_t = 32)]
    pub heads: usize,
    /// Key and value heads
    #[arg(long, default_value_t = 8)]
    pub kv_heads: usize,
    /// Words; `run` and `compare` must be told the same number
    #[arg(long, default_value_t = 128_256)]
    pub vocabulary: usize,
}

/// Tensors of one file, in order: name and shape.
type Tensors = Vec<(String, Vec<usize>)>;

/// Numbers of the pattern that fills all weights: a prime, so that rows of a matrix differ.
const FEW: usize = 65_537;
/// How often it stands in the buffer that is written: 32 MiB.
const COPIES: usize = 256;
/// Standard deviation of weights.
const DEVIATION: f64 = 0.02;
/// Files that are written at once.
const WRITERS: usize = 8;

impl Shape {
    fn checked(&self) -> Result<()> {
        let Self {
            hidden,
            heads,
            kv_heads,
            ..
        } = *self;
        let all = [
            self.layers,
            hidden,
            self.ffn,
            heads,
            kv_heads,
            self.vocabulary,
        ];
        ensure!(
            all.iter().all(|n| *n > 0) && hidden % heads == 0 && heads % kv_heads == 0,
            "there is no model with hidden {hidden}, heads {heads}, kv-heads {kv_heads}: all numbers must be above 0, heads \
             divide hidden, and kv-heads divide heads"
        );
        Ok(())
    }

    fn config(&self) -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "torch_dtype": "bfloat16", "hidden_size": self.hidden, "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers, "head_dim": self.hidden / self.heads,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0, "tie_word_embeddings": false, "bos_token_id": 0, "eos_token_id": 1,
        })
    }

    /// One word `wN` for each token; the first three are begin, end and unknown.
    fn tokenizer(&self) -> Value {
        let words: Map<String, Value> = (0..self.vocabulary)
            .map(|i| (format!("w{i}"), json!(i)))
            .collect();
        json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null,
            "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
            "model": {"type": "WordLevel", "vocab": words, "unk_token": "w2"},
        })
    }

    /// The tensors of each file: one for each layer, and one for what stands before and after them.
    fn files(&self) -> Vec<Tensors> {
        let (h, kv) = (self.hidden, self.kv_heads * (self.hidden / self.heads));
        let parts = [
            ("input_layernorm", vec![h]),
            ("post_attention_layernorm", vec![h]),
            ("self_attn.q_proj", vec![h, h]),
            ("self_attn.k_proj", vec![kv, h]),
            ("self_attn.v_proj", vec![kv, h]),
            ("self_attn.o_proj", vec![h, h]),
            ("mlp.gate_proj", vec![self.ffn, h]),
            ("mlp.up_proj", vec![self.ffn, h]),
            ("mlp.down_proj", vec![h, self.ffn]),
        ];
        let layer = |i: usize| {
            let tensor = |(part, shape): &(&str, Vec<usize>)| {
                (format!("model.layers.{i}.{part}.weight"), shape.clone())
            };
            parts.iter().map(tensor).collect()
        };
        let ends = vec![
            (
                "model.embed_tokens.weight".to_owned(),
                vec![self.vocabulary, h],
            ),
            ("model.norm.weight".to_owned(), vec![h]),
            ("lm_head.weight".to_owned(), vec![self.vocabulary, h]),
        ];
        (0..self.layers).map(layer).chain([ends]).collect()
    }
}

/// Write the model into a folder, which is made; bytes of its weights.
///
/// # Errors
/// If there is no such model, or a file cannot be written.
pub fn write(folder: &Path, shape: &Shape) -> Result<usize> {
    shape.checked()?;
    std::fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    let put = |name: &str, value: &Value| {
        let path = folder.join(name);
        std::fs::write(&path, value.to_string())
            .with_context(|| format!("writing {}", path.display()))
    };
    put("config.json", &shape.config())?;
    put("tokenizer.json", &shape.tokenizer())?;
    let template = "{% for m in messages %}{{ m['content'] }}{% endfor %}";
    let tokenizer = json!({"chat_template": template, "eos_token": "w1", "bos_token": "w0"});
    put("tokenizer_config.json", &tokenizer)?;
    let (files, pattern) = (shape.files(), pattern());
    let next = AtomicUsize::new(0);
    let work = || -> Result<usize> {
        let mut bytes = 0;
        while let Some((i, tensors)) =
            Some(next.fetch_add(1, Relaxed)).and_then(|i| Some((i, files.get(i)?)))
        {
            let path = folder.join(format!(
                "model-{:05}-of-{:05}.safetensors",
                i + 1,
                files.len()
            ));
            bytes += save(&path, tensors, &pattern)
                .with_context(|| format!("writing {}", path.display()))?;
        }
        Ok(bytes)
    };
    let writers = std::thread::available_parallelism().map_or(1, |n| n.get().min(WRITERS));
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..writers).map(|_| scope.spawn(work)).collect();
        let written = writers.into_iter().map(|writer| writer.join());
        written
            .map(|bytes| bytes.unwrap_or_else(|_| panic!("a writer panicked")))
            .sum()
    })
}

/// The same few numbers over and over. A bf16 is the upper half of an f32.
fn pattern() -> Vec<u8> {
    let mut draw = Draw::new(1, 0);
    let number = |_| ((draw.gaussian(DEVIATION) as f32).to_bits() >> 16) as u16;
    let few: Vec<u8> = (0..FEW).map(number).flat_map(u16::to_le_bytes).collect();
    few.repeat(COPIES)
}

/// A safetensors file; bytes of its tensors.
fn save(path: &Path, tensors: &Tensors, pattern: &[u8]) -> Result<usize> {
    let (mut header, mut end) = (Map::new(), 0);
    for (name, shape) in tensors {
        let begin = end;
        end += 2 * shape.iter().product::<usize>();
        let tensor = json!({"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]});
        header.insert(name.clone(), tensor);
    }
    let mut text = Value::Object(header).to_string().into_bytes();
    // Tensors begin at a multiple of 8, as other writers of this format have it.
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut file = File::create(path)?;
    file.write_all(&(text.len() as u64).to_le_bytes())?;
    file.write_all(&text)?;
    let mut left = end;
    while left > 0 {
        let part = &pattern[..left.min(pattern.len())];
        file.write_all(part)?;
        left -= part.len();
    }
    Ok(end)
}
