//! What the OTT KV cache does alike on CPU and GPU, its CUDA kernels (`cuda/*.cu`), and how they are launched.
//!
//! ```text
//! blocks -> abi -> plan, shape -> prompt -> device -> attend -> cache
//! ```
//!
//! [`blocks`] is the life of blocks: which are pages, where the window lies, what a step reads and writes. Caches on both
//! devices run it. [`abi`] are the structs that kernels take, field by field as in `cuda/cache.cuh`; [`plan`] turns the rows
//! of a step into the tables that all layers share; [`prompt`] says into how many parts a prompt's context is cut. None of these needs a GPU. `device` (feature `cuda`) holds a layer's
//! memory and launches kernels on a stream, `attend` those for prompts, `cache` holds all layers of a model; but for what says so, nothing in them waits
//! for the device.

pub mod abi;
#[cfg(feature = "cuda")]
mod attend;
pub mod blocks;
#[cfg(feature = "cuda")]
pub mod cache;
#[cfg(feature = "cuda")]
pub mod device;
#[cfg(feature = "cuda")]
mod image;
pub mod plan;
pub mod prompt;
pub mod shape;
