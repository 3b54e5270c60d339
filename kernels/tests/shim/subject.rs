//! The CUDA cache under the shim, behind the seam: tensors of the CPU are copied into the shim's memory and back. All that is
//! decided is decided in `src/cache.rs` and `src/blocks.rs`.

use std::f32::consts::LOG2_E;
use std::fmt;
use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Error, Result, Tensor};
use mistralrs_kv_backend::{KvAttn, KvBackendProvider, KvCacheBackend, KvFault, KvPlan, KvStep};
use ott_backend::backend::Inspect;
use ott_backend::cache::{LayerSpec, LayerStats, Row};
use ott_backend::{CpuOps, OttConfig, PageLayout};

use crate::abi::{Fresh, Prompt, Query, PARTIAL};
use crate::cache::{DeviceCache, Step};
use crate::conformance::shape;
use crate::device::{address, Dtype, Kernels};
use crate::driver::{CudaSlice, CudaStream};
use crate::harness::{Host, Model};
use crate::machine::{Subject, NUM_BLOCKS};

struct Shim {
    tells: Tells,
    late: Mutex<Vec<KvFault>>,
    layers: DeviceCache,
    stream: Arc<CudaStream>,
    model: Model,
}

struct ShimStep {
    shim: Arc<Shim>,
    step: Arc<Step>,
    plan: KvPlan,
}

struct ShimBackend(Arc<Shim>);

/// When faults of rows are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tells {
    /// By the step that has them.
    AtOnce,
    /// By the step after it: a fault put in on purpose.
    Late,
}

/// The cache of a model on these kernels.
pub fn subject(kernels: Kernels, model: Model, tells: Tells) -> Subject {
    let config = OttConfig::parse(&model.options).expect("valid");
    let spec = |layer| LayerSpec {
        layer,
        config,
        layout: PageLayout::new(&config, layer, model.kv_heads, model.k_dim, model.v_dim)
            .expect("served"),
        ops: CpuOps::available()[0],
    };
    let specs: Vec<LayerSpec> = (0..model.layers).map(spec).collect();
    let shapes: Vec<_> = specs
        .iter()
        .map(|spec| (shape(spec), model.heads))
        .collect();
    let pool = (NUM_BLOCKS, specs[0].chunks(model.max_seqs));
    let stream = Arc::clone(kernels.stream());
    let layers = DeviceCache::new(kernels, &shapes, Dtype::F32, pool, config.residual, 1);
    let shim = Arc::new(Shim {
        tells,
        late: Mutex::default(),
        layers: layers.expect("memory"),
        stream,
        model: model.clone(),
    });
    Subject {
        host: Host {
            block_size: ott_backend::provider()
                .block_size(None, &model.options)
                .expect("valid"),
            model,
            cache: Arc::new(ShimBackend(Arc::clone(&shim))),
        },
        inspect: Arc::new(ShimBackend(shim)),
        answered: usize::MAX,
    }
}

fn failed(error: impl fmt::Display) -> Error {
    Error::Msg(error.to_string())
}

impl KvCacheBackend for ShimBackend {
    fn begin_step(&self, plan: KvPlan) -> Result<Arc<dyn KvStep>> {
        let rows = plan.rows.iter().map(|row| Row {
            seq: row.seq,
            past: row.past,
            new: row.new,
            table: &row.blocks,
        });
        let step = self
            .0
            .layers
            .begin(&rows.collect::<Vec<_>>())
            .map_err(failed)?;
        let shim = Arc::clone(&self.0);
        Ok(Arc::new(ShimStep { shim, step, plan }))
    }

    fn end_step(&self) -> Result<Vec<KvFault>> {
        let faults = self.0.layers.end().map_err(failed)?.into_iter();
        let fault = |fault: crate::cache::Fault| KvFault {
            seq: fault.seq,
            error: format!("layer {}", fault.layer),
        };
        let mut faults: Vec<KvFault> = faults.map(fault).collect();
        if self.0.tells == Tells::Late {
            let mut late = self.0.late.lock().map_err(failed)?;
            std::mem::swap(&mut *late, &mut faults);
        }
        Ok(faults)
    }

    fn allocated(&self, _seq: usize, blocks: &[usize]) {
        self.0.layers.allocated(blocks);
    }

    fn released(&self, seq: usize, blocks: &[usize]) -> Vec<usize> {
        self.0.layers.released(seq, blocks)
    }

    fn reset(&self) {
        self.0.layers.reset();
    }

    fn describe(&self) -> String {
        String::new()
    }

    fn allocated_bytes(&self) -> usize {
        self.0.layers.allocated_bytes()
    }
}

impl Inspect for ShimBackend {
    fn num_layers(&self) -> usize {
        self.0.layers.num_layers()
    }

    fn stats(&self, layer: usize) -> Option<LayerStats> {
        // A look in the middle of a step is told what was counted before it.
        let (counts, traced) = self.0.layers.stats().ok()?;
        let traced = traced.get(layer)?;
        Some(LayerStats {
            sealed_blocks: counts.pages,
            traced_tokens: traced.tokens,
            staging_chunks: counts.chunks,
            tokens: counts.tokens,
            window_tokens: counts.window,
            most_displaced: traced.displaced,
            stopped_parts: traced.stopped,
        })
    }

    fn page(&self, layer: usize, block: usize) -> Option<Vec<u8>> {
        self.0.layers.page(layer, block)
    }

    fn bytes(&self) -> usize {
        self.0.layers.allocated_bytes()
    }
}

impl fmt::Debug for ShimStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShimStep").finish_non_exhaustive()
    }
}

/// A tensor `(rows, heads, tokens, channels)` in the shim's memory.
struct Copied {
    data: CudaSlice<f32>,
    row: i64,
    head: i64,
    token: i64,
}

impl ShimStep {
    fn copied(&self, x: &Tensor) -> Result<Copied> {
        let (_, heads, tokens, dim) = x.dims4()?;
        let numbers = x.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        Ok(Copied {
            data: self.shim.stream.clone_htod(&numbers).map_err(failed)?,
            row: (heads * tokens * dim) as i64,
            head: (tokens * dim) as i64,
            token: dim as i64,
        })
    }

    fn fresh(&self, copied: &Copied) -> Fresh {
        Fresh {
            data: address(&copied.data, &self.shim.stream),
            row: copied.row,
            head: copied.head,
            token: copied.token,
        }
    }
}

impl KvStep for ShimStep {
    fn plan(&self) -> &KvPlan {
        &self.plan
    }

    fn prefill(
        &self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        attn: KvAttn,
    ) -> Result<Option<Tensor>> {
        let shim = &self.shim;
        let device_layer = shim.layers.layer(layer).map_err(failed)?;
        let tables = self.step.tables(&shim.layers, layer);
        let (rows, heads, v_dim) = (self.step.rows.len(), shim.model.heads, shim.model.v_dim);
        let tokens = q.dim(2)?;
        let nan = vec![f32::NAN; rows * heads * tokens * v_dim];
        let out = shim.stream.clone_htod(&nan).map_err(failed)?;
        let (q, k, v) = (self.copied(q)?, self.copied(k)?, self.copied(v)?);
        let prompt = Prompt {
            q: self.fresh(&q),
            k: self.fresh(&k),
            v: self.fresh(&v),
            out: address(&out, &shim.stream),
            sums: 0,
            tokens: tokens as u32,
            splits: 1,
            scale: attn.scale * LOG2_E,
            softcap: attn.softcap.unwrap_or(0.0),
        };
        device_layer.prompt(tables, prompt).map_err(failed)?;
        let out = shim.stream.clone_dtoh(&out).map_err(failed)?;
        Tensor::from_vec(out, (rows, heads, tokens, v_dim), &Device::Cpu).map(Some)
    }

    fn past(&self, layer: usize, row: usize, dtype: DType) -> Result<(Tensor, Tensor)> {
        let (shim, device) = (&self.shim, Device::Cpu);
        let (past, heads) = (self.step.rows[row].past, shim.model.kv_heads);
        let device_layer = shim.layers.layer(layer).map_err(failed)?;
        let nan = |dim: usize| {
            shim.stream
                .clone_htod(&vec![f32::NAN; heads * past * dim])
                .map_err(failed)
        };
        let (k_dim, v_dim) = (shim.model.k_dim, shim.model.v_dim);
        let (k, v) = (nan(k_dim)?, nan(v_dim)?);
        if past > 0 {
            let tables = self.step.tables(&shim.layers, layer);
            let to = |x| address(x, &shim.stream);
            let gathered = device_layer.gather(tables, row as u32, 0..past as u32, to(&k), to(&v));
            gathered.map_err(failed)?;
        }
        let tensor = |x: &CudaSlice<f32>, dim: usize| {
            let numbers = shim.stream.clone_dtoh(x).map_err(failed)?;
            Tensor::from_vec(numbers, (1, heads, past, dim), &device)?.to_dtype(dtype)
        };
        Ok((tensor(&k, k_dim)?, tensor(&v, v_dim)?))
    }

    fn append(&self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<()> {
        let (q, k, v) = (self.copied(q)?, self.copied(k)?, self.copied(v)?);
        let device_layer = self.shim.layers.layer(layer).map_err(failed)?;
        let tables = self.step.tables(&self.shim.layers, layer);
        let stored = device_layer.append(tables, self.fresh(&q), self.fresh(&k), self.fresh(&v));
        stored.map_err(failed)
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
        let shim = &self.shim;
        let device_layer = shim.layers.layer(layer).map_err(failed)?;
        let tables = self.step.tables(&shim.layers, layer);
        let (rows, heads, v_dim) = (self.step.rows.len(), shim.model.heads, shim.model.v_dim);
        let nan = |len: usize| shim.stream.clone_htod(&vec![f32::NAN; len]).map_err(failed);
        let (out, sums) = (
            nan(rows * heads * v_dim)?,
            nan(tables.num_items * heads * (v_dim + PARTIAL))?,
        );
        let q = self.copied(q)?;
        let query = Query {
            q: address(&q.data, &shim.stream),
            row: q.row,
            head: q.head,
            out: address(&out, &shim.stream),
            sums: address(&sums, &shim.stream),
            arrived: 0,
            num_heads: heads as u32,
            scale: attn.scale * LOG2_E,
            softcap: attn.softcap.unwrap_or(0.0),
        };
        device_layer.decode(tables, query, true).map_err(failed)?;
        let out = shim.stream.clone_dtoh(&out).map_err(failed)?;
        Tensor::from_vec(out, (rows, heads, 1, v_dim), &Device::Cpu)
    }
}
