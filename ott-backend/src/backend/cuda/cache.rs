//! Blocks and layers on the device, and what happens to them between steps and at the beginning of each.

use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::{CudaDevice, DType, Device};
use mistralrs_kv_backend::KvShape;
use ott_kernels::abi::Fresh;
use ott_kernels::blocks::{Blocks, Refused, Step};
use ott_kernels::device::{address, DeviceLayer, DevicePlan, Kernels};
use ott_kernels::plan::{Plan, RowState};

use super::memory::{chunks, shapes, sums};
use super::tensor::kernel_dtype;
use crate::cache::{check_tables, LayerSpec, LayerStats, Row, NO_BLOCK};
use crate::error::{Error, Result};

/// What changes between steps, on the host's side.
struct State {
    blocks: Blocks,
    /// By block: the block before it in its sequence, [`NO_BLOCK`] if none.
    previous: Vec<u32>,
    /// Blocks that the last step wrote.
    written: Vec<usize>,
    /// Bytes of the last step's tables.
    table_bytes: usize,
}

/// The tables of a step on the device, one of each kind of layer.
pub struct Tables(Vec<DevicePlan>);

impl Tables {
    /// Those of a layer.
    pub fn of(&self, cache: &CudaCache, layer: usize) -> &DevicePlan {
        &self.0[cache.kinds[layer]]
    }
}

/// The cache of all layers of a model on one GPU.
pub struct CudaCache {
    layers: Vec<DeviceLayer>,
    /// By layer: its place among kinds of layers that share a step's tables.
    kinds: Vec<usize>,
    /// Blocks of threads per item and how many the device runs at once, by kind.
    lanes_and_slots: Vec<(usize, usize)>,
    kernels: Kernels,
    sums: CudaSlice<f32>,
    state: Mutex<State>,
    pub(super) device: Device,
    pub(super) dtype: DType,
    group: usize,
    residual: usize,
    num_blocks: usize,
    max_seqs: usize,
}

/// What the driver said, as an error of ours.
pub fn failed(error: impl std::fmt::Display) -> Error {
    let what = format!("{error:#}").into();
    Error::Cuda { what }
}

impl CudaCache {
    /// An empty cache: all its memory is taken now.
    ///
    /// # Errors
    /// If the device is too old or has too little memory.
    pub fn new(
        specs: &[LayerSpec],
        shape: &KvShape,
        num_blocks: usize,
        device: &CudaDevice,
    ) -> Result<Self> {
        let stream = device.cuda_stream();
        let kernels = Kernels::new(&stream).map_err(failed)?;
        let dtype = kernel_dtype(shape.dtype).ok_or(Error::Dtype {
            dtype: shape.dtype.as_str(),
        })?;
        let mut layers = Vec::with_capacity(specs.len());
        for ((spec, layer), l) in specs.iter().zip(shapes(specs)).zip(&shape.layers) {
            let chunks = chunks(spec, shape.max_seqs);
            let made = DeviceLayer::new(&kernels, layer, dtype, l.num_heads, num_blocks, chunks);
            layers.push(made.map_err(failed)?);
        }
        let by_layer: Vec<_> = layers.iter().map(|l| l.lanes_and_slots()).collect();
        let mut lanes_and_slots = by_layer.clone();
        lanes_and_slots.sort_unstable();
        lanes_and_slots.dedup();
        let kind = |of: &(usize, usize)| lanes_and_slots.partition_point(|other| other < of);
        let (group, residual) = specs.first().map_or((1, 0), |spec| {
            (spec.layout.group_size, spec.config.residual)
        });
        let window = specs.first().map_or(0, |spec| chunks(spec, shape.max_seqs));
        Ok(Self {
            kinds: by_layer.iter().map(kind).collect(),
            lanes_and_slots,
            layers,
            sums: stream.alloc_zeros(sums(shape).max(1)).map_err(failed)?,
            state: Mutex::new(State {
                blocks: Blocks::new(num_blocks, window, group, residual),
                previous: vec![NO_BLOCK; num_blocks],
                written: Vec::new(),
                table_bytes: 0,
            }),
            kernels,
            device: Device::Cuda(device.clone()),
            dtype: shape.dtype,
            group,
            residual,
            num_blocks,
            max_seqs: shape.max_seqs,
        })
    }

    /// Number of layers.
    pub fn num_layers(&self) -> usize {
        self.layers.len()
    }

    /// One layer.
    ///
    /// # Errors
    /// If there is no such layer.
    pub fn layer(&self, layer: usize) -> Result<&DeviceLayer> {
        self.layers.get(layer).ok_or(Error::NoSuchLayer {
            layer,
            layers: self.layers.len(),
        })
    }

    /// How many layers attend on tensor cores.
    pub fn tuned_layers(&self) -> usize {
        self.layers.iter().filter(|layer| layer.is_tuned()).count()
    }

    /// Where the sums of a step's items go; layers use it one after the other.
    pub fn sums_address(&self) -> u64 {
        address(&self.sums, self.kernels.stream())
    }

    /// Check a step, make room for it in all layers, and bring its tables to the device.
    ///
    /// # Errors
    /// If blocks or tokens are missing, or a block is written twice or is sealed; or if the last step met a number that no
    /// scale can hold: only now it is known, and what that step wrote is forgotten.
    pub fn begin(&self, rows: &[Row<'_>]) -> Result<Tables> {
        let mut state = self.state();
        if let Some(layer) = self.kernels.faults().take().map_err(failed)? {
            let written = std::mem::take(&mut state.written);
            state.blocks.clear(&written);
            return Err(Error::NotRepresentableBefore { layer });
        }
        check_tables(rows, self.group, self.num_blocks)?;
        if rows.len() > self.max_seqs {
            return Err(self.refused(Refused::Full));
        }
        let steps = rows.iter().map(|row| Step {
            past: row.past,
            new: row.new,
            table: &row.table[..row.end().div_ceil(self.group)],
        });
        let steps: Vec<Step<'_>> = steps.collect();
        for step in &steps {
            for i in state.blocks.overdue(step) {
                let before = i.checked_sub(1).map(|i| step.table[i]);
                self.flush(&mut state, step.table[i], before)?;
            }
        }
        let states = state.blocks.begin(&steps);
        let states = states.map_err(|refused| self.refused(refused))?;
        state.written.clear();
        for row in rows {
            let last = row.end().div_ceil(self.group);
            for i in (row.past / self.group).saturating_sub(1)..last {
                let before = i.checked_sub(1).map(|i| row.table[i] as u32);
                state.previous[row.table[i]] = before.unwrap_or(NO_BLOCK);
            }
            let written = &row.table[row.past / self.group..last];
            state.written.extend_from_slice(written);
        }
        let tables = self.upload(&states)?;
        state.table_bytes = tables.0.iter().map(DevicePlan::bytes).sum();
        Ok(tables)
    }

    /// Blocks were handed out: what they held is dead.
    pub fn allocated(&self, blocks: &[usize]) {
        let inside: Vec<usize> = self.inside(blocks).collect();
        self.state().blocks.clear(&inside);
    }

    /// A sequence gave up blocks, in table order. Full ones are sealed, others forgotten, and those that cannot be sealed.
    pub fn released(&self, blocks: &[usize]) {
        let mut state = self.state();
        let mut before = None;
        for block in self.inside(blocks) {
            let previous = before.or(match state.previous[block] {
                NO_BLOCK => None,
                previous => Some(previous as usize),
            });
            let kept = state.blocks.is_sealed(block)
                || state.blocks.held(block) == self.group
                    && self.flush(&mut state, block, previous).is_ok();
            if !kept {
                state.blocks.clear(&[block]);
            }
            before = Some(block);
        }
    }

    /// Forget everything.
    pub fn reset(&self) {
        let mut state = self.state();
        state.blocks.reset();
        state.previous.fill(NO_BLOCK);
        state.written.clear();
    }

    /// Bytes held on the device.
    pub fn allocated_bytes(&self) -> usize {
        let layers = self.layers.iter();
        let layers: usize = layers.map(DeviceLayer::allocated_bytes).sum();
        layers + self.sums.num_bytes() + self.state().table_bytes
    }

    /// Counts of one layer; waits for the device.
    ///
    /// # Errors
    /// If there is no such layer, or the device fails.
    pub fn stats(&self, layer: usize) -> Result<LayerStats> {
        let (counts, sealed) = {
            let state = self.state();
            (state.blocks.counts(), state.blocks.sealed())
        };
        let sealed: Vec<u32> = sealed.into_iter().map(|block| block as u32).collect();
        let [traced, stopped, displaced] = self.layer(layer)?.count(&sealed).map_err(failed)?;
        Ok(LayerStats {
            sealed_blocks: counts.sealed,
            traced_tokens: traced as usize,
            staging_chunks: counts.chunks,
            tokens: counts.sealed * self.group + counts.window,
            window_tokens: counts.window,
            most_displaced: displaced as usize,
            stopped_parts: stopped as usize,
        })
    }

    /// The page of a sealed block; waits for the device.
    pub fn page(&self, layer: usize, block: usize) -> Option<Vec<u8>> {
        let sealed = block < self.num_blocks && self.state().blocks.is_sealed(block);
        sealed.then(|| self.layer(layer).ok()?.page(block).ok())?
    }

    /// Seal a full open block behind the one before it, in all layers.
    fn flush(&self, state: &mut State, block: usize, before: Option<usize>) -> Result<()> {
        if let Some(open) = before.filter(|b| !state.blocks.is_sealed(*b)) {
            return Err(Error::MissingTokens {
                layer: 0,
                block: open,
                held: 0,
                expected: self.group,
            });
        }
        let table: Vec<usize> = before.into_iter().chain([block]).collect();
        let row = state.blocks.flush(&table);
        let row = row.map_err(|refused| self.refused(refused))?;
        let tables = self.upload(&[row])?;
        for (layer, device_layer) in self.layers.iter().enumerate() {
            let tables = tables.of(self, layer);
            device_layer
                .append(tables, Fresh::NOTHING, Fresh::NOTHING, Fresh::NOTHING)
                .map_err(failed)?;
        }
        Ok(())
    }

    fn upload(&self, rows: &[RowState<'_>]) -> Result<Tables> {
        let plans = self.lanes_and_slots.iter().map(|&(lanes, slots)| {
            let plan = Plan::new(rows, self.group, lanes, slots);
            DevicePlan::upload(&plan, lanes, self.kernels.stream()).map_err(failed)
        });
        Ok(Tables(plans.collect::<Result<_>>()?))
    }

    fn refused(&self, refused: Refused) -> Error {
        match refused {
            Refused::Missing {
                block,
                held,
                expected,
            } => Error::MissingTokens {
                layer: 0,
                block,
                held,
                expected,
            },
            Refused::Sealed { block } => Error::Sealed {
                layer: 0,
                block,
                residual: self.residual,
            },
            Refused::Full => Error::StagingFull {
                layer: 0,
                max_seqs: self.max_seqs,
            },
        }
    }

    fn inside<'a>(&self, blocks: &'a [usize]) -> impl Iterator<Item = usize> + 'a {
        let num_blocks = self.num_blocks;
        blocks.iter().copied().filter(move |b| *b < num_blocks)
    }

    // Poisoned by a panic that ended a request; `reset` brings a sane state.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
