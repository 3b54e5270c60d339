//! How long a prompt takes that hits a long prefix, on a GPU, and how much memory: one layer's attention and storing, of
//! the shape of Llama 3 8B in bf16. Beside it what the host did before the cache attended itself: one dense mask, keys and
//! values of the whole past, scores as one product.
//!
//! `cargo run --release -p ott-backend --features cuda --example prefix-hit -- 32768 1024`

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use candle_core::cuda_backend::cudarc::driver::result::mem_get_info;
use candle_core::{DType, Device, Tensor, D};
use mistralrs_kv_backend::{KvAttn, KvBackendProvider, KvLayer, KvPlan, KvRow, KvShape, KvStep};

const HEADS: usize = 32;
const KV_HEADS: usize = 8;
const DIM: usize = 128;
const GROUP: usize = 128;
const DTYPE: DType = DType::BF16;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let mut number = |default: usize| args.next().map_or(Ok(default), |n| n.parse());
    let (past, new) = (number(32768)? / GROUP * GROUP, number(1024)?);
    let device = Device::new_cuda(0)?;
    let total = past + new;
    let layer = KvLayer {
        num_heads: HEADS,
        num_kv_heads: KV_HEADS,
        k_dim: DIM,
        v_dim: DIM,
        device: device.clone(),
    };
    let shape = KvShape {
        layers: vec![layer],
        dtype: DTYPE,
        block_size: GROUP,
        max_seq_len: total,
        max_seqs: 8,
        options: String::new(),
    };
    let provider = ott_backend::provider();
    let answered = provider.memory(&shape)?.fixed;
    let blocks: Vec<usize> = (1..total.div_ceil(GROUP) + 2).collect();
    let cache = provider.create(shape, blocks.len() + 1)?;
    let plan = |seq, past, new| KvPlan {
        prompt: true,
        block_size: GROUP,
        rows: vec![KvRow {
            seq,
            past,
            new,
            blocks: blocks.clone(),
        }],
    };
    let noise = |heads: usize, tokens: usize| -> Result<Tensor> {
        let x = Tensor::randn(0f32, 1f32, (1, heads, tokens, DIM), &device)?;
        Ok(x.to_dtype(DTYPE)?)
    };
    cache.allocated(1, &blocks);
    let step = cache.begin_step(plan(1, 0, past))?;
    let (k, v) = (noise(KV_HEADS, past)?, noise(KV_HEADS, past)?);
    step.append(0, &noise(HEADS, past)?, &k, &v)?;
    ensure!(cache.end_step()?.is_empty(), "the prefix holds bad numbers");
    ensure!(cache.released(1, &blocks).is_empty(), "a block is lost");
    drop((step, k, v));
    let attn = KvAttn {
        scale: 1.0 / (DIM as f32).sqrt(),
        softcap: None,
    };
    let (q, k, v) = (
        noise(HEADS, new)?,
        noise(KV_HEADS, new)?,
        noise(KV_HEADS, new)?,
    );
    cache.allocated(2, &blocks[past / GROUP..]);
    let step = cache.begin_step(plan(2, past, new))?;
    println!(
        "past {past}, new {new}; fixed bytes answered: {} MiB",
        answered >> 20
    );
    let mut answers = Vec::new();
    for dense in [true, false] {
        let (mut times, mut peak, mut answer) = (Vec::new(), 0, None);
        for _ in 0..4 {
            device.synchronize()?;
            let watch = Watch::start(&device)?;
            let start = Instant::now();
            let out = match dense {
                true => densely(&*step, (&q, &k, &v), past, attn)?,
                false => step.prefill(0, &q, &k, &v, attn)?.context("it attends")?,
            };
            device.synchronize()?;
            times.push(start.elapsed().as_secs_f64() * 1e3);
            peak = watch.stop().max(peak);
            answer = Some(out);
        }
        // The first one loads kernels.
        times.remove(0);
        times.sort_by(f64::total_cmp);
        let name = if dense {
            "dense, as before"
        } else {
            "over pages"
        };
        println!(
            "{name:18} {:8.1} ms ({:.1} to {:.1}), peak {:5} MiB more",
            times[1],
            times[0],
            times[2],
            peak >> 20
        );
        answers.push(answer.context("an answer")?.to_dtype(DType::F32)?);
    }
    let off = (&answers[0] - &answers[1])?
        .abs()?
        .max_all()?
        .to_scalar::<f32>()?;
    let largest = answers[0].abs()?.max_all()?.to_scalar::<f32>()?;
    println!("largest difference {off:.1e} of {largest:.2}");
    Ok(())
}

/// What the host's attention did.
fn densely(
    step: &dyn KvStep,
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    past: usize,
    attn: KvAttn,
) -> Result<Tensor> {
    let new = q.dim(2)?;
    let (past_k, past_v) = step.past(0, 0, DTYPE)?;
    let k = Tensor::cat(&[&past_k, k], 2)?;
    let v = Tensor::cat(&[&past_v, v], 2)?;
    let mask: Vec<f32> = (0..new)
        .flat_map(|i| {
            (0..past + new).map(move |j| if j <= past + i { 0. } else { f32::NEG_INFINITY })
        })
        .collect();
    let mask = Tensor::from_vec(mask, (new, past + new), q.device())?.to_dtype(DTYPE)?;
    let repeat = |x: &Tensor| -> Result<Tensor> {
        let copies = vec![x; HEADS / KV_HEADS];
        let (_, _, tokens, dim) = x.dims4()?;
        Ok(Tensor::cat(&copies, 2)?.reshape((1, HEADS, tokens, dim))?)
    };
    let (k, v) = (repeat(&k)?, repeat(&v)?);
    let scores = (q.matmul(&k.t()?)? * f64::from(attn.scale))?.broadcast_add(&mask)?;
    let max = scores.max_keepdim(D::Minus1)?;
    let weights = scores.broadcast_sub(&max)?.exp()?;
    let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
    Ok(weights.matmul(&v)?)
}

/// The least free memory while something runs.
struct Watch {
    before: usize,
    least: Arc<AtomicUsize>,
    on: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<()>,
}

impl Watch {
    fn start(device: &Device) -> Result<Self> {
        let context = device.as_cuda_device()?.cuda_stream().context().clone();
        context.bind_to_thread()?;
        let before = mem_get_info()?.0;
        let (least, on) = (
            Arc::new(AtomicUsize::new(before)),
            Arc::new(AtomicBool::new(true)),
        );
        let (seen, going) = (Arc::clone(&least), Arc::clone(&on));
        let thread = std::thread::spawn(move || {
            let _ = context.bind_to_thread();
            while going.load(Relaxed) {
                if let Ok((free, _)) = mem_get_info() {
                    seen.fetch_min(free, Relaxed);
                }
                std::thread::sleep(Duration::from_micros(200));
            }
        });
        Ok(Self {
            before,
            least,
            on,
            thread,
        })
    }

    fn stop(self) -> usize {
        self.on.store(false, Relaxed);
        let _ = self.thread.join();
        self.before - self.least.load(Relaxed).min(self.before)
    }
}
