//! The seam between mistral.rs's PagedAttention and a KV cache that keeps its bytes elsewhere.
//!
//! The host owns block tables, prefix hashes, scheduling and models. A backend owns the bytes of a
//! block: it stores new keys and values and attends over stored ones. The host asks, in this order:
//!
//! | when | call | answers |
//! |---|---|---|
//! | a spec is read (`name` or `name:options`) | [`KvBackendSpec::parse`] | is there such a backend, are the options valid |
//! | before the weights are read | [`KvBackendProvider::check_model`] | is this model served; if not, why and what to do |
//! | the pool is sized | [`KvBackendProvider::block_size`], [`KvBackendProvider::memory`] | tokens per block, bytes |
//! | after the weights are read | [`KvBackendProvider::create`] | the cache of this model |
//! | once per forward pass | [`KvCacheBackend::begin_step`] | tables uploaded, work planned |
//! | in each layer | [`KvStep::prefill`], [`KvStep::append`], [`KvStep::decode`] | attention |
//! | after the last layer | [`KvCacheBackend::end_step`] | what the step wrote counts |
//! | at any time | [`KvCacheBackend::stats`] | what is held |
//!
//! Nothing here knows a method of compression: [`toy`] is a full-precision backend in a page of
//! code, and the golden reference for the patched host.

mod metrics;
mod model;
mod registry;
mod servable;
mod spec;
mod stats;
pub mod toy;

use std::fmt;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};

pub use metrics::{metrics, METRICS_TYPE};
pub use model::KvModelSource;
pub use registry::{presets, register, registered, versions, KvAbout};
pub use servable::{check_servable, KvRefusal};
pub use spec::KvBackendSpec;
pub use stats::{KvGauge, KvMeter, KvPool, KvReport, KvStats};

/// One layer of the cache, as this rank holds it.
#[derive(Clone, Debug)]
pub struct KvLayer {
    /// Query heads; a multiple of `num_kv_heads`.
    pub num_heads: usize,
    /// Key/value heads.
    pub num_kv_heads: usize,
    /// Channels of one key head (and of one query head).
    pub k_dim: usize,
    /// Channels of one value head.
    pub v_dim: usize,
    /// Where the layer's tensors live.
    pub device: Device,
}

/// The whole cache of one model, as this rank holds it.
#[derive(Clone, Debug)]
pub struct KvShape {
    /// By absolute layer index.
    pub layers: Vec<KvLayer>,
    /// Activation dtype: what `append`, `prefill` and `decode` receive and return.
    pub dtype: DType,
    /// Tokens per block, as answered by [`KvBackendProvider::block_size`].
    pub block_size: usize,
    /// Longest sequence the model allows, in tokens.
    pub max_seq_len: usize,
    /// Most sequences that run at once.
    pub max_seqs: usize,
    /// The text after the colon of the spec; empty if there is none.
    pub options: String,
}

/// Bytes on the device that needs most, answered before anything is allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvMemory {
    /// Bytes of one block over all layers, at worst.
    pub per_block: usize,
    /// Bytes held whatever the number of blocks, at worst.
    pub fixed: usize,
}

/// A registered kind of cache.
pub trait KvBackendProvider: Send + Sync {
    /// What the user types before the colon: lower case, no spaces.
    fn name(&self) -> &'static str;

    /// What people are told of it.
    fn about(&self) -> KvAbout {
        KvAbout::default()
    }

    /// Check the text after the colon. Errors list the valid options.
    fn check_options(&self, options: &str) -> anyhow::Result<()>;

    /// Refuse a model before its weights are read. Errors name the model, the layer or size, the
    /// reason, and what to do instead.
    fn check_model(&self, source: &KvModelSource<'_>, options: &str) -> anyhow::Result<()>;

    /// Tokens per block; `user` is what the user asked for, to be honoured or refused.
    fn block_size(&self, user: Option<usize>, options: &str) -> anyhow::Result<usize>;

    /// Bytes needed for `shape`. Also where a shape that cannot be served is refused.
    fn memory(&self, shape: &KvShape) -> anyhow::Result<KvMemory>;

    /// The cache of one loaded model. Block 0 is never used: it is the host's padding.
    fn create(&self, shape: KvShape, num_blocks: usize) -> anyhow::Result<Arc<dyn KvCacheBackend>>;
}

/// One sequence in one step: tokens `0..past` are stored, `new` come now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvRow {
    /// The host's sequence id.
    pub seq: usize,
    /// Tokens already in `blocks`.
    pub past: usize,
    /// Tokens of this step.
    pub new: usize,
    /// Block ids in order, covering `past + new` tokens at least.
    pub blocks: Vec<usize>,
}

/// What one forward pass does, for all layers alike.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvPlan {
    /// Prompt rows attend through [`KvStep::prefill`] or the host; others through [`KvStep::decode`].
    pub prompt: bool,
    /// Tokens per block.
    pub block_size: usize,
    /// Rows in the order of the tensors' first dimension.
    pub rows: Vec<KvRow>,
}

/// A sequence whose new tokens could not be kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvFault {
    /// The host's sequence id.
    pub seq: usize,
    /// Why, in a sentence for its user.
    pub error: String,
}

/// Parameters of one attention call.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KvAttn {
    /// Factor on `q . k`.
    pub scale: f32,
    /// Scores become `softcap * tanh(score / softcap)`, if set.
    pub softcap: Option<f32>,
}

/// The cache of one loaded model.
///
/// Methods run on the engine thread under the host's locks: they must not call back into the host
/// and must not panic.
pub trait KvCacheBackend: Send + Sync {
    /// Once per forward pass, before the first layer: check the plan, reserve what it needs.
    fn begin_step(&self, plan: KvPlan) -> Result<Arc<dyn KvStep>>;

    /// The step that was begun last has passed all layers: what it wrote counts from now on. The host ends the
    /// sequences that are answered here, with their errors; for the others the step stands. A step for which
    /// this is not called has failed: what it wrote must not count. May wait for the device.
    fn end_step(&self) -> Result<Vec<KvFault>> {
        Ok(Vec::new())
    }

    /// `blocks` were handed to sequence `seq`; whatever they held is dead.
    fn allocated(&self, seq: usize, blocks: &[usize]);

    /// Sequence `seq` gave up `blocks` (in table order). Full ones may be hit again: keep them. Answers blocks,
    /// these or others, whose tokens are gone: the host forgets their hashes, so that nobody hits them.
    fn released(&self, seq: usize, blocks: &[usize]) -> Vec<usize>;

    /// A new scheduler owns the pool: every block is free and nothing stored can be hit.
    fn reset(&self);

    /// A few plain lines for the log: what is kept, at how many bits, in how much memory.
    fn describe(&self) -> String;

    /// Bytes held now, all layers.
    fn allocated_bytes(&self) -> usize;

    /// What is held, in numbers. This and `allocated_bytes` are asked from other threads too, also
    /// in the middle of a step.
    fn stats(&self) -> KvStats {
        KvStats::default()
    }
}

/// One forward pass. Tensors are `(rows, heads, tokens, channels)`, rows as in the plan, and need
/// not be contiguous. Tokens beyond a row's `new` are padding.
pub trait KvStep: Send + Sync + fmt::Debug {
    /// The plan this step was begun with.
    fn plan(&self) -> &KvPlan;

    /// Attention of a prompt's queries over past and new tokens, causal, before `append`.
    /// `None`: the host does it, reading `past`.
    fn prefill(
        &self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        attn: KvAttn,
    ) -> Result<Option<Tensor>> {
        let _ = (layer, q, k, v, attn);
        Ok(None)
    }

    /// Past keys and values of one row, `(1, num_kv_heads, past, channels)` each, in `dtype`.
    fn past(&self, layer: usize, row: usize, dtype: DType) -> Result<(Tensor, Tensor)>;

    /// Store the new tokens of all rows, after their attention. Writing a token again replaces it.
    fn append(&self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<()>;

    /// Store the new tokens of all rows and attend over past and new, causal:
    /// `(rows, num_heads, tokens, v_dim)` in q's dtype.
    fn decode(
        &self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        attn: KvAttn,
    ) -> Result<Tensor>;
}
