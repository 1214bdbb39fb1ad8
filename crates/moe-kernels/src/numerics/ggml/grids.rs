//! The IQ types of one to three bits: groups of values are points of a grid, stored by their
//! numbers; and NVFP4.
//!
//! `grids.bin` holds the points, a byte for each coordinate, one grid after the other.
//! `scripts/ggml/grids.py` makes it from the `gguf` Python package.

use super::super::e2m1;
use super::f16_at;

static GRIDS: &[u8; 33_792] = include_bytes!("grids.bin");

/// Where a grid begins, and how many coordinates a point has.
#[derive(Clone, Copy)]
struct Grid(usize, usize);

const IQ2_XXS: Grid = Grid(0, 8);
const IQ2_XS: Grid = Grid(2_048, 8);
const IQ2_S: Grid = Grid(6_144, 8);
const IQ3_XXS: Grid = Grid(14_336, 4);
const IQ3_S: Grid = Grid(15_360, 4);
const IQ1: Grid = Grid(17_408, 8);

impl Grid {
    /// The coordinates of point `index`.
    #[inline(always)]
    fn point(self, index: usize) -> &'static [u8] {
        &GRIDS[self.0 + index * self.1..][..self.1]
    }

    /// Writes point `index`, scaled; bit `i` of `signs` makes coordinate `i` negative.
    #[inline(always)]
    fn signed(self, index: usize, scale: f32, signs: u8, out: &mut [f32]) {
        for (i, (out, value)) in out.iter_mut().zip(self.point(index)).enumerate() {
            let value = f32::from(*value) * scale;
            *out = if signs >> i & 1 == 1 { -value } else { value };
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
    u16::from_le_bytes([block[at], block[at + 1]])
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

/// Bytes: f16 scale; for each 32 values four numbers of points, and a word of four times seven
/// signs and a scale of four bits.
#[inline(always)]
pub(super) fn decode_iq2_xxs(block: &[u8], out: &mut [f32]) {
    let d = f16_at(block, 0);
    for (sub, out) in out.chunks_exact_mut(32).enumerate() {
        let at = 2 + sub * 8;
        let word = u32_at(block, at + 4);
        let scale = d * (0.5 + (word >> 28) as f32) * 0.25;
        for (i, out) in out.chunks_exact_mut(8).enumerate() {
            let signs = even_signs(word >> (7 * i));
            IQ2_XXS.signed(usize::from(block[at + i]), scale, signs, out);
        }
    }
}

/// Bytes: f16 scale, 64 of nine-bit numbers with seven signs, 8 of scales of four bits for each 16.
#[inline(always)]
pub(super) fn decode_iq2_xs(block: &[u8], out: &mut [f32]) {
    let d = f16_at(block, 0);
    for (i, out) in out.chunks_exact_mut(8).enumerate() {
        let word = u16_at(block, 2 + 2 * i);
        let scale = d * (0.5 + f32::from(nibble(&block[66..], i / 2))) * 0.25;
        IQ2_XS.signed(usize::from(word & 511), scale, even_signs(u32::from(word >> 9)), out);
    }
}

/// Bytes: f16 scale, 32 of the low eight bits of numbers, 32 of signs, 8 of the high two bits, 8 of
/// scales of four bits for each 16.
#[inline(always)]
pub(super) fn decode_iq2_s(block: &[u8], out: &mut [f32]) {
    let d = f16_at(block, 0);
    for (i, out) in out.chunks_exact_mut(8).enumerate() {
        let high = block[66 + i / 4] >> (i % 4 * 2) & 3;
        let index = usize::from(block[2 + i]) | usize::from(high) << 8;
        let scale = d * (0.5 + f32::from(nibble(&block[74..], i / 2))) * 0.25;
        IQ2_S.signed(index, scale, block[34 + i], out);
    }
}

/// Bytes: f16 scale, 64 of numbers, 8 words as in IQ2_XXS.
#[inline(always)]
pub(super) fn decode_iq3_xxs(block: &[u8], out: &mut [f32]) {
    let d = f16_at(block, 0);
    for (sub, out) in out.chunks_exact_mut(32).enumerate() {
        let word = u32_at(block, 66 + sub * 4);
        let scale = d * (0.5 + (word >> 28) as f32) * 0.5;
        for (i, out) in out.chunks_exact_mut(8).enumerate() {
            let signs = even_signs(word >> (7 * i));
            let (first, second) = out.split_at_mut(4);
            let at = 2 + sub * 8 + i * 2;
            IQ3_XXS.signed(usize::from(block[at]), scale, signs, first);
            IQ3_XXS.signed(usize::from(block[at + 1]), scale, signs >> 4, second);
        }
    }
}

/// Bytes: f16 scale, 64 of the low eight bits of numbers, 8 of the ninth, 32 of signs, 4 of scales
/// of four bits for each 32.
#[inline(always)]
pub(super) fn decode_iq3_s(block: &[u8], out: &mut [f32]) {
    let d = f16_at(block, 0);
    for (i, out) in out.chunks_exact_mut(4).enumerate() {
        let high = block[66 + i / 8] >> (i % 8) & 1;
        let index = usize::from(block[2 + i]) | usize::from(high) << 8;
        let scale = d * (1.0 + 2.0 * f32::from(nibble(&block[106..], i / 8)));
        IQ3_S.signed(index, scale, block[74 + i / 2] >> (i % 2 * 4), out);
    }
}

/// A point of ternary coordinates, shifted and scaled.
#[inline(always)]
fn ternary(index: usize, scale: f32, negative: bool, out: &mut [f32]) {
    let delta = if negative { -0.125 } else { 0.125 };
    for (out, value) in out.iter_mut().zip(IQ1.point(index)) {
        *out = scale * (f32::from(*value as i8) + delta);
    }
}

/// Bytes: f16 scale, 32 of the low eight bits of numbers, 16 of four times three high bits, a scale
/// of three bits and the sign of the shift, for each 32.
#[inline(always)]
pub(super) fn decode_iq1_s(block: &[u8], out: &mut [f32]) {
    let d = f16_at(block, 0);
    for (i, out) in out.chunks_exact_mut(8).enumerate() {
        let word = u16_at(block, 34 + i / 4 * 2);
        let scale = d * f32::from(2 * (word >> 12 & 7) + 1);
        let high = word >> (i % 4 * 3) & 7;
        ternary(usize::from(block[2 + i]) | usize::from(high) << 8, scale, word >> 15 == 1, out);
    }
}

/// Bytes: 32 of the low eight bits of numbers, 16 of three high bits and the sign of the shift, 8 of
/// scales of three bits for each 16, with the f16 scale in the high four bits of their words.
#[inline(always)]
pub(super) fn decode_iq1_m(block: &[u8], out: &mut [f32]) {
    let word = |i: usize| u16_at(block, 48 + 2 * i);
    let d = word(0) >> 12 | word(1) >> 12 << 4 | word(2) >> 12 << 8 | word(3) >> 12 << 12;
    let d = half::f16::from_bits(d).to_f32_const();
    for (i, out) in out.chunks_exact_mut(8).enumerate() {
        let scale = d * f32::from(2 * (word(i / 8) >> (i / 2 % 4 * 3) & 7) + 1);
        let high = nibble(&block[32..], i);
        let index = usize::from(block[i]) | usize::from(high & 7) << 8;
        ternary(index, scale, high & 8 != 0, out);
    }
}

/// Bytes: 4 unsigned E4M3 scales, 8 of codes for each 16 values: low nibbles first, then high ones.
#[inline(always)]
pub(super) fn decode_nvfp4(block: &[u8], out: &mut [f32]) {
    for (sub, out) in out.chunks_exact_mut(16).enumerate() {
        let scale = unsigned_e4m3(block[sub]);
        let codes = &block[4 + sub * 8..][..8];
        let (low, high) = out.split_at_mut(8);
        for (i, byte) in codes.iter().enumerate() {
            low[i] = e2m1::VALUES[usize::from(byte & 15)] * scale;
            high[i] = e2m1::VALUES[usize::from(byte >> 4)] * scale;
        }
    }
}

/// E4M3 without a sign; the code that would be NaN is zero, as in ggml.
#[inline(always)]
pub(crate) fn unsigned_e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    match (code, exponent) {
        (0 | 0x7f, _) => 0.0,
        (_, 0) => mantissa / 512.0,
        _ => (1.0 + mantissa / 8.0) * f32::from_bits(((exponent - 7 + 127) as u32) << 23),
    }
}
