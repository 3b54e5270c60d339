//! All kernels, by the suite that judges them on a GPU.

use std::process::Command;
use std::sync::Arc;

use anyhow::Result;

use crate::compile::{library, sanitizer, Build, Edit, Watch};
use crate::conformance;
use crate::device::{Dtype, Kernels};
use crate::driver::CudaContext;
use crate::prompts;

/// Architectures: copies by threads, and by the engine. Nothing else in the kernels depends on it.
pub const THREADS_COPY: u32 = 800;
pub const ENGINE_COPIES: u32 = 900;

/// Kernels with changes, on a machine with few multiprocessors or many, so that contexts are cut in other places.
pub fn kernels(arch: u32, without: &[&str], edits: &[Edit<'_>], seed: u64) -> Result<Kernels> {
    Kernels::new(&machine(arch, without, edits, seed)?.new_stream()?)
}

fn machine(arch: u32, without: &[&str], edits: &[Edit<'_>], seed: u64) -> Result<Arc<CudaContext>> {
    let build = Build {
        folder: "cuda",
        arch,
        watch: Watch::of_environment()?,
        without,
        edits,
    };
    let multiprocessors = [2, 16, 132][seed as usize % 3];
    Ok(CudaContext::on_host(
        &library(&build)?,
        multiprocessors,
        seed << 32,
    )?)
}

fn agree(arch: u32, short: bool, dtypes: &[Dtype], seed: u64) {
    let kernels = kernels(arch, &[], &[], seed).expect("compiles");
    conformance::judge(&kernels, short, dtypes).expect("the kernels agree with the scalar code");
}

#[test]
fn agree_copies_by_threads() {
    agree(THREADS_COPY, true, &[Dtype::F16, Dtype::F32], 1);
}

#[test]
fn agree_copies_by_the_engine() {
    agree(ENGINE_COPIES, true, &[Dtype::F16, Dtype::Bf16], 2);
}

#[test]
fn prompts_agree() {
    let kernels = kernels(THREADS_COPY, &[], &[], 4).expect("compiles");
    prompts::judge(&kernels, true, &[Dtype::F16, Dtype::Bf16, Dtype::F32]).expect("prompts agree");
}

/// A new device may have less shared memory than the newest architecture that was compiled: what asks for more is left out.
#[test]
fn prompts_agree_where_shared_memory_is_small() {
    let machine = machine(THREADS_COPY, &[], &[], 5).expect("compiles");
    machine.have_shared(99 << 10);
    let stream = machine.new_stream().expect("a stream");
    let kernels = Kernels::new(&stream).expect("loads");
    prompts::judge(&kernels, true, &[Dtype::F16]).expect("prompts agree");
}

/// All cases and types, in `OTT_SHIM_SEEDS` (1) orders of threads.
#[test]
#[ignore = "minutes"]
fn agree_everywhere() {
    let seeds = std::env::var("OTT_SHIM_SEEDS").ok();
    let seeds = seeds.and_then(|s| s.parse().ok()).unwrap_or(1);
    for seed in 10..10 + seeds {
        for arch in [THREADS_COPY, ENGINE_COPIES] {
            agree(arch, false, &[Dtype::F16, Dtype::Bf16, Dtype::F32], seed);
        }
    }
}

/// What [`addresses_are_inside`] and [`accesses_are_ordered`] start.
#[test]
#[ignore = "part of others"]
fn watched() {
    for arch in [THREADS_COPY, ENGINE_COPIES] {
        let kernels = kernels(arch, &[], &[], 3).expect("compiles");
        let dtypes = [Dtype::F16, Dtype::F32];
        conformance::judge(&kernels, true, &dtypes)
            .expect("the kernels agree with the scalar code");
    }
}

#[test]
#[ignore = "minutes"]
fn addresses_are_inside() {
    let (good, words) = watch(Watch::Addresses, "kernels::watched", None);
    assert!(good, "{words}");
    let test = "detectors::fault_of_the_environment";
    let (good, words) = watch(Watch::Addresses, test, Some("beyond_an_address"));
    assert!(!good && words.contains("global-buffer-overflow"), "{words}");
}

#[test]
#[ignore = "minutes"]
fn accesses_are_ordered() {
    let (good, words) = watch(Watch::Races, "kernels::watched", None);
    assert!(good, "{words}");
    let race = "data race";
    for fault in [
        "no_barrier_between_warps",
        "no_barrier_in_a_warp",
        "no_second_barrier",
    ] {
        let (good, words) = watch(
            Watch::Races,
            "detectors::fault_of_the_environment",
            Some(fault),
        );
        assert!(!good && words.contains(race), "{fault}: {words}");
    }
    let (good, words) = watch(
        Watch::Races,
        "detectors::fault_of_the_environment",
        Some("nothing"),
    );
    assert!(good, "{words}");
}

/// One of these tests in a process of its own, which a sanitizer's library is loaded into first.
fn watch(watch: Watch, test: &str, fault: Option<&str>) -> (bool, String) {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args([
        "--exact",
        test,
        "--ignored",
        "--nocapture",
        "--test-threads",
        "1",
    ]);
    let sanitizer = sanitizer(watch).expect("a compiler with sanitizers");
    command
        .env("LD_PRELOAD", sanitizer)
        .env("OTT_SHIM", watch.name());
    // The Rust side keeps what it loaded until the end; builds for two architectures have variables of the same names.
    let addresses = "detect_leaks=0:detect_odr_violation=0";
    command.env("ASAN_OPTIONS", addresses).env(
        "TSAN_OPTIONS",
        "halt_on_error=1:ignore_noninstrumented_modules=1",
    );
    command.envs(fault.map(|fault| ("OTT_SHIM_FAULT", fault)));
    let output = command.output().expect("starts");
    let words = [output.stdout, output.stderr].concat();
    (
        output.status.success(),
        String::from_utf8_lossy(&words).into_owned(),
    )
}
