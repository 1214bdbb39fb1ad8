//! FP4 E2M1, the elements of NVFP4 and MXFP4: magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6, bit 3 is the
//! sign, neither infinities nor NaN. Two codes lie in a byte, the one with the even index in the
//! low nibble.

use super::minifloat::Minifloat;

const FORMAT: Minifloat = Minifloat { exponent: 2, mantissa: 1, max_code: 7, nan: 7 };

/// Largest value.
pub const MAX: f32 = 6.0;

/// Values of the sixteen codes.
pub static VALUES: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// Values of both nibbles of a byte, low one first.
static PAIRS: [[f32; 2]; 256] = {
    let mut pairs = [[0.0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        pairs[byte] = [VALUES[byte & 15], VALUES[byte >> 4]];
        byte += 1;
    }
    pairs
};

/// Value of the low nibble of `code`.
#[inline]
pub fn decode(code: u8) -> f32 {
    VALUES[(code & 15) as usize]
}

/// Nearest code, ties to even, saturating at ±[`MAX`], infinities too. The format has no NaN: NaN
/// becomes ±[`MAX`], so callers that may meet one look for it first.
#[inline]
pub fn encode(x: f32) -> u8 {
    FORMAT.encode(x)
}

/// `decode(encode(x))`, but NaN stays NaN.
#[inline]
pub fn round(x: f32) -> f32 {
    FORMAT.round(x)
}

/// Values `start..start + out.len()` of a packed row.
///
/// # Panics
/// If the row is shorter.
pub fn decode_packed(row: &[u8], start: usize, out: &mut [f32]) {
    super::int4::decode_pairs(row, start, out, &PAIRS);
}

/// Packs `values`, as [`encode`] gives them, two to a byte; the last high nibble of an odd number
/// of values is zero.
///
/// # Panics
/// If `out` is not `values.len().div_ceil(2)` bytes long.
pub fn encode_packed(values: &[f32], out: &mut [u8]) {
    super::int4::pack_nibbles(values, out, |&x| encode(x));
}
