//! f16 and bf16 to f32 and back, in bulk: exact upwards; downwards to nearest, ties to even,
//! overflow to infinity, and NaN stays NaN. Bit-equal to `half`, but for signalling NaNs of bf16,
//! which widen as they are.
//!
//! `half` converts slices of f16 with the CPU's own instructions, but slices of bf16 one by one:
//! the loops here are left to the compiler's vectoriser, once for each instruction set.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::vectorised::for_each_isa;
use crate::isa::Cpu;

/// Values of bf16 numbers.
///
/// # Panics
/// If the lengths differ.
pub fn bf16_to_f32(from: &[bf16], to: &mut [f32]) {
    bf16_to_f32_on(Cpu::detect(), from, to);
}

for_each_isa! {
    fn bf16_to_f32_on(cpu: Cpu, from: &[bf16], to: &mut [f32]) {
        assert_eq!(from.len(), to.len());
        for (to, from) in to.iter_mut().zip(from) {
            *to = f32::from_bits(u32::from(from.to_bits()) << 16);
        }
    }
}

/// Values of bf16 numbers in the little-endian bytes of a file; no alignment is needed.
///
/// # Panics
/// If `from` is not two bytes for each value.
pub fn bf16_bytes_to_f32(from: &[u8], to: &mut [f32]) {
    bf16_bytes_to_f32_on(Cpu::detect(), from, to);
}

for_each_isa! {
    fn bf16_bytes_to_f32_on(cpu: Cpu, from: &[u8], to: &mut [f32]) {
        assert_eq!(from.len(), 2 * to.len());
        for (to, from) in to.iter_mut().zip(from.chunks_exact(2)) {
            *to = f32::from_bits(u32::from(u16::from_le_bytes([from[0], from[1]])) << 16);
        }
    }
}

/// Nearest bf16 numbers.
///
/// # Panics
/// If the lengths differ.
pub fn f32_to_bf16(from: &[f32], to: &mut [bf16]) {
    f32_to_bf16_on(Cpu::detect(), from, to);
}

for_each_isa! {
    fn f32_to_bf16_on(cpu: Cpu, from: &[f32], to: &mut [bf16]) {
        assert_eq!(from.len(), to.len());
        for (to, from) in to.iter_mut().zip(from) {
            *to = bf16::from_bits(nearest_bf16(*from));
        }
    }
}

/// Nearest bf16 numbers, as little-endian bytes; no alignment is needed.
///
/// # Panics
/// If `to` is not two bytes for each value.
pub fn f32_to_bf16_bytes(from: &[f32], to: &mut [u8]) {
    f32_to_bf16_bytes_on(Cpu::detect(), from, to);
}

for_each_isa! {
    fn f32_to_bf16_bytes_on(cpu: Cpu, from: &[f32], to: &mut [u8]) {
        assert_eq!(2 * from.len(), to.len());
        for (to, from) in to.chunks_exact_mut(2).zip(from) {
            to.copy_from_slice(&nearest_bf16(*from).to_le_bytes());
        }
    }
}

/// Bits of the nearest bf16 number. To the upper half of the bits half of the lowest kept one is
/// added, less one where that is even: ties go to even. NaN keeps its upper bits and is made quiet,
/// so that it cannot carry into infinity.
#[inline(always)]
pub(super) fn nearest_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7FFF + (bits >> 16 & 1));
    let kept = if value.is_nan() { bits | 0x40_0000 } else { rounded };
    (kept >> 16) as u16
}

/// Values of f16 numbers.
///
/// # Panics
/// If the lengths differ.
pub fn f16_to_f32(from: &[f16], to: &mut [f32]) {
    from.convert_to_f32_slice(to);
}

/// Numbers that are aligned at a time, where bytes are not.
const CHUNK: usize = 64;

/// Values of f16 numbers in the little-endian bytes of a file; no alignment is needed.
///
/// # Panics
/// If `from` is not two bytes for each value.
pub fn f16_bytes_to_f32(from: &[u8], to: &mut [f32]) {
    assert_eq!(from.len(), 2 * to.len());
    let mut aligned = [f16::ZERO; CHUNK];
    for (from, to) in from.chunks(2 * CHUNK).zip(to.chunks_mut(CHUNK)) {
        let aligned = &mut aligned[..to.len()];
        for (aligned, from) in aligned.iter_mut().zip(from.chunks_exact(2)) {
            *aligned = f16::from_le_bytes([from[0], from[1]]);
        }
        aligned.convert_to_f32_slice(to);
    }
}

/// Nearest f16 numbers.
///
/// # Panics
/// If the lengths differ.
pub fn f32_to_f16(from: &[f32], to: &mut [f16]) {
    to.convert_from_f32_slice(from);
}

/// Nearest f16 numbers, as little-endian bytes; no alignment is needed.
///
/// # Panics
/// If `to` is not two bytes for each value.
pub fn f32_to_f16_bytes(from: &[f32], to: &mut [u8]) {
    assert_eq!(2 * from.len(), to.len());
    let mut aligned = [f16::ZERO; CHUNK];
    for (from, to) in from.chunks(CHUNK).zip(to.chunks_mut(2 * CHUNK)) {
        let aligned = &mut aligned[..from.len()];
        aligned.convert_from_f32_slice(from);
        for (to, aligned) in to.chunks_exact_mut(2).zip(aligned) {
            to.copy_from_slice(&aligned.to_le_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On every set of features what `half` says.
    #[test]
    fn bf16_on_every_set() {
        let bits: Vec<u16> = (0..=u16::MAX).collect();
        let narrow: Vec<bf16> = bits.iter().map(|bits| bf16::from_bits(*bits)).collect();
        let bytes: Vec<u8> = bits.iter().flat_map(|bits| bits.to_le_bytes()).collect();
        for cpu in Cpu::levels() {
            let (mut a, mut b) = (vec![0.0; bits.len()], vec![0.0; bits.len()]);
            bf16_to_f32_on(cpu, &narrow, &mut a);
            bf16_bytes_to_f32_on(cpu, &bytes, &mut b);
            for ((a, b), bits) in a.iter().zip(&b).zip(&bits) {
                let want = u32::from(*bits) << 16;
                assert_eq!((a.to_bits(), b.to_bits()), (want, want), "{cpu:?}");
            }
            // Each with a bit beyond bf16's, below, at and above the middle.
            let wide: Vec<f32> = (0..1 << 18).map(|i| f32::from_bits(i << 14 | i >> 9)).collect();
            let mut narrow = vec![bf16::ZERO; wide.len()];
            let mut bytes = vec![0; 2 * wide.len()];
            f32_to_bf16_on(cpu, &wide, &mut narrow);
            f32_to_bf16_bytes_on(cpu, &wide, &mut bytes);
            for ((narrow, bytes), wide) in narrow.iter().zip(bytes.chunks(2)).zip(&wide) {
                assert_eq!(narrow.to_bits(), bf16::from_f32(*wide).to_bits(), "{cpu:?}: {wide}");
                assert_eq!(bytes, narrow.to_le_bytes(), "{cpu:?}");
            }
        }
    }
}
