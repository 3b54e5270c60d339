//! Each kind of fault in a kernel of its own (`shim/broken`), and what the shim says of it.

use std::sync::Arc;

use crate::compile::{library, Build, Watch};
use crate::driver::{CudaContext, CudaStream, LaunchConfig, PushKernelArg};

const THREADS: u32 = 128;
/// Orders of threads that are tried: a race shows in one or the other.
const SEEDS: u64 = 24;

/// What a kernel did to `0, 1, 2, ..`.
fn launch(stream: &Arc<CudaStream>, name: &str) -> Result<Vec<u32>, String> {
    let of = |e: crate::driver::DriverError| e.to_string();
    let module = stream
        .context()
        .load_module(crate::nvrtc::Ptx)
        .map_err(of)?;
    let function = module
        .load_function(&format!("broken_{name}"))
        .map_err(of)?;
    let input: Vec<u32> = (0..THREADS).collect();
    let input = stream.clone_htod(&input).map_err(of)?;
    // SAFETY: garbage is what is wanted.
    let out = unsafe { stream.alloc::<u32>(THREADS as usize) }.map_err(of)?;
    let config = LaunchConfig {
        grid_dim: (1, 1, 1),
        block_dim: (THREADS, 1, 1),
        // One number too few for `beyond_dynamic_memory`.
        shared_mem_bytes: match name {
            "beyond_dynamic_memory" => 4 * (THREADS - 1),
            _ => 4 * THREADS,
        },
    };
    let mut launch = stream.launch_builder(&function);
    // SAFETY: the arguments are the kernel's.
    unsafe { launch.arg(&out).arg(&input).launch(config) }.map_err(of)?;
    stream.clone_dtoh(&out).map_err(of)
}

fn streams() -> impl Iterator<Item = Arc<CudaStream>> {
    let build = Build {
        folder: "shim/broken",
        arch: 900,
        watch: Watch::Indices,
        without: &[],
        edits: &[],
    };
    let library = library(&build).expect("compiles");
    (0..SEEDS).map(move |seed| {
        let context = CudaContext::on_host(&library, 1, 1000 * seed).expect("loads");
        context.new_stream().expect("a stream")
    })
}

fn says(name: &str, words: &str) {
    for stream in streams() {
        let found = launch(&stream, name).expect_err("a fault");
        assert!(found.contains(words), "{name}: {found}");
    }
}

/// Some order of threads gives another answer, or all of them the same.
fn answers(name: &str, expected: impl Fn(u32) -> u32, always: bool) {
    let expected: Vec<u32> = (0..THREADS).map(expected).collect();
    let right = streams().filter(|stream| launch(stream, name).expect("ends") == expected);
    let right = right.count() as u64;
    assert_eq!(
        right == SEEDS,
        always,
        "{name}: {right} of {SEEDS} are right"
    );
}

#[test]
fn threads_that_wait_for_ever() {
    says(
        "half_a_block_at_a_barrier",
        "nobody can go on: threads 0-63 wait at __syncthreads (broken.cu:10); threads 64-127 have ended",
    );
    says("two_barriers", "threads wait at different barriers");
    says("half_a_warp_shuffles", "nobody can go on: threads 0-15");
}

#[test]
fn lanes_that_part() {
    says("a_warp_parts", "lanes of a warp part");
    says("a_lane_without_part", "lane 20, which does not take part");
}

#[test]
fn accesses_that_no_barrier_orders() {
    answers("nothing", |t| (t + 32) % 128, true);
    answers("no_barrier_between_warps", |t| (t + 32) % 128, false);
    answers("no_barrier_in_a_warp", |t| (t + 1) % 128, false);
    answers("no_second_barrier", |_| 6, false);
}

/// Two streams that wait for each other may share memory; without that, the first to go on is told.
#[test]
fn streams_that_do_not_wait() {
    for main in streams().take(1) {
        let side = main.context().new_stream().expect("a stream");
        let run = |stream| launch(stream, "nothing").map(|_| ());
        assert_eq!(run(&side), Ok(()));
        let wrong = "stream 0 has not waited for stream 1";
        assert_eq!(run(&main), Err(wrong.to_owned()));
        main.join(&side).expect("waits");
        assert_eq!(run(&main), Ok(()));
        let wrong = "stream 1 has not waited for stream 0";
        assert_eq!(run(&side), Err(wrong.to_owned()));
        side.join(&main).expect("waits");
        assert_eq!(run(&side), Ok(()));
    }
}

#[test]
fn addresses_outside() {
    says("beyond_an_array", "is outside of its array (broken.cu:");
    says(
        "beyond_dynamic_memory",
        "byte 508 of shared memory was written, of 508",
    );
    says(
        "beyond_the_output",
        "wrote outside of 512 bytes of the device's memory",
    );
    says("beyond_all_memory", "nothing is at address");
    says(
        "a_crooked_vector",
        "16 bytes are read or written at an address 4 above their multiple",
    );
}

#[test]
fn what_nobody_wrote() {
    answers("nobody_wrote", |t| t, false);
    answers("no_output", |t| t, false);
}

#[test]
fn copies_that_have_not_arrived() {
    answers("copies_waited_for", |t| t, true);
    says("copies_not_waited_for", "ended with a copy on its way");
    answers("copies_waited_for_too_late", |t| t, false);
    answers("bulk", |t| t, true);
    says("bulk_without_a_barrier", "of what is no barrier");
    says(
        "bulk_that_nobody_expects",
        "bytes are waited for that nobody sends",
    );
    says(
        "bulk_that_nobody_sends",
        "bytes are waited for that nobody sends",
    );
    answers("bulk_waited_for_too_late", |t| t, false);
}

/// By the fault's own name, in a process that AddressSanitizer ends: `addresses` of main.rs starts it.
#[test]
#[ignore = "ends its process"]
fn fault_of_the_environment() {
    let Ok(name) = std::env::var("OTT_SHIM_FAULT") else {
        return;
    };
    let build = Build {
        folder: "shim/broken",
        arch: 900,
        watch: Watch::of_environment().expect("a known name"),
        without: &[],
        edits: &[],
    };
    let library = library(&build).expect("compiles");
    for seed in 0..SEEDS {
        let context = CudaContext::on_host(&library, 1, 1000 * seed).expect("loads");
        let stream = context.new_stream().expect("a stream");
        launch(&stream, &name).expect("no fault that the shim itself sees");
    }
}
