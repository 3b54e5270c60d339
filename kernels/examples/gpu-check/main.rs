//! Judges the CUDA kernels on the GPU at hand: first that they agree with the scalar code, then how fast they are.
//!
//! `gpu-check [--quick] [--no-speed | --speed-only [--only head_dim,gqa,batch,depth]] [--out FILE.json]`; with `--prompts
//! [--sweep]` prompts alone. Needs an NVIDIA driver and nothing else.

mod conformance;
mod paint;
mod prompt_speed;
mod prompts;
mod speed;

use std::sync::Arc;

use anyhow::{Context, Result};
use cudarc::driver::{CudaContext, CudaStream};
use ott_kernels::device::{self, Dtype, Kernels};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let has = |name: &str| arguments.iter().any(|a| a == name);
    let context = CudaContext::new(0).context("no NVIDIA GPU, or no driver, was found")?;
    // SAFETY: everything runs on one stream, so nothing has to wait for an event.
    unsafe { context.disable_event_tracking() };
    let stream: Arc<CudaStream> = context.new_stream()?;
    let kernels = Kernels::new(&stream)?;
    println!("{}", context.name()?);
    let dtypes = [Dtype::F16, Dtype::Bf16, Dtype::F32];
    if !has("--speed-only") {
        if !has("--prompts") {
            conformance::run(&kernels, has("--quick"))?;
        }
        prompts::judge(&kernels, has("--quick"), &dtypes)?;
        println!("prompts: all cases agree");
    }
    if has("--no-speed") {
        return Ok(());
    }
    let report = match has("--prompts") {
        true => prompt_speed::run(&kernels, has("--sweep"))?,
        false => speed::run(&kernels, has("--quick"), only(&arguments)?)?,
    };
    if let Some(at) = arguments.iter().position(|a| a == "--out") {
        let path = arguments.get(at + 1).context("--out names a file")?;
        std::fs::write(path, serde_json::to_string_pretty(&report)?)?;
    }
    Ok(())
}

fn only(arguments: &[String]) -> Result<Option<[usize; 4]>> {
    let Some(at) = arguments.iter().position(|a| a == "--only") else {
        return Ok(None);
    };
    let cell = arguments.get(at + 1).context("--only names a cell")?;
    let numbers: Vec<usize> = cell.split(',').map(str::parse).collect::<Result<_, _>>()?;
    let numbers = numbers.try_into().ok();
    Ok(Some(numbers.context("a cell is head_dim,gqa,batch,depth")?))
}
