//! Matrix products of f32 on one thread: the only place that calls the `gemm` crate, which candle
//! multiplies with as well.

use gemm::Parallelism;

/// A matrix whose rows begin `stride` numbers apart.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    /// Its numbers.
    pub data: &'a [f32],
    /// Numbers from a row to the next.
    pub stride: usize,
}

/// A matrix to be written.
#[derive(Debug)]
pub struct MatrixMut<'a> {
    /// Its numbers.
    pub data: &'a mut [f32],
    /// Numbers from a row to the next.
    pub stride: usize,
}

/// What becomes of the numbers that a product is written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// They are overwritten.
    Replace,
    /// The product is added to them.
    Add,
}

/// `c (m, n)` becomes, or grows by, `a (m, k) b (k, n)`.
///
/// Each number of `c` is one sum over `k` in an order that depends on the sizes alone.
///
/// # Panics
/// If a matrix is smaller than its size says.
pub fn multiply(
    c: MatrixMut<'_>,
    a: Matrix<'_>,
    b: Matrix<'_>,
    (m, n, k): (usize, usize, usize),
    write: Write,
) {
    let fits = |len: usize, stride: usize, rows: usize, columns: usize| {
        columns <= stride && (rows == 0 || (rows - 1) * stride + columns <= len)
    };
    assert!(
        fits(c.data.len(), c.stride, m, n)
            && fits(a.data.len(), a.stride, m, k)
            && fits(b.data.len(), b.stride, k, n),
        "a matrix is smaller than the product ({m}, {k}) ({k}, {n}) needs"
    );
    // SAFETY: by the assertion above, element (i, j) of each matrix lies at i * stride + j within
    // its slice; `c` is borrowed exclusively, so it overlaps neither `a` nor `b`. Strides are
    // lengths of slices at most and fit isize.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.data.as_mut_ptr(),
            1,
            c.stride as isize,
            write == Write::Add,
            a.data.as_ptr(),
            1,
            a.stride as isize,
            b.data.as_ptr(),
            1,
            b.stride as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_of_padded_matrices() {
        let a = [1.0, 2.0, 9.0, 3.0, 4.0, 9.0];
        let b = [1.0, 0.0, 2.0, 9.0, 0.0, 1.0, 3.0];
        let mut c = [0.5f32; 7];
        for (write, want) in [
            (Write::Replace, [1.0, 2.0, 8.0, 0.5, 3.0, 4.0, 18.0]),
            (Write::Add, [2.0, 4.0, 16.0, 0.5, 6.0, 8.0, 36.0]),
        ] {
            let out = MatrixMut {
                data: &mut c,
                stride: 4,
            };
            let (a, b) = (
                Matrix {
                    data: &a,
                    stride: 3,
                },
                Matrix {
                    data: &b,
                    stride: 4,
                },
            );
            multiply(out, a, b, (2, 3, 2), write);
            assert_eq!(c, want);
        }
    }

    #[test]
    #[should_panic(expected = "a matrix is smaller than the product (2, 2) (2, 3) needs")]
    fn a_matrix_that_is_too_small_is_refused() {
        let a = [0.0; 4];
        let mut c = [0.0; 6];
        let out = MatrixMut {
            data: &mut c,
            stride: 3,
        };
        let (a, b) = (
            Matrix {
                data: &a,
                stride: 2,
            },
            Matrix {
                data: &a,
                stride: 3,
            },
        );
        multiply(out, a, b, (2, 3, 2), Write::Replace);
    }
}
