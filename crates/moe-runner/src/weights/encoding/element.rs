//! The codes of a row: formats of single numbers, packed along the row.

use moe_kernels::numerics::{e2m1, e2m3, e3m2, e4m3, e5m2, int4, int8};

/// The format of one code. Codes of less than 8 bits are packed along the row, the first one in
/// the lowest bits; a row begins with a new byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// FP8 E4M3.
    E4m3,
    /// FP8 E5M2.
    E5m2,
    /// Signed 8-bit integers.
    Int8,
    /// Unsigned 8-bit integers.
    Uint8,
    /// Unsigned 4-bit integers.
    Uint4,
    /// FP4 E2M1.
    E2m1,
    /// FP6 E2M3, four in three bytes.
    E2m3,
    /// FP6 E3M2, four in three bytes.
    E3m2,
}

impl Element {
    /// Bits of a code.
    pub fn bits(self) -> usize {
        match self {
            Self::E4m3 | Self::E5m2 | Self::Int8 | Self::Uint8 => 8,
            Self::E2m3 | Self::E3m2 => 6,
            Self::Uint4 | Self::E2m1 => 4,
        }
    }

    /// Bytes that `cols` codes take at least; `None` if they do not fit memory.
    pub fn row_bytes(self, cols: usize) -> Option<usize> {
        match self.bits() {
            6 => cols.div_ceil(4).checked_mul(3),
            bits => cols.checked_mul(bits).map(|bits| bits.div_ceil(8)),
        }
    }

    /// The numbers at `start..start + out.len()` of a row of codes, without any scale.
    ///
    /// # Panics
    /// If the row is shorter.
    pub fn decode(self, row: &[u8], start: usize, out: &mut [f32]) {
        let end = start + out.len();
        match self {
            Self::E4m3 => e4m3::decode_slice(&row[start..end], out),
            Self::E5m2 => e5m2::decode_slice(&row[start..end], out),
            Self::Int8 => int8::decode_bytes(&row[start..end], out),
            Self::Uint8 => int8::decode_unsigned(&row[start..end], out),
            Self::Uint4 => int4::decode_packed(row, start, out),
            Self::E2m1 => e2m1::decode_packed(row, start, out),
            Self::E2m3 => e2m3::decode_packed(row, start, out),
            Self::E3m2 => e3m2::decode_packed(row, start, out),
        }
    }
}
