//! FP8 E4M3, the finite variant ("fn") of checkpoints: 4 exponent bits with bias 7, 3 mantissa
//! bits, largest value 448, no infinities, NaN at 0x7F and 0xFF.

use super::minifloat::Minifloat;
use super::vectorised::for_each_isa;
use crate::isa::Cpu;

const FORMAT: Minifloat = Minifloat { exponent: 4, mantissa: 3, max_code: 0x7E, nan: 0x7F };

/// Largest finite value.
pub const MAX: f32 = 448.0;

/// Smallest positive value, 2^−9.
const SMALLEST: f32 = 1.0 / 512.0;

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
    decode_on(Cpu::detect(), codes, out);
}

for_each_isa! {
    fn decode_on(cpu: Cpu, codes: &[u8], out: &mut [f32]) {
        assert_eq!(codes.len(), out.len());
        for (out, &code) in out.iter_mut().zip(codes) {
            *out = compute(code);
        }
    }
}

/// Codes of `values`, as [`encode`] gives them.
///
/// # Panics
/// If the lengths differ.
pub fn encode_slice(values: &[f32], out: &mut [u8]) {
    encode_on(Cpu::detect(), values, out);
}

for_each_isa! {
    fn encode_on(cpu: Cpu, values: &[f32], out: &mut [u8]) {
        assert_eq!(values.len(), out.len());
        for (out, &x) in out.iter_mut().zip(values) {
            *out = encode(x);
        }
    }
}

/// What [`decode`] looks up, by arithmetic: a vectorised loop does eight or sixteen at once.
#[inline(always)]
fn compute(code: u8) -> f32 {
    let magnitude = u32::from(code & 0x7F);
    // The exponent and mantissa of a normal number in their places of an f32, biases adjusted.
    let normal = (magnitude << 20) + ((127 - 7) << 23);
    let subnormal = (magnitude as f32 * SMALLEST).to_bits();
    let finite = if magnitude < 8 { subnormal } else { normal };
    let bits = if magnitude == 0x7F { f32::NAN.to_bits() } else { finite };
    f32::from_bits(bits | u32::from(code & 0x80) << 24)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On every set of features what the single functions say.
    #[test]
    fn slices() {
        let codes: Vec<u8> = (0..=255).collect();
        for cpu in Cpu::levels() {
            let mut values = vec![0.0; 256];
            decode_on(cpu, &codes, &mut values);
            let single = codes.iter().map(|code| decode(*code));
            assert!(values.iter().zip(single).all(|(a, b)| a.to_bits() == b.to_bits()), "{cpu:?}");
            let values: Vec<f32> = (0..4000).map(|i| (i as f32 - 2000.0) * 0.3).collect();
            let mut codes = vec![0; values.len()];
            encode_on(cpu, &values, &mut codes);
            assert!(codes.iter().zip(&values).all(|(code, x)| *code == encode(*x)), "{cpu:?}");
        }
    }
}
