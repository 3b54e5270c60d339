//! All layers of a model on one GPU, and what happens to them in a step and between steps. Nothing waits for the device but
//! [`DeviceCache::end`], once per step, and what looks into the cache.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::{CudaSlice, CudaStream};

use crate::blocks::{Blocks, Counts, Refused, Row, RowPlan};
use crate::device::{address, DeviceLayer, DevicePlan, Dtype, Kernels};
use crate::plan::Plan;
use crate::shape::LayerShape;

/// Layers that are sealed beside each other. The kernels of one group follow each other, on a few of a GPU's multiprocessors.
const SIDES: usize = 16;

/// A layer's shape and its query heads.
pub type LayerHeads = (LayerShape, usize);

/// Why a call did not succeed.
#[derive(Debug)]
pub enum CacheError {
    /// The step cannot be.
    Refused(Refused),
    /// No such layer.
    NoSuchLayer(usize),
    /// The GPU or its driver failed.
    Device(anyhow::Error),
}

impl fmt::Display for CacheError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(refused) => write!(f, "{refused}"),
            Self::NoSuchLayer(layer) => write!(f, "no layer {layer}"),
            Self::Device(error) => write!(f, "{error:#}"),
        }
    }
}

impl std::error::Error for CacheError {}

impl From<Refused> for CacheError {
    fn from(refused: Refused) -> Self {
        Self::Refused(refused)
    }
}

impl From<anyhow::Error> for CacheError {
    fn from(error: anyhow::Error) -> Self {
        Self::Device(error)
    }
}

/// This module's result.
pub type Result<T> = std::result::Result<T, CacheError>;

/// A step: its rows, and their tables on the device, one of each kind of layer.
pub struct Step {
    /// What each row reads and writes.
    pub rows: Vec<RowPlan>,
    tables: Vec<DevicePlan>,
}

impl Step {
    /// The tables of a layer.
    pub fn tables(&self, cache: &DeviceCache, layer: usize) -> &DevicePlan {
        &self.tables[cache.kinds[layer]]
    }
}

/// A row whose new tokens could not be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The row's sequence.
    pub seq: usize,
    /// The first layer that met a number which no scale can hold.
    pub layer: usize,
}

/// Counts of the pages of one layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traced {
    /// Traced tokens.
    pub tokens: usize,
    /// Parts of a head after which tracing has stopped.
    pub stopped: usize,
    /// Most places of an extra store that are taken.
    pub displaced: usize,
}

/// What changes.
struct State {
    blocks: Blocks,
    /// Of the step that has begun and not ended.
    step: Option<Arc<Step>>,
    /// Bytes of the last step's tables.
    table_bytes: usize,
    /// By layer, as last counted.
    traced: Vec<Traced>,
    /// Somebody has asked since.
    asked: bool,
}

/// The cache of all layers of a model on one GPU.
pub struct DeviceCache {
    layers: Vec<DeviceLayer>,
    /// By layer: its place among kinds of layers that share a step's tables.
    kinds: Vec<usize>,
    /// Blocks of threads per item and how many the device runs at once, by kind.
    lanes_and_slots: Vec<(usize, usize)>,
    kernels: Kernels,
    /// Streams on which stored groups are sealed.
    sides: Vec<Arc<CudaStream>>,
    sums: CudaSlice<f32>,
    state: Mutex<State>,
    group: usize,
}

impl DeviceCache {
    /// An empty cache: all its memory is taken now. `chunks` of the window, `sums` numbers for the parts of contexts.
    ///
    /// # Errors
    /// If the device has too little memory.
    pub fn new(
        kernels: Kernels,
        shapes: &[LayerHeads],
        dtype: Dtype,
        (num_blocks, chunks): (usize, usize),
        residual: usize,
        sums: usize,
    ) -> Result<Self> {
        let mut layers = Vec::with_capacity(shapes.len());
        for (shape, num_heads) in shapes {
            let made = DeviceLayer::new(&kernels, *shape, dtype, *num_heads, num_blocks, chunks);
            layers.push(made?);
        }
        let by_layer: Vec<_> = layers.iter().map(|l| l.lanes_and_slots()).collect();
        let mut lanes_and_slots = by_layer.clone();
        lanes_and_slots.sort_unstable();
        lanes_and_slots.dedup();
        let kind = |of: &(usize, usize)| lanes_and_slots.partition_point(|other| other < of);
        let group = shapes.first().map_or(1, |(shape, _)| shape.group_size);
        let taken = kernels.stream().alloc_zeros(sums.max(1));
        let side = |_| Ok(kernels.stream().context().new_stream()?);
        let sides = (0..SIDES.min(layers.len())).map(side);
        Ok(Self {
            sides: sides.collect::<anyhow::Result<_>>()?,
            kinds: by_layer.iter().map(kind).collect(),
            lanes_and_slots,
            sums: taken.map_err(anyhow::Error::from)?,
            state: Mutex::new(State {
                blocks: Blocks::new(num_blocks, chunks, group, residual),
                step: None,
                table_bytes: 0,
                traced: vec![Traced::default(); layers.len()],
                asked: false,
            }),
            layers,
            kernels,
            group,
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
        self.layers.get(layer).ok_or(CacheError::NoSuchLayer(layer))
    }

    /// How many layers attend on tensor cores.
    pub fn tuned_layers(&self) -> usize {
        self.layers.iter().filter(|layer| layer.is_tuned()).count()
    }

    /// Where the sums of a step's items go; layers use it one after the other.
    pub fn sums_address(&self) -> u64 {
        address(&self.sums, self.kernels.stream())
    }

    /// Plan a step, seal the stored groups that leave the window, and bring its tables to the device. A step that has not
    /// ended is undone.
    ///
    /// # Errors
    /// If blocks or tokens are missing, a block is sealed or is another sequence's too, the window has no room, or the
    /// device fails; the cache is as it was.
    pub fn begin(&self, rows: &[Row<'_>]) -> Result<Arc<Step>> {
        let state = &mut *self.state();
        state.step = None;
        let rows = state.blocks.begin(rows, |wave| self.seal(wave));
        // On the device a page leaves nothing behind.
        state.blocks.take_void();
        let rows = rows?;
        // Without tables the step never ends, and is undone.
        let step = Arc::new(self.upload(rows)?);
        state.table_bytes = step.tables.iter().map(DevicePlan::bytes).sum();
        state.step = Some(Arc::clone(&step));
        Ok(step)
    }

    /// The step has passed all layers: what it wrote counts, but for the rows that are told. Waits for the device.
    ///
    /// # Errors
    /// If the device fails: then the step never was.
    pub fn end(&self) -> Result<Vec<Fault>> {
        let Some(step) = self.state().step.take() else {
            return Ok(Vec::new());
        };
        // Without the lock: who watches the cache need not wait for the device.
        let mut layers: Vec<Option<usize>> = vec![None; step.rows.len()];
        for tables in &step.tables {
            let found = tables.faults(self.kernels.stream())?;
            for (layer, found) in layers.iter_mut().zip(found) {
                *layer = [*layer, found].into_iter().flatten().min();
            }
        }
        let mut state = self.state();
        if !state.blocks.has_step() {
            return Err(Refused::Undone.into());
        }
        state.blocks.end(|row| layers[row].is_some());
        state.blocks.take_void();
        if std::mem::take(&mut state.asked) {
            state.traced = self.count(&state.blocks)?;
        }
        let rows = step.rows.iter().zip(layers);
        let fault = |(row, layer): (&RowPlan, Option<usize>)| {
            let (seq, layer) = (row.seq, layer?);
            Some(Fault { seq, layer })
        };
        Ok(rows.filter_map(fault).collect())
    }

    /// Blocks were handed out: what they held is dead.
    pub fn allocated(&self, blocks: &[usize]) {
        self.state().blocks.allocated(blocks);
    }

    /// A sequence gave up blocks, in table order. Those that are in no other sequence's window are sealed if they are full,
    /// and forgotten if they are not. The blocks that hold nothing to hit any more, these and others.
    pub fn released(&self, seq: usize, blocks: &[usize]) -> Vec<usize> {
        let mut state = self.state();
        state.blocks.released(seq, blocks, |wave| self.seal(wave))
    }

    /// Forget everything.
    pub fn reset(&self) {
        let state = &mut *self.state();
        state.step = None;
        state.blocks.reset();
        state.traced.fill(Traced::default());
    }

    /// Bytes held on the device.
    pub fn allocated_bytes(&self) -> usize {
        let layers = self.layers.iter();
        let layers: usize = layers.map(DeviceLayer::allocated_bytes).sum();
        layers + self.sums.num_bytes() + self.state().table_bytes
    }

    /// How much is held, and by layer what is counted of its pages. While a step runs this does not wait for the device: the
    /// counts of pages are those of the end of the last step after which somebody had asked.
    ///
    /// # Errors
    /// If the device fails.
    pub fn stats(&self) -> Result<(Counts, Vec<Traced>)> {
        let mut state = self.state();
        state.asked = state.blocks.has_step();
        if !state.asked {
            state.traced = self.count(&state.blocks)?;
        }
        Ok((state.blocks.counts(), state.traced.clone()))
    }

    /// The page of a block, if it has one; waits for the device.
    pub fn page(&self, layer: usize, block: usize) -> Option<Vec<u8>> {
        let state = self.state();
        let page = state.blocks.is_page(block);
        page.then(|| self.layer(layer).ok()?.page(block).ok())?
    }

    /// Make pages out of stored tokens, in all layers.
    fn seal(&self, wave: &[RowPlan]) -> Result<()> {
        let step = self.upload(wave.to_vec())?;
        Ok(self.seal_layers(&step)?)
    }

    /// Layers beside each other, after what has been launched and before what will be.
    fn seal_layers(&self, step: &Step) -> anyhow::Result<()> {
        let main = self.kernels.stream();
        for side in &self.sides {
            side.join(main)?;
        }
        let sides = self.sides.iter().cycle();
        let sealed = (self.layers.iter().zip(sides).enumerate())
            .try_for_each(|(i, (layer, side))| layer.seal_stored(step.tables(self, i), side));
        // All of them, also after an error: what follows on the main stream must not meet what is still being sealed.
        let joined: Vec<_> = self.sides.iter().map(|side| main.join(side)).collect();
        sealed?;
        joined.into_iter().try_for_each(|joined| Ok(joined?))
    }

    fn upload(&self, rows: Vec<RowPlan>) -> Result<Step> {
        let plans = self.lanes_and_slots.iter().map(|&(lanes, slots)| {
            let plan = Plan::new(&rows, self.group, lanes, slots);
            DevicePlan::upload(&plan, lanes, self.kernels.stream())
        });
        let tables = plans.collect::<anyhow::Result<_>>()?;
        Ok(Step { rows, tables })
    }

    /// Counts of the pages, by layer; waits for the device.
    fn count(&self, blocks: &Blocks) -> Result<Vec<Traced>> {
        let pages: Vec<u32> = blocks.pages().into_iter().map(|b| b as u32).collect();
        let count = |layer: &DeviceLayer| {
            let [tokens, stopped, displaced] = layer.count(&pages)?.map(|n| n as usize);
            Ok(Traced {
                tokens,
                stopped,
                displaced,
            })
        };
        self.layers.iter().map(count).collect()
    }

    // Poisoned by a panic that ended a request; `reset` brings a sane state.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
