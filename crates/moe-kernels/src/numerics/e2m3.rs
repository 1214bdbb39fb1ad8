//! FP6 E2M3: 2 exponent bits, 3 mantissa bits, largest value 7.5, neither infinities nor NaN. Four
//! codes lie in three bytes: code `i` takes bits `6i..6i+6` of the little-endian 24-bit number.

use super::minifloat::Minifloat;
use super::packed6;

const FORMAT: Minifloat = Minifloat { exponent: 2, mantissa: 3, max_code: 0x1F, nan: 0x1F };

/// Largest value.
pub const MAX: f32 = 7.5;

static VALUES: [f32; 64] = {
    let mut values = [0.0; 64];
    let mut code = 0;
    while code < 64 {
        values[code] = FORMAT.finite(code as u8);
        code += 1;
    }
    values
};

/// Value of the low 6 bits of `code`.
#[inline]
pub fn decode(code: u8) -> f32 {
    VALUES[(code & 0x3F) as usize]
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
    packed6::unpack(row, start, out, decode);
}

/// Packs `values`, as [`encode`] gives them, four to three bytes; missing codes of the last three
/// bytes are zero.
///
/// # Panics
/// If `out` is not `values.len().div_ceil(4) * 3` bytes long.
pub fn encode_packed(values: &[f32], out: &mut [u8]) {
    packed6::pack(values, out, encode);
}
