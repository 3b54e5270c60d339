//! A layer on the device, and the kernels of a step.

use std::ops::Range;
use std::sync::Arc;

use anyhow::{Context, Result};
use cudarc::driver::sys::{CUdevice_attribute, CUfunction_attribute_enum};
use cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, CudaSlice, CudaStream, DevicePtr, DeviceRepr,
    LaunchConfig, PushKernelArg,
};
use cudarc::nvrtc::Ptx;

use crate::abi::{Fresh, Item, Layer, Prompt, Query, Row, ITEM_FIRST, WINDOW_CHUNKS};
use crate::image::image;
use crate::plan::{lanes, Plan, NARROW, WIDE};
use crate::prompt::clear_shared;
use crate::shape::{LayerShape, MAX_DIM};

// SAFETY: plain numbers, laid out as the kernels' structs (`repr(C)`).
unsafe impl DeviceRepr for Layer {}
// SAFETY: as above.
unsafe impl DeviceRepr for Fresh {}
// SAFETY: as above.
unsafe impl DeviceRepr for Query {}
// SAFETY: as above.
unsafe impl DeviceRepr for Prompt {}

/// Fields of all structs, and sections of a page.
const PROBED: usize = 6 + 14 + 5 + 2 * WINDOW_CHUNKS + 4 + 4 + ITEM_FIRST + 9 + 21 + 10;
/// Threads of every block.
pub(crate) const THREADS: u32 = 128;
/// Most tokens of a page.
const MAX_GROUP: usize = 128;
/// Threads of a block that gives third bits.
const BOOSTERS: u32 = 512;
/// Half warps of a block: groups that `quantize` takes at once.
const HALF_WARPS: usize = 8;

/// Type of activations, as kernels name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// IEEE binary32: the clear kernels only.
    F32,
}

impl Dtype {
    fn suffix(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::F32 => "f32",
        }
    }

    /// Bytes of a number.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            _ => 2,
        }
    }
}

/// The modules of a device.
pub struct Kernels {
    stream: Arc<CudaStream>,
    count: Arc<CudaModule>,
    store: Arc<CudaModule>,
    seal: Arc<CudaModule>,
    decode: Arc<CudaModule>,
    decode_mma: Arc<CudaModule>,
    prompt: Arc<CudaModule>,
    prompt_mma: Arc<CudaModule>,
    probe: Arc<CudaModule>,
    multiprocessors: usize,
    /// Bytes of shared memory that a block may ask for.
    most_shared: u32,
}

impl Kernels {
    /// Load the kernels into the stream's context.
    ///
    /// # Errors
    /// If the device is older than any of the architectures that were compiled.
    pub fn new(stream: &Arc<CudaStream>) -> Result<Self> {
        let context: &Arc<CudaContext> = stream.context();
        let load = |image: Vec<u8>| {
            let module = context.load_module(Ptx::from_binary(image));
            module.context("the CUDA kernels of the ott cache do not load on this device")
        };
        let count = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let shared = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        Ok(Self {
            stream: Arc::clone(stream),
            count: load(image("count"))?,
            store: load(image("store"))?,
            seal: load(image("seal"))?,
            decode: load(image("decode"))?,
            decode_mma: load(image("decode_mma"))?,
            prompt: load(image("prompt"))?,
            prompt_mma: load(image("prompt_mma"))?,
            probe: load(image("probe"))?,
            multiprocessors: context.attribute(count)? as usize,
            most_shared: context.attribute(shared)? as u32,
        })
    }

    /// The stream that everything runs on.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// What the device finds in each field of these, in order, then in a page's offsets; for a test.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn probe(
        &self,
        layer: Layer,
        row: Row,
        fresh: Fresh,
        item: Item,
        (query, prompt): (Query, Prompt),
    ) -> Result<Vec<u64>> {
        let stream = &self.stream;
        let function = self.probe.load_function("ott_probe")?;
        let row = stream.clone_htod(&row.words())?;
        let item = stream.clone_htod(&item.words())?;
        let mut out = stream.alloc_zeros::<u64>(PROBED)?;
        let mut launch = stream.launch_builder(&function);
        let args = launch.arg(&layer).arg(&row).arg(&fresh).arg(&item);
        let one = LaunchConfig {
            block_dim: (1, 1, 1),
            ..grid(1, 1, 1)
        };
        // SAFETY: the arguments are the kernel's, which writes `PROBED` numbers.
        unsafe { args.arg(&query).arg(&prompt).arg(&mut out).launch(one) }?;
        Ok(stream.clone_dtoh(&out)?)
    }
}

/// Which way values are rotated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Into the basis in which they are kept.
    In,
    /// Back into the model's.
    Back,
}

/// The kernels for attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attention {
    /// Any shape.
    Clear,
    /// On tensor cores, 4 query heads at once.
    Narrow,
    /// On tensor cores, 8 query heads at once, where a kv head has more than 4.
    Wide,
}

/// A tensor-core kernel: its shared memory, and the query heads that a block takes.
struct Tuned {
    function: CudaFunction,
    shared: u32,
    heads: usize,
}

/// The kernels for prompts.
pub(crate) struct Prompts {
    pub(crate) clear: CudaFunction,
    pub(crate) join: CudaFunction,
    /// On tensor cores, with its shared memory and how many blocks the device runs at once.
    pub(crate) tuned: Option<(CudaFunction, u32, usize)>,
}

/// One layer's memory on the device, and its kernels.
pub struct DeviceLayer {
    /// What never changes.
    pub shape: LayerShape,
    /// Type of activations.
    pub dtype: Dtype,
    /// Query heads.
    pub num_heads: usize,
    /// Pages of all blocks.
    pub pages: CudaSlice<u8>,
    staging: CudaSlice<u8>,
    /// Beside each chunk of the window, samples of its tokens' queries.
    samples: Option<CudaSlice<u8>>,
    traced: CudaSlice<u8>,
    /// Places of traced tokens by block: each block has its own.
    pub places: CudaSlice<u32>,
    pub(crate) stream: Arc<CudaStream>,
    count: CudaFunction,
    store: CudaFunction,
    magnitudes: CudaFunction,
    trace: CudaFunction,
    quantize: CudaFunction,
    boost: CudaFunction,
    make_up: CudaFunction,
    rotate: CudaFunction,
    clear_decode: CudaFunction,
    narrow_decode: Option<Tuned>,
    wide_decode: Option<Tuned>,
    merge: CudaFunction,
    gather: CudaFunction,
    slots: usize,
    pub(crate) prompts: Prompts,
}

/// Tables of a step on the device: one piece of memory, written once.
pub struct DevicePlan {
    pub(crate) words: CudaSlice<u32>,
    /// As they are in `words`.
    pub(crate) rows: Vec<Row>,
    pub(crate) tables: u64,
    groups: u64,
    items: u64,
    of_row: u64,
    arrived: u64,
    /// Where the words of rows' faults begin.
    faults: usize,
    num_groups: usize,
    /// Parts of contexts.
    pub num_items: usize,
    pub(crate) num_rows: usize,
    longest: usize,
    seals_new: bool,
}

impl DevicePlan {
    /// Copy a plan for `lanes` blocks of threads per item to the device.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn upload(plan: &Plan, lanes: usize, stream: &Arc<CudaStream>) -> Result<Self> {
        let mut words: Vec<u32> = plan.rows.iter().flat_map(|row| row.words()).collect();
        // Pairs are read as one number of 8 bytes.
        let mut section = |numbers: &mut dyn Iterator<Item = u32>| {
            words.resize(words.len().next_multiple_of(4), 0);
            let start = words.len();
            words.extend(numbers);
            (start * size_of::<u32>()) as u64
        };
        let tables = section(&mut plan.tables.iter().copied());
        let groups = section(&mut plan.groups.iter().flat_map(|p| [p.a, p.b]));
        let items = plan.items.iter();
        let items = section(&mut items.flat_map(Item::words));
        let of_row = section(&mut plan.of_row.iter().flat_map(|p| [p.a, p.b]));
        let counters = (plan.rows.len() * lanes).max(1);
        let arrived = section(&mut std::iter::repeat_n(0, counters));
        let faults = section(&mut std::iter::repeat_n(0, plan.rows.len())) as usize;
        let words = stream.clone_htod(&words)?;
        let base = address(&words, stream);
        Ok(Self {
            words,
            rows: plan.rows.clone(),
            tables: base + tables,
            groups: base + groups,
            items: base + items,
            of_row: base + of_row,
            arrived: base + arrived,
            faults: faults / size_of::<u32>(),
            num_groups: plan.groups.len(),
            num_items: plan.items.len(),
            num_rows: plan.rows.len(),
            longest: plan.longest,
            seals_new: plan.seals_new,
        })
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.words.num_bytes()
    }

    /// Wait for the device. By row: the first layer that met a number which cannot be kept, if any did.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn faults(&self, stream: &Arc<CudaStream>) -> Result<Vec<Option<usize>>> {
        let words = self
            .words
            .try_slice(self.faults..self.faults + self.num_rows);
        let words = stream.clone_dtoh(&words.context("a word for each row")?)?;
        let layer = |word: u32| (word as usize).checked_sub(1);
        Ok(words.into_iter().map(layer).collect())
    }

    fn faults_address(&self, stream: &Arc<CudaStream>) -> u64 {
        address(&self.words, stream) + (self.faults * size_of::<u32>()) as u64
    }
}

impl DeviceLayer {
    /// Memory for `num_blocks` blocks and `chunks` chunks of the window.
    ///
    /// # Errors
    /// If there is not enough memory.
    pub fn new(
        kernels: &Kernels,
        shape: LayerShape,
        dtype: Dtype,
        num_heads: usize,
        num_blocks: usize,
        chunks: usize,
    ) -> Result<Self> {
        let stream = &kernels.stream;
        let places = (num_blocks * shape.places()).max(1);
        let own: Vec<u32> = (0..places as u32).collect();
        let suffix = dtype.suffix();
        let kernel = |module: &Arc<CudaModule>, name: &str| {
            let name = format!("ott_{name}_{suffix}");
            module.load_function(&name).context(name)
        };
        let narrow = tuned(kernels, &shape, dtype, NARROW)?;
        let wide = match num_heads / shape.num_kv_heads > NARROW {
            true => tuned(kernels, &shape, dtype, WIDE)?,
            false => None,
        };
        let per_multiprocessor = match &narrow {
            Some(tuned) => {
                let function = &tuned.function;
                let shared = tuned.shared as usize;
                function.occupancy_max_active_blocks_per_multiprocessor(THREADS, shared, None)?
            }
            None => 8,
        };
        Ok(Self {
            pages: stream.alloc_zeros(num_blocks * shape.page_bytes())?,
            staging: stream.alloc_zeros(chunks.max(1) * shape.chunk_bytes(dtype.size()))?,
            samples: match shape.weigh {
                true => Some(stream.alloc_zeros(chunks.max(1) * shape.sample_bytes(dtype.size()))?),
                false => None,
            },
            traced: stream.alloc_zeros(places * shape.width() * dtype.size())?,
            places: stream.clone_htod(&own)?,
            stream: Arc::clone(stream),
            count: kernels.count.load_function("ott_count")?,
            store: kernel(&kernels.store, "store")?,
            magnitudes: kernel(&kernels.seal, "magnitudes")?,
            trace: kernel(&kernels.seal, "trace")?,
            quantize: kernel(&kernels.seal, "quantize")?,
            boost: kernel(&kernels.seal, "boost")?,
            make_up: kernel(&kernels.seal, "make_up")?,
            rotate: kernel(&kernels.store, "rotate")?,
            clear_decode: kernel(&kernels.decode, "decode")?,
            narrow_decode: narrow,
            wide_decode: wide,
            merge: kernel(&kernels.decode, "merge")?,
            gather: kernel(&kernels.decode, "gather")?,
            slots: per_multiprocessor as usize * kernels.multiprocessors,
            prompts: prompts(kernels, &shape, dtype)?,
            shape,
            dtype,
            num_heads,
        })
    }

    /// Blocks of threads per item, and how many the device runs at once: what [`Plan::new`] asks for.
    pub fn lanes_and_slots(&self) -> (usize, usize) {
        (lanes(self.num_heads, self.shape.num_kv_heads), self.slots)
    }

    /// Whether the tensor-core kernel serves this layer.
    pub fn is_tuned(&self) -> bool {
        self.narrow_decode.is_some()
    }

    /// Whether that for prompts does, which takes more shared memory.
    pub fn is_tuned_for_prompts(&self) -> bool {
        self.prompts.tuned.is_some()
    }

    /// Bytes held.
    pub fn allocated_bytes(&self) -> usize {
        self.pages.num_bytes()
            + self.staging.num_bytes()
            + self.samples.as_ref().map_or(0, CudaSlice::num_bytes)
            + self.traced.num_bytes()
            + self.places.num_bytes()
    }

    /// Seal the groups that leave the window and store the rest of the new tokens. Values come in the model's basis. `q`
    /// are these tokens' queries, by which errors of keys are weighed; with [`Fresh::NOTHING`] all channels count alike.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn append(&self, plan: &DevicePlan, q: Fresh, k: Fresh, v: Fresh) -> Result<()> {
        let layer = self.abi(plan);
        if plan.num_groups > 0 && plan.seals_new && self.shape.rotate {
            let shape = (plan.num_rows, self.shape.num_kv_heads, plan.longest);
            let len = shape.0 * shape.1 * shape.2 * self.shape.v_dim * self.dtype.size();
            // SAFETY: `rotate` writes all of it before anything reads.
            let rotated = unsafe { self.stream.alloc::<u8>(len) }?;
            let turned = self.rotate(Turn::In, shape, v, address(&rotated, &self.stream))?;
            self.seal(&self.stream, plan, &layer, [q, k, turned])?;
        } else if plan.num_groups > 0 {
            self.seal(&self.stream, plan, &layer, [q, k, v])?;
        }
        self.store(plan, &layer, q, k, v)
    }

    /// Seal the groups of stored tokens that leave the window, on `stream`, which has waited for what wrote them.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn seal_stored(&self, plan: &DevicePlan, stream: &Arc<CudaStream>) -> Result<()> {
        if plan.num_groups == 0 {
            return Ok(());
        }
        self.seal(stream, plan, &self.abi(plan), [Fresh::NOTHING; 3])
    }

    /// Values `(rows, kv_heads, tokens, v_dim)` into the basis in which they are kept, or back; `to` is contiguous and may be where they
    /// are. What was written, to be read from.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn rotate(
        &self,
        turn: Turn,
        shape: (usize, usize, usize),
        from: Fresh,
        to: u64,
    ) -> Result<Fresh> {
        let (rows, heads, tokens) = shape;
        let v_dim = self.shape.v_dim;
        let (size, back) = (v_dim as u32, u32::from(turn == Turn::Back));
        let mut launch = self.stream.launch_builder(&self.rotate);
        let args = launch.arg(&from).arg(&to).arg(&size).arg(&back);
        let grid = grid(tokens as u32, heads as u32, rows as u32);
        // SAFETY: the arguments are the kernel's; the caller's memory has this shape.
        unsafe { args.launch(grid) }?;
        Ok(Fresh {
            data: to,
            row: (heads * tokens * v_dim) as i64,
            head: (tokens * v_dim) as i64,
            token: v_dim as i64,
        })
    }

    fn seal(
        &self,
        stream: &Arc<CudaStream>,
        plan: &DevicePlan,
        layer: &Layer,
        [q, k, v]: [Fresh; 3],
    ) -> Result<()> {
        let shape = &self.shape;
        let (heads, groups) = (shape.num_kv_heads as u32, plan.num_groups as u32);
        if shape.outliers > 0 {
            let len = plan.num_groups * shape.num_kv_heads * MAX_GROUP;
            // SAFETY: `magnitudes` writes what `trace` reads.
            let mut magnitudes = unsafe { stream.alloc::<f32>(len) }?;
            let mut launch = stream.launch_builder(&self.magnitudes);
            let args = launch.arg(layer).arg(&plan.words).arg(&plan.groups);
            let args = args.arg(&k).arg(&v).arg(&mut magnitudes);
            // SAFETY: the arguments are the kernel's; the plan's blocks and chunks lie inside the layer's memory.
            unsafe { args.launch(grid(heads, groups, 1)) }?;
            let mut launch = stream.launch_builder(&self.trace);
            let args = launch.arg(layer).arg(&plan.words).arg(&plan.tables);
            let args = args.arg(&magnitudes).arg(&k).arg(&v);
            // SAFETY: as above.
            unsafe { args.launch(grid(heads, plan.num_rows as u32, 1)) }?;
        }
        let per_group = (shape.k_dim + shape.group_size).div_ceil(HALF_WARPS) as u32;
        let mut launch = stream.launch_builder(&self.quantize);
        let args = launch.arg(layer).arg(&plan.words).arg(&plan.tables);
        let args = args.arg(&plan.groups).arg(&k).arg(&v);
        // SAFETY: as above.
        unsafe { args.launch(grid(per_group, heads, groups)) }?;
        if shape.boosted > 0 {
            let mut launch = stream.launch_builder(&self.boost);
            let args = launch.arg(layer).arg(&plan.words).arg(&plan.tables);
            let args = args.arg(&plan.groups).arg(&q).arg(&k).arg(&v);
            let grid = LaunchConfig {
                block_dim: (BOOSTERS, 1, 1),
                ..grid(heads, groups, 1)
            };
            // SAFETY: as above.
            unsafe { args.launch(grid) }?;
        }
        if shape.weigh {
            let mut launch = stream.launch_builder(&self.make_up);
            let args = launch.arg(layer).arg(&plan.words).arg(&plan.tables);
            let args = args.arg(&plan.groups).arg(&q).arg(&k).arg(&v);
            // SAFETY: as above.
            unsafe { args.launch(grid(heads, groups, 1)) }?;
        }
        Ok(())
    }

    fn store(&self, plan: &DevicePlan, layer: &Layer, q: Fresh, k: Fresh, v: Fresh) -> Result<()> {
        if plan.longest == 0 {
            return Ok(());
        }
        let heads = self.shape.num_kv_heads as u32;
        let (longest, rows) = (plan.longest as u32, plan.num_rows as u32);
        let mut launch = self.stream.launch_builder(&self.store);
        let args = launch.arg(layer).arg(&plan.words);
        let args = args.arg(&q).arg(&k).arg(&v);
        // SAFETY: as above.
        unsafe { args.launch(grid(longest, heads, rows)) }?;
        Ok(())
    }

    /// Attention of each row's one new token, which is stored. `sums` has room for every item. `tuned`: by the fastest
    /// kernel that there is.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn decode(&self, plan: &DevicePlan, query: Query, tuned: bool) -> Result<()> {
        let blocks = plan.num_items * lanes(self.num_heads, self.shape.num_kv_heads);
        // As long as the device has room, heads are spread; then a page is read once for more of them.
        let kernel = match blocks > self.slots {
            true => [Attention::Wide, Attention::Narrow],
            false => [Attention::Narrow, Attention::Clear],
        };
        let kernel = kernel.into_iter().find(|k| tuned && self.has(*k));
        self.decode_by(kernel.unwrap_or(Attention::Clear), plan, query)
    }

    /// Whether a kernel serves this layer.
    pub fn has(&self, kernel: Attention) -> bool {
        kernel == Attention::Clear || self.tuned(kernel).is_some()
    }

    fn tuned(&self, kernel: Attention) -> Option<&Tuned> {
        match kernel {
            Attention::Clear => None,
            Attention::Narrow => self.narrow_decode.as_ref(),
            Attention::Wide => self.wide_decode.as_ref(),
        }
    }

    /// Attention by this kernel, or by the clear one where it does not serve.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn decode_by(&self, kernel: Attention, plan: &DevicePlan, query: Query) -> Result<()> {
        let layer = self.abi(plan);
        let (items, heads) = (plan.num_items as u32, self.num_heads as u32);
        let kv_heads = self.shape.num_kv_heads;
        if let Some(tuned) = self.tuned(kernel) {
            let blocks = (self.num_heads / kv_heads).div_ceil(tuned.heads) as u32;
            let config = LaunchConfig {
                shared_mem_bytes: tuned.shared,
                ..grid(items, kv_heads as u32, blocks)
            };
            let query = Query {
                arrived: plan.arrived,
                ..query
            };
            let mut launch = self.stream.launch_builder(&tuned.function);
            let args = launch.arg(&layer).arg(&plan.words).arg(&plan.tables);
            let args = args.arg(&plan.items).arg(&plan.of_row).arg(&query);
            // SAFETY: the arguments are the kernel's; the caller's `sums` has room for every item and head.
            unsafe { args.launch(config) }?;
            return Ok(());
        }
        let mut launch = self.stream.launch_builder(&self.clear_decode);
        let args = launch.arg(&layer).arg(&plan.words).arg(&plan.tables);
        let args = args.arg(&plan.items).arg(&query);
        // SAFETY: as above.
        unsafe { args.launch(grid(items, heads, 1)) }?;
        let mut launch = self.stream.launch_builder(&self.merge);
        let args = launch.arg(&layer).arg(&plan.of_row).arg(&query);
        // SAFETY: as above.
        unsafe { args.launch(grid(heads, plan.num_rows as u32, 1)) }?;
        Ok(())
    }

    /// Some tokens of one row's past as numbers: k `(kv_heads, tokens, k_dim)`, v `(kv_heads, tokens, v_dim)`, values in the
    /// model's basis.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn gather(
        &self,
        plan: &DevicePlan,
        row: u32,
        tokens: Range<u32>,
        k: u64,
        v: u64,
    ) -> Result<()> {
        let layer = self.abi(plan);
        let mut launch = self.stream.launch_builder(&self.gather);
        let args = launch.arg(&layer).arg(&plan.words).arg(&plan.tables);
        let heads = self.shape.num_kv_heads as u32;
        let args = args.arg(&row).arg(&tokens.start).arg(&k).arg(&v);
        // SAFETY: the arguments are the kernel's; the caller's k and v have room for the tokens, which are stored.
        unsafe { args.launch(grid(tokens.len() as u32, heads, 1)) }?;
        if self.shape.rotate {
            let (heads, tokens, v_dim) = (heads as usize, tokens.len(), self.shape.v_dim);
            let kept = Fresh {
                data: v,
                row: 0,
                head: (tokens * v_dim) as i64,
                token: v_dim as i64,
            };
            self.rotate(Turn::Back, (1, heads, tokens), kept, v)?;
        }
        Ok(())
    }

    /// Wait for the device, and count over the pages of `blocks`: traced tokens, parts of a head after which tracing has
    /// stopped, and most places of the extra store that are taken.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn count(&self, blocks: &[u32]) -> Result<[u32; 3]> {
        if blocks.is_empty() || self.shape.outliers == 0 {
            return Ok([0; 3]);
        }
        let n = blocks.len() as u32;
        let blocks = self.stream.clone_htod(blocks)?;
        let counts = self.stream.alloc_zeros::<u32>(3)?;
        let layer = self.abi_at(0);
        let parts = n as usize * self.shape.num_kv_heads;
        let mut launch = self.stream.launch_builder(&self.count);
        let args = launch.arg(&layer).arg(&blocks).arg(&n).arg(&counts);
        // SAFETY: the arguments are the kernel's; the blocks are this layer's.
        unsafe { args.launch(grid(parts.div_ceil(THREADS as usize) as u32, 1, 1)) }?;
        let counts = self.stream.clone_dtoh(&counts)?;
        Ok([counts[0], counts[1], counts[2]])
    }

    /// Wait for the device, and copy one block's page.
    ///
    /// # Errors
    /// If there is no such block, or the driver fails.
    pub fn page(&self, block: usize) -> Result<Vec<u8>> {
        let bytes = self.shape.page_bytes();
        let page = self.pages.try_slice(block * bytes..(block + 1) * bytes);
        Ok(self.stream.clone_dtoh(&page.context("no such block")?)?)
    }

    /// All traced tokens and their places, for tests: `(places, k then v)` as bytes.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn traced_bytes(&self) -> Result<(Vec<u32>, Vec<u8>)> {
        let places = self.stream.clone_dtoh(&self.places)?;
        Ok((places, self.stream.clone_dtoh(&self.traced)?))
    }

    pub(crate) fn abi(&self, plan: &DevicePlan) -> Layer {
        self.abi_at(plan.faults_address(&self.stream))
    }

    fn abi_at(&self, faults: u64) -> Layer {
        let shape = &self.shape;
        Layer {
            pages: address(&self.pages, &self.stream),
            staging: address(&self.staging, &self.stream),
            samples: self
                .samples
                .as_ref()
                .map_or(0, |samples| address(samples, &self.stream)),
            traced: address(&self.traced, &self.stream),
            places: address(&self.places, &self.stream),
            faults,
            kv_heads: shape.num_kv_heads as u32,
            k_dim: shape.k_dim as u32,
            v_dim: shape.v_dim as u32,
            group: shape.group_size as u32,
            k_bits: shape.k_bits.into(),
            v_bits: shape.v_bits.into(),
            outliers: shape.outliers as u32,
            extra: shape.extra as u32,
            clip: shape.clip,
            boosted: shape.boosted as u32,
            rotate: shape.rotate.into(),
            weigh: shape.weigh.into(),
            num_heads: self.num_heads as u32,
            number: shape.layer as u32,
        }
    }
}

/// A slice's address on the device.
pub fn address<T>(slice: &CudaSlice<T>, stream: &Arc<CudaStream>) -> u64 {
    slice.device_ptr(stream).0
}

/// Whether tensor-core kernels serve a layer.
fn is_served(shape: &LayerShape, dtype: Dtype) -> bool {
    matches!(shape.k_dim, 64 | 128)
        && shape.v_dim == shape.k_dim
        && shape.group_size == 128
        && matches!(
            (shape.k_bits, shape.v_bits),
            (2, 2) | (3, 2) | (3, 3) | (4, 2) | (4, 4)
        )
        && dtype != Dtype::F32
}

/// The tensor-core kernel for blocks of `heads` query heads, if there is one for this layer.
fn tuned(
    kernels: &Kernels,
    shape: &LayerShape,
    dtype: Dtype,
    heads: usize,
) -> Result<Option<Tuned>> {
    if !is_served(shape, dtype) {
        return Ok(None);
    }
    let (suffix, dim) = (dtype.suffix(), shape.k_dim);
    let name = format!(
        "ott_decode_mma_{suffix}_{dim}_{}_{}_{heads}",
        shape.k_bits, shape.v_bits
    );
    let kernel = with_shared(kernels, &kernels.decode_mma, &name)?;
    Ok(kernel.map(|(function, shared)| Tuned {
        function,
        shared,
        heads,
    }))
}

/// A kernel and the bytes of shared memory that it says it needs, which it is given leave to take; none where the device
/// has less. What was compiled for an older architecture may ask for more than a newer device has.
fn with_shared(
    kernels: &Kernels,
    module: &Arc<CudaModule>,
    name: &str,
) -> Result<Option<(CudaFunction, u32)>> {
    let function = module.load_function(name)?;
    let shared = module.get_global(&format!("{name}_shared"), &kernels.stream)?;
    let bytes = kernels.stream.clone_dtoh(&shared)?;
    let bytes = bytes.try_into().ok().context("a u32")?;
    let shared = u32::from_le_bytes(bytes);
    if shared > kernels.most_shared {
        return Ok(None);
    }
    allow(&function, shared)?;
    Ok(Some((function, shared)))
}

/// Give a kernel leave to ask for this much shared memory.
fn allow(function: &CudaFunction, shared: u32) -> Result<()> {
    let most = CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    Ok(function.set_attribute(most, shared as i32)?)
}

fn prompts(kernels: &Kernels, shape: &LayerShape, dtype: Dtype) -> Result<Prompts> {
    let (suffix, dim) = (dtype.suffix(), shape.k_dim);
    let clear = kernels
        .prompt
        .load_function(&format!("ott_prompt_{suffix}"))?;
    // Layers of all shapes share it.
    allow(&clear, clear_shared(2 * MAX_DIM))?;
    let (k_bits, v_bits) = (shape.k_bits, shape.v_bits);
    let name = format!("ott_prompt_mma_{suffix}_{dim}_{k_bits}_{v_bits}");
    let kernel = match is_served(shape, dtype) {
        true => with_shared(kernels, &kernels.prompt_mma, &name)?,
        false => None,
    };
    let tuned = kernel.map(|(function, shared)| {
        let at_once =
            function.occupancy_max_active_blocks_per_multiprocessor(THREADS, shared as usize, None);
        let slots = at_once? as usize * kernels.multiprocessors;
        Ok::<_, anyhow::Error>((function, shared, slots))
    });
    let tuned = tuned.transpose()?;
    Ok(Prompts {
        clear,
        join: kernels
            .prompt
            .load_function(&format!("ott_prompt_join_{suffix}"))?,
        tuned,
    })
}

pub(crate) fn grid(x: u32, y: u32, z: u32) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (x, y, z),
        block_dim: (THREADS, 1, 1),
        shared_mem_bytes: 0,
    }
}
