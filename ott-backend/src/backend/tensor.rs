//! candle tensors as slices, and back.

use std::borrow::Cow;

use candle_core::{DType, Device, Result, Storage, Tensor, WithDType};
use half::{bf16, f16};

use crate::cache::{Element, Tokens};
use crate::error::Error;
use crate::rotate::rotate;

/// A dtype that both candle and the cache know.
pub trait Activation: Element + WithDType {}

impl Activation for f16 {}
impl Activation for bf16 {}
impl Activation for f32 {}

/// A tensor `(rows, heads, tokens, channels)` on the CPU, with channels next to each other.
pub struct Rows<'a> {
    tensor: Cow<'a, Tensor>,
    dims: (usize, usize, usize, usize),
}

impl<'a> Rows<'a> {
    /// Check a tensor's shape and bring it into dtype `E`, without a copy where possible.
    pub fn new<E: Activation>(
        what: &'static str,
        tensor: &'a Tensor,
        expected: (usize, usize, usize, usize),
    ) -> Result<Self> {
        let dims = tensor.dims4()?;
        let (rows, heads, tokens, channels) = expected;
        if (dims.0, dims.1, dims.3) != (rows, heads, channels) || dims.2 < tokens {
            return Err(candle_core::Error::wrap(Error::Shape {
                what,
                found: [dims.0, dims.1, dims.2, dims.3],
                expected: [rows, heads, tokens, channels],
            }));
        }
        let mut tensor = Cow::Borrowed(tensor);
        if tensor.dtype() != E::DTYPE {
            tensor = Cow::Owned(tensor.to_dtype(E::DTYPE)?);
        }
        if tensor.stride()[3] != 1 && channels > 1 {
            tensor = Cow::Owned(tensor.contiguous()?);
        }
        Ok(Self { tensor, dims })
    }

    /// The same in the basis in which values are stored.
    pub fn rotated<E: Activation>(&self) -> Result<Self> {
        let mut wide = self.widened::<E>(1.0)?;
        wide.chunks_exact_mut(self.dims.3).for_each(rotate);
        let mut numbers = vec![E::default(); wide.len()];
        E::narrow(&wide, &mut numbers);
        Ok(Self {
            tensor: Cow::Owned(tensor(numbers, self.dims, E::DTYPE)?),
            dims: self.dims,
        })
    }

    /// Tokens of the tensor, padding among them.
    pub fn tokens(&self) -> usize {
        self.dims.2
    }

    /// Do something with the numbers, which are locked meanwhile.
    pub fn with<E: Activation, T>(&self, f: impl FnOnce(Slices<'_, E>) -> T) -> Result<T> {
        let (storage, layout) = self.tensor.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else {
            return Err(candle_core::Error::wrap(Error::Device { kind: "CUDA" }));
        };
        Ok(f(Slices {
            data: &storage.as_slice::<E>()?[layout.start_offset()..],
            stride: layout.stride(),
            dim: self.dims.3,
        }))
    }

    /// All numbers as f32 times `factor`, contiguous.
    pub fn widened<E: Activation>(&self, factor: f32) -> Result<Vec<f32>> {
        let (rows, heads, tokens, dim) = self.dims;
        let mut out = vec![0f32; rows * heads * tokens * dim];
        self.with::<E, ()>(|from| {
            let mut rest = out.chunks_exact_mut(dim);
            for r in 0..rows {
                let from = from.row(r);
                for (i, out) in rest.by_ref().take(heads * tokens).enumerate() {
                    E::widen(from.row(i / tokens, i % tokens), out);
                    out.iter_mut().for_each(|x| *x *= factor);
                }
            }
        })?;
        Ok(out)
    }
}

/// Numbers as a tensor of `dtype`.
pub fn tensor<E: Activation>(
    numbers: Vec<E>,
    shape: (usize, usize, usize, usize),
    dtype: DType,
) -> Result<Tensor> {
    Tensor::from_vec(numbers, shape, &Device::Cpu)?.to_dtype(dtype)
}

/// Numbers of a tensor `(rows, heads, tokens, channels)`.
#[derive(Clone, Copy)]
pub struct Slices<'a, E> {
    data: &'a [E],
    stride: &'a [usize],
    dim: usize,
}

impl<'a, E> Slices<'a, E> {
    /// One row's tokens.
    pub fn row(&self, row: usize) -> Tokens<'a, E> {
        Tokens {
            data: &self.data[row * self.stride[0]..],
            head_stride: self.stride[1],
            token_stride: self.stride[2],
            dim: self.dim,
        }
    }
}
