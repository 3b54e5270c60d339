//! How long decode attention takes, beside a copy of the same bytes; and how long a prompt takes to be sealed.

use std::sync::Arc;

use anyhow::{ensure, Context, Result};
use cudarc::driver::sys::{CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaSlice, CudaStream};
use half::f16;
use ott_backend::cache::LayerSpec;
use ott_backend::{CpuOps, OttConfig, PageLayout};
use ott_kernels::abi::{Fresh, Query, PARTIAL};
use ott_kernels::blocks::{Blocks, Refused, Row, RowPlan};
use ott_kernels::device::{address, DeviceLayer, DevicePlan, Dtype, Kernels};
use ott_kernels::plan::Plan;
use serde_json::{json, Value};

use crate::paint::{keys, values, Noise};

pub const GROUP: usize = 128;
/// Bytes that layers must have together, so that no cell is read from the L2 cache.
const COLD: usize = 400 << 20;
/// Tokens of a prompt that is sealed.
const PROMPT: usize = 8192;
/// Measured runs; the median counts.
pub const RUNS: usize = 15;

/// `only`: one cell, for a profiler.
pub fn run(kernels: &Kernels, quick: bool, only: Option<[usize; 4]>) -> Result<Value> {
    if let Some([dim, ratio, batch, depth]) = only {
        let cell = cell(kernels, "", dim, 8, ratio, batch, depth)?;
        println!("{:.1} us", cell.median * 1e6);
        return Ok(json!({ "seconds": cell.median }));
    }
    let copy = copy_bandwidth(kernels.stream())?;
    println!("copy: {:.2} TB/s read and written", copy / 1e12);
    println!("head gqa  batch  depth      us  (min..max)       stored GB/s  of copy");
    let mut cells = Vec::new();
    let depths: &[usize] = &[1 << 10, 8 << 10, 32 << 10, 128 << 10];
    for (dim, ratio) in [(128, 4), (128, 1), (128, 8), (64, 4), (64, 7)] {
        for &batch in &[1usize, 8, 32, 64] {
            for &depth in depths {
                let total = batch * depth;
                if total > 2 << 20 || quick && ((dim, ratio) != (128, 4) || total > 1 << 20) {
                    continue;
                }
                let cell = cell(kernels, "", dim, 8, ratio, batch, depth)?;
                let share = cell.bytes as f64 / cell.median / copy;
                println!(
                    "{dim:4} {ratio:3} {batch:6} {depth:6} {:8.1}  ({:.1}..{:.1})  {:10.0}  {:5.0} %",
                    cell.median * 1e6,
                    cell.least * 1e6,
                    cell.most * 1e6,
                    cell.bytes as f64 / cell.median / 1e9,
                    share * 100.0
                );
                cells.push(json!({
                    "head_dim": dim, "gqa": ratio, "kv_heads": 8, "batch": batch, "depth": depth,
                    "seconds": cell.median, "least": cell.least, "most": cell.most,
                    "stored_bytes": cell.bytes, "of_copy": share,
                }));
            }
        }
    }
    let mut sealed = Vec::new();
    println!(
        "sealing a prompt of {PROMPT} tokens, one layer, 8 kv heads of 128, GQA 4: us (min..max)"
    );
    for options in [
        "paper,outliers=0",
        "paper",
        "clip=k,weigh=none",
        "weigh=none",
        "",
    ] {
        let times = sealing(kernels, options)?;
        let (median, least, most) = (times[RUNS / 2], times[0], times[RUNS - 1]);
        let micros = |seconds: f64| seconds * 1e6;
        println!(
            "{options:18} {:8.1}  ({:.1}..{:.1})",
            micros(median),
            micros(least),
            micros(most)
        );
        sealed.push(json!({
            "options": options, "tokens": PROMPT, "seconds": median, "least": least, "most": most,
        }));
    }
    Ok(json!({ "copy_bytes_per_second": copy, "cells": cells, "sealing": sealed }))
}

/// A layer that traces.
pub fn layer_spec(options: &str, kv_heads: usize, dim: usize) -> Result<LayerSpec> {
    let config = OttConfig::parse(options)?;
    Ok(LayerSpec {
        layer: 5,
        config,
        layout: PageLayout::new(&config, 5, kv_heads, dim, dim)?,
        ops: CpuOps::available()[0],
    })
}

/// New tokens of one row, `(heads, tokens, dim)`.
pub fn fresh(data: u64, tokens: usize, dim: usize) -> Fresh {
    Fresh {
        data,
        row: 0,
        head: (tokens * dim) as i64,
        token: dim as i64,
    }
}

/// Seconds that one layer takes to store a prompt, sorted.
fn sealing(kernels: &Kernels, options: &str) -> Result<Vec<f64>> {
    let (kv_heads, num_heads, dim) = (8, 32, 128);
    let stream = kernels.stream();
    let spec = layer_spec(options, kv_heads, dim)?;
    let config = spec.config;
    let shape = crate::conformance::shape(&spec);
    let (num_blocks, chunks) = (1 + PROMPT.div_ceil(GROUP), 2 * GROUP / 32);
    let layer = DeviceLayer::new(kernels, shape, Dtype::F16, num_heads, num_blocks, chunks)?;
    let mut noise = Noise::new(1);
    let k = stream.clone_htod(&keys(&mut noise, kv_heads, PROMPT, dim))?;
    let v = stream.clone_htod(&values(&mut noise, kv_heads * PROMPT * dim))?;
    let q = stream.clone_htod(&values(&mut noise, num_heads * PROMPT * dim))?;
    let table: Vec<usize> = (1..num_blocks).collect();
    let mut blocks = Blocks::new(num_blocks, chunks, GROUP, config.residual);
    let row = Row {
        seq: 1,
        past: 0,
        new: PROMPT,
        table: &table,
    };
    let rows = blocks.begin(&[row], |_| Ok::<_, Refused>(()))?;
    let plan = DevicePlan::upload(&Plan::new(&rows, GROUP, 1, 1), 1, stream)?;
    let of = |x: &CudaSlice<f16>| fresh(address(x, stream), PROMPT, dim);
    // The same pages again and again.
    let mut times = time(stream, || layer.append(&plan, of(&q), of(&k), of(&v)))?;
    ensure!(
        plan.faults(stream)? == [None],
        "the prompt holds bad numbers"
    );
    times.sort_by(f64::total_cmp);
    Ok(times)
}

struct Cell {
    median: f64,
    least: f64,
    most: f64,
    /// Bytes that one call must read.
    bytes: usize,
}

/// One layer's decode at a depth, over as many layers as keep the cache cold, in one graph.
fn cell(
    kernels: &Kernels,
    options: &str,
    dim: usize,
    kv_heads: usize,
    ratio: usize,
    batch: usize,
    depth: usize,
) -> Result<Cell> {
    let stream = kernels.stream();
    let spec = layer_spec(options, kv_heads, dim)?;
    let config = spec.config;
    let pages = (depth - config.residual) / GROUP;
    let num_blocks = 1 + batch * (pages + 1);
    let bytes = batch * pages * spec.layout.page_bytes();
    let copies = (COLD / bytes).clamp(1, 48);
    let chunks = batch * (GROUP + config.residual) / 32;
    let num_heads = kv_heads * ratio;

    // Pages and traced tokens of one sequence; then, in every block, those of its later half, so that there are as few
    // traced tokens as in a long sequence.
    let layer = || {
        DeviceLayer::new(
            kernels,
            crate::conformance::shape(&spec),
            Dtype::F16,
            num_heads,
            num_blocks,
            chunks,
        )
    };
    let layers: Vec<DeviceLayer> = (0..copies).map(|_| layer()).collect::<Result<_>>()?;
    let tokens = 8192.min(depth);
    let mut noise = Noise::new(depth as u64);
    let k = stream.clone_htod(&keys(&mut noise, kv_heads, tokens, dim))?;
    let v = stream.clone_htod(&values(&mut noise, kv_heads * tokens * dim))?;
    let table: Vec<usize> = (1..num_blocks).collect();
    let mut blocks = Blocks::new(num_blocks, chunks, GROUP, config.residual);
    let row = Row {
        seq: 1,
        past: 0,
        new: tokens,
        table: &table,
    };
    let state = blocks.begin(&[row], |_| Ok::<_, Refused>(()))?;
    let sealed = state[0].pages;
    let window = tokens - sealed * GROUP;
    let of_row = state[0].chunks.clone();
    let plan = DevicePlan::upload(&Plan::new(&state, GROUP, 1, 1), 1, stream)?;
    let fresh = |x: &CudaSlice<f16>| Fresh {
        data: address(x, stream),
        row: 0,
        head: (tokens * dim) as i64,
        token: dim as i64,
    };
    let page_bytes = spec.layout.page_bytes();
    let block_places = kv_heads * spec.layout.outliers;
    for layer in &layers {
        layer.append(&plan, Fresh::NOTHING, fresh(&k), fresh(&v))?;
        ensure!(
            plan.faults(stream)? == [None],
            "the prompt holds bad numbers"
        );
        for block in sealed + 1..num_blocks {
            let from = 1 + sealed / 2 + (block - 1) % (sealed - sealed / 2);
            copy_within(&layer.pages, from, block, page_bytes, stream)?;
            copy_within(&layer.places, from, block, block_places, stream)?;
        }
    }
    // All sequences share one window; its bytes are few.
    let tables: Vec<Vec<usize>> = (0..batch)
        .map(|r| {
            (0..pages)
                .map(|i| 1 + r * pages + i)
                .chain([num_blocks - 1])
                .collect()
        })
        .collect();
    let rows: Vec<RowPlan> = tables
        .into_iter()
        .zip(0..)
        .map(|(table, seq)| RowPlan {
            seq,
            past: pages * GROUP + window - 1,
            new: 1,
            table,
            pages_before: pages,
            pages,
            chunks_before: of_row.clone(),
            chunks: of_row.clone(),
        })
        .collect();
    let (lanes, slots) = layers[0].lanes_and_slots();
    let plan = DevicePlan::upload(&Plan::new(&rows, GROUP, lanes, slots), lanes, stream)?;
    let q = stream.clone_htod(&values(&mut noise, batch * num_heads * dim))?;
    let out = stream.alloc_zeros::<u16>(batch * num_heads * dim)?;
    let sums = stream.alloc_zeros::<f32>(plan.num_items * num_heads * (dim + PARTIAL))?;
    let query = Query {
        q: address(&q, stream),
        row: (num_heads * dim) as i64,
        head: dim as i64,
        out: address(&out, stream),
        sums: address(&sums, stream),
        arrived: 0,
        num_heads: num_heads as u32,
        scale: std::f32::consts::LOG2_E / (dim as f32).sqrt(),
        softcap: 0.0,
    };
    let repeats = copies.max(8).div_ceil(copies);
    stream.synchronize()?;
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
    for _ in 0..repeats {
        for layer in &layers {
            layer.decode(&plan, query, true)?;
        }
    }
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags)?.context("a graph")?;
    let calls = (repeats * copies) as f64;
    let mut times = time(stream, || Ok(graph.launch()?))?;
    times.iter_mut().for_each(|t| *t /= calls);
    times.sort_by(f64::total_cmp);
    Ok(Cell {
        median: times[RUNS / 2],
        least: times[0],
        most: times[RUNS - 1],
        bytes: bytes + batch * window * num_heads / ratio * dim * 4,
    })
}

pub fn copy_within<T: cudarc::driver::DeviceRepr>(
    slice: &CudaSlice<T>,
    from: usize,
    to: usize,
    len: usize,
    stream: &Arc<CudaStream>,
) -> Result<()> {
    let size = len * size_of::<T>();
    let base = address(slice, stream);
    let at = |i: usize| base + (i * size) as u64;
    // SAFETY: both ranges lie inside the slice and do not overlap.
    unsafe {
        cudarc::driver::result::memcpy_dtod_async(at(to), at(from), size, stream.cu_stream())
    }?;
    Ok(())
}

pub fn time(stream: &Arc<CudaStream>, run: impl Fn() -> Result<()>) -> Result<Vec<f64>> {
    (0..3).try_for_each(|_| run())?;
    let timed = Some(CUevent_flags::CU_EVENT_DEFAULT);
    (0..RUNS)
        .map(|_| {
            let start = stream.record_event(timed)?;
            run()?;
            let end = stream.record_event(timed)?;
            Ok(f64::from(start.elapsed_ms(&end)?) / 1e3)
        })
        .collect()
}

/// Bytes read and written per second by a large copy on the device.
fn copy_bandwidth(stream: &Arc<CudaStream>) -> Result<f64> {
    let bytes = 2usize << 30;
    let (from, to) = (
        stream.alloc_zeros::<u8>(bytes)?,
        stream.alloc_zeros::<u8>(bytes)?,
    );
    let (source, target) = (address(&from, stream), address(&to, stream));
    let mut times = time(stream, || {
        // SAFETY: both slices have `bytes` bytes.
        unsafe {
            cudarc::driver::result::memcpy_dtod_async(target, source, bytes, stream.cu_stream())
        }?;
        Ok(())
    })?;
    times.sort_by(f64::total_cmp);
    Ok(2.0 * bytes as f64 / times[RUNS / 2])
}
