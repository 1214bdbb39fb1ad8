//! IQ4_NL, IQ4_XS and MXFP4: 4-bit indices into a table of 16 values.

use super::super::{e2m1, e8m0};
use super::f16_at;

/// The values of the IQ4 types.
static IQ4_VALUES: [f32; 16] = [
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0,
    89.0, 113.0,
];

/// Bytes: f16 scale, 16 of indices.
#[inline(always)]
pub(super) fn decode_iq4_nl(block: &[u8], out: &mut [f32]) {
    decode_indices(&block[2..], f16_at(block, 0), &IQ4_VALUES, out);
}

/// Bytes: f16 scale, 2 of the high two bits and 4 of the low four bits of eight scales, 128 of
/// indices. Scales are offset by 32.
#[inline(always)]
pub(super) fn decode_iq4_xs(block: &[u8], out: &mut [f32]) {
    let d = f16_at(block, 0);
    let high = u16::from_le_bytes([block[2], block[3]]);
    for (sub, out) in out.chunks_exact_mut(32).enumerate() {
        let low_bits = block[4 + sub / 2] >> (sub % 2 * 4) & 15;
        let high_bits = (high >> (sub * 2) & 3) as u8;
        let scale = d * (f32::from(low_bits | high_bits << 4) - 32.0);
        decode_indices(&block[8 + sub * 16..][..16], scale, &IQ4_VALUES, out);
    }
}

/// Bytes: E8M0 scale, 16 of codes. Scale 255 is NaN, as E8M0 has it.
#[inline(always)]
pub(super) fn decode_mxfp4(block: &[u8], out: &mut [f32]) {
    decode_indices(&block[1..], e8m0::decode(block[0]), &e2m1::VALUES, out);
}

/// The low nibbles of 16 bytes are the values 0 to 15, the high ones 16 to 31.
#[inline(always)]
fn decode_indices(codes: &[u8], scale: f32, values: &[f32; 16], out: &mut [f32]) {
    let (low, high) = out[..32].split_at_mut(16);
    let codes = &codes[..16];
    for (low, &byte) in low.iter_mut().zip(codes) {
        *low = values[usize::from(byte & 15)] * scale;
    }
    for (high, &byte) in high.iter_mut().zip(codes) {
        *high = values[usize::from(byte >> 4)] * scale;
    }
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
