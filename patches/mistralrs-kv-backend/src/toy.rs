//! `toy-f32`: a full-precision backend in a page of code.
//!
//! It shows that the seam can be implemented, and it is the golden reference of the patched host:
//! sums run in the order of mistral.rs's own CPU attention (tiles of 16 tokens, dot products by
//! fours), so that a decoded token is equal bit for bit, whatever the dtype.
//!
//! It is strict where a real backend would be silent: reading a token that nobody wrote, writing to
//! a block of another sequence or allocating a block that is in use is an error. Options:
//! `block=N`, tokens per block (128). [`faulty`] adds failures on demand.

mod attention;
pub mod faulty;

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use candle_core::{bail, DType, Device, Result, Tensor};

use attention::Head;

use crate::{
    KvAttn, KvBackendProvider, KvCacheBackend, KvGauge, KvLayer, KvMemory, KvModelSource, KvPlan,
    KvRow, KvShape, KvStats, KvStep,
};

const DEFAULT_BLOCK_SIZE: usize = 128;

/// The provider of `toy-f32`, to be [registered](crate::register).
pub fn provider() -> Arc<dyn KvBackendProvider> {
    Arc::new(Toy)
}

struct Toy;

impl KvBackendProvider for Toy {
    fn name(&self) -> &'static str {
        "toy-f32"
    }

    fn check_options(&self, options: &str) -> anyhow::Result<()> {
        self.block_size(None, options).map(drop)
    }

    fn check_model(&self, _source: &KvModelSource<'_>, _options: &str) -> anyhow::Result<()> {
        Ok(()) // What the seam can carry, this backend can serve.
    }

    fn block_size(&self, user: Option<usize>, options: &str) -> anyhow::Result<usize> {
        let asked = match options.split_once('=') {
            None if options.is_empty() => None,
            Some(("block", n)) if n.parse::<usize>().is_ok_and(|n| n > 0) => n.parse().ok(),
            _ => anyhow::bail!("toy-f32 does not know `{options}`; its only option is `block=N`"),
        };
        match (user, asked) {
            (Some(user), Some(asked)) if user != asked => anyhow::bail!(
                "blocks of {user} tokens were asked for, and `block={asked}`: give one of them"
            ),
            (user, asked) => Ok(user.or(asked).unwrap_or(DEFAULT_BLOCK_SIZE)),
        }
    }

    fn memory(&self, shape: &KvShape) -> anyhow::Result<KvMemory> {
        let slot: usize = shape.layers.iter().map(|l| bytes_of(l) + SLOT_BYTES).sum();
        Ok(KvMemory {
            per_block: shape.block_size * slot,
            fixed: 0,
        })
    }

    fn create(&self, shape: KvShape, num_blocks: usize) -> anyhow::Result<Arc<dyn KvCacheBackend>> {
        Ok(Arc::new(ToyCache(Arc::new(Pool::new(shape, num_blocks)))))
    }
}

/// K of all heads, then V of all heads, of one token in one layer; `None` until written.
type Slot = Option<Box<[f32]>>;

const SLOT_BYTES: usize = size_of::<Slot>();

fn bytes_of(layer: &KvLayer) -> usize {
    layer.num_kv_heads * (layer.k_dim + layer.v_dim) * size_of::<f32>()
}

struct Pool {
    shape: KvShape,
    num_blocks: usize,
    state: RwLock<State>,
}

struct State {
    /// By layer, then by slot: `block * block_size + offset`.
    slots: Vec<Vec<Slot>>,
    /// By block: the sequence that may write to it.
    owners: Vec<Option<usize>>,
    /// What `allocated` found wrong; told by the next `begin_step`.
    complaint: Option<String>,
}

impl Pool {
    fn new(shape: KvShape, num_blocks: usize) -> Self {
        let slots = vec![None; num_blocks * shape.block_size];
        let state = State {
            slots: vec![slots; shape.layers.len()],
            owners: vec![None; num_blocks],
            complaint: None,
        };
        Self {
            shape,
            num_blocks,
            state: RwLock::new(state),
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn layer(&self, layer: usize) -> Result<&KvLayer> {
        match self.shape.layers.get(layer) {
            Some(found) => Ok(found),
            None => bail!(
                "layer {layer} asked of a cache of {} layers",
                self.shape.layers.len()
            ),
        }
    }

    /// Block and slot of a row's token.
    fn locate(&self, row: &KvRow, token: usize) -> (usize, usize) {
        let size = self.shape.block_size;
        let block = row.blocks[token / size];
        (block, block * size + token % size)
    }

    /// The first `len` tokens of a row.
    fn tokens<'a>(
        &self,
        state: &'a State,
        layer: usize,
        row: &KvRow,
        len: usize,
    ) -> Result<Vec<&'a [f32]>> {
        let stored = |token| {
            let (block, slot) = self.locate(row, token);
            match state.slots[layer][slot].as_deref() {
                Some(kv) => Ok(kv),
                None => bail!(
                    "layer {layer}: sequence {} reads token {token} from block {block}, which \
                     holds nothing there: it was never written, or was allocated anew since",
                    row.seq
                ),
            }
        };
        (0..len).map(stored).collect()
    }

    fn check(&self, plan: &KvPlan) -> Result<()> {
        let size = self.shape.block_size;
        if plan.block_size != size {
            bail!(
                "plan with blocks of {} tokens for a cache of {size}",
                plan.block_size
            );
        }
        if plan.rows.is_empty() {
            bail!("plan without rows");
        }
        for (i, row) in plan.rows.iter().enumerate() {
            let (seq, past, new) = (row.seq, row.past, row.new);
            if let Some(block) = row
                .blocks
                .iter()
                .find(|b| !(1..self.num_blocks).contains(*b))
            {
                bail!(
                    "sequence {seq}: block {block} is not one of 1..{}",
                    self.num_blocks
                );
            }
            if new == 0 || (past + new).div_ceil(size) > row.blocks.len() {
                bail!(
                    "sequence {seq}: {past} past and {new} new tokens in {} blocks of {size}",
                    row.blocks.len()
                );
            }
            if plan.rows[..i].iter().any(|other| other.seq == seq) {
                bail!("sequence {seq} has two rows in one step");
            }
        }
        Ok(())
    }
}

struct ToyCache(Arc<Pool>);

impl KvCacheBackend for ToyCache {
    fn begin_step(&self, plan: KvPlan) -> Result<Arc<dyn KvStep>> {
        if let Some(complaint) = self.0.write().complaint.take() {
            bail!("{complaint}");
        }
        self.0.check(&plan)?;
        Ok(Arc::new(ToyStep {
            pool: Arc::clone(&self.0),
            plan,
        }))
    }

    fn allocated(&self, seq: usize, blocks: &[usize]) {
        let size = self.0.shape.block_size;
        let state = &mut *self.0.write();
        for &block in blocks {
            match state.owners.get(block).copied() {
                None => {
                    state.complaint = Some(format!("block {block} was allocated: no such block"))
                }
                Some(Some(owner)) if owner != seq => {
                    let message = format!("block {block} of sequence {owner} was given to {seq}");
                    state.complaint = Some(message);
                }
                Some(_) => {
                    state.owners[block] = Some(seq);
                    for slots in &mut state.slots {
                        slots[block * size..][..size].fill(None);
                    }
                }
            }
        }
    }

    fn released(&self, seq: usize, blocks: &[usize]) -> Vec<usize> {
        let state = &mut *self.0.write();
        for &block in blocks {
            if let Some(owner) = state.owners.get_mut(block).filter(|o| **o == Some(seq)) {
                *owner = None;
            }
        }
        Vec::new()
    }

    fn reset(&self) {
        let state = &mut *self.0.write();
        state.slots.iter_mut().for_each(|slots| slots.fill(None));
        state.owners.fill(None);
        state.complaint = None;
    }

    fn describe(&self) -> String {
        let (layers, size) = (self.0.shape.layers.len(), self.0.shape.block_size);
        let blocks = self.0.num_blocks.saturating_sub(1);
        format!("toy-f32: keys and values at 32 bits, {layers} layers, {blocks} blocks of {size} tokens")
    }

    fn stats(&self) -> KvStats {
        let state = self.0.read();
        let first = state.slots.first().into_iter().flatten();
        let owned = state.owners.iter().flatten().count();
        KvStats {
            setting: format!("block={}", self.0.shape.block_size),
            bits_per_number: Some(32.0),
            tokens: Some(first.flatten().count()),
            gauges: vec![KvGauge {
                name: "owned_blocks",
                help: "Blocks that a sequence may write to",
                by_layer: vec![owned as f64; self.0.shape.layers.len()],
            }],
        }
    }

    fn allocated_bytes(&self) -> usize {
        let state = self.0.read();
        let layers = self.0.shape.layers.iter().zip(&state.slots);
        layers
            .map(|(l, s)| s.len() * SLOT_BYTES + s.iter().flatten().count() * bytes_of(l))
            .sum()
    }
}

struct ToyStep {
    pool: Arc<Pool>,
    plan: KvPlan,
}

impl fmt::Debug for ToyStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ToyStep")
            .field("plan", &self.plan)
            .finish_non_exhaustive()
    }
}

impl KvStep for ToyStep {
    fn plan(&self) -> &KvPlan {
        &self.plan
    }

    fn past(&self, layer: usize, row: usize, dtype: DType) -> Result<(Tensor, Tensor)> {
        let shape = self.pool.layer(layer)?;
        let Some(row) = self.plan.rows.get(row) else {
            bail!("row {row} asked of a step of {} rows", self.plan.rows.len());
        };
        let state = self.pool.read();
        let tokens = self.pool.tokens(&state, layer, row, row.past)?;
        let heads = shape.num_kv_heads;
        let gather = |range: Range<usize>, dim| -> Result<Tensor> {
            let kv: Vec<f32> = tokens
                .iter()
                .flat_map(|kv| &kv[range.clone()])
                .copied()
                .collect();
            let kv = Tensor::from_vec(kv, (1, tokens.len(), heads, dim), &Device::Cpu)?;
            kv.transpose(1, 2)?
                .to_dtype(dtype)?
                .contiguous()?
                .to_device(&shape.device)
        };
        let (k, all) = (heads * shape.k_dim, heads * (shape.k_dim + shape.v_dim));
        Ok((gather(0..k, shape.k_dim)?, gather(k..all, shape.v_dim)?))
    }

    fn append(&self, layer: usize, _q: &Tensor, k: &Tensor, v: &Tensor) -> Result<()> {
        let shape = self.pool.layer(layer)?;
        let tokens = k.dim(2)?;
        let (k_len, v_len) = (
            shape.num_kv_heads * shape.k_dim,
            shape.num_kv_heads * shape.v_dim,
        );
        let k = self.by_token(k, (shape.num_kv_heads, tokens, shape.k_dim))?;
        let v = self.by_token(v, (shape.num_kv_heads, tokens, shape.v_dim))?;
        let state = &mut *self.pool.write();
        for (i, row) in self.plan.rows.iter().enumerate() {
            for t in 0..row.new {
                let (block, slot) = self.pool.locate(row, row.past + t);
                if state.owners[block] != Some(row.seq) {
                    bail!(
                        "layer {layer}: sequence {} writes token {} to block {block}, which was \
                         not allocated to it",
                        row.seq,
                        row.past + t
                    );
                }
                let at = i * tokens + t;
                let kv = [&k[at * k_len..][..k_len], &v[at * v_len..][..v_len]].concat();
                state.slots[layer][slot] = Some(kv.into());
            }
        }
        Ok(())
    }

    fn decode(
        &self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        attn: KvAttn,
    ) -> Result<Tensor> {
        self.append(layer, q, k, v)?;
        let shape = self.pool.layer(layer)?;
        let (heads, k_dim, v_dim) = (shape.num_heads, shape.k_dim, shape.v_dim);
        let (gqa, v_start) = (heads / shape.num_kv_heads, shape.num_kv_heads * k_dim);
        let (rows, tokens) = (self.plan.rows.len(), q.dim(2)?);
        let queries = self.by_token(q, (heads, tokens, k_dim))?;
        let mut out = vec![0f32; rows * tokens * heads * v_dim];
        let state = self.pool.read();
        for (i, row) in self.plan.rows.iter().enumerate() {
            let context = self.pool.tokens(&state, layer, row, row.past + row.new)?;
            for t in 0..row.new {
                for h in 0..heads {
                    let at = (i * tokens + t) * heads + h;
                    let k_at = h / gqa * k_dim;
                    let v_at = v_start + h / gqa * v_dim;
                    let head = Head {
                        q: &queries[at * k_dim..][..k_dim],
                        k: k_at..k_at + k_dim,
                        v: v_at..v_at + v_dim,
                        attn,
                    };
                    head.attend(&context[..=row.past + t], &mut out[at * v_dim..][..v_dim]);
                }
            }
        }
        let out = Tensor::from_vec(out, (rows, tokens, heads, v_dim), &Device::Cpu)?;
        out.transpose(1, 2)?
            .to_dtype(q.dtype())?
            .contiguous()?
            .to_device(&shape.device)
    }
}

impl ToyStep {
    /// A tensor `(rows, heads, tokens, channels)` as numbers in the order
    /// `(rows, tokens, heads, channels)`, after a check of its shape.
    fn by_token(&self, x: &Tensor, shape: (usize, usize, usize)) -> Result<Vec<f32>> {
        let expected = [self.plan.rows.len(), shape.0, shape.1, shape.2];
        let new = self.plan.rows.iter().map(|row| row.new).max().unwrap_or(0);
        if x.dims() != expected || new > shape.1 {
            bail!(
                "tensor of shape {:?} for {expected:?}, at least {new} tokens",
                x.dims()
            );
        }
        let x = x.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
        x.transpose(1, 2)?.contiguous()?.flatten_all()?.to_vec1()
    }
}
