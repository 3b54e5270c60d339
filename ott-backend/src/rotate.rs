//! The basis in which values are stored: a Hadamard matrix mixes channels, so that no single one
//! stretches the range of a token, and errors are alike in all of them (QuaRot, arXiv 2404.00456).
//!
//! Attention is linear in the values: what it returns is in the same basis, and is turned back once
//! for each query. The matrix is symmetric and orthogonal, its own inverse. A channel of the rotated
//! value may be larger than any of the value's, by the root of the width at most. So rotated values are
//! kept divided by a power of two that is no smaller: what f16 holds, it holds rotated too.

use crate::layout::V_GROUP;

/// Channels that are mixed with each other: the largest power of two that divides `dim`, at most
/// [`V_GROUP`].
pub fn width(dim: usize) -> usize {
    (1 << dim.trailing_zeros()).min(V_GROUP)
}

/// Rotate one token's channels in place, into the basis and the scale in which they are kept. Additions in
/// binary32, in the order of the fast Walsh-Hadamard transform (pairs of distance 1, 2, 4, ..), then one
/// product.
pub fn rotate(x: &mut [f32]) {
    transform(x, 1.0 / headroom(x.len()));
}

/// The other way.
pub fn rotate_back(x: &mut [f32]) {
    transform(x, headroom(x.len()));
}

/// The least power of two that is no smaller than the root of the width: 4, 8 or 16 for 16, 64 or 128.
fn headroom(dim: usize) -> f32 {
    (1u32 << width(dim).ilog2().div_ceil(2)) as f32
}

fn transform(x: &mut [f32], scale: f32) {
    let width = width(x.len());
    let factor = 1.0 / (width as f32).sqrt() * scale;
    for x in x.chunks_exact_mut(width) {
        let sixteens = x.as_chunks_mut::<16>().0;
        for x in sixteens.iter_mut() {
            *x = pairs::<8>(pairs::<4>(pairs::<2>(pairs::<1>(*x))));
        }
        let mut half = if sixteens.is_empty() { 1 } else { 16 };
        while half < width {
            for pair in x.chunks_exact_mut(2 * half) {
                let (low, high) = pair.split_at_mut(half);
                for (a, b) in low.iter_mut().zip(high) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
            half *= 2;
        }
        x.iter_mut().for_each(|x| *x *= factor);
    }
}

/// Sums and differences of pairs of one distance, which become shuffles of registers.
#[inline(always)]
fn pairs<const HALF: usize>(x: [f32; 16]) -> [f32; 16] {
    std::array::from_fn(|i| match i & HALF {
        0 => x[i] + x[i | HALF],
        _ => x[i & !HALF] - x[i],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widths() {
        let dims = [8, 64, 80, 96, 128, 136, 256];
        assert_eq!(dims.map(width), [8, 64, 16, 32, 128, 8, 128]);
    }

    #[test]
    fn one_channel_is_spread_over_all() {
        let mut x = [0.0; 16];
        x[5] = 4.0;
        rotate(&mut x);
        assert!(x.iter().all(|x| x.abs() == 0.25), "{x:?}");
        assert_eq!(x.iter().filter(|x| **x < 0.0).count(), 8);
    }

    #[test]
    fn there_and_back_is_nothing() {
        for dim in [8, 32, 80, 128, 256] {
            let x: Vec<f32> = (0..dim)
                .map(|i| ((i * 37) % 101) as f32 / 50.0 - 1.0)
                .collect();
            let mut twice = x.clone();
            rotate(&mut twice);
            assert!(x.iter().zip(&twice).any(|(a, b)| (a - b).abs() > 0.1));
            rotate_back(&mut twice);
            for (a, b) in x.iter().zip(&twice) {
                assert!((a - b).abs() < 1e-6, "{dim}: {a} {b}");
            }
        }
    }

    #[test]
    fn no_channel_grows_beyond_the_largest() {
        for dim in [8, 16, 32, 64, 80, 96, 128, 256, 1024] {
            let mut x = vec![-65504.0; dim];
            rotate(&mut x);
            assert!(x.iter().all(|x| x.abs() <= 65504.0), "{dim}");
        }
    }
}
