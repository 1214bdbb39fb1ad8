//! TQ1_0 and TQ2_0: values −1, 0 and 1, times an f16 scale.

use super::parts::{Parts, pairs, two};

/// Bytes: 48 with five values each, 4 with four, f16 scale. A byte is a fraction of 256 in base 3:
/// times 3^i, and the carry out of the next times 3 is digit `i`. Values come digit by digit of 32
/// bytes, then of 16, then of the last 4.
#[inline(always)]
pub(super) fn tq1_0(block: &[u8], parts: &mut Parts) {
    parts.scale = two(block, 52);
    let pieces = [(&block[..32], 5), (&block[32..48], 5), (&block[48..52], 4)];
    let mut codes = parts.codes.iter_mut();
    for (bytes, digits) in pieces {
        for digit in 0..digits {
            for (&byte, code) in bytes.iter().zip(&mut codes) {
                let shifted = byte.wrapping_mul(3u8.pow(digit));
                *code = ((u16::from(shifted) * 3) >> 8) as u8;
            }
        }
    }
}

/// Bytes: 64 with four values of 2 bits each, f16 scale.
#[inline(always)]
pub(super) fn tq2_0(block: &[u8], parts: &mut Parts) {
    parts.scale = two(block, 64);
    pairs(&block[..64], &mut parts.codes);
}
