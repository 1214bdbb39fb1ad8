//! E8M0, the scales of the OCP MX formats: code `b` is 2^(b − 127), 255 is NaN. No sign, no zero.

/// Code of NaN.
pub const NAN: u8 = 255;

/// Value of `code`. Exact: 2^−127, the smallest, is a subnormal f32.
#[inline]
pub fn decode(code: u8) -> f32 {
    match code {
        0 => f32::from_bits(1 << 22),
        NAN => f32::NAN,
        _ => f32::from_bits((code as u32) << 23),
    }
}

/// Code of 2^`exponent`, clamped to the range of the format.
#[inline]
pub fn from_exponent(exponent: i32) -> u8 {
    (exponent.clamp(-127, 127) + 127) as u8
}

/// Code of the smallest power of two that is at least `x`, clamped to the range of the format: the
/// rule of scales that must not be too small. Zero and negative values give the smallest scale, NaN
/// gives NaN.
pub fn encode_up(x: f32) -> u8 {
    if x.is_nan() {
        return NAN;
    }
    from_exponent(ceil_log2(x))
}

/// Nearest code, ties to the even one, clamped to the range of the format, infinity too. Zero and
/// negative values give the smallest scale, NaN gives NaN.
pub fn encode(x: f32) -> u8 {
    const MIDDLE_OF_0_AND_1: f32 = f32::from_bits(0x60_0000); // 1.5 · 2^−127
    if x.is_nan() {
        NAN
    } else if x < f32::MIN_POSITIVE {
        u8::from(x > MIDDLE_OF_0_AND_1)
    } else {
        // Round the mantissa away; a carry runs into the exponent, which is the code.
        let bits = x.to_bits();
        ((bits + (1 << 22) - 1 + (bits >> 23 & 1)) >> 23).min(254) as u8
    }
}

/// Exponent of the largest power of two that is at most `x`; very small for zero and below.
pub(super) fn floor_log2(x: f32) -> i32 {
    if x <= 0.0 {
        return -1000;
    }
    // Every positive f32, subnormals too, is a normal f64.
    ((x as f64).to_bits() >> 52) as i32 - 1023
}

/// Exponent of the smallest power of two that is at least `x`; very small for zero and below.
pub(super) fn ceil_log2(x: f32) -> i32 {
    let has_fraction = (x as f64).to_bits() & ((1 << 52) - 1) != 0;
    floor_log2(x) + i32::from(x > 0.0 && has_fraction)
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
