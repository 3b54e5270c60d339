//! Upstream's own attention on the CPU, compiled from the host's tree: the function is private there.

/// What that file takes from its parent.
pub struct SdpaParams {
    #[allow(dead_code)]
    pub n_kv_groups: usize,
    pub softcap: Option<f32>,
    pub softmax_scale: f32,
    #[allow(dead_code)]
    pub sliding_window: Option<usize>,
}

#[allow(dead_code, clippy::all)]
#[path = "../../../host/mistralrs-core/src/attention/backends/cpu.rs"]
mod upstream;

pub use upstream::run_flash_attn_cpu;
