//! How long one layer's attention of a prompt takes, by its past and its new tokens, in bf16.

use anyhow::{ensure, Result};
use cudarc::driver::CudaSlice;
use half::{bf16, f16};
use ott_kernels::abi::{Fresh, Prompt};
use ott_kernels::blocks::{Blocks, Refused, Row, RowPlan};
use ott_kernels::device::{address, Attention, DeviceLayer, DevicePlan, Dtype, Kernels};
use ott_kernels::plan::Plan;
use serde_json::{json, Value};

use crate::paint::{keys, values, Noise};
use crate::speed::{copy_within, fresh, layer_spec, time, GROUP, RUNS};

const KV_HEADS: usize = 8;
/// Tokens that are sealed; longer pasts have these pages again.
const SEALED: usize = 4096;
/// Past and new tokens, and what flash attention in PyTorch takes over bf16 keys on an H100, head_dim 128, GQA 4,
/// milliseconds.
const CELLS: [(usize, usize, Option<f64>); 8] = [
    (4096, 512, Some(0.142)),
    (4096, 1024, Some(0.257)),
    (32768, 1024, Some(1.57)),
    (32768, 4096, Some(6.68)),
    (131_072, 1024, Some(6.281)),
    (32768, 16, None),
    (4096, 1536, None),
    (0, 4096, None),
];

/// `sweep`: contexts cut into 1 to 4 parts too.
///
/// # Errors
/// If the driver fails.
pub fn run(kernels: &Kernels, sweep: bool) -> Result<Value> {
    println!("prompts in bf16, one layer, {KV_HEADS} kv heads: ms (min..max)");
    let mut cells = Vec::new();
    for (options, dim, ratio) in [
        ("", 128, 4),
        ("", 64, 4),
        ("", 128, 1),
        ("", 128, 8),
        ("3bit", 128, 4),
        ("4bit", 128, 4),
    ] {
        for (past, new, flash) in CELLS {
            let is_shape = (options, dim, ratio) == ("", 128, 4);
            if !(is_shape || (past, new) == (32768, 1024)) {
                continue;
            }
            let setting = Setting::new(kernels, options, dim, ratio, past, new)?;
            let flash = flash.filter(|_| is_shape);
            let mut splits = vec![None];
            splits.extend((1..=4).filter(|_| sweep).map(Some));
            for splits in splits {
                cells.push(setting.cell(splits, flash)?);
            }
        }
    }
    Ok(json!({ "prompts": cells }))
}

/// A layer with a past, and new tokens.
struct Setting<'a> {
    kernels: &'a Kernels,
    name: String,
    layer: DeviceLayer,
    plan: DevicePlan,
    new: [CudaSlice<bf16>; 3],
    out: CudaSlice<u16>,
    shape: (usize, usize, usize, usize),
}

fn wide(numbers: Vec<f16>) -> Vec<bf16> {
    let wide = |x: f16| bf16::from_f32(x.to_f32());
    numbers.into_iter().map(wide).collect()
}

impl<'a> Setting<'a> {
    fn new(
        kernels: &'a Kernels,
        options: &str,
        dim: usize,
        ratio: usize,
        past: usize,
        new: usize,
    ) -> Result<Self> {
        let stream = kernels.stream();
        let spec = layer_spec(options, KV_HEADS, dim)?;
        let shape = crate::conformance::shape(&spec);
        // A window as long as a prompt's: the rest of a group and the residual.
        let pages = past.saturating_sub(spec.config.residual) / GROUP;
        let num_blocks = 2 + (past.max(SEALED) + new) / GROUP;
        let chunks = 2 * (2 * GROUP + spec.config.residual) / 32;
        let num_heads = KV_HEADS * ratio;
        let layer = DeviceLayer::new(kernels, shape, Dtype::Bf16, num_heads, num_blocks, chunks)?;
        let mut noise = Noise::new(past as u64 + 1);
        let mut paint = |heads: usize, tokens: usize, is_key: bool| -> Result<CudaSlice<bf16>> {
            let numbers = match is_key {
                true => keys(&mut noise, heads, tokens, dim),
                false => values(&mut noise, heads * tokens * dim),
            };
            Ok(stream.clone_htod(&wide(numbers))?)
        };
        let (k, v) = (
            paint(KV_HEADS, SEALED, true)?,
            paint(KV_HEADS, SEALED, false)?,
        );
        let table: Vec<usize> = (1..num_blocks).collect();
        let mut blocks = Blocks::new(num_blocks, chunks, GROUP, spec.config.residual);
        let row = Row {
            seq: 1,
            past: 0,
            new: SEALED,
            table: &table,
        };
        let state = blocks.begin(&[row], |_| Ok::<_, Refused>(()))?;
        let plan = DevicePlan::upload(&Plan::new(&state, GROUP, 1, 1), 1, stream)?;
        let of = |x: &CudaSlice<bf16>| fresh(address(x, stream), SEALED, dim);
        layer.append(&plan, Fresh::NOTHING, of(&k), of(&v))?;
        ensure!(plan.faults(stream)? == [None], "the past holds bad numbers");
        let sealed = state[0].pages;
        let places = KV_HEADS * layer.shape.outliers;
        for block in sealed + 1..num_blocks {
            // Those of the later half, which have as few traced tokens as a long text.
            let from = 1 + sealed / 2 + (block - 1) % (sealed - sealed / 2);
            copy_within(&layer.pages, from, block, layer.shape.page_bytes(), stream)?;
            copy_within(&layer.places, from, block, places, stream)?;
        }
        let row = RowPlan {
            seq: 1,
            past,
            new,
            table,
            pages_before: pages,
            pages: (past + new).saturating_sub(spec.config.residual) / GROUP,
            chunks_before: state[0].chunks.clone(),
            chunks: state[0].chunks.clone(),
        };
        let plan = Plan::new(&[row], GROUP, 1, 1);
        Ok(Self {
            kernels,
            name: format!("{options:6} head {dim:3} gqa {ratio} past {past:6} new {new:5}"),
            plan: DevicePlan::upload(&plan, 1, stream)?,
            new: [
                paint(num_heads, new, false)?,
                paint(KV_HEADS, new, true)?,
                paint(KV_HEADS, new, false)?,
            ],
            out: stream.alloc_zeros(num_heads * new * dim)?,
            layer,
            shape: (dim, ratio, past, new),
        })
    }

    fn cell(&self, splits: Option<usize>, flash: Option<f64>) -> Result<Value> {
        let stream = self.kernels.stream();
        let (dim, ratio, past, new) = self.shape;
        let [q, k, v] = [0, 1, 2].map(|i| fresh(address(&self.new[i], stream), new, dim));
        let prompt = Prompt {
            q,
            k,
            v,
            out: address(&self.out, stream),
            sums: 0,
            tokens: new as u32,
            splits: 1,
            scale: std::f32::consts::LOG2_E / (dim as f32).sqrt(),
            softcap: 0.0,
        };
        let mut times = time(stream, || match splits {
            None => self.layer.prompt(&self.plan, prompt),
            some => {
                let kernel = Attention::Narrow;
                self.layer.prompt_by(kernel, &self.plan, prompt, some)
            }
        })?;
        times.sort_by(f64::total_cmp);
        let (median, least, most) = (times[RUNS / 2], times[0], times[RUNS - 1]);
        let seen = (past + new / 2) as f64;
        let flops = 4.0 * new as f64 * seen * (KV_HEADS * ratio * dim) as f64;
        let beside = flash.map_or(String::new(), |f| {
            format!(", {:.2} of flash's {f}", median * 1e3 / f)
        });
        let cut = splits.map_or("as planned".to_string(), |s| format!("{s} parts"));
        println!(
            "{} {cut:10}: {:8.3} ({:.3}..{:.3}), {:4.0} TFLOP/s{beside}",
            self.name,
            median * 1e3,
            least * 1e3,
            most * 1e3,
            flops / median / 1e12,
        );
        Ok(json!({
            "setting": self.name, "head_dim": dim, "gqa": ratio, "past": past, "new": new, "splits": splits,
            "seconds": median, "least": least, "most": most, "flops": flops / median, "flash_ms": flash,
        }))
    }
}
