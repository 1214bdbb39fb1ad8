//! Rows of bytes, with what products of integers need of each group.

use super::{coded_int8, write_codes};
use crate::isa::Cpu;
use crate::numerics::for_each_isa;
use crate::numerics::quantise::sums_of_codes;
use crate::pack::{OCTET, Packed, position};

/// Writes a quantised row for `w`: its bytes, what the sum of each group begins with, the scale of each, and
/// where weights have minima the sum of each, times the scale.
pub(super) fn write(
    w: &Packed,
    row: &[f32],
    max: Option<f32>,
    codes: &mut [i8],
    [begins, scales, scaled]: [&mut [f32]; 3],
) {
    write_codes(w, row, max, coded_int8, codes, scales);
    let mut group = 0;
    let factor = w.sum_factor();
    let mut sum = |sum: i32| {
        begins[group] = f32::from_bits((factor * sum) as u32);
        if let Some(scaled) = scaled.get_mut(group) {
            *scaled = scales[group] * sum as f32;
        }
        group += 1;
    };
    sums_of_codes(Cpu::detect(), codes, &mut w.group_ranges(), &mut sum);
    if w.in_octets() {
        in_octets(Cpu::detect(), codes);
    }
}

for_each_isa! {
    fn in_octets(cpu: Cpu, codes: &mut [i8]) {
        codes.as_chunks_mut::<OCTET>().0.iter_mut().for_each(in_octet);
    }
}

/// The codes of an octet as the bytes of two words: the low nibbles of a word's four bytes, then the high
/// ones.
#[inline(always)]
fn in_octet(codes: &mut [i8; OCTET]) {
    let mut moved = [0; OCTET];
    for (k, code) in codes.iter().enumerate() {
        let nibble = position(k);
        moved[nibble % 2 * 4 + nibble / 2] = *code;
    }
    *codes = moved;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_stand_as_the_nibbles_do() {
        let mut codes = [0, 1, 2, 3, 4, 5, 6, 7];
        in_octet(&mut codes);
        assert_eq!(codes, [0, 4, 1, 5, 2, 6, 3, 7]);
    }
}
