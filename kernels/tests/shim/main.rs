//! The kernels without a GPU: as host C++ under a SIMT shim (`kernels/shim`), judged by what judges them on a GPU.
//!
//! `device.rs` and the conformance suite are compiled here against `driver.rs`, which takes cudarc's place, so that the
//! launches are judged too. docs/kernels.md says what the shim sees and what it cannot.

// `cudarc::driver` and `cudarc::nvrtc` are this crate's.
extern crate self as cudarc;

mod compile;
#[path = "../../examples/gpu-check/conformance.rs"]
#[allow(dead_code)]
mod conformance;
#[path = "../../src/device.rs"]
#[allow(dead_code)]
mod device;
mod driver;
#[path = "../../examples/gpu-check/paint.rs"]
mod paint;

use ott_kernels::{abi, plan, shape};

mod nvrtc {
    pub struct Ptx;
    impl Ptx {
        pub fn from_binary(_: Vec<u8>) -> Self {
            Self
        }
    }
}

mod image {
    /// A library has all kernels.
    pub fn image(_: &str) -> Vec<u8> {
        Vec::new()
    }
}

use compile::{library, Build, Watch};
use device::Kernels;
use driver::CudaContext;

fn agree(arch: u32, seed: u64) {
    let build = Build {
        folder: "cuda",
        arch,
        watch: Watch::of_environment().expect("a known name"),
        edits: &[],
    };
    let library = library(&build).expect("compiles");
    let context = CudaContext::on_host(&library, 2, seed).expect("loads");
    let kernels = Kernels::new(&context.new_stream().expect("a stream")).expect("loads");
    conformance::run(&kernels, false).expect("the kernels agree with the scalar code");
}

#[test]
fn kernels_agree_copies_by_threads() {
    agree(800, 1);
}

#[test]
fn kernels_agree_copies_by_the_engine() {
    agree(900, 2);
}
