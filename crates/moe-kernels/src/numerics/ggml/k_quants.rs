//! The K types: 256 values in sub-blocks whose scales are small integers, times an f16 scale.

use super::parts::{Parts, negated, pairs, two};

/// Bytes: 16 of 4-bit scales (low) and minima (high), 64 of 2-bit codes, f16 scale, f16 minimum,
/// which is taken off. A scale holds for 16 values.
#[inline(always)]
pub(super) fn q2_k(block: &[u8], parts: &mut Parts) {
    (parts.scale, parts.minimum) = (two(block, 80), negated(two(block, 82)));
    for (sub, byte) in block[..16].iter().enumerate() {
        (parts.scales[sub], parts.minima[sub]) = (byte & 15, byte >> 4);
    }
    pairs(&block[16..80], &mut parts.codes);
}

/// Bytes: 32 of high bits, 64 of low two bits, 12 of 6-bit scales, f16 scale. The low bits lie as
/// in Q2_K. Bit `j` of the 32 high-bit bytes belongs to the `j`-th 32 values; where it is clear, the
/// value is 4 less. Scales are offset by 32.
#[inline(always)]
pub(super) fn q3_k(block: &[u8], parts: &mut Parts) {
    parts.scale = two(block, 108);
    let packed = &block[96..108];
    for (sub, scale) in parts.scales.iter_mut().enumerate() {
        let low = packed[sub % 8] >> (sub / 8 * 4) & 15;
        let high = packed[8 + sub % 4] >> (sub / 4 * 2) & 3;
        *scale = (low | high << 4).wrapping_sub(32);
    }
    pairs(&block[32..96], &mut parts.codes);
    high_bits(&block[..32], 2, &mut parts.codes);
}

/// Bytes: f16 scale, f16 minimum, which is taken off, 12 of 6-bit scales and minima, 128 of codes.
#[inline(always)]
pub(super) fn q4_k(block: &[u8], parts: &mut Parts) {
    (parts.scale, parts.minimum) = (two(block, 0), negated(two(block, 2)));
    scales_and_minima(&block[4..16], parts);
    nibbles_of_64(&block[16..144], &mut parts.codes);
}

/// As Q4_K, with 32 bytes between scales and codes: bit `j` of them is the fifth bit of the `j`-th
/// 32 values.
#[inline(always)]
pub(super) fn q5_k(block: &[u8], parts: &mut Parts) {
    (parts.scale, parts.minimum) = (two(block, 0), negated(two(block, 2)));
    scales_and_minima(&block[4..16], parts);
    nibbles_of_64(&block[48..176], &mut parts.codes);
    high_bits(&block[16..48], 4, &mut parts.codes);
}

/// Bytes: 128 of low nibbles, 64 of high two bits, 16 of signed scales, f16 scale. Each half of the
/// block takes 64 bytes of nibbles, low ones first, and 32 bytes of high bits, lowest first; a scale
/// holds for 16 values, codes are offset by 32.
#[inline(always)]
pub(super) fn q6_k(block: &[u8], parts: &mut Parts) {
    parts.scale = two(block, 208);
    parts.scales.copy_from_slice(&block[192..208]);
    for (part, codes) in parts.codes.chunks_exact_mut(32).enumerate() {
        let (half, quarter) = (part / 4, part % 4);
        let low = &block[half * 64 + quarter % 2 * 32..][..32];
        let high = &block[128 + half * 32..][..32];
        for ((code, low), high) in codes.iter_mut().zip(low).zip(high) {
            *code = (low >> (quarter / 2 * 4) & 15) | (high >> (quarter * 2) & 3) << 4;
        }
    }
}

/// Bit `j` of 32 bytes is bit `at` of the `j`-th 32 codes.
#[inline(always)]
fn high_bits(bytes: &[u8], at: u32, codes: &mut [u8; 256]) {
    for (part, codes) in codes.chunks_exact_mut(32).enumerate() {
        codes.iter_mut().zip(bytes).for_each(|(code, bits)| *code |= (bits >> part & 1) << at);
    }
}

/// 32 bytes hold 32 codes in their low nibbles, and the next 32 in their high ones.
#[inline(always)]
fn nibbles_of_64(bytes: &[u8], codes: &mut [u8; 256]) {
    for (part, codes) in codes.chunks_exact_mut(32).enumerate() {
        let bytes = &bytes[part / 2 * 32..][..32];
        for (code, byte) in codes.iter_mut().zip(bytes) {
            *code = byte >> (part % 2 * 4) & 15;
        }
    }
}

/// Eight 6-bit scales and minima: the first four fill the low 6 bits of bytes 0 to 4 and 4 to 8; the
/// others have their low 4 bits in bytes 8 to 12 (scale low, minimum high) and their high 2 bits
/// above those of the first four.
#[inline(always)]
fn scales_and_minima(packed: &[u8], parts: &mut Parts) {
    for sub in 0..4 {
        (parts.scales[sub], parts.minima[sub]) = (packed[sub] & 63, packed[sub + 4] & 63);
        let low = packed[sub + 8];
        parts.scales[sub + 4] = low & 15 | packed[sub] >> 6 << 4;
        parts.minima[sub + 4] = low >> 4 | packed[sub + 4] >> 6 << 4;
    }
}
