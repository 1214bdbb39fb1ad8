//! Blocks of GGUF, taken apart: the codes one to a byte, and the numbers of the header.

use super::layout::{Codes, Group, Layout, Number, Offset};
use crate::numerics::{e2m1, ggml::BlockType};

/// What a block consists of. Parts that a type lacks are left alone.
pub(super) struct Parts {
    /// An f16, or the E8M0 of MXFP4.
    pub(super) scale: [u8; 2],
    /// An f16 that is added, or multiplies `minima`.
    pub(super) minimum: [u8; 2],
    /// Of groups, where `scale` only multiplies them.
    pub(super) scales: [u8; 16],
    /// Of groups, where `minimum` only multiplies them.
    pub(super) minima: [u8; 16],
    pub(super) codes: [u8; 256],
}

impl Parts {
    pub(super) fn new() -> Parts {
        let (scales, minima, codes) = ([0; 16], [0; 16], [0; 256]);
        Parts { scale: [0; 2], minimum: [0; 2], scales, minima, codes }
    }
}

/// How a type is packed, and the numbers that its codes stand for.
pub(super) fn layout(block: BlockType) -> (Layout, Vec<f32>) {
    let f16 = |codes| Layout { scale: Some(Number::F16), ..Layout::plain(codes) };
    let with_minimum = |codes| Layout { offset: Offset::Minimum(Number::F16), ..f16(codes) };
    let two = |codes, group| Layout {
        group,
        scale: Some(Number::Int8),
        outer_scale: true,
        ..Layout::plain(codes)
    };
    let two_with_minimum = |codes| Layout {
        offset: Offset::Minimum(Number::Int8),
        outer_minimum: true,
        ..two(codes, Group::ThirtyTwo)
    };
    let from = |first: i32, count: i32| (first..first + count).map(|v| v as f32).collect();
    match block {
        BlockType::Q4_0 => (f16(Codes::Table4), from(-8, 16)),
        BlockType::Q4_1 => (with_minimum(Codes::Table4), from(0, 16)),
        BlockType::Q5_0 => (f16(Codes::Int5), vec![16.0]),
        BlockType::Q5_1 => (with_minimum(Codes::Int5), vec![0.0]),
        BlockType::Q8_0 => (f16(Codes::Int8), vec![]),
        BlockType::Q2K => {
            let scale = Some(Number::Low4);
            let offset = Offset::Minimum(Number::High4);
            let base = two(Codes::Table2, Group::Sixteen);
            (Layout { scale, offset, outer_minimum: true, ..base }, from(0, 4))
        }
        BlockType::Q3K => (two(Codes::Table3, Group::Sixteen), from(-4, 8)),
        BlockType::Q4K => (two_with_minimum(Codes::Table4), from(0, 16)),
        BlockType::Q5K => (two_with_minimum(Codes::Int5), vec![0.0]),
        BlockType::Q6K => (two(Codes::Int6, Group::Sixteen), vec![32.0]),
        BlockType::Iq4Nl => (f16(Codes::Table4), IQ4.to_vec()),
        BlockType::Iq4Xs => (two(Codes::Table4, Group::ThirtyTwo), IQ4.to_vec()),
        BlockType::Tq1_0 | BlockType::Tq2_0 => (f16(Codes::Table2), from(-1, 4)),
        BlockType::Mxfp4 => {
            let scale = Some(Number::E8m0);
            (Layout { scale, ..Layout::plain(Codes::Table4) }, e2m1::VALUES.to_vec())
        }
        BlockType::Nvfp4 => {
            let (group, scale) = (Group::Sixteen, Some(Number::E4m3));
            (Layout { group, scale, ..Layout::plain(Codes::Table4) }, e2m1::VALUES.to_vec())
        }
        BlockType::Iq1S | BlockType::Iq2Xxs | BlockType::Iq3Xxs | BlockType::Iq3S => {
            (two(Codes::Table4, Group::ThirtyTwo), grid_values(block).to_vec())
        }
        BlockType::Iq1M | BlockType::Iq2Xs | BlockType::Iq2S => {
            (two(Codes::Table4, Group::Sixteen), grid_values(block).to_vec())
        }
    }
}

/// The coordinates of the grids of a type, with their signs and shifts, for the scale 1.
fn grid_values(block: BlockType) -> &'static [f32; 16] {
    const fn signed(magnitudes: [f32; 8]) -> [f32; 16] {
        let mut all = [0.0; 16];
        let mut i = 0;
        while i < 8 {
            (all[i], all[i + 8]) = (magnitudes[i], -magnitudes[i]);
            i += 1;
        }
        all
    }
    static IQ1: [f32; 16] = signed([0.125, 0.875, 1.125, 0.0, 0.0, 0.0, 0.0, 0.0]);
    static IQ2: [f32; 16] = signed([1.0, 3.125, 5.375, 0.0, 0.0, 0.0, 0.0, 0.0]);
    static IQ3_XXS: [f32; 16] = signed([1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 15.5]);
    static IQ3_S: [f32; 16] = signed([1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 15.0]);
    match block {
        BlockType::Iq1S | BlockType::Iq1M => &IQ1,
        BlockType::Iq3Xxs => &IQ3_XXS,
        BlockType::Iq3S => &IQ3_S,
        _ => &IQ2,
    }
}

/// The values of the IQ4 types.
const IQ4: [f32; 16] = [
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0,
    89.0, 113.0,
];

/// Takes `bytes`, one block, apart. The formats are described where they are decoded, in
/// [`numerics::ggml`](crate::numerics::ggml).
pub(super) fn take_apart(block: BlockType, bytes: &[u8], parts: &mut Parts) {
    let two = |at: usize| [bytes[at], bytes[at + 1]];
    match block {
        BlockType::Q4_0 | BlockType::Iq4Nl => {
            parts.scale = two(0);
            halves(&bytes[2..18], &mut parts.codes);
        }
        BlockType::Q4_1 => {
            (parts.scale, parts.minimum) = (two(0), two(2));
            halves(&bytes[4..20], &mut parts.codes);
        }
        BlockType::Q5_0 => {
            parts.scale = two(0);
            halves(&bytes[6..22], &mut parts.codes);
            fifth(&bytes[2..6], &mut parts.codes);
        }
        BlockType::Q5_1 => {
            (parts.scale, parts.minimum) = (two(0), two(2));
            halves(&bytes[8..24], &mut parts.codes);
            fifth(&bytes[4..8], &mut parts.codes);
        }
        BlockType::Q8_0 => {
            parts.scale = two(0);
            parts.codes[..32].copy_from_slice(&bytes[2..34]);
        }
        BlockType::Mxfp4 => {
            parts.scale[0] = bytes[0];
            halves(&bytes[1..17], &mut parts.codes);
        }
        BlockType::Q2K => {
            (parts.scale, parts.minimum) = (two(80), negated(two(82)));
            parts.scales.copy_from_slice(&bytes[..16]);
            pairs(&bytes[16..80], &mut parts.codes);
        }
        BlockType::Q3K => {
            parts.scale = two(108);
            let packed = &bytes[96..108];
            for (sub, scale) in parts.scales.iter_mut().enumerate() {
                let low = packed[sub % 8] >> (sub / 8 * 4) & 15;
                let high = packed[8 + sub % 4] >> (sub / 4 * 2) & 3;
                *scale = (low | high << 4).wrapping_sub(32);
            }
            pairs(&bytes[32..96], &mut parts.codes);
            for (k, code) in parts.codes.iter_mut().enumerate() {
                *code |= (bytes[k % 32] >> (k / 32) & 1) << 2;
            }
        }
        BlockType::Q4K => {
            (parts.scale, parts.minimum) = (two(0), negated(two(2)));
            scales_and_minima(&bytes[4..16], parts);
            nibbles_of_64(&bytes[16..144], &mut parts.codes);
        }
        BlockType::Q5K => {
            (parts.scale, parts.minimum) = (two(0), negated(two(2)));
            scales_and_minima(&bytes[4..16], parts);
            nibbles_of_64(&bytes[48..176], &mut parts.codes);
            for (k, code) in parts.codes.iter_mut().enumerate() {
                *code |= (bytes[16 + k % 32] >> (k / 32) & 1) << 4;
            }
        }
        BlockType::Q6K => {
            parts.scale = two(208);
            parts.scales.copy_from_slice(&bytes[192..208]);
            for (k, code) in parts.codes.iter_mut().enumerate() {
                let (half, quarter) = (k / 128, k % 128 / 32);
                let low = bytes[half * 64 + quarter % 2 * 32 + k % 32] >> (quarter / 2 * 4) & 15;
                let high = bytes[128 + half * 32 + k % 32] >> (quarter * 2) & 3;
                *code = low | high << 4;
            }
        }
        BlockType::Iq4Xs => {
            parts.scale = two(0);
            let high = u16::from_le_bytes(two(2));
            for (sub, scale) in parts.scales[..8].iter_mut().enumerate() {
                let low = bytes[4 + sub / 2] >> (sub % 2 * 4) & 15;
                let high = (high >> (sub * 2) & 3) as u8;
                *scale = (low | high << 4).wrapping_sub(32);
            }
            let codes = bytes[8..136].chunks_exact(16).zip(parts.codes.chunks_exact_mut(32));
            codes.for_each(|(bytes, codes)| halves(bytes, codes));
        }
        BlockType::Tq1_0 => {
            parts.scale = two(52);
            let parts_of_bytes = [(&bytes[..32], 5), (&bytes[32..48], 5), (&bytes[48..52], 4)];
            let mut codes = parts.codes.iter_mut();
            for (bytes, digits) in parts_of_bytes {
                for digit in 0..digits {
                    for (byte, code) in bytes.iter().zip(&mut codes) {
                        let shifted = byte.wrapping_mul(3u8.pow(digit));
                        *code = ((u16::from(shifted) * 3) >> 8) as u8;
                    }
                }
            }
        }
        BlockType::Tq2_0 => {
            parts.scale = two(64);
            pairs(&bytes[..64], &mut parts.codes);
        }
        BlockType::Nvfp4 => {
            for (sub, scale) in parts.scales[..4].iter_mut().enumerate() {
                // unsigned, and zero where E4M3 would not be a number
                *scale = match bytes[sub] {
                    0x7f => 0,
                    0xff => 0xff,
                    byte => byte & 0x7f,
                };
                for (i, byte) in bytes[4 + sub * 8..][..8].iter().enumerate() {
                    parts.codes[sub * 16 + i] = byte & 15;
                    parts.codes[sub * 16 + 8 + i] = byte >> 4;
                }
            }
        }
        BlockType::Iq1S
        | BlockType::Iq1M
        | BlockType::Iq2Xxs
        | BlockType::Iq2Xs
        | BlockType::Iq2S
        | BlockType::Iq3Xxs
        | BlockType::Iq3S => grid(block, bytes, parts),
    }
}

/// A block of points of a grid: its values for the scale 1 tell the codes. Scales of groups are odd
/// numbers of few bits.
fn grid(block: BlockType, bytes: &[u8], parts: &mut Parts) {
    const ONE: [u8; 2] = [0x00, 0x3c];
    let mut unit = [0; 128];
    let unit = &mut unit[..bytes.len()];
    unit.copy_from_slice(bytes);
    let nibble = |at: usize, i: usize| bytes[at + i / 2] >> (i % 2 * 4) & 15;
    let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    if block == BlockType::Iq1M {
        // the scale's nibbles are the high ones of four words
        let high = |i: usize| word(48 + 2 * i) >> 12;
        parts.scale = (high(0) | high(1) << 4 | high(2) << 8 | high(3) << 12).to_le_bytes();
        for (i, nibble) in [0x00, 0x00, 0xc0, 0x30].into_iter().enumerate() {
            let byte = &mut unit[49 + 2 * i];
            *byte = *byte & 15 | nibble;
        }
    } else {
        parts.scale = [bytes[0], bytes[1]];
        unit[..2].copy_from_slice(&ONE);
    }
    let groups =
        if matches!(block, BlockType::Iq1M | BlockType::Iq2Xs | BlockType::Iq2S) { 16 } else { 8 };
    for (i, scale) in parts.scales[..groups].iter_mut().enumerate() {
        *scale = 1 + 2 * match block {
            BlockType::Iq1S => (word(34 + 2 * i) >> 12 & 7) as u8,
            BlockType::Iq1M => (word(48 + i / 4 * 2) >> (i % 4 * 3) & 7) as u8,
            BlockType::Iq2Xxs => bytes[2 + i * 8 + 7] >> 4,
            BlockType::Iq2Xs => nibble(66, i),
            BlockType::Iq2S => nibble(74, i),
            BlockType::Iq3Xxs => bytes[66 + i * 4 + 3] >> 4,
            _ => nibble(106, i),
        };
    }
    let mut values = [0.0; 256];
    block.decode(unit, &mut values);
    let known = grid_values(block);
    for (k, (code, value)) in parts.codes.iter_mut().zip(values).enumerate() {
        let point = value / f32::from(parts.scales[k * groups / 256]);
        *code = known.iter().position(|known| *known == point).unwrap_or_default() as u8;
    }
}

/// An f16 with the other sign.
fn negated([low, high]: [u8; 2]) -> [u8; 2] {
    [low, high ^ 0x80]
}

/// The low nibbles of sixteen bytes, then the high ones.
fn halves(bytes: &[u8], codes: &mut [u8]) {
    let (low, high) = codes[..32].split_at_mut(16);
    low.iter_mut().zip(bytes).for_each(|(code, byte)| *code = byte & 15);
    high.iter_mut().zip(bytes).for_each(|(code, byte)| *code = byte >> 4);
}

/// Bit `i` of 32 is the fifth bit of code `i`.
fn fifth(bits: &[u8], codes: &mut [u8]) {
    for (i, code) in codes[..32].iter_mut().enumerate() {
        *code |= (bits[i / 8] >> (i % 8) & 1) << 4;
    }
}

/// 32 bytes hold 128 codes of two bits, first the lowest of all.
fn pairs(bytes: &[u8], codes: &mut [u8; 256]) {
    for (part, codes) in codes.chunks_exact_mut(32).enumerate() {
        let bytes = &bytes[part / 4 * 32..][..32];
        for (code, byte) in codes.iter_mut().zip(bytes) {
            *code = byte >> (part % 4 * 2) & 3;
        }
    }
}

/// 32 bytes hold 32 codes in their low nibbles, and the next 32 in their high ones.
fn nibbles_of_64(bytes: &[u8], codes: &mut [u8; 256]) {
    for (part, codes) in codes.chunks_exact_mut(32).enumerate() {
        let bytes = &bytes[part / 2 * 32..][..32];
        for (code, byte) in codes.iter_mut().zip(bytes) {
            *code = byte >> (part % 2 * 4) & 15;
        }
    }
}

/// Eight 6-bit scales and minima: the first four fill the low 6 bits of bytes 0 to 4 and 4 to 8; the
/// others have their low 4 bits in bytes 8 to 12 and their high 2 bits above those of the first.
fn scales_and_minima(packed: &[u8], parts: &mut Parts) {
    for sub in 0..4 {
        (parts.scales[sub], parts.minima[sub]) = (packed[sub] & 63, packed[sub + 4] & 63);
        let low = packed[sub + 8];
        parts.scales[sub + 4] = low & 15 | packed[sub] >> 6 << 4;
        parts.minima[sub + 4] = low >> 4 | packed[sub + 4] >> 6 << 4;
    }
}
