//! The kernels without a GPU: as host C++ under a SIMT shim (`kernels/shim`), judged by what judges them on a GPU.
//!
//! `device.rs` and the conformance suite are compiled here against `driver.rs`, which takes cudarc's place, so that the
//! launches are judged too. docs/kernels.md says what the shim sees and what it cannot.

// `cudarc::driver` and `cudarc::nvrtc` are this crate's.
extern crate self as cudarc;

#[path = "../../src/attend.rs"]
#[allow(dead_code)]
mod attend;
#[path = "../../src/cache.rs"]
#[allow(dead_code)]
mod cache;
mod compile;
#[path = "../../examples/gpu-check/conformance.rs"]
#[allow(dead_code)]
mod conformance;
mod detectors;
#[path = "../../src/device.rs"]
#[allow(dead_code)]
mod device;
mod driver;
#[path = "../../../ott-backend/tests/harness/mod.rs"]
mod harness;
mod histories;
mod kernels;
#[path = "../../../ott-backend/tests/machine/mod.rs"]
mod machine;
#[path = "../../examples/gpu-check/paint.rs"]
mod paint;
#[path = "../../../ott-backend/tests/pool/mod.rs"]
mod pool;
#[path = "../../examples/gpu-check/prompts.rs"]
mod prompts;
#[path = "../../../ott-backend/tests/reference/mod.rs"]
mod reference;
mod subject;
mod teeth;

use ott_kernels::{abi, blocks, plan, prompt, shape};

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
