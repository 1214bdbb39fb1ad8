//! How the codes of a matrix `[rows, cols]` lie in memory.
//!
//! | packing | array | code of `[n, k]` |
//! |---|---|---|
//! | rows (compressed-tensors, MX, FP8, MLX) | `[N, K·b/8]` bytes | code `k` of row `n` |
//! | transposed (Quark, transposed stacks) | `[K, N·b/8]` bytes | code `n` of column `k` |
//! | transposed pairs (transposed stacks of FP4) | `[K/2, N]` bytes | byte `[k/2, n]`, nibble `k % 2` |
//! | GPTQ | `[K·b/32, N]` words | word `[k·b/32, n]`, code `k % (32/b)` |
//! | AWQ | `[K, N/8]` words | word `[k, n/8]`, nibble `[0, 4, 1, 5, 2, 6, 3, 7][n % 8]` |
//!
//! Words are little-endian and hold their first code in the lowest bits.

use std::ops::Range;

use super::{Element, Misfit};
use crate::numerics::int4;

/// The order of codes in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Packing {
    /// Row after row; a row begins with a new byte and may be padded at its end.
    Rows,
    /// Column after column; a column is whole bytes.
    Transposed,
    /// Bytes of two codes along K, row beside row; K is even, codes have 4 bits.
    TransposedPairs,
    /// Words along K, row beside row; K is whole words, codes have 4 or 8 bits.
    Gptq,
    /// Words along N with interleaved nibbles; N is whole words.
    Awq,
}

impl Packing {
    /// Bytes from one line of the array in memory to the next, for a matrix `[rows, cols]` whose
    /// array has `len` bytes.
    ///
    /// # Errors
    /// If the packing cannot hold such codes, or not in `len` bytes.
    pub(super) fn stride(
        self,
        element: Element,
        [rows, cols]: [usize; 2],
        len: usize,
    ) -> Result<usize, Misfit> {
        let bits = element.bits();
        let (lines, stride) = match self {
            Self::Rows => {
                // rows may be padded at their ends
                let given = len.checked_div(rows).unwrap_or(0);
                (rows, element.row_bytes(cols).map(|least| least.max(given)))
            }
            Self::Transposed if matches!(bits, 4 | 8) && rows.is_multiple_of(8 / bits) => {
                (cols, rows.checked_mul(bits).map(|line| line / 8))
            }
            Self::TransposedPairs if bits == 4 && cols.is_multiple_of(2) => (cols / 2, Some(rows)),
            Self::Gptq if matches!(bits, 4 | 8) && cols.is_multiple_of(32 / bits) => {
                (cols / (32 / bits), rows.checked_mul(4))
            }
            Self::Awq if bits == 4 && rows.is_multiple_of(8) => (cols, Some(rows / 2)),
            _ => {
                let reason = format!("{self:?} packing holds no {element:?} [{rows}, {cols}]");
                return Err(Misfit::new(reason + ": codes would not fill whole words"));
            }
        };
        let needed = stride.and_then(|stride| stride.checked_mul(lines));
        match stride {
            Some(stride) if needed == Some(len) => Ok(stride),
            _ => {
                let what = format_args!("a matrix [{rows}, {cols}] of {element:?} codes");
                Err(Misfit::bytes(what, len, needed))
            }
        }
    }

    /// Writes the codes of `cols` of `row`, one to a byte; `stride` as [`stride`](Self::stride)
    /// says.
    pub(super) fn codes(
        self,
        element: Element,
        bytes: &[u8],
        stride: usize,
        row: usize,
        cols: Range<usize>,
        out: &mut [u8],
    ) {
        let eight = element.bits() == 8;
        let out = out.iter_mut().zip(cols);
        match self {
            Self::Rows => {
                let line = &bytes[row * stride..(row + 1) * stride];
                match element.bits() {
                    8 => out.for_each(|(out, k)| *out = line[k]),
                    4 => out.for_each(|(out, k)| *out = int4::nibble(line, k)),
                    _ => out.for_each(|(out, k)| *out = element.code(line, k)),
                }
            }
            Self::Transposed if eight => out.for_each(|(out, k)| *out = bytes[k * stride + row]),
            Self::Transposed => {
                out.for_each(|(out, k)| *out = int4::nibble(bytes, k * stride * 2 + row));
            }
            Self::TransposedPairs => {
                out.for_each(|(out, k)| *out = bytes[k / 2 * stride + row] >> (k % 2 * 4) & 15);
            }
            Self::Gptq if eight => {
                out.for_each(|(out, k)| *out = bytes[k / 4 * stride + row * 4 + k % 4]);
            }
            Self::Gptq => {
                out.for_each(|(out, k)| {
                    *out = int4::nibble(bytes, k / 8 * stride * 2 + row * 8 + k % 8);
                });
            }
            Self::Awq => {
                let at = row / 8 * 8 + int4::AWQ_NIBBLE[row % 8];
                out.for_each(|(out, k)| *out = int4::nibble(bytes, k * stride * 2 + at));
            }
        }
    }
}
