//! Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: 32 values with an f16 scale, and in the `_1` types an f16 minimum.
//!
//! The low nibbles of the 16 bytes of codes are the values 0 to 15, the high ones 16 to 31. In the
//! 5-bit types bit `i` of a 32-bit word is the fifth bit of value `i`.

use half::f16;

use super::f16_at;

#[inline(always)]
pub(super) fn decode_q4_0(block: &[u8], out: &mut [f32]) {
    let scale = f16_at(block, 0);
    decode_4_bits(&block[2..], out, |code| (f32::from(code) - 8.0) * scale);
}

#[inline(always)]
pub(super) fn decode_q4_1(block: &[u8], out: &mut [f32]) {
    let (scale, min) = (f16_at(block, 0), f16_at(block, 2));
    decode_4_bits(&block[4..], out, |code| f32::from(code) * scale + min);
}

#[inline(always)]
pub(super) fn decode_q5_0(block: &[u8], out: &mut [f32]) {
    let scale = f16_at(block, 0);
    decode_5_bits(&block[2..], out, |code| (f32::from(code) - 16.0) * scale);
}

#[inline(always)]
pub(super) fn decode_q5_1(block: &[u8], out: &mut [f32]) {
    let (scale, min) = (f16_at(block, 0), f16_at(block, 2));
    decode_5_bits(&block[4..], out, |code| f32::from(code) * scale + min);
}

#[inline(always)]
pub(super) fn decode_q8_0(block: &[u8], out: &mut [f32]) {
    let scale = f16_at(block, 0);
    for (out, &code) in out[..32].iter_mut().zip(&block[2..34]) {
        *out = f32::from(code as i8) * scale;
    }
}

#[inline(always)]
fn decode_4_bits(codes: &[u8], out: &mut [f32], value: impl Fn(u8) -> f32) {
    let (low, high) = out[..32].split_at_mut(16);
    let codes = &codes[..16];
    // Two loops: the compiler vectorises each, but not one that writes in two places.
    for (low, &byte) in low.iter_mut().zip(codes) {
        *low = value(byte & 15);
    }
    for (high, &byte) in high.iter_mut().zip(codes) {
        *high = value(byte >> 4);
    }
}

#[inline(always)]
fn decode_5_bits(bytes: &[u8], out: &mut [f32], value: impl Fn(u8) -> f32) {
    let (low, high) = out[..32].split_at_mut(16);
    let codes = &bytes[4..20];
    let fifth: [[u8; 8]; 4] = std::array::from_fn(|i| spread(bytes[i]));
    let fifth = fifth.as_flattened();
    for ((low, &byte), fifth) in low.iter_mut().zip(codes).zip(&fifth[..16]) {
        *low = value(byte & 15 | fifth << 4);
    }
    for ((high, &byte), fifth) in high.iter_mut().zip(codes).zip(&fifth[16..]) {
        *high = value(byte >> 4 | fifth << 4);
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
