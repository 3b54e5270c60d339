//! A real model answers with its cache on the GPU, and on the CPU, and with a plain cache in full precision: what differs,
//! and how fast it is when the cache has only so many bytes.
//!
//! `gpu-model MODEL.gguf TOKENS.txt [OPTIONS]`; the file holds a prompt as token ids. No engine: what mistral.rs does with
//! blocks is done here in its plainest form, through the same seam.

mod llama;
mod plain;

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use llama::{causal, Llama};
use mistralrs_kv_backend::{
    KvAttn, KvBackendProvider, KvCacheBackend, KvLayer, KvPlan, KvRow, KvShape,
};
use ott_backend::backend::Inspect;
use plain::Plain;

const GROUP: usize = 128;
/// Tokens that a model says.
const ANSWER: usize = 96;
/// Bytes that caches get when throughput is measured.
const BUDGET: usize = 2 << 30;
/// Context of each sequence then, and measured steps.
const DEPTH: usize = 4096;
const STEPS: usize = 24;

/// A model with a cache behind the seam.
struct Cached<'a> {
    model: &'a Llama,
    cache: Arc<dyn KvCacheBackend>,
    inspect: Arc<dyn Inspect>,
    blocks_per_seq: usize,
}

fn shape(model: &Llama, options: &str, max_seqs: usize) -> KvShape {
    let layer = KvLayer {
        num_heads: model.num_heads,
        num_kv_heads: model.num_kv_heads,
        k_dim: model.dim,
        v_dim: model.dim,
        device: model.device.clone(),
    };
    KvShape {
        layers: vec![layer; model.num_layers],
        dtype: model.dtype,
        block_size: GROUP,
        max_seq_len: 8192,
        max_seqs,
        options: options.to_owned(),
    }
}

impl<'a> Cached<'a> {
    fn new(model: &'a Llama, options: &str, seqs: usize, tokens: usize) -> Result<Self> {
        let blocks_per_seq = tokens.div_ceil(GROUP);
        let provider = ott_backend::provider();
        let cache = provider.create(shape(model, options, seqs), 1 + seqs * blocks_per_seq)?;
        let inspect = provider.caches().pop().context("it was made")?;
        for seq in 0..seqs {
            cache.allocated(seq, &table(seq, blocks_per_seq));
        }
        Ok(Self {
            model,
            cache,
            inspect,
            blocks_per_seq,
        })
    }

    /// Logits after the tokens of sequences `first..`, which are behind `past` others.
    fn step(&self, tokens: &[Vec<u32>], first: usize, past: usize, prompt: bool) -> Result<Tensor> {
        let row = |i: usize| KvRow {
            seq: first + i,
            past,
            new: tokens[i].len(),
            blocks: table(first + i, self.blocks_per_seq),
        };
        let step = self.cache.begin_step(KvPlan {
            prompt,
            block_size: GROUP,
            rows: (0..tokens.len()).map(row).collect(),
        })?;
        let attn = KvAttn {
            scale: 1.0 / (self.model.dim as f32).sqrt(),
            softcap: None,
        };
        let past = vec![past; tokens.len()];
        let logits = self.model.forward(tokens, &past, &mut |layer, q, k, v| {
            if !prompt {
                return Ok(step.decode(layer, q, k, v, attn)?);
            }
            // The same attention for prompts everywhere, so that what differs is the cache's.
            step.append(layer, q, k, v)?;
            causal(q, k, v)
        })?;
        let faults = self.cache.end_step()?;
        anyhow::ensure!(faults.is_empty(), "{faults:?}");
        Ok(logits)
    }
}

fn table(seq: usize, blocks: usize) -> Vec<usize> {
    (1 + seq * blocks..1 + (seq + 1) * blocks).collect()
}

/// Greedy answer, or `given` tokens, with the log-probabilities of every token said.
fn say(
    prompt: &[u32],
    given: Option<&[u32]>,
    mut step: impl FnMut(&[u32], usize) -> Result<Tensor>,
) -> Result<(Vec<u32>, Vec<Vec<f32>>)> {
    let (mut said, mut seen) = (Vec::new(), Vec::new());
    let mut logits = step(prompt, 0)?;
    for i in 0..ANSWER {
        let last = logits.get(0)?.get(logits.dim(1)? - 1)?.to_vec1::<f32>()?;
        let best = (0..last.len()).max_by(|a, b| last[*a].total_cmp(&last[*b]));
        said.push(best.context("a vocabulary")? as u32);
        seen.push(last);
        let next = given.map_or(said[i], |given| given[i]);
        logits = step(&[next], prompt.len() + i)?;
    }
    Ok((said, seen))
}

/// Mean Kullback-Leibler divergence of `other` from `base`, in nats, and how often the first choice is the same.
fn divergence(base: &[Vec<f32>], other: &[Vec<f32>]) -> (f64, f64) {
    let logs = |x: &[f32]| -> Vec<f64> {
        let max = x.iter().fold(f32::NEG_INFINITY, |m, x| m.max(*x));
        let sum: f64 = x.iter().map(|x| f64::from(x - max).exp()).sum();
        x.iter().map(|x| f64::from(x - max) - sum.ln()).collect()
    };
    let first = |x: &[f32]| (0..x.len()).max_by(|a, b| x[*a].total_cmp(&x[*b]));
    let (mut sum, mut same) = (0.0, 0);
    for (base, other) in base.iter().zip(other) {
        same += usize::from(first(base) == first(other));
        let (b, o) = (logs(base), logs(other));
        sum += b
            .iter()
            .zip(&o)
            .map(|(b, o)| b.exp() * (b - o))
            .sum::<f64>();
    }
    (sum / base.len() as f64, same as f64 / base.len() as f64)
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [path, tokens, rest @ ..] = arguments.as_slice() else {
        anyhow::bail!("gpu-model MODEL.gguf TOKENS.txt [OPTIONS]")
    };
    let options = rest.first().map_or("", String::as_str);
    let prompt: Result<Vec<u32>, _> = std::fs::read_to_string(tokens)?
        .split_whitespace()
        .map(str::parse)
        .collect();
    let prompt = prompt?;
    let gpu = Device::new_cuda(0)?;
    let on_gpu = Llama::load(path, DType::F16, &gpu, DEPTH + STEPS + 8)?;
    let on_cpu = Llama::load(path, DType::F16, &Device::Cpu, DEPTH + STEPS + 8)?;
    answers(&on_gpu, &on_cpu, &prompt, options)?;
    throughput(&on_gpu, &prompt, options)
}

fn answers(on_gpu: &Llama, on_cpu: &Llama, prompt: &[u32], options: &str) -> Result<()> {
    let room = prompt.len() + ANSWER;
    let mut plain = Plain::new(on_gpu, 1, room)?;
    let whole = say(prompt, None, |tokens, past| {
        plain.step(&[tokens.to_vec()], past)
    })?;
    println!("f16 on the GPU: {:?}", whole.0);
    let gpu = Cached::new(on_gpu, options, 1, room)?;
    println!("{}", gpu.cache.describe());
    let started = Instant::now();
    let free = say(prompt, None, |t, past| {
        gpu.step(&[t.to_vec()], 0, past, past == 0)
    })?;
    println!(
        "ott on the GPU, {:.1} s: {:?}",
        started.elapsed().as_secs_f64(),
        free.0
    );

    // Now all say the same tokens.
    let again = Cached::new(on_gpu, options, 1, room)?;
    let gpu_said = say(prompt, Some(&whole.0), |t, past| {
        again.step(&[t.to_vec()], 0, past, past == 0)
    })?;
    let cpu = Cached::new(on_cpu, options, 1, room)?;
    let started = Instant::now();
    let cpu_said = say(prompt, Some(&whole.0), |t, past| {
        cpu.step(&[t.to_vec()], 0, past, past == 0)
    })?;
    println!(
        "ott on the CPU took {:.1} s",
        started.elapsed().as_secs_f64()
    );
    for (name, a, b) in [
        ("ott on the GPU from f16 on the GPU", &whole, &gpu_said),
        ("ott on the CPU from f16 on the GPU", &whole, &cpu_said),
        ("ott on the GPU from ott on the CPU", &cpu_said, &gpu_said),
    ] {
        let (nats, same) = divergence(&a.1, &b.1);
        println!(
            "{name}: KL divergence {nats:.5} nats, first choice the same {:.1} %",
            same * 100.0
        );
    }
    let (mut bytes, mut differ, mut pages, mut whole_pages) = (0usize, 0usize, 0usize, 0usize);
    for layer in 0..on_gpu.num_layers {
        for block in 1..=room.div_ceil(GROUP) {
            let Some((a, b)) = again
                .inspect
                .page(layer, block)
                .zip(cpu.inspect.page(layer, block))
            else {
                continue;
            };
            let different = a.iter().zip(&b).filter(|(a, b)| a != b).count();
            (pages, bytes, differ) = (pages + 1, bytes + a.len(), differ + different);
            whole_pages += usize::from(different == 0);
        }
    }
    println!(
        "pages of GPU and CPU, whose keys and values come from different matrix products: {pages}, {whole_pages} of them \
         equal, {:.3} % of bytes differ",
        100.0 * differ as f64 / bytes.max(1) as f64
    );
    for layer in [0, 2, on_gpu.num_layers - 1] {
        let stats = [&again, &cpu].map(|c| c.inspect.stats(layer));
        println!(
            "layer {layer}: GPU {:?}\n         CPU {:?}",
            stats[0], stats[1]
        );
    }
    Ok(())
}

/// Tokens per second when the cache may take [`BUDGET`] bytes: as many sequences of [`DEPTH`] tokens as fit.
fn throughput(model: &Llama, prompt: &[u32], options: &str) -> Result<()> {
    let room = DEPTH + STEPS;
    let tokens: Vec<u32> = prompt.iter().copied().cycle().take(DEPTH).collect();
    let whole = room * model.num_layers * model.num_kv_heads * model.dim * 2 * 2;
    let seqs = (BUDGET / whole).max(1);
    let plain = {
        let mut plain = Plain::new(model, seqs, room)?;
        plain.fill(&tokens)?;
        rate(seqs, &model.device, |tokens, past| plain.step(tokens, past))?
    };
    println!(
        "f16: {seqs} sequences of {DEPTH} in {} MiB: {plain:.0} tokens/s",
        (seqs * whole) >> 20
    );
    let provider = ott_backend::provider();
    let fits = |seqs: usize| -> Result<bool> {
        let memory = provider.memory(&shape(model, options, seqs))?;
        Ok(memory.fixed + memory.per_block * (1 + seqs * room.div_ceil(GROUP)) <= BUDGET)
    };
    let mut most = seqs;
    while fits(most + 1)? {
        most += 1;
    }
    for seqs in [seqs, most] {
        let cached = Cached::new(model, options, seqs, room)?;
        // One prompt at a time, as the host does with long ones.
        for seq in 0..seqs {
            cached.step(std::slice::from_ref(&tokens), seq, 0, true)?;
        }
        let ott = rate(seqs, &model.device, |tokens, past| {
            cached.step(tokens, 0, past, false)
        })?;
        println!(
            "ott: {seqs} sequences of {DEPTH} in {} MiB: {ott:.0} tokens/s, {:.2} times as many",
            cached.cache.allocated_bytes() >> 20,
            ott / plain
        );
    }
    Ok(())
}

/// Tokens per second of steps of one token a sequence.
fn rate(
    seqs: usize,
    device: &Device,
    mut step: impl FnMut(&[Vec<u32>], usize) -> Result<Tensor>,
) -> Result<f64> {
    let tokens = vec![vec![42u32]; seqs];
    let warm = STEPS / 3;
    let mut started = Instant::now();
    for i in 0..STEPS {
        if i == warm {
            device.synchronize()?;
            started = Instant::now();
        }
        step(&tokens, DEPTH + i)?;
    }
    device.synchronize()?;
    Ok((seqs * (STEPS - warm)) as f64 / started.elapsed().as_secs_f64())
}
