//! IQ4_NL, IQ4_XS, MXFP4 and NVFP4: 4-bit indices into a table of 16 values.

use super::super::{e2m1, e8m0};
use super::parts::{Parts, nibbles, two};

/// The values of the IQ4 types.
pub(super) static IQ4: [f32; 16] = [
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0,
    89.0, 113.0,
];

/// Bytes: f16 scale, 16 of indices.
#[inline(always)]
pub(super) fn iq4_nl(block: &[u8], parts: &mut Parts) {
    parts.scale = two(block, 0);
    nibbles(&block[2..18], &mut parts.codes[..32]);
}

/// Bytes: f16 scale, 2 of the high two bits and 4 of the low four bits of eight scales, 128 of
/// indices. Scales are offset by 32.
#[inline(always)]
pub(super) fn iq4_xs(block: &[u8], parts: &mut Parts) {
    parts.scale = two(block, 0);
    let high = u16::from_le_bytes(two(block, 2));
    for (sub, scale) in parts.scales[..8].iter_mut().enumerate() {
        let low = block[4 + sub / 2] >> (sub % 2 * 4) & 15;
        let high = (high >> (sub * 2) & 3) as u8;
        *scale = (low | high << 4).wrapping_sub(32);
    }
    let codes = parts.codes.chunks_exact_mut(32);
    block[8..136].chunks_exact(16).zip(codes).for_each(|(bytes, codes)| nibbles(bytes, codes));
}

/// Bytes: E8M0 scale, 16 of codes. Scale 255 is NaN, as E8M0 has it.
#[inline(always)]
pub(super) fn mxfp4(block: &[u8], parts: &mut Parts) {
    parts.scale[0] = block[0];
    nibbles(&block[1..17], &mut parts.codes[..32]);
}

/// Bytes: 4 unsigned E4M3 scales, 8 of codes for each 16 values: low nibbles first, then high ones.
#[inline(always)]
pub(super) fn nvfp4(block: &[u8], parts: &mut Parts) {
    for (scale, byte) in parts.scales.iter_mut().zip(&block[..4]) {
        // without a sign, and zero where E4M3 would not be a number
        *scale = match *byte {
            0x7f => 0,
            0xff => 0xff,
            byte => byte & 0x7f,
        };
    }
    let codes = parts.codes.chunks_exact_mut(16);
    block[4..36].chunks_exact(8).zip(codes).for_each(|(bytes, codes)| nibbles(bytes, codes));
}

/// ggml's rule: the scale's exponent is that of the largest magnitude less 2, so that it lies in
/// [4, 8) before it saturates at 6; then the nearest value. Ties go to the even code, as everywhere
/// here; ggml's go to the smaller magnitude.
pub(super) fn encode_mxfp4(values: &[f32], block: &mut [u8]) {
    let amax = values.iter().fold(0.0f32, |amax, x| amax.max(x.abs()));
    block[0] = e8m0::from_exponent(e8m0::floor_log2(amax) - 2);
    // The division by a power of two is exact where it matters: what underflows becomes zero.
    let scale = e8m0::decode(block[0]);
    for (i, byte) in block[1..].iter_mut().enumerate() {
        *byte = e2m1::encode(values[i] / scale) | e2m1::encode(values[i + 16] / scale) << 4;
    }
}
