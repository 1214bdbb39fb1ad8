//! A block taken apart: its codes one to a byte, the numbers of its header, and what they stand for.

use super::super::e8m0;
use super::BlockType;

/// What a block consists of. Parts that a type lacks are left alone.
pub(crate) struct Parts {
    /// An f16, or the E8M0 of MXFP4.
    pub(crate) scale: [u8; 2],
    /// An f16 that is added, or multiplies `minima`.
    pub(crate) minimum: [u8; 2],
    /// Of sub-blocks: signed integers that `scale` multiplies; E4M3 in NVFP4.
    pub(crate) scales: [u8; 16],
    /// Of sub-blocks: integers that `minimum` multiplies.
    pub(crate) minima: [u8; 16],
    pub(crate) codes: [u8; 256],
}

/// What all blocks of a type have in common.
pub(crate) struct Form {
    /// Bits of a code.
    pub(crate) bits: usize,
    pub(crate) points: Points,
    /// Values that share a scale of their own.
    pub(crate) sub: Option<usize>,
    /// Whether something is added to the values: a minimum, and where there are sub-blocks, one each.
    pub(crate) minimum: bool,
}

/// The number that a code stands for, before any scale.
#[derive(Clone, Copy)]
pub(crate) enum Points {
    /// The code, less this.
    Less(u8),
    /// A signed byte.
    Signed,
    /// An index.
    Table(&'static [f32; 16]),
}

impl Parts {
    pub(crate) fn new() -> Parts {
        let (scales, minima, codes) = ([0; 16], [0; 16], [0; 256]);
        Parts { scale: [0; 2], minimum: [0; 2], scales, minima, codes }
    }

    /// The values of the block.
    #[inline(always)]
    pub(super) fn values(&self, block: BlockType, out: &mut [f32]) {
        let Form { points, sub, minimum, .. } = block.form();
        let len = sub.unwrap_or(out.len());
        let groups = self.codes.chunks_exact(len).zip(out.chunks_exact_mut(len)).enumerate();
        for (group, (codes, out)) in groups {
            let scale = match (block, sub) {
                (BlockType::Mxfp4, _) => e8m0::decode(self.scale[0]),
                (BlockType::Nvfp4, _) => unsigned_e4m3(self.scales[group]),
                (_, None) => f16(self.scale),
                (_, Some(_)) => f16(self.scale) * f32::from(self.scales[group] as i8),
            };
            match points {
                Points::Less(middle) => {
                    let middle = f32::from(middle);
                    spell(codes, out, |code| (f32::from(code) - middle) * scale);
                }
                Points::Signed => spell(codes, out, |code| f32::from(code as i8) * scale),
                Points::Table(table) => {
                    spell(codes, out, |code| table[usize::from(code & 15)] * scale);
                }
            }
            if minimum {
                let each = if sub.is_some() { f32::from(self.minima[group]) } else { 1.0 };
                let minimum = f16(self.minimum) * each;
                out.iter_mut().for_each(|out| *out += minimum);
            }
        }
    }
}

#[inline(always)]
fn spell(codes: &[u8], out: &mut [f32], value: impl Fn(u8) -> f32) {
    out.iter_mut().zip(codes).for_each(|(out, code)| *out = value(*code));
}

#[inline(always)]
fn f16(bytes: [u8; 2]) -> f32 {
    // Not `to_f32`: it asks the CPU for its features at every call.
    half::f16::from_le_bytes(bytes).to_f32_const()
}

/// Two bytes at `at`.
#[inline(always)]
pub(super) fn two(block: &[u8], at: usize) -> [u8; 2] {
    [block[at], block[at + 1]]
}

/// An f16 with the other sign.
#[inline(always)]
pub(super) fn negated([low, high]: [u8; 2]) -> [u8; 2] {
    [low, high ^ 0x80]
}

/// The low nibbles of all bytes, then the high ones.
#[inline(always)]
pub(super) fn nibbles(bytes: &[u8], codes: &mut [u8]) {
    let (low, high) = codes.split_at_mut(bytes.len());
    low.iter_mut().zip(bytes).for_each(|(code, byte)| *code = byte & 15);
    high.iter_mut().zip(bytes).for_each(|(code, byte)| *code = byte >> 4);
}

/// 32 bytes hold 128 codes of two bits, first the lowest of all.
#[inline(always)]
pub(super) fn pairs(bytes: &[u8], codes: &mut [u8; 256]) {
    for (part, codes) in codes.chunks_exact_mut(32).enumerate() {
        let bytes = &bytes[part / 4 * 32..][..32];
        for (code, byte) in codes.iter_mut().zip(bytes) {
            *code = byte >> (part % 4 * 2) & 3;
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
