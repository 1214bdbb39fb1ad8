//! The block types of GGUF: fixed numbers of values with their scales, byte for byte as ggml
//! defines them. A block is taken apart in one place, for its values and for packing alike.
//!
//! Every decoded value is the exact one, rounded once to f32: scales are f16 and products of scale
//! and code fit f32, so that only the subtraction of a minimum rounds.

mod grids;
mod k_quants;
mod non_linear;
mod parts;
mod simple;
mod ternary;

use super::e2m1;
use super::vectorised::for_each_isa;
use crate::isa::Cpu;
pub(crate) use parts::{Form, Parts, Points, unsigned_e4m3};

/// A block type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum BlockType {
    /// 32 values of 4 bits, scale.
    Q4_0,
    /// 32 values of 4 bits, scale and minimum.
    Q4_1,
    /// 32 values of 5 bits, scale.
    Q5_0,
    /// 32 values of 5 bits, scale and minimum.
    Q5_1,
    /// 32 values of 8 bits, scale.
    Q8_0,
    /// 256 values of 2 bits, 4-bit scales and minima of 16.
    Q2K,
    /// 256 values of 3 bits, 6-bit scales of 16.
    Q3K,
    /// 256 values of 4 bits, 6-bit scales and minima of 32.
    Q4K,
    /// 256 values of 5 bits, 6-bit scales and minima of 32.
    Q5K,
    /// 256 values of 6 bits, 8-bit scales of 16.
    Q6K,
    /// 32 indices into a table of 16 values, scale.
    Iq4Nl,
    /// 256 indices into a table of 16 values, 6-bit scales of 32.
    Iq4Xs,
    /// 256 ternary values, five to a byte, scale.
    Tq1_0,
    /// 256 ternary values, four to a byte, scale.
    Tq2_0,
    /// 32 values of FP4 E2M1, E8M0 scale.
    Mxfp4,
    /// 256 values in eights from a grid of 2048, 3-bit scales of 32.
    Iq1S,
    /// 256 values in eights from a grid of 2048, 3-bit scales of 16.
    Iq1M,
    /// 256 values in eights from a grid of 256, 4-bit scales of 32.
    Iq2Xxs,
    /// 256 values in eights from a grid of 512, 4-bit scales of 16.
    Iq2Xs,
    /// 256 values in eights from a grid of 1024, 4-bit scales of 16.
    Iq2S,
    /// 256 values in fours from a grid of 256, 4-bit scales of 32.
    Iq3Xxs,
    /// 256 values in fours from a grid of 512, 4-bit scales of 32.
    Iq3S,
    /// 64 values of FP4 E2M1, E4M3 scales of 16.
    Nvfp4,
}

/// Most values that a block holds.
const MAX_BLOCK_LEN: usize = 256;

impl BlockType {
    /// All of them.
    pub const ALL: [Self; 23] = [
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2K,
        Self::Q3K,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
        Self::Iq4Nl,
        Self::Iq4Xs,
        Self::Tq1_0,
        Self::Tq2_0,
        Self::Mxfp4,
        Self::Iq1S,
        Self::Iq1M,
        Self::Iq2Xxs,
        Self::Iq2Xs,
        Self::Iq2S,
        Self::Iq3Xxs,
        Self::Iq3S,
        Self::Nvfp4,
    ];

    /// Number, name, values and bytes of a block.
    const fn facts(self) -> (u32, &'static str, usize, usize) {
        match self {
            Self::Q4_0 => (2, "Q4_0", 32, 18),
            Self::Q4_1 => (3, "Q4_1", 32, 20),
            Self::Q5_0 => (6, "Q5_0", 32, 22),
            Self::Q5_1 => (7, "Q5_1", 32, 24),
            Self::Q8_0 => (8, "Q8_0", 32, 34),
            Self::Q2K => (10, "Q2_K", 256, 84),
            Self::Q3K => (11, "Q3_K", 256, 110),
            Self::Q4K => (12, "Q4_K", 256, 144),
            Self::Q5K => (13, "Q5_K", 256, 176),
            Self::Q6K => (14, "Q6_K", 256, 210),
            Self::Iq4Nl => (20, "IQ4_NL", 32, 18),
            Self::Iq4Xs => (23, "IQ4_XS", 256, 136),
            Self::Tq1_0 => (34, "TQ1_0", 256, 54),
            Self::Tq2_0 => (35, "TQ2_0", 256, 66),
            Self::Mxfp4 => (39, "MXFP4", 32, 17),
            Self::Iq1S => (19, "IQ1_S", 256, 50),
            Self::Iq1M => (29, "IQ1_M", 256, 56),
            Self::Iq2Xxs => (16, "IQ2_XXS", 256, 66),
            Self::Iq2Xs => (17, "IQ2_XS", 256, 74),
            Self::Iq2S => (22, "IQ2_S", 256, 82),
            Self::Iq3Xxs => (18, "IQ3_XXS", 256, 98),
            Self::Iq3S => (21, "IQ3_S", 256, 110),
            Self::Nvfp4 => (40, "NVFP4", 64, 36),
        }
    }

    /// The type that has this number in GGUF files; `None` for plain floats and integers, and for
    /// types that are not supported.
    pub fn from_ggml(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|block| block.ggml() == number)
    }

    /// Its number in GGUF files.
    pub fn ggml(self) -> u32 {
        self.facts().0
    }

    /// Its name as ggml spells it.
    pub fn name(self) -> &'static str {
        self.facts().1
    }

    /// Values of a block.
    pub fn block_len(self) -> usize {
        self.facts().2
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        self.facts().3
    }

    /// Bytes of a row of `cols` values; `None` unless they fill whole blocks.
    pub fn row_bytes(self, cols: usize) -> Option<usize> {
        let whole = cols.is_multiple_of(self.block_len());
        whole.then(|| cols / self.block_len()).and_then(|n| n.checked_mul(self.block_bytes()))
    }

    /// Values of one block.
    ///
    /// # Panics
    /// If `block` is not [`block_bytes`](Self::block_bytes) or `out` not
    /// [`block_len`](Self::block_len) long.
    pub fn decode(self, block: &[u8], out: &mut [f32]) {
        assert_eq!((block.len(), out.len()), (self.block_bytes(), self.block_len()));
        self.decode_row(block, 0, out);
    }

    /// Values `start..start + out.len()` of a row of blocks. Whole blocks decode in place; those
    /// that the window cuts take a detour.
    ///
    /// # Panics
    /// If the row is shorter.
    pub fn decode_row(self, row: &[u8], start: usize, out: &mut [f32]) {
        decode_row(Cpu::detect(), self, row, start, out);
    }

    /// What all blocks of the type have in common.
    pub(crate) fn form(self) -> Form {
        use Points::{Less, Signed, Table};
        let (bits, points, sub, minimum) = match self {
            Self::Q4_0 => (4, Less(8), None, false),
            Self::Q4_1 => (4, Less(0), None, true),
            Self::Q5_0 => (5, Less(16), None, false),
            Self::Q5_1 => (5, Less(0), None, true),
            Self::Q8_0 => (8, Signed, None, false),
            Self::Q2K => (2, Less(0), Some(16), true),
            Self::Q3K => (3, Less(4), Some(16), false),
            Self::Q4K => (4, Less(0), Some(32), true),
            Self::Q5K => (5, Less(0), Some(32), true),
            Self::Q6K => (6, Less(32), Some(16), false),
            Self::Iq4Nl => (4, Table(&non_linear::IQ4), None, false),
            Self::Iq4Xs => (4, Table(&non_linear::IQ4), Some(32), false),
            Self::Tq1_0 | Self::Tq2_0 => (2, Less(1), None, false),
            Self::Mxfp4 => (4, Table(&e2m1::VALUES), None, false),
            Self::Nvfp4 => (4, Table(&e2m1::VALUES), Some(16), false),
            Self::Iq1S => (4, Table(&grids::IQ1_POINTS), Some(32), false),
            Self::Iq1M => (4, Table(&grids::IQ1_POINTS), Some(16), false),
            Self::Iq2Xxs => (4, Table(&grids::IQ2_POINTS), Some(32), false),
            Self::Iq2Xs | Self::Iq2S => (4, Table(&grids::IQ2_POINTS), Some(16), false),
            Self::Iq3Xxs => (4, Table(&grids::IQ3_XXS_POINTS), Some(32), false),
            Self::Iq3S => (4, Table(&grids::IQ3_S_POINTS), Some(32), false),
        };
        Form { bits, points, sub, minimum }
    }

    /// Takes one block of the right length apart.
    #[inline(always)]
    pub(crate) fn take_apart(self, block: &[u8], parts: &mut Parts) {
        match self {
            Self::Q4_0 => simple::q4_0(block, parts),
            Self::Q4_1 => simple::q4_1(block, parts),
            Self::Q5_0 => simple::q5_0(block, parts),
            Self::Q5_1 => simple::q5_1(block, parts),
            Self::Q8_0 => simple::q8_0(block, parts),
            Self::Q2K => k_quants::q2_k(block, parts),
            Self::Q3K => k_quants::q3_k(block, parts),
            Self::Q4K => k_quants::q4_k(block, parts),
            Self::Q5K => k_quants::q5_k(block, parts),
            Self::Q6K => k_quants::q6_k(block, parts),
            Self::Iq4Nl => non_linear::iq4_nl(block, parts),
            Self::Iq4Xs => non_linear::iq4_xs(block, parts),
            Self::Tq1_0 => ternary::tq1_0(block, parts),
            Self::Tq2_0 => ternary::tq2_0(block, parts),
            Self::Mxfp4 => non_linear::mxfp4(block, parts),
            Self::Nvfp4 => non_linear::nvfp4(block, parts),
            Self::Iq1S => grids::iq1_s(block, parts),
            Self::Iq1M => grids::iq1_m(block, parts),
            Self::Iq2Xxs => grids::iq2_xxs(block, parts),
            Self::Iq2Xs => grids::iq2_xs(block, parts),
            Self::Iq2S => grids::iq2_s(block, parts),
            Self::Iq3Xxs => grids::iq3_xxs(block, parts),
            Self::Iq3S => grids::iq3_s(block, parts),
        }
    }

    /// Quantises one block by ggml's reference rule, for the types that have a plain one: Q4_0,
    /// Q4_1, Q5_0, Q5_1, Q8_0 and MXFP4. Returns whether this type is one of them; if not, `block`
    /// is left alone. Values that are not finite give a block without meaning: look for them
    /// before.
    ///
    /// # Panics
    /// If `values` is not [`block_len`](Self::block_len) or `block` not
    /// [`block_bytes`](Self::block_bytes) long.
    pub fn encode(self, values: &[f32], block: &mut [u8]) -> bool {
        assert_eq!((block.len(), values.len()), (self.block_bytes(), self.block_len()));
        match self {
            Self::Q4_0 => simple::encode_q4_0(values, block),
            Self::Q4_1 => simple::encode_q4_1(values, block),
            Self::Q5_0 => simple::encode_q5_0(values, block),
            Self::Q5_1 => simple::encode_q5_1(values, block),
            Self::Q8_0 => simple::encode_q8_0(values, block),
            Self::Mxfp4 => non_linear::encode_mxfp4(values, block),
            _ => return false,
        }
        true
    }
}

for_each_isa! {
    fn decode_row(cpu: Cpu, kind: BlockType, row: &[u8], start: usize, out: &mut [f32]) {
        let (len, bytes) = (kind.block_len(), kind.block_bytes());
        let mut cut = [0.0; MAX_BLOCK_LEN];
        let mut parts = Parts::new();
        let mut done = 0;
        while done < out.len() {
            let (index, first) = ((start + done) / len, (start + done) % len);
            let count = (len - first).min(out.len() - done);
            let part = &mut out[done..done + count];
            let whole = if count == len { &mut *part } else { &mut cut[..len] };
            kind.take_apart(&row[index * bytes..(index + 1) * bytes], &mut parts);
            parts.values(kind, whole);
            if count < len {
                part.copy_from_slice(&cut[first..first + count]);
            }
            done += count;
        }
    }
}
