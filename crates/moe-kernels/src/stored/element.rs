//! Formats of single codes.

use crate::numerics::{e2m1, e2m3, e3m2, e4m3, e5m2, int4, int8};

/// The format of one code. Codes of less than 8 bits are packed, the first one in the lowest bits.
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
    /// Signed 4-bit integers, two's complement.
    Int4,
    /// FP4 E2M1.
    E2m1,
    /// FP6 E2M3, four in three bytes.
    E2m3,
    /// FP6 E3M2, four in three bytes.
    E3m2,
    /// Unsigned 1-bit integers.
    Uint1,
    /// Unsigned 2-bit integers.
    Uint2,
    /// Unsigned 3-bit integers, eight in three bytes.
    Uint3,
    /// Unsigned 5-bit integers, eight in five bytes.
    Uint5,
    /// Unsigned 6-bit integers, four in three bytes.
    Uint6,
}

impl Element {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::E4m3,
        Self::E5m2,
        Self::Int8,
        Self::Uint8,
        Self::Uint4,
        Self::Int4,
        Self::E2m1,
        Self::E2m3,
        Self::E3m2,
        Self::Uint1,
        Self::Uint2,
        Self::Uint3,
        Self::Uint5,
        Self::Uint6,
    ];

    /// Bits of a code.
    pub fn bits(self) -> usize {
        match self {
            Self::E4m3 | Self::E5m2 | Self::Int8 | Self::Uint8 => 8,
            Self::E2m3 | Self::E3m2 | Self::Uint6 => 6,
            Self::Uint5 => 5,
            Self::Uint4 | Self::Int4 | Self::E2m1 => 4,
            Self::Uint3 => 3,
            Self::Uint2 => 2,
            Self::Uint1 => 1,
        }
    }

    /// Bytes that `cols` codes take at least; `None` if they do not fit memory.
    pub fn row_bytes(self, cols: usize) -> Option<usize> {
        match self.bits() {
            6 => cols.div_ceil(4).checked_mul(3),
            bits => cols.checked_mul(bits).map(|bits| bits.div_ceil(8)),
        }
    }

    /// The number that `code` stands for, without any scale; bits beyond the code are ignored.
    #[inline]
    pub fn value(self, code: u8) -> f32 {
        match self {
            Self::E4m3 => e4m3::decode(code),
            Self::E5m2 => e5m2::decode(code),
            Self::Int8 => f32::from(code as i8),
            Self::Uint8 => f32::from(code),
            Self::Uint4 => f32::from(code & 15),
            Self::Int4 => f32::from((code << 4) as i8 >> 4),
            Self::E2m1 => e2m1::decode(code & 15),
            Self::E2m3 => e2m3::decode(code & 63),
            Self::E3m2 => e3m2::decode(code & 63),
            Self::Uint1 | Self::Uint2 | Self::Uint3 | Self::Uint5 | Self::Uint6 => {
                f32::from(code & ((1 << self.bits()) - 1))
            }
        }
    }

    /// The numbers at `start..start + out.len()` of codes packed along a row, without any scale.
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
            Self::Int4 => {
                int4::decode_packed(row, start, out);
                out.iter_mut().for_each(|v| *v = if *v < 8.0 { *v } else { *v - 16.0 });
            }
            Self::E2m1 => e2m1::decode_packed(row, start, out),
            Self::E2m3 => e2m3::decode_packed(row, start, out),
            Self::E3m2 => e3m2::decode_packed(row, start, out),
            Self::Uint1 | Self::Uint2 | Self::Uint3 | Self::Uint5 | Self::Uint6 => {
                let codes = (start..end).map(|k| self.code(row, k));
                out.iter_mut().zip(codes).for_each(|(out, code)| *out = f32::from(code));
            }
        }
    }

    /// Code `index` of fewer than 8 bits: they follow one another from the lowest bit of the first byte
    /// on, some of them over two bytes.
    #[inline]
    pub(super) fn code(self, row: &[u8], index: usize) -> u8 {
        let bits = self.bits();
        let (byte, shift) = (index * bits / 8, index * bits % 8);
        let low = row[byte] >> shift;
        let high = if shift + bits > 8 { row[byte + 1] << (8 - shift) } else { 0 };
        (low | high) & ((1 << bits) - 1)
    }
}
