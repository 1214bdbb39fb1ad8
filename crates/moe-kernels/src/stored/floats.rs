//! Plain floats: rows or columns may be the contiguous direction.

use std::borrow::Cow;
use std::ops::Range;

use half::{bf16, f16};

use super::{Bytes, FloatType, Misfit};
use crate::numerics::float16;

/// Little-endian floats `[rows, cols]` with strides.
#[derive(Clone, Debug)]
pub struct Floats {
    bytes: Bytes,
    float: FloatType,
    rows: usize,
    cols: usize,
    transposed: bool,
}

/// Plain floats, row after row.
#[derive(Clone, Copy, Debug)]
pub struct FloatRows<'a> {
    /// Little-endian elements; no alignment is promised.
    pub bytes: &'a [u8],
    /// Element type.
    pub float: FloatType,
    /// Elements from one row's start to the next one's.
    pub stride: usize,
}

impl Floats {
    /// `rows × cols` elements, row after row.
    ///
    /// # Errors
    /// If `bytes` has another length.
    pub fn row_major(
        bytes: Bytes,
        float: FloatType,
        [rows, cols]: [usize; 2],
    ) -> Result<Self, Misfit> {
        let needed = rows.checked_mul(cols).and_then(|n| n.checked_mul(float.size()));
        if needed != Some(bytes.len()) {
            let what = format_args!("a matrix [{rows}, {cols}] of {}", float.name());
            return Err(Misfit::bytes(what, bytes.len(), needed));
        }
        Ok(Self { bytes, float, rows, cols, transposed: false })
    }

    /// The transpose of a stored `[cols, rows]` array.
    ///
    /// # Errors
    /// If `bytes` has another length.
    pub fn transposed(bytes: Bytes, float: FloatType, shape: [usize; 2]) -> Result<Self, Misfit> {
        Ok(Self { transposed: true, ..Self::row_major(bytes, float, shape)? })
    }

    /// f32 values, row after row, copied.
    ///
    /// # Errors
    /// If there are more or fewer.
    pub fn from_f32(values: &[f32], shape: [usize; 2]) -> Result<Self, Misfit> {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self::row_major(bytes.into(), FloatType::F32, shape)
    }

    /// Element type.
    pub fn float(&self) -> FloatType {
        self.float
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// All elements: `[rows, cols]`, or `[cols, rows]` where it is [transposed](Self::is_transposed).
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Whether columns are the contiguous direction.
    pub fn is_transposed(&self) -> bool {
        self.transposed
    }

    /// The rows, where each lies in memory as a whole.
    pub fn float_rows(&self) -> Option<FloatRows<'_>> {
        (!self.transposed).then_some(FloatRows {
            bytes: &self.bytes,
            float: self.float,
            stride: self.cols,
        })
    }

    /// The elements of one row, one after the other: borrowed where they lie so.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&self, row: usize) -> Cow<'_, [u8]> {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        let size = self.float.size();
        if !self.transposed {
            return Cow::Borrowed(&self.bytes[row * self.cols * size..][..self.cols * size]);
        }
        let columns = self.bytes.chunks_exact(self.rows * size);
        Cow::Owned(columns.flat_map(|column| &column[row * size..][..size]).copied().collect())
    }

    pub(super) fn decode(&self, row: usize, cols: Range<usize>, out: &mut [f32]) {
        let size = self.float.size();
        if !self.transposed {
            let start = (row * self.cols + cols.start) * size;
            let bytes = &self.bytes[start..start + out.len() * size];
            match self.float {
                FloatType::F32 => {
                    let values = bytes.as_chunks().0.iter();
                    out.iter_mut().zip(values).for_each(|(out, v)| *out = f32::from_le_bytes(*v));
                }
                FloatType::F16 => float16::f16_bytes_to_f32(bytes, out),
                FloatType::Bf16 => float16::bf16_bytes_to_f32(bytes, out),
            }
            return;
        }
        for (out, col) in out.iter_mut().zip(cols) {
            let bytes = &self.bytes[(col * self.rows + row) * size..][..size];
            *out = match *bytes {
                [a, b, c, d] => f32::from_le_bytes([a, b, c, d]),
                [a, b] if self.float == FloatType::F16 => f16::from_le_bytes([a, b]).to_f32_const(),
                [a, b] => bf16::from_le_bytes([a, b]).to_f32(),
                _ => unreachable!("floats have two or four bytes"),
            };
        }
    }
}
