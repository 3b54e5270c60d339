//! Group quantization: numbers to codes, a scale and a min; and back.
//!
//! Asymmetric, round to nearest, ties to even (KIVI, section 3; design of the page in
//! [`layout`](crate::layout)):
//!
//! ```text
//! code = clamp(round_ties_even((x - min) / scale), 0, 2^bits - 1)      x^ = code * scale + min
//! ```
//!
//! All in f32, with scale and min already rounded to f16 as they are stored, a true division, and
//! no fused multiply-add: every implementation can give the same bits.

use half::f16;

use crate::config::Clip;

/// Ends of a clipped range move inwards by `0..CLIP_STEPS` sixteenths of the full range, each by
/// itself. Sixteenths are exact in f32.
pub const CLIP_STEPS: usize = 7;

/// Lanes of a sum. Term `i` goes to lane `i mod 16`, in order; then lane `i` takes lane `i + 8`,
/// `i + 4`, `i + 2`, `i + 1`.
pub const LANES: usize = 16;

/// What turns codes back into numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Affine {
    /// Step between codes; 0 for a constant group.
    pub scale: f16,
    /// Value of code 0.
    pub min: f16,
}

impl Affine {
    /// From the ends of a range; `None` if f16 cannot hold them.
    fn over(low: f32, high: f32, bits: u8) -> Option<Self> {
        let scale = f16::from_f32((high - low) / levels(bits));
        // Which of -0 and +0 is the smaller one depends on the machine: a minimum of -0 is +0.
        let min = f16::from_f32(low + 0.0);
        (scale.is_finite() && min.is_finite()).then_some(Self { scale, min })
    }

    /// The number that `code` stands for.
    pub fn value(self, code: u8) -> f32 {
        f32::from(code) * self.scale.to_f32() + self.min.to_f32()
    }
}

/// Highest code.
pub(crate) fn levels(bits: u8) -> f32 {
    ((1u16 << bits) - 1) as f32
}

/// Code of `x` as f32, for `scale` above 0.
#[inline(always)]
pub(crate) fn code(x: f32, scale: f32, min: f32, levels: f32) -> f32 {
    ((x - min) / scale).round_ties_even().clamp(0.0, levels)
}

/// Quantize one group `x` into `codes`.
///
/// Unless with [`Clip::None`], the range with the least squared error is taken, the first one of equals in
/// the order (low end, high end); element `i` counts `weight[i]` times, which is 1, or 0 for a
/// token that is traced and never read from the page.
///
/// `None` if a number is not finite or f16 cannot hold scale or min.
#[inline(always)]
pub fn quantize_group(
    x: &[f32],
    weight: &[f32],
    bits: u8,
    clip: Clip,
    codes: &mut [u8],
) -> Option<Affine> {
    if !x.iter().all(|x| x.is_finite()) {
        return None;
    }
    let low = x.iter().copied().fold(f32::INFINITY, f32::min);
    let high = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let full = Affine::over(low, high, bits)?;
    let affine = match clip {
        Clip::None => full,
        Clip::Keys | Clip::Both => clipped(x, weight, bits, low, high, full),
    };
    encode(x, affine, bits, codes);
    Some(affine)
}

/// The best of `CLIP_STEPS`^2 ranges.
#[inline(always)]
fn clipped(x: &[f32], weight: &[f32], bits: u8, low: f32, high: f32, full: Affine) -> Affine {
    let sixteenth = (high - low) / 16.0;
    let mut best = (squared_error(x, weight, full, bits), full);
    for i in 0..CLIP_STEPS {
        for j in 0..CLIP_STEPS {
            let (low, high) = (low + sixteenth * i as f32, high - sixteenth * j as f32);
            // Inside the full range, so f16 holds it.
            let Some(affine) = Affine::over(low, high, bits) else {
                continue;
            };
            let error = squared_error(x, weight, affine, bits);
            if error < best.0 {
                best = (error, affine);
            }
        }
    }
    best.1
}

/// Sum of `weight * (x - x^)^2`, in the fixed order of [`LANES`].
#[inline(always)]
pub fn squared_error(x: &[f32], weight: &[f32], affine: Affine, bits: u8) -> f32 {
    let (scale, min, levels) = (affine.scale.to_f32(), affine.min.to_f32(), levels(bits));
    if scale == 0.0 {
        return sum2(x, weight, |x, w| w * ((x - min) * (x - min)));
    }
    sum2(x, weight, |x, w| {
        let back = code(x, scale, min, levels) * scale + min;
        w * ((x - back) * (x - back))
    })
}

/// How far apart codes are read back, once they are chosen ([`Clip::Both`]).
///
/// The code nearest to a number is on average nearer to the mean than the number is: at 2 bits a group
/// read back has a tenth less spread. Errors of many numbers cancel in a sum, that one does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spread {
    /// The group's variance is what it was. For keys: scores are as far apart as they were.
    Variance,
    /// The group is as long in its own direction as it was: `sum (x^ - m)(x - m) = sum (x - m)^2`.
    /// For values: a sum of many is not too short.
    Gain,
}

/// Scale and min that read `codes` of `x` back with the mean and the spread of `x`; element `i` counts
/// `weight[i]` times. `affine` where there is no spread, or f16 cannot hold what it takes.
pub fn stretched(
    x: &[f32],
    weight: &[f32],
    codes: &[u8],
    affine: Affine,
    spread: Spread,
) -> Affine {
    let codes: Vec<f32> = codes.iter().map(|code| f32::from(*code)).collect();
    let count = sum(weight, |w| w);
    let mean = |x: &[f32]| sum2(x, weight, |x, w| w * x) / count;
    let off = |x: &[f32]| -> (f32, Vec<f32>) {
        let mean = mean(x);
        (mean, x.iter().map(|x| x - mean).collect())
    };
    let ((x_mean, x), (code_mean, codes)) = (off(x), off(&codes));
    let square = |x: &[f32]| sum2(x, weight, |x, w| w * (x * x));
    let (xx, cc) = (square(&x), square(&codes));
    let products: Vec<f32> = x.iter().zip(&codes).map(|(x, c)| x * c).collect();
    let xc = sum2(&products, weight, |p, w| w * p);
    let scale = match spread {
        Spread::Variance => (xx / cc).sqrt(),
        Spread::Gain => xx / xc,
    };
    let scale = f16::from_f32(scale);
    let min = f16::from_f32(x_mean - scale.to_f32() * code_mean + 0.0);
    match scale.is_finite() && scale > f16::ZERO && min.is_finite() {
        true => Affine { scale, min },
        false => affine,
    }
}

/// Codes of `x`; all 0 if the scale is 0.
#[inline(always)]
pub fn encode(x: &[f32], affine: Affine, bits: u8, codes: &mut [u8]) {
    let (scale, min, levels) = (affine.scale.to_f32(), affine.min.to_f32(), levels(bits));
    if scale == 0.0 {
        codes.fill(0);
        return;
    }
    for (c, &x) in codes.iter_mut().zip(x) {
        *c = code(x, scale, min, levels) as u8;
    }
}

/// Sum of `term(x)` in the fixed order of [`LANES`].
#[inline(always)]
pub fn sum(x: &[f32], term: impl Fn(f32) -> f32) -> f32 {
    sum2(x, x, |x, _| term(x))
}

/// Sum of `term(a, b)` over pairs, in the fixed order of [`LANES`].
#[inline(always)]
pub fn sum2(a: &[f32], b: &[f32], term: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let (a_rest, b_rest) = (a.remainder(), b.remainder());
    for (a, b) in a.zip(b) {
        for i in 0..LANES {
            lanes[i] += term(a[i], b[i]);
        }
    }
    for (lane, (a, b)) in lanes.iter_mut().zip(a_rest.iter().zip(b_rest)) {
        *lane += term(*a, *b);
    }
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn quantized(x: &[f32], bits: u8, clip: Clip) -> (Option<Affine>, Vec<u8>) {
        let mut codes = vec![0xAA; x.len()];
        let affine = quantize_group(x, &vec![1.0; x.len()], bits, clip, &mut codes);
        (affine, codes)
    }

    #[test]
    fn codes_by_hand() {
        let x = [1.0, 4.0, 2.0, 3.0, 1.4, 2.5, 3.5, 1.5];
        let (affine, codes) = quantized(&x, 2, Clip::None);
        let affine = affine.expect("finite");
        assert_eq!((affine.scale, affine.min), (f16::ONE, f16::ONE));
        // 2.5 -> 1.5 and 3.5 -> 2.5 and 1.5 -> 0.5: ties go to the even code.
        assert_eq!(codes, [0, 3, 1, 2, 0, 2, 2, 0]);
    }

    #[test]
    fn a_constant_group_is_exact() {
        for clip in [Clip::None, Clip::Keys] {
            let x = [f16::from_f32(0.1).to_f32(); 32];
            let (affine, codes) = quantized(&x, 2, clip);
            let affine = affine.expect("finite");
            assert_eq!(affine.scale, f16::ZERO);
            assert!(codes.iter().all(|c| affine.value(*c) == x[0]));
        }
    }

    #[test]
    fn a_minimum_of_minus_zero_is_zero() {
        for x in [[-0.0, 0.0, 1.0, 2.0], [0.0, -0.0, 1.0, 2.0], [-0.0; 4]] {
            let affine = quantized(&x, 2, Clip::None).0.expect("finite");
            assert_eq!(affine.min.to_bits(), 0, "{x:?}");
        }
    }

    #[test]
    fn what_f16_cannot_hold_is_refused() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -70000.0] {
            let mut x = [1.0; 32];
            x[7] = bad;
            assert_eq!(quantized(&x, 2, Clip::Keys).0, None, "{bad}");
        }
    }

    #[test]
    fn a_clipped_range_ignores_what_has_no_weight() {
        let mut x: Vec<f32> = (0..32).map(|i| (i % 4) as f32).collect();
        x[5] = 3.6;
        let mut weight = vec![1.0; 32];
        weight[5] = 0.0;
        let mut codes = vec![0; 32];
        let affine = quantize_group(&x, &weight, 2, Clip::Keys, &mut codes).expect("finite");
        let error = squared_error(&x, &weight, affine, 2);
        let unclipped = Affine::over(0.0, 3.6, 2).expect("finite");
        assert!(error < squared_error(&x, &weight, unclipped, 2));
    }

    #[test]
    fn what_is_read_back_has_the_spread_that_was_stored() {
        let x: Vec<f32> = (0..64)
            .map(|i| ((i * 37 % 64) as f32 - 20.0).powi(3) / 900.0)
            .collect();
        let mut weight = vec![1.0; 64];
        weight[9] = 0.0;
        let mut codes = vec![0; 64];
        let affine = quantize_group(&x, &weight, 2, Clip::Both, &mut codes).expect("finite");
        let off = |x: Vec<f32>| -> (f32, Vec<f32>) {
            let mean = x.iter().zip(&weight).map(|(x, w)| x * w).sum::<f32>() / 63.0;
            (
                mean,
                x.iter().zip(&weight).map(|(x, w)| (x - mean) * w).collect(),
            )
        };
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        let (mean, x_off) = off(x.clone());
        let read = |affine: Affine| off(codes.iter().map(|c| affine.value(*c)).collect());
        let close = |a: f32, b: f32| (a - b).abs() < 2e-3 * b.abs().max(1.0);
        // The search alone reads back too short.
        let (_, nearest) = read(affine);
        assert!(dot(&nearest, &x_off) < 0.97 * dot(&x_off, &x_off));
        let (m, kept) = read(stretched(&x, &weight, &codes, affine, Spread::Variance));
        assert!(close(m, mean) && close(dot(&kept, &kept), dot(&x_off, &x_off)));
        let (m, long) = read(stretched(&x, &weight, &codes, affine, Spread::Gain));
        assert!(close(m, mean) && close(dot(&long, &x_off), dot(&x_off, &x_off)));
    }

    #[test]
    fn what_cannot_be_stretched_stays() {
        let x = [2.0; 32];
        let mut codes = [0xAA; 32];
        let affine = quantize_group(&x, &[1.0; 32], 2, Clip::Both, &mut codes).expect("finite");
        for spread in [Spread::Variance, Spread::Gain] {
            assert_eq!(stretched(&x, &[1.0; 32], &codes, affine, spread), affine);
        }
    }

    #[test]
    fn sums_have_a_fixed_order() {
        let x: Vec<f32> = (0..24).map(|i| 1e7f32.powi(i % 3 - 1)).collect();
        let mut lanes = [0f32; 16];
        for (i, x) in x.iter().enumerate() {
            lanes[i % 16] += x;
        }
        let eight: Vec<f32> = (0..8).map(|i| lanes[i] + lanes[i + 8]).collect();
        let four: Vec<f32> = (0..4).map(|i| eight[i] + eight[i + 4]).collect();
        let two = [four[0] + four[2], four[1] + four[3]];
        assert_eq!(sum(&x, |x| x), two[0] + two[1]);
    }

    proptest! {
        #[test]
        fn error_is_half_a_step(
            bits in prop::sample::select(vec![2u8, 3, 4, 8]),
            x in prop::collection::vec(-100f32..100.0, 32),
        ) {
            let (affine, codes) = quantized(&x, bits, Clip::None);
            let affine = affine.expect("finite");
            // Scale and min are rounded to f16: 2^-11 of each, and of the scale `levels` times.
            let step = affine.scale.to_f32();
            let slack = (affine.min.to_f32().abs() + step * levels(bits)) / 2048.0 + 1e-5;
            for (x, code) in x.iter().zip(codes) {
                let error = (x - affine.value(code)).abs();
                prop_assert!(error <= step / 2.0 + slack, "{x}: {error} of step {step}");
            }
        }

        #[test]
        fn clipping_never_hurts_the_squared_error(x in prop::collection::vec(-8f32..8.0, 64)) {
            let error = |clip| {
                let (affine, _) = quantized(&x, 2, clip);
                squared_error(&x, &vec![1.0; x.len()], affine.expect("finite"), 2)
            };
            prop_assert!(error(Clip::Keys) <= error(Clip::None));
        }
    }
}
