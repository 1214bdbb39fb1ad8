//! FP8 E4M3, the finite variant ("fn") of checkpoints: 4 exponent bits with bias 7, 3 mantissa
//! bits, largest value 448, no infinities, NaN at 0x7F and 0xFF.

use super::minifloat::Minifloat;

const FORMAT: Minifloat = Minifloat { exponent: 4, mantissa: 3, max_code: 0x7E, nan: 0x7F };

/// Largest finite value.
pub const MAX: f32 = 448.0;

static VALUES: [f32; 256] = {
    let mut values = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        values[code] = match code {
            0x7F => f32::NAN,
            0xFF => -f32::NAN,
            _ => FORMAT.finite(code as u8),
        };
        code += 1;
    }
    values
};

/// Value of `code`.
#[inline]
pub fn decode(code: u8) -> f32 {
    VALUES[code as usize]
}

/// Nearest code, ties to even, saturating at ±[`MAX`], infinities too; NaN becomes 0x7F or 0xFF.
#[inline]
pub fn encode(x: f32) -> u8 {
    FORMAT.encode(x)
}

/// `decode(encode(x))`.
#[inline]
pub fn round(x: f32) -> f32 {
    FORMAT.round(x)
}

/// Values of `codes`.
///
/// # Panics
/// If the lengths differ.
pub fn decode_slice(codes: &[u8], out: &mut [f32]) {
    assert_eq!(codes.len(), out.len());
    for (out, &code) in out.iter_mut().zip(codes) {
        *out = decode(code);
    }
}

/// Codes of `values`, as [`encode`] gives them.
///
/// # Panics
/// If the lengths differ.
pub fn encode_slice(values: &[f32], out: &mut [u8]) {
    assert_eq!(values.len(), out.len());
    for (out, &x) in out.iter_mut().zip(values) {
        *out = encode(x);
    }
}
