//! A 2-bit KV cache with outlier tokens tracing (OTT, arXiv 2505.10938) for mistral.rs.
//!
//! The newest tokens are kept in full precision. When they are more than a window and a group, the
//! oldest group is **sealed**: keys are quantized per channel, values per token, and the few tokens
//! whose keys are smallest, which would spoil the group's scales, are **traced**: kept in full
//! precision for ever. Attention reads sealed groups, traced tokens and the window in one softmax.
//!
//! Rooms, in the order in which data flows; none uses a room to its right:
//!
//! ```text
//! config -> pack -> layout -> quantize -> weigh, rotate -> cpu -> cache -> attention -> prompt -> backend -> (mistral.rs)
//! ```
//!
//! An application calls [`register`] once, before it reads its command line.

pub mod attention;
#[cfg(feature = "seam")]
pub mod backend;
pub mod cache;
pub mod config;
pub mod cpu;
mod error;
pub mod layout;
pub mod pack;
pub mod prompt;
pub mod quantize;
pub mod report;
pub mod rotate;
pub mod weigh;

#[cfg(feature = "seam")]
pub use backend::{provider, register, OttBackend, OttProvider};
pub use cache::{Cache, Element, LayerStats};
pub use config::{Clip, OttConfig, Rotation, Weigh};
pub use cpu::CpuOps;
pub use error::{Error, Result};
pub use layout::PageLayout;
pub use report::stored_bits;
