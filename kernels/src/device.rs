//! A layer on the device, and the kernels of a step.

use std::sync::Arc;

use anyhow::{bail, Context, Result};
use cudarc::driver::sys::{CUdevice_attribute, CUfunction_attribute_enum};
use cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, CudaSlice, CudaStream, DevicePtr, DeviceRepr,
    LaunchConfig, PushKernelArg,
};
use cudarc::nvrtc::Ptx;
use ott_backend::cache::LayerSpec;
use ott_backend::Clip;

use crate::abi::{Fresh, Item, Layer, Pair, Query, Row};
use crate::image::image;
use crate::plan::Plan;

// SAFETY: plain numbers, laid out as the kernels' structs (`repr(C)`).
unsafe impl DeviceRepr for Row {}
// SAFETY: as above.
unsafe impl DeviceRepr for Layer {}
// SAFETY: as above.
unsafe impl DeviceRepr for Fresh {}
// SAFETY: as above.
unsafe impl DeviceRepr for Item {}
// SAFETY: as above.
unsafe impl DeviceRepr for Pair {}
// SAFETY: as above.
unsafe impl DeviceRepr for Query {}

/// Threads of every block.
const THREADS: u32 = 128;
/// Query heads of a tile of the tensor-core kernel.
const QUERIES: usize = 4;
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
    store: Arc<CudaModule>,
    seal: Arc<CudaModule>,
    decode: Arc<CudaModule>,
    decode_mma: Arc<CudaModule>,
    multiprocessors: usize,
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
        Ok(Self {
            stream: Arc::clone(stream),
            store: load(image("store"))?,
            seal: load(image("seal"))?,
            decode: load(image("decode"))?,
            decode_mma: load(image("decode_mma"))?,
            multiprocessors: context.attribute(count)? as usize,
        })
    }

    /// The stream that everything runs on.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }
}

/// One layer's memory on the device, and its kernels.
pub struct DeviceLayer {
    /// What never changes.
    pub spec: LayerSpec,
    /// Type of activations.
    pub dtype: Dtype,
    /// Query heads.
    pub num_heads: usize,
    /// Pages of all blocks.
    pub pages: CudaSlice<u8>,
    staging: CudaSlice<u8>,
    traced: CudaSlice<u8>,
    /// Places of traced tokens by block.
    pub places: CudaSlice<u32>,
    free: CudaSlice<u32>,
    free_len: CudaSlice<u32>,
    status: CudaSlice<u32>,
    stream: Arc<CudaStream>,
    store: CudaFunction,
    trace: CudaFunction,
    quantize: CudaFunction,
    clear_decode: CudaFunction,
    tuned_decode: Option<(CudaFunction, u32)>,
    merge: CudaFunction,
    gather: CudaFunction,
    slots: usize,
}

/// Tables of a step on the device.
pub struct DevicePlan {
    rows: CudaSlice<Row>,
    tables: CudaSlice<u32>,
    groups: CudaSlice<Pair>,
    items: CudaSlice<Item>,
    of_row: CudaSlice<Pair>,
    arrived: CudaSlice<u32>,
    num_groups: usize,
    /// Parts of contexts.
    pub num_items: usize,
    num_rows: usize,
    longest: usize,
}

impl DevicePlan {
    /// Copy a plan for `lanes` blocks of threads per item to the device.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn upload(plan: &Plan, lanes: usize, stream: &Arc<CudaStream>) -> Result<Self> {
        let nothing = [Pair { a: 0, b: 0 }];
        let groups = match plan.groups.is_empty() {
            true => &nothing[..],
            false => &plan.groups,
        };
        Ok(Self {
            rows: stream.clone_htod(&plan.rows)?,
            tables: stream.clone_htod(&plan.tables)?,
            groups: stream.clone_htod(groups)?,
            items: stream.clone_htod(&plan.items)?,
            of_row: stream.clone_htod(&plan.of_row)?,
            arrived: stream.alloc_zeros((plan.rows.len() * lanes).max(1))?,
            num_groups: plan.groups.len(),
            num_items: plan.items.len(),
            num_rows: plan.rows.len(),
            longest: plan.longest,
        })
    }
}

impl DeviceLayer {
    /// Memory for `num_blocks` blocks and `chunks` chunks of the window.
    ///
    /// # Errors
    /// If there is not enough memory.
    pub fn new(
        kernels: &Kernels,
        spec: LayerSpec,
        dtype: Dtype,
        num_heads: usize,
        num_blocks: usize,
        chunks: usize,
    ) -> Result<Self> {
        let stream = &kernels.stream;
        let layout = &spec.layout;
        let width = layout.k_dim + layout.v_dim;
        let places = num_blocks * layout.num_kv_heads * layout.outliers;
        let free: Vec<u32> = (0..places.max(1) as u32).rev().collect();
        let suffix = dtype.suffix();
        let kernel = |module: &Arc<CudaModule>, name: &str| {
            let name = format!("ott_{name}_{suffix}");
            module.load_function(&name).context(name)
        };
        let tuned = tuned(kernels, &spec, dtype)?;
        let per_multiprocessor = match &tuned {
            Some((function, shared)) => function.occupancy_max_active_blocks_per_multiprocessor(
                THREADS,
                *shared as usize,
                None,
            )?,
            None => 8,
        };
        Ok(Self {
            pages: stream.alloc_zeros(num_blocks * layout.page_bytes())?,
            staging: stream.alloc_zeros(
                chunks.max(1) * layout.num_kv_heads * crate::plan::CHUNK * width * dtype.size(),
            )?,
            traced: stream.alloc_zeros(places.max(1) * width * dtype.size())?,
            places: stream.clone_htod(&vec![crate::abi::NONE; places.max(1)])?,
            free_len: stream.clone_htod(&[free.len() as u32])?,
            free: stream.clone_htod(&free)?,
            status: stream.alloc_zeros(1)?,
            stream: Arc::clone(stream),
            store: kernel(&kernels.store, "store")?,
            trace: kernel(&kernels.seal, "trace")?,
            quantize: kernel(&kernels.seal, "quantize")?,
            clear_decode: kernel(&kernels.decode, "decode")?,
            tuned_decode: tuned,
            merge: kernel(&kernels.decode, "merge")?,
            gather: kernel(&kernels.decode, "gather")?,
            slots: per_multiprocessor as usize * kernels.multiprocessors,
            spec,
            dtype,
            num_heads,
        })
    }

    /// Blocks of threads per item, and how many the device runs at once: what [`Plan::new`] asks for.
    pub fn lanes_and_slots(&self) -> (usize, usize) {
        let kv_heads = self.spec.layout.num_kv_heads;
        let tiles = (self.num_heads / kv_heads).div_ceil(QUERIES);
        (kv_heads * tiles, self.slots)
    }

    /// Whether the tensor-core kernel serves this layer.
    pub fn is_tuned(&self) -> bool {
        self.tuned_decode.is_some()
    }

    /// Bytes held.
    pub fn allocated_bytes(&self) -> usize {
        self.pages.num_bytes()
            + self.staging.num_bytes()
            + self.traced.num_bytes()
            + self.places.num_bytes()
            + self.free.num_bytes()
    }

    /// Seal the groups that leave the window and store the rest of the new tokens.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn append(&self, plan: &DevicePlan, k: Fresh, v: Fresh) -> Result<()> {
        let layer = self.abi();
        let layout = &self.spec.layout;
        let heads = layout.num_kv_heads as u32;
        let rows = plan.num_rows as u32;
        if plan.num_groups > 0 {
            if layout.outliers > 0 {
                let mut launch = self.stream.launch_builder(&self.trace);
                let args = launch.arg(&layer).arg(&plan.rows).arg(&plan.tables);
                // SAFETY: the arguments are the kernel's; the plan's blocks and chunks lie inside the layer's memory.
                unsafe { args.arg(&k).arg(&v).launch(grid(heads, rows, 1)) }?;
            }
            let per_group = (layout.k_dim + layout.group_size).div_ceil(HALF_WARPS) as u32;
            let mut launch = self.stream.launch_builder(&self.quantize);
            let args = launch.arg(&layer).arg(&plan.rows).arg(&plan.tables);
            let args = args.arg(&plan.groups).arg(&k).arg(&v);
            // SAFETY: as above.
            unsafe { args.launch(grid(per_group, heads, plan.num_groups as u32)) }?;
        }
        let mut launch = self.stream.launch_builder(&self.store);
        let args = launch.arg(&layer).arg(&plan.rows).arg(&k).arg(&v);
        // SAFETY: as above.
        unsafe { args.launch(grid(plan.longest as u32, heads, rows)) }?;
        Ok(())
    }

    /// Attention of each row's one new token, which is stored. `sums` has room for every item.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn decode(&self, plan: &DevicePlan, query: Query, tuned: bool) -> Result<()> {
        let layer = self.abi();
        let layout = &self.spec.layout;
        let (items, heads) = (plan.num_items as u32, self.num_heads as u32);
        let kv_heads = layout.num_kv_heads as u32;
        if let (Some((function, shared)), true) = (&self.tuned_decode, tuned) {
            let tiles = heads.div_ceil(kv_heads).div_ceil(QUERIES as u32);
            let config = LaunchConfig {
                shared_mem_bytes: *shared,
                ..grid(items, kv_heads, tiles)
            };
            let query = Query {
                arrived: address(&plan.arrived, &self.stream),
                ..query
            };
            let mut launch = self.stream.launch_builder(function);
            let args = launch.arg(&layer).arg(&plan.rows).arg(&plan.tables);
            let args = args.arg(&plan.items).arg(&plan.of_row).arg(&query);
            // SAFETY: the arguments are the kernel's; the caller's `sums` has room for every item and head.
            unsafe { args.launch(config) }?;
            return Ok(());
        }
        let mut launch = self.stream.launch_builder(&self.clear_decode);
        let args = launch.arg(&layer).arg(&plan.rows).arg(&plan.tables);
        let args = args.arg(&plan.items).arg(&query);
        // SAFETY: as above.
        unsafe { args.launch(grid(items, heads, 1)) }?;
        let v_dim = layout.v_dim as u32;
        let mut launch = self.stream.launch_builder(&self.merge);
        let args = launch.arg(&plan.of_row).arg(&query).arg(&v_dim);
        // SAFETY: as above.
        unsafe { args.launch(grid(heads, plan.num_rows as u32, 1)) }?;
        Ok(())
    }

    /// The past of one row as numbers: k `(kv_heads, past, k_dim)`, v `(kv_heads, past, v_dim)`.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn gather(&self, plan: &DevicePlan, row: u32, past: u32, k: u64, v: u64) -> Result<()> {
        let layer = self.abi();
        let mut launch = self.stream.launch_builder(&self.gather);
        let args = launch.arg(&layer).arg(&plan.rows).arg(&plan.tables);
        let heads = self.spec.layout.num_kv_heads as u32;
        // SAFETY: the arguments are the kernel's; the caller's k and v have room for the past.
        unsafe { args.arg(&row).arg(&k).arg(&v).launch(grid(past, heads, 1)) }?;
        Ok(())
    }

    /// Wait for the device; an error if a number could not be quantized.
    ///
    /// # Errors
    /// If so, or if the driver fails.
    pub fn check(&self) -> Result<()> {
        match self.stream.clone_dtoh(&self.status)?[0] {
            0 => Ok(()),
            _ => bail!(
                "layer {}: a key or value is not finite, or beyond f16",
                self.spec.layer
            ),
        }
    }

    /// All traced tokens and their places, for tests: `(places, k then v)` as bytes.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn traced_bytes(&self) -> Result<(Vec<u32>, Vec<u8>)> {
        let places = self.stream.clone_dtoh(&self.places)?;
        Ok((places, self.stream.clone_dtoh(&self.traced)?))
    }

    fn abi(&self) -> Layer {
        let (layout, config) = (&self.spec.layout, &self.spec.config);
        Layer {
            pages: address(&self.pages, &self.stream),
            staging: address(&self.staging, &self.stream),
            traced: address(&self.traced, &self.stream),
            places: address(&self.places, &self.stream),
            free: address(&self.free, &self.stream),
            free_len: address(&self.free_len, &self.stream),
            status: address(&self.status, &self.stream),
            kv_heads: layout.num_kv_heads as u32,
            k_dim: layout.k_dim as u32,
            v_dim: layout.v_dim as u32,
            group: layout.group_size as u32,
            k_bits: layout.k_bits.into(),
            v_bits: layout.v_bits.into(),
            outliers: layout.outliers as u32,
            extra: config.extra as u32,
            clip: (config.clip == Clip::Keys).into(),
        }
    }
}

/// A slice's address on the device.
pub fn address<T>(slice: &CudaSlice<T>, stream: &Arc<CudaStream>) -> u64 {
    slice.device_ptr(stream).0
}

/// The tensor-core kernel and its shared memory, if it serves this layer.
fn tuned(kernels: &Kernels, spec: &LayerSpec, dtype: Dtype) -> Result<Option<(CudaFunction, u32)>> {
    let layout = &spec.layout;
    let (dim, bits) = (layout.k_dim, (layout.k_bits, layout.v_bits));
    let served = matches!(dim, 64 | 128)
        && layout.v_dim == dim
        && layout.group_size == 128
        && matches!(bits, (2, 2) | (3, 2) | (3, 3) | (4, 2) | (4, 4))
        && dtype != Dtype::F32;
    if !served {
        return Ok(None);
    }
    let suffix = dtype.suffix();
    let name = format!("ott_decode_mma_{suffix}_{dim}_{}_{}", bits.0, bits.1);
    let function = kernels.decode_mma.load_function(&name)?;
    let shared = format!("{name}_shared");
    let shared = kernels.decode_mma.get_global(&shared, &kernels.stream)?;
    let bytes = kernels.stream.clone_dtoh(&shared)?;
    let bytes = bytes.try_into().ok().context("a u32")?;
    let bytes = u32::from_le_bytes(bytes);
    let most = CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    function.set_attribute(most, bytes as i32)?;
    Ok(Some((function, bytes)))
}

fn grid(x: u32, y: u32, z: u32) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (x, y, z),
        block_dim: (THREADS, 1, 1),
        shared_mem_bytes: 0,
    }
}
