//! `toy-faulty`: `toy-f32` that fails on demand, to test what the host does with a failed step.
//!
//! | option | meaning | default |
//! |---|---|---|
//! | `fail_layer=L` | `append` and `decode` fail in layer `L`; without it, `begin_step` fails | |
//! | `fail_row=R` | row `R` of the step has a fault, told by `end_step`; the others go on | |
//! | `fail_after_steps=S` | so many steps succeed first | 0 |
//! | `fail_times=K` | so many steps fail, then all succeed again | 1 |
//! | `fail_every=N` | and again after each N steps; 0: never again | 0 |
//! | `fail_by=HOW` | with an `error`, or in a `panic` | `error` |
//! | `stats_ms=T` | it takes so long to tell what is held, as of a device that is busy | 0 |
//!
//! Steps are counted over the life of the cache, whoever they belong to.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use candle_core::{bail, DType, Result, Tensor};

use crate::{
    KvAttn, KvBackendProvider, KvCacheBackend, KvFault, KvMemory, KvModelSource, KvPlan, KvShape,
    KvStats, KvStep,
};

/// The provider of `toy-faulty`, to be [registered](crate::register) by tests.
pub fn provider() -> Arc<dyn KvBackendProvider> {
    Arc::new(Faulty(super::provider()))
}

struct Faulty(Arc<dyn KvBackendProvider>);

#[derive(Clone, Copy, Debug)]
struct Fault {
    layer: Option<usize>,
    row: Option<usize>,
    after_steps: usize,
    times: usize,
    every: usize,
    panic: bool,
    stats_ms: u64,
}

impl Fault {
    fn parse(options: &str) -> anyhow::Result<Self> {
        let mut fault = Self {
            layer: None,
            row: None,
            after_steps: 0,
            times: 1,
            every: 0,
            panic: false,
            stats_ms: 0,
        };
        for option in options.split(',').filter(|o| !o.is_empty()) {
            if let Some(how @ ("error" | "panic")) = option.strip_prefix("fail_by=") {
                fault.panic = how == "panic";
                continue;
            }
            if let Some(Ok(ms)) = option.strip_prefix("stats_ms=").map(str::parse) {
                fault.stats_ms = ms;
                continue;
            }
            match option.split_once('=').map(|(key, n)| (key, n.parse())) {
                Some(("fail_layer", Ok(n))) => fault.layer = Some(n),
                Some(("fail_row", Ok(n))) => fault.row = Some(n),
                Some(("fail_after_steps", Ok(n))) => fault.after_steps = n,
                Some(("fail_times", Ok(n))) => fault.times = n,
                Some(("fail_every", Ok(n))) => fault.every = n,
                _ => anyhow::bail!(
                    "toy-faulty does not know `{option}`; its options are `fail_layer=L`, \
                     `fail_row=R`, `fail_after_steps=S`, `fail_times=K`, `fail_every=N`, `fail_by=error` or `panic`, and \
                     `stats_ms=T`"
                ),
            }
        }
        Ok(fault)
    }

    fn hits(self, step: usize) -> bool {
        let Some(since) = step.checked_sub(self.after_steps) else {
            return false;
        };
        let since = match self.every {
            0 => since,
            every => since % every,
        };
        since < self.times
    }

    /// # Panics
    /// If that was asked for.
    fn fail<T>(self, what: String) -> Result<T> {
        assert!(!self.panic, "toy-faulty: {what} panics, as asked");
        bail!("toy-faulty: {what} fails, as asked")
    }
}

impl KvBackendProvider for Faulty {
    fn name(&self) -> &'static str {
        "toy-faulty"
    }

    fn check_options(&self, options: &str) -> anyhow::Result<()> {
        Fault::parse(options).map(drop)
    }

    fn check_model(&self, source: &KvModelSource<'_>, _options: &str) -> anyhow::Result<()> {
        self.0.check_model(source, "")
    }

    fn block_size(&self, user: Option<usize>, _options: &str) -> anyhow::Result<usize> {
        self.0.block_size(user, "")
    }

    fn memory(&self, shape: &KvShape) -> anyhow::Result<KvMemory> {
        self.0.memory(shape)
    }

    fn create(&self, shape: KvShape, num_blocks: usize) -> anyhow::Result<Arc<dyn KvCacheBackend>> {
        let fault = Fault::parse(&shape.options)?;
        let cache = self.0.create(shape, num_blocks)?;
        Ok(Arc::new(FaultyCache {
            cache,
            fault,
            steps: AtomicUsize::new(0),
            faults: Mutex::default(),
        }))
    }
}

struct FaultyCache {
    cache: Arc<dyn KvCacheBackend>,
    fault: Fault,
    steps: AtomicUsize,
    /// Of the step that runs.
    faults: Mutex<Vec<KvFault>>,
}

impl KvCacheBackend for FaultyCache {
    fn begin_step(&self, plan: KvPlan) -> Result<Arc<dyn KvStep>> {
        let step = self.steps.fetch_add(1, Ordering::Relaxed);
        let row = self.fault.row.filter(|_| self.fault.hits(step));
        let row = row.and_then(|row| plan.rows.get(row));
        let fault = row.map(|row| KvFault {
            seq: row.seq,
            error: format!("toy-faulty: a row of step {step} fails, as asked"),
        });
        *self.faults.lock().unwrap_or_else(PoisonError::into_inner) = fault.into_iter().collect();
        let inner = self.cache.begin_step(plan)?;
        if self.fault.row.is_some() {
            return Ok(inner);
        }
        match (self.fault.hits(step), self.fault.layer) {
            (false, _) => Ok(inner),
            (true, None) => self.fault.fail(format!("the beginning of step {step}")),
            (true, Some(layer)) => Ok(Arc::new(FaultyStep {
                inner,
                step,
                layer,
                fault: self.fault,
            })),
        }
    }

    fn allocated(&self, seq: usize, blocks: &[usize]) {
        self.cache.allocated(seq, blocks);
    }

    fn end_step(&self) -> Result<Vec<KvFault>> {
        let mut faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(std::mem::take(&mut *faults))
    }

    fn released(&self, seq: usize, blocks: &[usize]) -> Vec<usize> {
        self.cache.released(seq, blocks)
    }

    fn reset(&self) {
        self.cache.reset();
    }

    fn describe(&self) -> String {
        format!(
            "{}; fails as asked: {:?}",
            self.cache.describe(),
            self.fault
        )
    }

    fn allocated_bytes(&self) -> usize {
        self.cache.allocated_bytes()
    }

    fn stats(&self) -> KvStats {
        std::thread::sleep(Duration::from_millis(self.fault.stats_ms));
        self.cache.stats()
    }
}

#[derive(Debug)]
struct FaultyStep {
    inner: Arc<dyn KvStep>,
    step: usize,
    layer: usize,
    fault: Fault,
}

impl FaultyStep {
    fn check(&self, layer: usize) -> Result<()> {
        if layer == self.layer {
            let step = self.step;
            return self.fault.fail(format!("layer {layer} of step {step}"));
        }
        Ok(())
    }
}

impl KvStep for FaultyStep {
    fn plan(&self) -> &KvPlan {
        self.inner.plan()
    }

    fn past(&self, layer: usize, row: usize, dtype: DType) -> Result<(Tensor, Tensor)> {
        self.inner.past(layer, row, dtype)
    }

    fn append(&self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<()> {
        self.check(layer)?;
        self.inner.append(layer, q, k, v)
    }

    fn decode(
        &self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        attn: KvAttn,
    ) -> Result<Tensor> {
        self.check(layer)?;
        self.inner.decode(layer, q, k, v, attn)
    }
}
