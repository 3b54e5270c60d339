//! CUDA kernels of the OTT KV cache (`cuda/*.cu`), and how they are launched.
//!
//! ```text
//! abi -> plan -> shape, blocks -> device
//! ```
//!
//! [`abi`] are the structs that kernels take, field by field as in `cuda/cache.cuh`. [`plan`] turns the rows of a step
//! into the tables that all layers share, [`blocks`] knows which blocks are pages, both without a GPU. `device` (feature
//! `cuda`) holds a layer's memory and launches kernels on a stream; but for what says so, nothing in it waits for the
//! device.

pub mod abi;
pub mod blocks;
#[cfg(feature = "cuda")]
pub mod device;
#[cfg(feature = "cuda")]
mod image;
pub mod plan;
pub mod shape;
