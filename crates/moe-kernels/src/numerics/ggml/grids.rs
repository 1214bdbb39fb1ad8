//! The IQ types of one to three bits: groups of values are points of a grid, stored by their
//! numbers. Scales of sub-blocks are odd numbers, of which all but the lowest bit is stored.
//!
//! `grids.bin` holds the points, a byte for each coordinate, one grid after the other.
//! `scripts/ggml/grids.py` makes it from the `gguf` Python package. A coordinate has one of at most
//! eight magnitudes: its code is the number of that, and a bit for the sign.

use super::parts::{Parts, two};

static GRIDS: &[u8; 33_792] = include_bytes!("grids.bin");

/// Coordinates with a sign: the magnitudes, then those that are negative.
const fn signed(magnitudes: [f32; 8]) -> [f32; 16] {
    let mut all = [0.0; 16];
    let mut i = 0;
    while i < 8 {
        (all[i], all[i + 8]) = (magnitudes[i], -magnitudes[i]);
        i += 1;
    }
    all
}

pub(super) static IQ1_POINTS: [f32; 16] = signed([0.125, 0.875, 1.125, 0.0, 0.0, 0.0, 0.0, 0.0]);
pub(super) static IQ2_POINTS: [f32; 16] = signed([1.0, 3.125, 5.375, 0.0, 0.0, 0.0, 0.0, 0.0]);
pub(super) static IQ3_XXS_POINTS: [f32; 16] = signed([1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 15.5]);
pub(super) static IQ3_S_POINTS: [f32; 16] = signed([1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 15.0]);

/// Where a grid begins, how many coordinates a point has, and what a coordinate in the file is
/// divided by to give the number of its magnitude.
#[derive(Clone, Copy)]
struct Grid(usize, usize, u8);

const IQ2_XXS: Grid = Grid(0, 8, 17);
const IQ2_XS: Grid = Grid(2_048, 8, 17);
const IQ2_S: Grid = Grid(6_144, 8, 17);
const IQ3_XXS: Grid = Grid(14_336, 4, 8);
const IQ3_S: Grid = Grid(15_360, 4, 2);
const IQ1: Grid = Grid(17_408, 8, 1);

impl Grid {
    /// The coordinates of point `index`.
    #[inline(always)]
    fn point(self, index: usize) -> &'static [u8] {
        &GRIDS[self.0 + index * self.1..][..self.1]
    }

    /// Writes the codes of point `index`; bit `i` of `signs` makes coordinate `i` negative.
    #[inline(always)]
    fn signed(self, index: usize, signs: u8, codes: &mut [u8]) {
        for (i, (code, coordinate)) in codes.iter_mut().zip(self.point(index)).enumerate() {
            *code = (coordinate / self.2) | (signs >> i & 1) << 3;
        }
    }
}

/// Seven signs and an eighth that makes their number even.
#[inline(always)]
fn even_signs(seven: u32) -> u8 {
    let seven = (seven & 127) as u8;
    seven | ((seven.count_ones() as u8 & 1) << 7)
}

#[inline(always)]
fn u16_at(block: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(two(block, at))
}

#[inline(always)]
fn u32_at(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

/// Nibble `index`, low ones first.
#[inline(always)]
fn nibble(bytes: &[u8], index: usize) -> u8 {
    bytes[index / 2] >> (index % 2 * 4) & 15
}

/// The odd numbers that the nibbles of `bytes` stand for.
#[inline(always)]
fn odd_nibbles(bytes: &[u8], scales: &mut [u8]) {
    for (i, scale) in scales.iter_mut().enumerate() {
        *scale = 2 * nibble(bytes, i) + 1;
    }
}

/// Bytes: f16 scale; for each 32 values four numbers of points, and a word of four times seven
/// signs and a scale of four bits.
#[inline(always)]
pub(super) fn iq2_xxs(block: &[u8], parts: &mut Parts) {
    parts.scale = two(block, 0);
    for (sub, codes) in parts.codes.chunks_exact_mut(32).enumerate() {
        let at = 2 + sub * 8;
        let word = u32_at(block, at + 4);
        parts.scales[sub] = 2 * (word >> 28) as u8 + 1;
        for (i, codes) in codes.chunks_exact_mut(8).enumerate() {
            let signs = even_signs(word >> (7 * i));
            IQ2_XXS.signed(usize::from(block[at + i]), signs, codes);
        }
    }
}

/// Bytes: f16 scale, 64 of nine-bit numbers with seven signs, 8 of scales of four bits for each 16.
#[inline(always)]
pub(super) fn iq2_xs(block: &[u8], parts: &mut Parts) {
    parts.scale = two(block, 0);
    odd_nibbles(&block[66..74], &mut parts.scales);
    for (i, codes) in parts.codes.chunks_exact_mut(8).enumerate() {
        let word = u16_at(block, 2 + 2 * i);
        IQ2_XS.signed(usize::from(word & 511), even_signs(u32::from(word >> 9)), codes);
    }
}

/// Bytes: f16 scale, 32 of the low eight bits of numbers, 32 of signs, 8 of the high two bits, 8 of
/// scales of four bits for each 16.
#[inline(always)]
pub(super) fn iq2_s(block: &[u8], parts: &mut Parts) {
    parts.scale = two(block, 0);
    odd_nibbles(&block[74..82], &mut parts.scales);
    for (i, codes) in parts.codes.chunks_exact_mut(8).enumerate() {
        let high = block[66 + i / 4] >> (i % 4 * 2) & 3;
        let index = usize::from(block[2 + i]) | usize::from(high) << 8;
        IQ2_S.signed(index, block[34 + i], codes);
    }
}

/// Bytes: f16 scale, 64 of numbers, 8 words as in IQ2_XXS.
#[inline(always)]
pub(super) fn iq3_xxs(block: &[u8], parts: &mut Parts) {
    parts.scale = two(block, 0);
    for (sub, codes) in parts.codes.chunks_exact_mut(32).enumerate() {
        let word = u32_at(block, 66 + sub * 4);
        parts.scales[sub] = 2 * (word >> 28) as u8 + 1;
        for (i, codes) in codes.chunks_exact_mut(8).enumerate() {
            let signs = even_signs(word >> (7 * i));
            let (first, second) = codes.split_at_mut(4);
            let at = 2 + sub * 8 + i * 2;
            IQ3_XXS.signed(usize::from(block[at]), signs, first);
            IQ3_XXS.signed(usize::from(block[at + 1]), signs >> 4, second);
        }
    }
}

/// Bytes: f16 scale, 64 of the low eight bits of numbers, 8 of the ninth, 32 of signs, 4 of scales
/// of four bits for each 32.
#[inline(always)]
pub(super) fn iq3_s(block: &[u8], parts: &mut Parts) {
    parts.scale = two(block, 0);
    odd_nibbles(&block[106..110], &mut parts.scales[..8]);
    for (i, codes) in parts.codes.chunks_exact_mut(4).enumerate() {
        let high = block[66 + i / 8] >> (i % 8) & 1;
        let index = usize::from(block[2 + i]) | usize::from(high) << 8;
        IQ3_S.signed(index, block[74 + i / 2] >> (i % 2 * 4), codes);
    }
}

/// A point of coordinates −1, 0 and 1, all shifted by 1/8 up or down.
#[inline(always)]
fn ternary(index: usize, down: bool, codes: &mut [u8]) {
    // −7/8, 1/8, 9/8; and −9/8, −1/8, 7/8
    let of_coordinate: [u8; 3] = if down { [8 + 2, 8, 1] } else { [8 + 1, 0, 2] };
    for (code, coordinate) in codes.iter_mut().zip(IQ1.point(index)) {
        *code = of_coordinate[usize::from(coordinate.wrapping_add(1))];
    }
}

/// Bytes: f16 scale, 32 of the low eight bits of numbers, 16 of four times three high bits, a scale
/// of three bits and the sign of the shift, for each 32.
#[inline(always)]
pub(super) fn iq1_s(block: &[u8], parts: &mut Parts) {
    parts.scale = two(block, 0);
    for (sub, codes) in parts.codes.chunks_exact_mut(32).enumerate() {
        let word = u16_at(block, 34 + sub * 2);
        parts.scales[sub] = 2 * (word >> 12 & 7) as u8 + 1;
        for (i, codes) in codes.chunks_exact_mut(8).enumerate() {
            let high = word >> (i * 3) & 7;
            let index = usize::from(block[2 + sub * 4 + i]) | usize::from(high) << 8;
            ternary(index, word >> 15 == 1, codes);
        }
    }
}

/// Bytes: 32 of the low eight bits of numbers, 16 of three high bits and the sign of the shift, 8 of
/// scales of three bits for each 16, with the f16 scale in the high four bits of their words.
#[inline(always)]
pub(super) fn iq1_m(block: &[u8], parts: &mut Parts) {
    let word = |i: usize| u16_at(block, 48 + 2 * i);
    let high = |i: usize| word(i) >> 12 << (4 * i);
    parts.scale = (high(0) | high(1) | high(2) | high(3)).to_le_bytes();
    for (sub, scale) in parts.scales.iter_mut().enumerate() {
        *scale = 2 * (word(sub / 4) >> (sub % 4 * 3) & 7) as u8 + 1;
    }
    for (i, codes) in parts.codes.chunks_exact_mut(8).enumerate() {
        let high = nibble(&block[32..48], i);
        let index = usize::from(block[i]) | usize::from(high & 7) << 8;
        ternary(index, high & 8 != 0, codes);
    }
}
