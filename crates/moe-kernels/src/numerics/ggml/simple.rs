//! Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: 32 values with an f16 scale, and in the `_1` types an f16 minimum.
//!
//! The low nibbles of the 16 bytes of codes are the values 0 to 15, the high ones 16 to 31. In the
//! 5-bit types bit `i` of a 32-bit word is the fifth bit of value `i`.

use half::f16;

use super::parts::{Parts, nibbles, two};

#[inline(always)]
pub(super) fn q4_0(block: &[u8], parts: &mut Parts) {
    parts.scale = two(block, 0);
    nibbles(&block[2..18], &mut parts.codes[..32]);
}

#[inline(always)]
pub(super) fn q4_1(block: &[u8], parts: &mut Parts) {
    (parts.scale, parts.minimum) = (two(block, 0), two(block, 2));
    nibbles(&block[4..20], &mut parts.codes[..32]);
}

#[inline(always)]
pub(super) fn q5_0(block: &[u8], parts: &mut Parts) {
    parts.scale = two(block, 0);
    five_bits(&block[2..22], &mut parts.codes[..32]);
}

#[inline(always)]
pub(super) fn q5_1(block: &[u8], parts: &mut Parts) {
    (parts.scale, parts.minimum) = (two(block, 0), two(block, 2));
    five_bits(&block[4..24], &mut parts.codes[..32]);
}

#[inline(always)]
pub(super) fn q8_0(block: &[u8], parts: &mut Parts) {
    parts.scale = two(block, 0);
    parts.codes[..32].copy_from_slice(&block[2..34]);
}

#[inline(always)]
fn five_bits(bytes: &[u8], codes: &mut [u8]) {
    nibbles(&bytes[4..20], codes);
    for (codes, bits) in codes.chunks_exact_mut(8).zip(&bytes[..4]) {
        let fifth = spread(*bits);
        codes.iter_mut().zip(fifth).for_each(|(code, fifth)| *code |= fifth << 4);
    }
}

/// The eight bits of `bits`, lowest first, each in a byte.
#[inline(always)]
fn spread(bits: u8) -> [u8; 8] {
    // Byte i of the product keeps bit i; the addition moves it to the top of its byte.
    let one_each = (u64::from(bits) * 0x0101_0101_0101_0101) & 0x8040_2010_0804_0201;
    let at_top = one_each + 0x7F7F_7F7F_7F7F_7F7F;
    ((at_top >> 7) & 0x0101_0101_0101_0101).to_le_bytes()
}

// The rules to quantise. Codes are computed with the unrounded scale, the block stores it as f16.
// In the `_0` types of 4 and 5 bits the value of largest magnitude becomes the lowest code, which
// has no positive twin.

pub(super) fn encode_q4_0(values: &[f32], block: &mut [u8]) {
    let scale = largest(values) / -8.0;
    let inverse = inverse(scale);
    write_f16(block, 0, scale);
    encode_4_bits(&mut block[2..], |i| ((values[i] * inverse + 8.5) as u8).min(15));
}

pub(super) fn encode_q4_1(values: &[f32], block: &mut [u8]) {
    let (min, max) = min_max(values);
    let scale = (max - min) / 15.0;
    let inverse = inverse(scale);
    write_f16(block, 0, scale);
    write_f16(block, 2, min);
    encode_4_bits(&mut block[4..], |i| (((values[i] - min) * inverse + 0.5) as u8).min(15));
}

pub(super) fn encode_q5_0(values: &[f32], block: &mut [u8]) {
    let scale = largest(values) / -16.0;
    let inverse = inverse(scale);
    write_f16(block, 0, scale);
    encode_5_bits(&mut block[2..], |i| ((values[i] * inverse + 16.5) as u8).min(31));
}

pub(super) fn encode_q5_1(values: &[f32], block: &mut [u8]) {
    let (min, max) = min_max(values);
    let scale = (max - min) / 31.0;
    let inverse = inverse(scale);
    write_f16(block, 0, scale);
    write_f16(block, 2, min);
    encode_5_bits(&mut block[4..], |i| (((values[i] - min) * inverse + 0.5) as u8).min(31));
}

pub(super) fn encode_q8_0(values: &[f32], block: &mut [u8]) {
    let scale = largest(values).abs() / 127.0;
    let inverse = inverse(scale);
    write_f16(block, 0, scale);
    for (code, &x) in block[2..].iter_mut().zip(values) {
        *code = (x * inverse).round() as i8 as u8; // halves away from zero, as ggml does
    }
}

/// The first value of largest magnitude, with its sign.
fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0f32, |best, &x| if x.abs() > best.abs() { x } else { best })
}

fn min_max(values: &[f32]) -> (f32, f32) {
    let fold = |f: fn(f32, f32) -> f32| values.iter().copied().fold(values[0], f);
    (fold(f32::min), fold(f32::max))
}

fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

fn write_f16(block: &mut [u8], at: usize, x: f32) {
    block[at..at + 2].copy_from_slice(&f16::from_f32(x).to_le_bytes());
}

fn encode_4_bits(bytes: &mut [u8], code: impl Fn(usize) -> u8) {
    for (i, byte) in bytes.iter_mut().enumerate() {
        *byte = code(i) | code(i + 16) << 4;
    }
}

fn encode_5_bits(bytes: &mut [u8], code: impl Fn(usize) -> u8) {
    let (high, low) = bytes.split_at_mut(4);
    let fifth = (0..32).fold(0, |word, i| word | u32::from(code(i) >> 4) << i);
    high.copy_from_slice(&fifth.to_le_bytes());
    encode_4_bits(low, |i| code(i) & 15);
}
