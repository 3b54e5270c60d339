//! Codes as bytes and back; where code `j` of `n` sits, and nothing else.
//!
//! Codes lie in planes, so that a loop over codes is a loop over bytes. `n` is a multiple of 8.
//!
//! | bits | bytes | code `j` |
//! |---|---|---|
//! | 2 | `n/4` | byte `j mod n/4`, bits `2p` and `2p+1` with plane `p = j / (n/4)` |
//! | 3 | `n/4` then `n/8` | its low two bits as at 2 bits; its high bit in byte `n/4 + j mod n/8`, bit `j / (n/8)` |
//! | 4 | `n/2` | byte `j mod n/2`, its low half if `j < n/2`, else its high half |
//! | 8 | `n` | byte `j` |

/// Bytes of `n` codes.
pub const fn packed_len(n: usize, bits: u8) -> usize {
    n * bits as usize / 8
}

/// Pack codes below `2^bits`; `out` has [`packed_len`] bytes.
pub fn pack(codes: &[u8], bits: u8, out: &mut [u8]) {
    debug_assert!(codes.len().is_multiple_of(8) && out.len() == packed_len(codes.len(), bits));
    match bits {
        3 => {
            let (low, high) = out.split_at_mut(codes.len() / 4);
            planes(codes, 2, 0, low);
            planes(codes, 1, 2, high);
        }
        _ => planes(codes, bits, 0, out),
    }
}

/// Pack bit `bit` of codes, as the high bits of 3-bit codes lie behind the low ones; `out` has `n/8`
/// bytes.
pub fn pack_bits(codes: &[u8], bit: u8, out: &mut [u8]) {
    debug_assert!(out.len() == packed_len(codes.len(), 1));
    planes(codes, 1, bit, out);
}

/// Pack `bits` of each code, those from bit `from` on.
fn planes(codes: &[u8], bits: u8, from: u8, out: &mut [u8]) {
    let mask = (1u16 << bits) as u8;
    let mask = mask.wrapping_sub(1);
    out.fill(0);
    for (p, plane) in codes.chunks_exact(out.len()).enumerate() {
        let shift = p as u8 * bits;
        for (byte, code) in out.iter_mut().zip(plane) {
            *byte |= ((code >> from) & mask) << shift;
        }
    }
}

/// Unpack codes.
pub fn unpack(bytes: &[u8], bits: u8, codes: &mut [u8]) {
    debug_assert!(codes.len().is_multiple_of(8) && bytes.len() == packed_len(codes.len(), bits));
    let n = codes.len();
    match bits {
        2 => each_plane::<2, u8>(bytes, codes, |c| c),
        3 => {
            let (low, high) = bytes.split_at(n / 4);
            each_plane::<2, u8>(low, codes, |c| c);
            for (p, plane) in codes.chunks_exact_mut(n / 8).enumerate() {
                for (code, byte) in plane.iter_mut().zip(high) {
                    *code |= ((byte >> p) & 1) << 2;
                }
            }
        }
        4 => each_plane::<4, u8>(bytes, codes, |c| c),
        _ => codes.copy_from_slice(bytes),
    }
}

/// Unpack codes, or single bits, as f32: what attention multiplies with.
#[inline(always)]
pub fn unpack_f32(bytes: &[u8], bits: u8, codes: &mut [f32]) {
    debug_assert!(codes.len().is_multiple_of(8) && bytes.len() == packed_len(codes.len(), bits));
    let n = codes.len();
    match bits {
        1 => each_plane::<1, f32>(bytes, codes, f32::from),
        2 => each_plane::<2, f32>(bytes, codes, f32::from),
        3 => {
            let (low, high) = bytes.split_at(n / 4);
            each_plane::<2, f32>(low, codes, f32::from);
            for (p, plane) in codes.chunks_exact_mut(n / 8).enumerate() {
                for (code, byte) in plane.iter_mut().zip(high) {
                    *code += f32::from(((byte >> p) & 1) << 2);
                }
            }
        }
        4 => each_plane::<4, f32>(bytes, codes, f32::from),
        _ => each_plane::<8, f32>(bytes, codes, f32::from),
    }
}

#[inline(always)]
fn each_plane<const BITS: u32, T>(bytes: &[u8], out: &mut [T], value: impl Fn(u8) -> T) {
    let mask = u8::MAX >> (8 - BITS);
    for (p, plane) in out.chunks_exact_mut(bytes.len()).enumerate() {
        let shift = p as u32 * BITS;
        for (code, byte) in plane.iter_mut().zip(bytes) {
            *code = value((byte >> shift) & mask);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn places_are_as_documented() {
        let n = 32;
        for (bits, byte_of, bit_of) in [(2, 8, 2), (4, 16, 4)] {
            for j in 0..n {
                let mut codes = vec![0; n];
                codes[j] = (1 << bits) - 1;
                let mut bytes = vec![0; packed_len(n, bits)];
                pack(&codes, bits, &mut bytes);
                let mut expected = vec![0; packed_len(n, bits)];
                expected[j % byte_of] = ((1u8 << bits) - 1) << (bit_of * (j / byte_of));
                assert_eq!(bytes, expected, "{bits} bits, code {j}");
            }
        }
        let mut codes = vec![0; n];
        codes[13] = 0b101;
        let mut bytes = vec![0; 12];
        pack(&codes, 3, &mut bytes);
        assert_eq!(bytes, [0, 0, 0, 0, 0, 1 << 2, 0, 0, 0, 1 << 3, 0, 0]);
    }

    proptest! {
        #[test]
        fn unpack_undoes_pack(
            bits in prop::sample::select(vec![2u8, 3, 4, 8]),
            codes in prop::collection::vec(any::<u8>(), 1..=16).prop_map(|c| c.repeat(8)),
            stir in any::<u8>(),
        ) {
            let mask = ((1u16 << bits) - 1) as u8;
            let codes: Vec<u8> = (0u8..).zip(&codes).map(|(i, c)| (c ^ i.wrapping_mul(stir)) & mask).collect();
            let mut bytes = vec![0xA5; packed_len(codes.len(), bits)];
            pack(&codes, bits, &mut bytes);
            let mut back = vec![0xFF; codes.len()];
            unpack(&bytes, bits, &mut back);
            prop_assert_eq!(&back, &codes);
            let mut floats = vec![f32::NAN; codes.len()];
            unpack_f32(&bytes, bits, &mut floats);
            let expected: Vec<f32> = codes.iter().map(|c| f32::from(*c)).collect();
            prop_assert_eq!(floats, expected);
        }
    }
}
