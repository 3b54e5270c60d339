//! Full-precision numbers as the model computes them.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// Numbers of one of the dtypes of activations.
#[derive(Clone, Copy, Debug)]
pub enum Full<'a> {
    /// binary32
    F32(&'a [f32]),
    /// binary16
    F16(&'a [f16]),
    /// bfloat16
    Bf16(&'a [bf16]),
}

impl Full<'_> {
    /// Count of numbers.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(x) => x.len(),
            Self::F16(x) => x.len(),
            Self::Bf16(x) => x.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// As many as `out` has, from number `start` on.
    #[inline(always)]
    pub fn widen(&self, start: usize, out: &mut [f32]) {
        let end = start + out.len();
        match self {
            Self::F32(x) => out.copy_from_slice(&x[start..end]),
            Self::F16(x) => x[start..end].convert_to_f32_slice(out),
            Self::Bf16(x) => {
                for (out, x) in out.iter_mut().zip(&x[start..end]) {
                    *out = f32::from_bits(u32::from(x.to_bits()) << 16);
                }
            }
        }
    }
}
