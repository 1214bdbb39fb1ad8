//! TQ1_0 and TQ2_0: values −1, 0 and 1, times an f16 scale.

use super::f16_at;

/// Bytes: 48 with five values each, 4 with four, f16 scale. A byte is a fraction of 256 in base 3:
/// times 3^i, and the carry out of the next times 3 is digit `i`. Values come digit by digit of 32
/// bytes, then of 16, then of the last 4.
#[inline(always)]
pub(super) fn decode_tq1_0(block: &[u8], out: &mut [f32]) {
    let scale = f16_at(block, 52);
    let parts = [(&block[..32], 5), (&block[32..48], 5), (&block[48..52], 4)];
    let mut out = out.iter_mut();
    for (bytes, digits) in parts {
        for digit in 0..digits {
            for (&byte, out) in bytes.iter().zip(&mut out) {
                let shifted = byte.wrapping_mul(3u8.pow(digit));
                let code = ((u16::from(shifted) * 3) >> 8) as u8;
                *out = (f32::from(code) - 1.0) * scale;
            }
        }
    }
}

/// Bytes: 64 with four values of 2 bits each, f16 scale. 32 bytes hold 128 values, first the lowest
/// bits of all, then the next.
#[inline(always)]
pub(super) fn decode_tq2_0(block: &[u8], out: &mut [f32]) {
    let scale = f16_at(block, 64);
    for (part, out) in out.chunks_exact_mut(32).enumerate() {
        let codes = &block[part / 4 * 32..][..32];
        for (out, code) in out.iter_mut().zip(codes) {
            *out = (f32::from(code >> (part % 4 * 2) & 3) - 1.0) * scale;
        }
    }
}
