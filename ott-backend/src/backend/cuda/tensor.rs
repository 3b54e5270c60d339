//! candle tensors as addresses on the device, and new ones for kernels to fill.

use std::borrow::Cow;

use candle_core::cuda_backend::cudarc::driver::DevicePtr;
use candle_core::{DType, Device, Result, Storage, Tensor};
use half::{bf16, f16};
use ott_kernels::abi::Fresh;
use ott_kernels::device::Dtype;
use ott_kernels::prompt::VECTOR;

use super::super::seam;
use crate::error::Error;

/// The kernels' name of a dtype that the cache takes.
pub fn kernel_dtype(dtype: DType) -> Option<Dtype> {
    match dtype {
        DType::F16 => Some(Dtype::F16),
        DType::BF16 => Some(Dtype::Bf16),
        DType::F32 => Some(Dtype::F32),
        _ => None,
    }
}

/// A tensor `(rows, heads, tokens, channels)` on the device, in the cache's dtype, with channels next to each other.
pub struct Rows<'a> {
    tensor: Cow<'a, Tensor>,
}

impl<'a> Rows<'a> {
    /// Check a tensor's shape and bring it into `dtype`, without a copy where possible.
    pub fn new(
        what: &'static str,
        tensor: &'a Tensor,
        expected: (usize, usize, usize, usize),
        dtype: DType,
    ) -> Result<Self> {
        let dims = tensor.dims4()?;
        let (rows, heads, tokens, channels) = expected;
        if (dims.0, dims.1, dims.3) != (rows, heads, channels) || dims.2 < tokens {
            return Err(seam(Error::Shape {
                what,
                found: [dims.0, dims.1, dims.2, dims.3],
                expected: [rows, heads, tokens, channels],
            }));
        }
        let mut tensor = Cow::Borrowed(tensor);
        if tensor.dtype() != dtype {
            tensor = Cow::Owned(tensor.to_dtype(dtype)?);
        }
        if tensor.stride()[3] != 1 && channels > 1 {
            tensor = Cow::Owned(tensor.contiguous()?);
        }
        Ok(Self { tensor })
    }

    /// The same numbers where every token's begin at a multiple of [`VECTOR`] bytes.
    pub fn even(self) -> Result<Self> {
        let each = VECTOR / self.tensor.dtype().size_in_bytes();
        let layout = self.tensor.layout();
        let strides = layout.stride()[..3]
            .iter()
            .all(|stride| stride.is_multiple_of(each));
        let is_even = strides && layout.start_offset().is_multiple_of(each);
        Ok(match is_even {
            true => self,
            false => Self {
                tensor: Cow::Owned(self.tensor.force_contiguous()?),
            },
        })
    }

    /// Do something with the address and the strides; what it launches on the device's stream comes before the tensor's
    /// memory can be used for something else.
    pub fn with<T>(&self, f: impl FnOnce(Fresh) -> T) -> Result<T> {
        let stride = self.tensor.stride();
        let (row, head, token) = (stride[0] as i64, stride[1] as i64, stride[2] as i64);
        with_address(&self.tensor, |data| {
            f(Fresh {
                data,
                row,
                head,
                token,
            })
        })
    }
}

/// Do something with the address of a tensor's first number.
pub fn with_address<T>(tensor: &Tensor, f: impl FnOnce(u64) -> T) -> Result<T> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else {
        return Err(seam(Error::Split));
    };
    let stream = storage.device.cuda_stream();
    let base = match tensor.dtype() {
        DType::F16 => storage.as_cuda_slice::<f16>()?.device_ptr(&stream).0,
        DType::BF16 => storage.as_cuda_slice::<bf16>()?.device_ptr(&stream).0,
        _ => storage.as_cuda_slice::<f32>()?.device_ptr(&stream).0,
    };
    let offset = layout.start_offset() * tensor.dtype().size_in_bytes();
    Ok(f(base + offset as u64))
}

/// A new tensor, filled by what `f` launches at its address.
pub fn filled(
    shape: (usize, usize, usize, usize),
    dtype: DType,
    device: &Device,
    f: impl FnOnce(u64) -> Result<()>,
) -> Result<Tensor> {
    // SAFETY: the kernel writes every number, and whoever reads them does so later on the same stream; if it is not
    // launched, the tensor is dropped unread.
    let tensor = unsafe { Tensor::empty(shape, dtype, device) }?;
    with_address(&tensor, f)??;
    Ok(tensor)
}
