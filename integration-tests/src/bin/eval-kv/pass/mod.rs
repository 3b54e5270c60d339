//! `pass:SPEC`: a whole text as a few prompts, in which each token sees of the others what it would see had it been
//! decoded: hours become minutes.
//!
//! The host runs its layers over thousands of tokens at once; here each layer takes them in steps, stores them in the
//! real cache and attends through it ([`layer`]). A text is longer than a prompt's logits may be: so it comes as prompts
//! that begin alike, of which the host reads what is new, after a prefix hit. Its last block it reads again; what the
//! layers have of it stays, and what they say of it nobody asks for a second time.

mod layer;
mod method;

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{bail, DType, Device, Result, Tensor};
use mistralrs_kv_backend::{
    KvAttn, KvBackendProvider, KvCacheBackend, KvMemory, KvModelSource, KvPlan, KvShape, KvStep,
};

use layer::Layer;
pub use method::Method;

/// What a cache holds after a text.
#[derive(Clone, Debug, Default)]
pub struct Held {
    /// Bytes of all layers.
    pub bytes: usize,
    /// Traced tokens of each layer, over its kv heads.
    pub traced: Vec<usize>,
    /// Their positions, of all layers and heads.
    pub positions: Vec<usize>,
}

/// The provider; it remembers the last text.
#[derive(Default)]
pub struct Pass {
    layers: Arc<Mutex<Vec<Layer>>>,
    /// Tokens that the next text may have.
    tokens: Mutex<usize>,
}

impl Pass {
    /// Make room for texts of so many tokens.
    pub fn expect(&self, tokens: usize) {
        *self.tokens.lock().unwrap_or_else(PoisonError::into_inner) = tokens;
    }

    /// What the cache holds of the last text.
    pub fn held(&self) -> Held {
        let layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        let mut held = Held::default();
        layers.iter().for_each(|layer| layer.count(&mut held));
        held
    }
}

impl KvBackendProvider for Pass {
    fn name(&self) -> &'static str {
        "pass"
    }

    fn check_options(&self, options: &str) -> anyhow::Result<()> {
        Method::parse(options).map(drop)
    }

    fn check_model(&self, _source: &KvModelSource<'_>, _options: &str) -> anyhow::Result<()> {
        Ok(())
    }

    fn block_size(&self, user: Option<usize>, _options: &str) -> anyhow::Result<usize> {
        Ok(user.unwrap_or(128))
    }

    fn memory(&self, _shape: &KvShape) -> anyhow::Result<KvMemory> {
        Ok(KvMemory {
            per_block: 1,
            fixed: 0,
        })
    }

    fn create(&self, shape: KvShape, _blocks: usize) -> anyhow::Result<Arc<dyn KvCacheBackend>> {
        let method = Method::parse(&shape.options)?;
        let tokens = *self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        let layers = shape.layers.iter().enumerate();
        let layers = layers.map(|(i, l)| Layer::new(&method, i, l, tokens));
        let layers: anyhow::Result<Vec<Layer>> = layers.collect();
        *self.layers.lock().unwrap_or_else(PoisonError::into_inner) = layers?;
        Ok(Arc::new(PassCache {
            method,
            layers: Arc::clone(&self.layers),
        }))
    }
}

#[derive(Clone)]
struct PassCache {
    method: Method,
    layers: Arc<Mutex<Vec<Layer>>>,
}

impl KvCacheBackend for PassCache {
    fn begin_step(&self, plan: KvPlan) -> Result<Arc<dyn KvStep>> {
        let mut layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        // The host's first request of all, when a model is loaded, is its own.
        if plan.rows.iter().all(|row| row.past == 0) {
            layers.iter_mut().for_each(Layer::clear);
        }
        let follows = |past| layers.iter().all(|layer| layer.tokens() >= past);
        match &plan.rows[..] {
            [row] if plan.prompt && follows(row.past) => {}
            rows => bail!("`pass` reads one text, prompt after prompt, and not {rows:?}"),
        }
        Ok(Arc::new(PassStep(self.clone(), plan)))
    }

    fn allocated(&self, _seq: usize, _blocks: &[usize]) {}

    fn released(&self, _seq: usize, _blocks: &[usize]) -> Vec<usize> {
        Vec::new()
    }

    fn reset(&self) {}

    fn describe(&self) -> String {
        format!("pass: {:?}", self.method)
    }

    fn allocated_bytes(&self) -> usize {
        0
    }
}

struct PassStep(PassCache, KvPlan);

impl fmt::Debug for PassStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PassStep").field(&self.1).finish()
    }
}

impl KvStep for PassStep {
    fn plan(&self) -> &KvPlan {
        &self.1
    }

    fn prefill(
        &self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        attn: KvAttn,
    ) -> Result<Option<Tensor>> {
        let layers = self.0.layers.lock();
        let mut layers = layers.unwrap_or_else(PoisonError::into_inner);
        let past = self.1.rows.first().map_or(0, |row| row.past);
        let known = layers[layer].tokens().saturating_sub(past);
        let (num_heads, new, v_dim) = (q.dim(1)?, q.dim(2)? - known, v.dim(3)?);
        let unknown = |x: &Tensor| x.narrow(2, known, new);
        let out = layers[layer].attend(&unknown(q)?, &unknown(k)?, &unknown(v)?, attn);
        let out = out.map_err(|error| candle_core::Error::Msg(format!("{error:#}")))?;
        let out = Tensor::from_vec(out, (1, num_heads, new, v_dim), &Device::Cpu)?;
        out.pad_with_zeros(2, known, 0)?
            .to_dtype(q.dtype())
            .map(Some)
    }

    fn past(&self, _layer: usize, _row: usize, _dtype: DType) -> Result<(Tensor, Tensor)> {
        bail!("`pass` attends itself")
    }

    fn append(&self, _layer: usize, _q: &Tensor, _k: &Tensor, _v: &Tensor) -> Result<()> {
        Ok(())
    }

    fn decode(&self, _: usize, _: &Tensor, _: &Tensor, _: &Tensor, _: KvAttn) -> Result<Tensor> {
        bail!("`pass` decodes nothing")
    }
}
