//! What `src/device.rs` uses of cudarc, on the host: memory is the host's, a module is a library of compile.rs, a launch
//! runs the kernel to its end. So what launches the kernels is judged as well.

use std::alloc::Layout;
use std::ffi::{c_char, c_void, CStr};
use std::marker::PhantomData;
use std::path::Path;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::nvrtc::Ptx;

/// What a kernel did, or where.
#[derive(Debug)]
pub struct DriverError(String);

impl std::fmt::Display for DriverError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for DriverError {}

pub mod sys {
    //! Names of cudarc.
    #![allow(non_camel_case_types, clippy::upper_case_acronyms)]

    pub enum CUdevice_attribute {
        CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
        CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
    }
    pub enum CUfunction_attribute_enum {
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
    }
}

/// Plain numbers.
///
/// # Safety
/// Any bytes are a value.
pub unsafe trait DeviceRepr: Copy {}

macro_rules! plain {
    ($($of:ty),*) => { $(
        // SAFETY: a number.
        unsafe impl DeviceRepr for $of {}
    )* };
}
plain!(u8, u16, u32, u64, i32, i64, f32, half::f16, half::bf16);

type Launch = unsafe extern "C" fn(
    kernel: *const c_void,
    args: *const *const c_void,
    grid: *const u32,
    block: *const u32,
    shared: u32,
    seed: u64,
    message: *mut c_char,
    size: usize,
) -> bool;

/// Bytes before and after an allocation that nobody may write.
const MARGIN: usize = 64;
const ALIGN: usize = 256;
const UNTOUCHED: u8 = 0xa5;

/// A machine: a library of kernels, and how many blocks it claims to run at once.
pub struct CudaContext {
    library: libloading::Library,
    multiprocessors: i32,
    /// Bytes of shared memory that a block may ask for.
    most_shared: AtomicI32,
    seed: AtomicU64,
    /// Address and bytes of all that is allocated.
    held: Mutex<Vec<(usize, usize)>>,
    order: Mutex<Order>,
}

/// Which streams have waited for which. The first is the main one: before a kernel or a copy, it waits for all the others, and
/// they wait for it. The others need not wait for each other.
#[derive(Default)]
struct Order {
    /// By stream: kernels launched.
    run: Vec<u64>,
    /// By stream that waits, and stream that is waited for.
    seen: std::collections::HashMap<(usize, usize), u64>,
}

impl Order {
    /// Whether the stream has waited.
    fn check(&self, stream: usize) -> Result<(), DriverError> {
        let others = match stream {
            0 => 1..self.run.len(),
            _ => 0..1,
        };
        for other in others {
            let seen = self.seen.get(&(stream, other)).copied().unwrap_or(0);
            if seen < self.run[other] {
                let wrong = format!("stream {stream} has not waited for stream {other}");
                return Err(DriverError(wrong));
            }
        }
        Ok(())
    }
}

impl CudaContext {
    /// Kernels of `library`; the order in which threads run comes from `seed`.
    pub fn on_host(
        library: &Path,
        multiprocessors: i32,
        seed: u64,
    ) -> Result<Arc<Self>, DriverError> {
        // SAFETY: ours, and without initialisers.
        let library = unsafe { libloading::Library::new(library) };
        Ok(Arc::new(Self {
            library: library.map_err(|e| DriverError(e.to_string()))?,
            multiprocessors,
            most_shared: AtomicI32::new(227 << 10),
            seed: AtomicU64::new(seed),
            held: Mutex::default(),
            order: Mutex::default(),
        }))
    }

    pub fn new_stream(self: &Arc<Self>) -> Result<Arc<CudaStream>, DriverError> {
        let mut order = self.order();
        order.run.push(0);
        Ok(Arc::new(CudaStream {
            context: Arc::clone(self),
            number: order.run.len() - 1,
        }))
    }

    pub fn load_module(self: &Arc<Self>, _: Ptx) -> Result<Arc<CudaModule>, DriverError> {
        Ok(Arc::new(CudaModule {
            context: Arc::clone(self),
        }))
    }

    pub fn attribute(&self, what: sys::CUdevice_attribute) -> Result<i32, DriverError> {
        use sys::CUdevice_attribute::*;
        Ok(match what {
            CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT => self.multiprocessors,
            CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN => {
                self.most_shared.load(Ordering::Relaxed)
            }
        })
    }

    /// Be a machine whose blocks may ask for this much shared memory.
    pub fn have_shared(&self, bytes: i32) {
        self.most_shared.store(bytes, Ordering::Relaxed);
    }

    fn order(&self) -> std::sync::MutexGuard<'_, Order> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn symbol(&self, name: &str) -> Result<*const c_void, DriverError> {
        // SAFETY: an address; who asks knows of what.
        let symbol = unsafe { self.library.get::<*const c_void>(name.as_bytes()) };
        let symbol = symbol.map_err(|e| DriverError(format!("{name}: {e}")))?;
        Ok(*symbol)
    }

    /// Whether what lies around all allocations is as it was.
    fn margins(&self) -> Result<(), String> {
        for &(at, len) in self
            .held
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
        {
            for around in [at - MARGIN, at + len] {
                // SAFETY: both margins were allocated with what they surround, which is held.
                let margin = unsafe { std::slice::from_raw_parts(around as *const u8, MARGIN) };
                if margin.iter().any(|b| *b != UNTOUCHED) {
                    return Err(format!(
                        "wrote outside of {len} bytes of the device's memory"
                    ));
                }
            }
        }
        Ok(())
    }
}

pub struct CudaModule {
    context: Arc<CudaContext>,
}

impl CudaModule {
    pub fn load_function(self: &Arc<Self>, name: &str) -> Result<CudaFunction, DriverError> {
        let kernel = self.context.symbol(&format!("shim_{name}"))?;
        Ok(CudaFunction {
            kernel,
            name: name.to_string(),
            most_shared: self.context.most_shared.load(Ordering::Relaxed),
        })
    }

    /// The bytes of a `__device__` number.
    pub fn get_global(
        self: &Arc<Self>,
        name: &str,
        stream: &Arc<CudaStream>,
    ) -> Result<CudaSlice<u8>, DriverError> {
        let at = self.context.symbol(name)?;
        // SAFETY: the only kind of global that the kernels have.
        let value = unsafe { at.cast::<u32>().read() };
        stream.clone_htod(&value.to_le_bytes())
    }
}

pub struct CudaFunction {
    kernel: *const c_void,
    name: String,
    most_shared: i32,
}

// SAFETY: an address of code.
unsafe impl Send for CudaFunction {}
// SAFETY: as above.
unsafe impl Sync for CudaFunction {}

impl CudaFunction {
    pub fn occupancy_max_active_blocks_per_multiprocessor(
        &self,
        _: u32,
        _: usize,
        _: Option<()>,
    ) -> Result<u32, DriverError> {
        Ok(4)
    }

    pub fn set_attribute(
        &self,
        _: sys::CUfunction_attribute_enum,
        shared: i32,
    ) -> Result<(), DriverError> {
        let name = &self.name;
        match shared > self.most_shared {
            true => Err(DriverError(format!("{name}: {shared} bytes are too many"))),
            false => Ok(()),
        }
    }
}

pub struct CudaStream {
    context: Arc<CudaContext>,
    number: usize,
}

impl CudaStream {
    pub fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    /// Wait for what `other` has run.
    pub fn join(&self, other: &Self) -> Result<(), DriverError> {
        let mut order = self.context.order();
        let run = order.run[other.number];
        order.seen.insert((self.number, other.number), run);
        Ok(())
    }

    pub fn alloc_zeros<T: DeviceRepr>(
        self: &Arc<Self>,
        len: usize,
    ) -> Result<CudaSlice<T>, DriverError> {
        Ok(CudaSlice::filled(&self.context, len, 0))
    }

    pub fn clone_htod<T: DeviceRepr>(
        self: &Arc<Self>,
        from: &[T],
    ) -> Result<CudaSlice<T>, DriverError> {
        let mut slice = CudaSlice::filled(&self.context, from.len(), 0);
        self.memcpy_htod(from, &mut slice)?;
        Ok(slice)
    }

    pub fn memcpy_htod<T: DeviceRepr>(
        self: &Arc<Self>,
        from: &[T],
        to: &mut CudaSlice<T>,
    ) -> Result<(), DriverError> {
        assert!(from.len() <= to.len, "as cudarc does");
        // SAFETY: as long as was just checked; two owners, so that they do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to.at, from.len()) };
        Ok(())
    }

    /// Memory that nobody has written yet: garbage, and numbers of none.
    ///
    /// # Safety
    /// As cudarc says.
    pub unsafe fn alloc<T: DeviceRepr>(
        self: &Arc<Self>,
        len: usize,
    ) -> Result<CudaSlice<T>, DriverError> {
        Ok(CudaSlice::filled(&self.context, len, 0xff))
    }

    pub fn clone_dtoh<T: DeviceRepr, From: DevicePtr<T>>(
        self: &Arc<Self>,
        from: &From,
    ) -> Result<Vec<T>, DriverError> {
        self.context.order().check(self.number)?;
        let (at, len) = (from.device_ptr(self).0 as *const T, from.len());
        // SAFETY: a slice's memory is all initialised, and any bytes are a T.
        Ok(unsafe { std::slice::from_raw_parts(at, len) }.to_vec())
    }

    pub fn launch_builder<'a>(&'a self, function: &'a CudaFunction) -> LaunchArgs<'a> {
        LaunchArgs {
            stream: self,
            function,
            args: Vec::new(),
            life: PhantomData,
        }
    }
}

/// Memory of the device: numbers, and a margin on either side.
pub struct CudaSlice<T> {
    at: *mut T,
    len: usize,
    context: Arc<CudaContext>,
}

// SAFETY: it owns its numbers; kernels run one at a time.
unsafe impl<T: Send> Send for CudaSlice<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for CudaSlice<T> {}

impl<T> CudaSlice<T> {
    fn layout(len: usize) -> Layout {
        let bytes = len * size_of::<T>() + ALIGN + MARGIN;
        Layout::from_size_align(bytes, ALIGN).expect("fits the address space")
    }

    fn filled(context: &Arc<CudaContext>, len: usize, with: u8) -> Self {
        let (layout, bytes) = (Self::layout(len), len * size_of::<T>());
        // SAFETY: not of no size; what is written lies inside, the numbers from ALIGN on.
        let at = unsafe {
            let base = std::alloc::alloc(layout);
            assert!(!base.is_null(), "out of memory");
            base.write_bytes(UNTOUCHED, layout.size());
            base.add(ALIGN).write_bytes(with, bytes);
            base.add(ALIGN)
        };
        let mut held = context.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.push((at as usize, bytes));
        Self {
            at: at.cast(),
            len,
            context: Arc::clone(context),
        }
    }

    pub fn num_bytes(&self) -> usize {
        self.len * size_of::<T>()
    }
}

impl<T> Drop for CudaSlice<T> {
    fn drop(&mut self) {
        let mut held = self
            .context
            .held
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        held.retain(|(at, _)| *at != self.at as usize);
        // SAFETY: allocated like this.
        unsafe { std::alloc::dealloc(self.at.cast::<u8>().sub(ALIGN), Self::layout(self.len)) };
    }
}

impl<T> CudaSlice<T> {
    pub fn try_slice(&self, range: std::ops::Range<usize>) -> Option<CudaView<'_, T>> {
        let inside = range.start <= range.end && range.end <= self.len;
        inside.then_some(CudaView { slice: self, range })
    }
}

/// A part of a slice.
pub struct CudaView<'a, T> {
    slice: &'a CudaSlice<T>,
    range: std::ops::Range<usize>,
}

pub trait DevicePtr<T> {
    fn device_ptr(&self, stream: &CudaStream) -> (u64, ());
    fn len(&self) -> usize;
}

impl<T> DevicePtr<T> for CudaSlice<T> {
    fn device_ptr(&self, _: &CudaStream) -> (u64, ()) {
        (self.at as u64, ())
    }
    fn len(&self) -> usize {
        self.len
    }
}

impl<T> DevicePtr<T> for CudaView<'_, T> {
    fn device_ptr(&self, _: &CudaStream) -> (u64, ()) {
        let offset = self.range.start * size_of::<T>();
        (self.slice.at as u64 + offset as u64, ())
    }
    fn len(&self) -> usize {
        self.range.len()
    }
}

#[derive(Clone, Copy, Debug)]
pub struct LaunchConfig {
    pub grid_dim: (u32, u32, u32),
    pub block_dim: (u32, u32, u32),
    pub shared_mem_bytes: u32,
}

pub struct LaunchArgs<'a> {
    stream: &'a CudaStream,
    function: &'a CudaFunction,
    args: Vec<*const c_void>,
    life: PhantomData<&'a ()>,
}

pub trait PushKernelArg<T> {
    fn arg(&mut self, arg: T) -> &mut Self;
}

impl<'a, T: DeviceRepr> PushKernelArg<&'a T> for LaunchArgs<'a> {
    fn arg(&mut self, arg: &'a T) -> &mut Self {
        self.args.push(std::ptr::from_ref(arg).cast());
        self
    }
}

impl<'a, T> PushKernelArg<&'a CudaSlice<T>> for LaunchArgs<'a> {
    fn arg(&mut self, arg: &'a CudaSlice<T>) -> &mut Self {
        self.args.push(std::ptr::from_ref(&arg.at).cast());
        self
    }
}

impl<'a, T> PushKernelArg<&'a mut CudaSlice<T>> for LaunchArgs<'a> {
    fn arg(&mut self, arg: &'a mut CudaSlice<T>) -> &mut Self {
        self.args.push(std::ptr::from_ref(&arg.at).cast());
        self
    }
}

impl LaunchArgs<'_> {
    /// # Safety
    /// The arguments are the kernel's.
    pub unsafe fn launch(&mut self, config: LaunchConfig) -> Result<(), DriverError> {
        let context = &self.stream.context;
        let mut order = context.order();
        order.check(self.stream.number)?;
        order.run[self.stream.number] += 1;
        drop(order);
        let launch = context.symbol("shim_launch")?;
        // SAFETY: runtime.cpp says so.
        let launch: Launch = unsafe { std::mem::transmute(launch) };
        let seed = context.seed.fetch_add(1, Ordering::Relaxed);
        let ((x, y, z), (u, v, w)) = (config.grid_dim, config.block_dim);
        let mut message = [0u8; 2048];
        // SAFETY: the caller's promise.
        let good = unsafe {
            launch(
                self.function.kernel,
                self.args.as_ptr(),
                [x, y, z].as_ptr(),
                [u, v, w].as_ptr(),
                config.shared_mem_bytes,
                seed,
                message.as_mut_ptr().cast(),
                message.len(),
            )
        };
        let wrong = match good {
            true => context.margins().err(),
            false => CStr::from_bytes_until_nul(&message)
                .ok()
                .map(|m| m.to_string_lossy().into_owned()),
        };
        match wrong {
            None => Ok(()),
            Some(wrong) => Err(DriverError(format!("{}: {wrong}", self.function.name))),
        }
    }
}
