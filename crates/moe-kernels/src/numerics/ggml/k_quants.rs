//! The K types: 256 values in sub-blocks whose scales are small integers, times an f16 scale.

use super::f16_at;

/// Bytes: 16 of 4-bit scales (low) and minima (high), 64 of 2-bit codes, f16 scale, f16 minimum.
/// Each half of the block takes 32 bytes of codes, and from them first the lowest two bits of all,
/// then the next two; a scale holds for 16 values.
#[inline(always)]
pub(super) fn decode_q2_k(block: &[u8], out: &mut [f32]) {
    let (scales, codes) = (&block[..16], &block[16..80]);
    let (d, dmin) = (f16_at(block, 80), f16_at(block, 82));
    for (sub, out) in out.chunks_exact_mut(16).enumerate() {
        let scale = d * f32::from(scales[sub] & 15);
        let min = dmin * f32::from(scales[sub] >> 4);
        let (half, shift, side) = (sub / 8, sub % 8 / 2 * 2, sub % 2);
        let codes = &codes[half * 32 + side * 16..][..16];
        for (out, &code) in out.iter_mut().zip(codes) {
            *out = scale * f32::from(code >> shift & 3) - min;
        }
    }
}

/// Bytes: 32 of high bits, 64 of low two bits, 12 of 6-bit scales, f16 scale. The low bits lie as
/// in Q2_K. Bit `j` of the 32 high-bit bytes belongs to the `j`-th 32 values; where it is clear, the
/// value is 4 less.
#[inline(always)]
pub(super) fn decode_q3_k(block: &[u8], out: &mut [f32]) {
    let (high, codes, packed) = (&block[..32], &block[32..96], &block[96..108]);
    let d = f16_at(block, 108);
    for (sub, out) in out.chunks_exact_mut(16).enumerate() {
        let low_bits = packed[sub % 8] >> (sub / 8 * 4) & 15;
        let high_bits = packed[8 + sub % 4] >> (sub / 4 * 2) & 3;
        let scale = d * (f32::from(low_bits | high_bits << 4) - 32.0);
        let (half, shift, side) = (sub / 8, sub % 8 / 2 * 2, sub % 2);
        let codes = &codes[half * 32 + side * 16..][..16];
        let high = &high[side * 16..][..16];
        for ((out, code), high) in out.iter_mut().zip(codes).zip(high) {
            let code = (code >> shift & 3) | (high >> (sub / 2) & 1) << 2;
            *out = scale * (f32::from(code) - 4.0);
        }
    }
}

/// Bytes: f16 scale, f16 minimum, 12 of 6-bit scales and minima, 128 of codes. 32 bytes of codes
/// hold 32 values in their low and the next 32 in their high nibbles.
#[inline(always)]
pub(super) fn decode_q4_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (f16_at(block, 0), f16_at(block, 2));
    let (packed, codes) = (&block[4..16], &block[16..144]);
    for (sub, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, min) = scale_and_min(packed, sub);
        let (scale, min) = (d * f32::from(scale), dmin * f32::from(min));
        let codes = &codes[sub / 2 * 32..][..32];
        for (out, code) in out.iter_mut().zip(codes) {
            *out = scale * f32::from(code >> (sub % 2 * 4) & 15) - min;
        }
    }
}

/// As Q4_K, with 32 bytes between scales and codes: bit `j` of them is the fifth bit of the `j`-th
/// 32 values.
#[inline(always)]
pub(super) fn decode_q5_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (f16_at(block, 0), f16_at(block, 2));
    let (packed, high, codes) = (&block[4..16], &block[16..48], &block[48..176]);
    for (sub, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, min) = scale_and_min(packed, sub);
        let (scale, min) = (d * f32::from(scale), dmin * f32::from(min));
        let codes = &codes[sub / 2 * 32..][..32];
        for ((out, code), high) in out.iter_mut().zip(codes).zip(high) {
            let code = (code >> (sub % 2 * 4) & 15) | (high >> sub & 1) << 4;
            *out = scale * f32::from(code) - min;
        }
    }
}

/// Bytes: 128 of low nibbles, 64 of high two bits, 16 of signed scales, f16 scale. Each half of the
/// block takes 64 bytes of nibbles, low ones first, and 32 bytes of high bits, lowest first; a scale
/// holds for 16 values, codes are offset by 32.
#[inline(always)]
pub(super) fn decode_q6_k(block: &[u8], out: &mut [f32]) {
    let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let d = f16_at(block, 208);
    for (part, out) in out.chunks_exact_mut(32).enumerate() {
        let (half, quarter) = (part / 4, part % 4);
        let low = &low[half * 64 + quarter % 2 * 32..][..32];
        let high = &high[half * 32..][..32];
        for (side, out) in out.chunks_exact_mut(16).enumerate() {
            let scale = d * f32::from(scales[part * 2 + side] as i8);
            let (low, high) = (&low[side * 16..][..16], &high[side * 16..][..16]);
            for ((out, low), high) in out.iter_mut().zip(low).zip(high) {
                let code = (low >> (quarter / 2 * 4) & 15) | (high >> (quarter * 2) & 3) << 4;
                *out = scale * (f32::from(code) - 32.0);
            }
        }
    }
}

/// The 6-bit scale and minimum of sub-block `sub` of eight, from their 12 bytes: the first four
/// fill the low 6 bits of bytes 0..4 and 4..8; the others have their low 4 bits in bytes 8..12
/// (scale low, minimum high) and their high 2 bits above those of the first four.
#[inline(always)]
fn scale_and_min(packed: &[u8], sub: usize) -> (u8, u8) {
    if sub < 4 {
        (packed[sub] & 63, packed[sub + 4] & 63)
    } else {
        let low = packed[sub + 4];
        (low & 15 | packed[sub - 4] >> 6 << 4, low >> 4 | packed[sub] >> 6 << 4)
    }
}
