//! What a cache holds and what became of it, for those who watch a server.

use std::any::Any;
use std::fmt;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::Arc;

use candle_core::{Error, Result};
use serde::Serialize;

use crate::{KvBackendSpec, KvCacheBackend};

/// What a backend tells of itself.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct KvStats {
    /// The effective options, each spelled out.
    pub setting: String,
    /// Stored bits per number of a full block, with scales and the like.
    pub bits_per_number: Option<f64>,
    /// Tokens stored, those of ended sequences that may be hit among them.
    pub tokens: Option<usize>,
    /// What else this kind of cache counts.
    pub gauges: Vec<KvGauge>,
}

/// A number for each layer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct KvGauge {
    /// Snake case, with the unit.
    pub name: &'static str,
    /// One sentence.
    pub help: &'static str,
    /// By absolute layer index.
    pub by_layer: Vec<f64>,
}

/// The host's counts beside a backend. Numbers only grow, but for `free_blocks`.
#[derive(Debug, Default)]
struct Counts {
    free_blocks: AtomicUsize,
    evicted_blocks: AtomicUsize,
    sequences: AtomicUsize,
    preempted: AtomicUsize,
    prompt_tokens: AtomicUsize,
    hit_tokens: AtomicUsize,
    steps: AtomicUsize,
    failed_steps: AtomicUsize,
}

/// The pool that a backend was made for.
#[derive(Clone, Copy, Debug)]
pub struct KvPool {
    /// What was asked for.
    pub spec: KvBackendSpec,
    /// Tokens per block.
    pub block_size: usize,
    /// Blocks, the padding block among them.
    pub num_blocks: usize,
    /// Bytes of one block, at worst.
    pub block_bytes: usize,
    /// Bytes of the whole cache, at worst.
    pub bytes: usize,
}

/// A backend, with what the host counts of its use. The host holds one per loaded model.
pub struct KvMeter {
    backend: Arc<dyn KvCacheBackend>,
    pool: KvPool,
    counts: Counts,
}

impl fmt::Debug for KvMeter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvMeter")
            .field("pool", &self.pool)
            .field("counts", &self.counts)
            .finish_non_exhaustive()
    }
}

impl KvMeter {
    /// Nothing has happened yet.
    pub fn new(backend: Arc<dyn KvCacheBackend>, pool: KvPool) -> Self {
        let counts = Counts::default();
        counts
            .free_blocks
            .store(pool.num_blocks.saturating_sub(1), Relaxed);
        Self {
            backend,
            pool,
            counts,
        }
    }

    /// What is watched.
    pub fn backend(&self) -> &Arc<dyn KvCacheBackend> {
        &self.backend
    }

    /// A sequence's prompt is run, for the first time: of its tokens so many were hit.
    pub fn admitted(&self, tokens: usize, hit: usize) {
        self.counts.sequences.fetch_add(1, Relaxed);
        self.counts.prompt_tokens.fetch_add(tokens, Relaxed);
        self.counts.hit_tokens.fetch_add(hit, Relaxed);
    }

    /// A sequence lost tokens it had computed, before its end.
    pub fn preempted(&self) {
        self.counts.preempted.fetch_add(1, Relaxed);
    }

    /// Blocks that can be handed out, and those with tokens to hit that were, ever.
    pub fn pool(&self, free: usize, evicted: usize) {
        self.counts.free_blocks.store(free, Relaxed);
        self.counts.evicted_blocks.store(evicted, Relaxed);
    }

    /// Begin a step, or do a layer of it. A panic is an error like others: it ends the requests of the step, not
    /// the engine.
    ///
    /// # Errors
    /// That of `call`, or what it panicked with.
    pub fn step<T>(&self, begun: bool, call: impl FnOnce() -> Result<T>) -> Result<T> {
        self.counts.steps.fetch_add(usize::from(begun), Relaxed);
        // What a panic leaves half done is written again or released by the host, as after an error.
        let result = catch_unwind(AssertUnwindSafe(call));
        let result = result.unwrap_or_else(|panic| Err(self.panicked(panic.as_ref())));
        let failed = usize::from(result.is_err());
        self.counts.failed_steps.fetch_add(failed, Relaxed);
        result
    }

    fn panicked(&self, panic: &(dyn Any + Send)) -> Error {
        let text = panic.downcast_ref::<&str>().copied();
        let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
        let spec = self.pool.spec;
        Error::Msg(format!(
            "the KV-cache backend `{spec}` panicked: {}. This is a defect; the log says where.",
            text.unwrap_or("it did not say why")
        ))
    }

    /// All that is known now.
    pub fn report(&self) -> KvReport {
        let (counts, pool) = (&self.counts, &self.pool);
        let blocks = pool.num_blocks.saturating_sub(1);
        let free = counts.free_blocks.load(Relaxed);
        KvReport {
            spec: pool.spec.to_string(),
            stats: self.backend.stats(),
            bytes_granted: pool.bytes,
            bytes_held: self.backend.allocated_bytes(),
            bytes_used: (blocks.saturating_sub(free)) * pool.block_bytes,
            bytes_free: free * pool.block_bytes,
            block_size: pool.block_size,
            blocks,
            free_blocks: free,
            evicted_blocks: counts.evicted_blocks.load(Relaxed),
            sequences: counts.sequences.load(Relaxed),
            preempted: counts.preempted.load(Relaxed),
            prompt_tokens: counts.prompt_tokens.load(Relaxed),
            hit_tokens: counts.hit_tokens.load(Relaxed),
            steps: counts.steps.load(Relaxed),
            failed_steps: counts.failed_steps.load(Relaxed),
        }
    }
}

/// The state of one model's cache.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct KvReport {
    /// What was asked for.
    pub spec: String,
    /// What the backend tells.
    #[serde(flatten)]
    pub stats: KvStats,
    /// Bytes of the whole cache at worst, as answered before it was made.
    pub bytes_granted: usize,
    /// Bytes allocated now.
    pub bytes_held: usize,
    /// Bytes of the blocks of running sequences, at worst.
    pub bytes_used: usize,
    /// Bytes of the other blocks, at worst.
    pub bytes_free: usize,
    /// Tokens per block.
    pub block_size: usize,
    /// Blocks that can hold tokens.
    pub blocks: usize,
    /// Blocks of no running sequence. They may hold tokens to hit.
    pub free_blocks: usize,
    /// Blocks with tokens to hit that were handed out for others, ever.
    pub evicted_blocks: usize,
    /// Sequences whose prompt was run, ever; each once, however often it was preempted.
    pub sequences: usize,
    /// How often a sequence lost tokens it had computed, before its end.
    pub preempted: usize,
    /// Tokens of those prompts.
    pub prompt_tokens: usize,
    /// Those of them that were stored already. Over `prompt_tokens`, the prefix hit rate.
    pub hit_tokens: usize,
    /// Forward passes.
    pub steps: usize,
    /// Those that failed, by a call of a layer or at their beginning.
    pub failed_steps: usize,
}
