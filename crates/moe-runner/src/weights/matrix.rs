//! One projection `[out, in]`, as a view of stored numbers.
//!
//! [`Encoding`] is how a stored array yields f32 values, one file for each number format; [`Matrix`]
//! is a window of one: which of its rows, which of its columns. Slices for experts, for interleaved
//! gate and up rows, and for tensor parallelism are windows and copy nothing.

use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};

use super::ActivationQuant;
use super::encoding::Scaled;
use super::portable::{RowWindow, Writer, write_floats};
use crate::checkpoint::Bytes;
use crate::spec::WeightFormat;

/// A stored array `[rows, cols]` of numbers.
pub trait Encoding: Send + Sync {
    /// Its number format.
    fn format(&self) -> WeightFormat;

    /// The format with all that belongs to it, for people.
    fn describe(&self) -> String {
        self.format().to_string()
    }

    /// Rows of the whole array.
    fn rows(&self) -> usize;

    /// Columns of the whole array.
    fn cols(&self) -> usize;

    /// Writes the values of `cols` of `row`: each the exact stored value, rounded once to f32.
    /// `row` and `cols` lie inside the array and `out` has `cols.len()` elements; otherwise this
    /// panics, which is a bug of the caller: [`Matrix`] checks its window when it is made.
    fn decode(&self, row: usize, cols: Range<usize>, out: &mut [f32]);

    /// Bytes of the file behind `rows` rows of this array, scales included.
    fn bytes_of_rows(&self, rows: usize) -> usize;

    /// The rows as plain floats that lie contiguous in memory, where they do.
    fn float_rows(&self) -> Option<FloatRows<'_>> {
        None
    }

    /// Writes the rows of `window`, all their columns, as they are stored: what
    /// [`Expert::from_bytes`](super::Expert::from_bytes) reads as an array of the same format and
    /// the same values, of these rows alone.
    fn write_rows(&self, window: RowWindow, to: &mut Writer);

    /// The codes and scales, where it is made of such: for kernels that read them.
    fn scaled(&self) -> Option<&Scaled> {
        None
    }
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

/// Stored float types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FloatType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
}

impl FloatType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

/// One projection `[rows, cols]` = `[out, in]`: a window of an [`Encoding`].
#[derive(Clone)]
pub struct Matrix {
    pub(super) encoding: Arc<dyn Encoding>,
    pub(super) first_row: usize,
    pub(super) row_step: usize,
    pub(super) rows: usize,
    pub(super) cols: Range<usize>,
    /// Quantisation of the rows that this matrix multiplies.
    pub input: ActivationQuant,
}

impl Matrix {
    /// All of `encoding`.
    pub fn new(encoding: Arc<dyn Encoding>) -> Self {
        let (rows, cols) = (encoding.rows(), encoding.cols());
        Self {
            encoding,
            first_row: 0,
            row_step: 1,
            rows,
            cols: 0..cols,
            input: ActivationQuant::None,
        }
    }

    /// Every `step`-th row from `first` on, `rows` of them; `None` if they are not all there.
    pub fn rows_of(&self, first: usize, step: usize, rows: usize) -> Option<Self> {
        let last = rows.checked_sub(1)?.checked_mul(step)?.checked_add(first)?;
        if last >= self.rows || step == 0 {
            return None;
        }
        Some(Self {
            first_row: self.first_row + first * self.row_step,
            row_step: self.row_step * step,
            rows,
            ..self.clone()
        })
    }

    /// The columns of `range`; `None` if they are not all there.
    pub fn cols_of(&self, range: Range<usize>) -> Option<Self> {
        if range.start > range.end || range.end > self.cols() {
            return None;
        }
        let cols = self.cols.start + range.start..self.cols.start + range.end;
        Some(Self { cols, ..self.clone() })
    }

    /// The same matrix, multiplying rows quantised by `input`.
    pub fn with_input(self, input: ActivationQuant) -> Self {
        Self { input, ..self }
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols.len()
    }

    /// Number format of the stored values.
    pub fn format(&self) -> WeightFormat {
        self.encoding.format()
    }

    /// The format with sizes of groups and all else that belongs to it, for people.
    pub fn describe(&self) -> String {
        self.encoding.describe()
    }

    /// Writes row `row` (`cols()` values).
    ///
    /// # Panics
    /// If `row` is not a row, or `out` has another length.
    pub fn decode_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        self.encoding.decode(self.first_row + row * self.row_step, self.cols.clone(), out);
    }

    /// Bytes of the file behind this matrix, scales included.
    pub fn stored_bytes(&self) -> usize {
        let all = self.encoding.bytes_of_rows(self.rows);
        if self.cols() == self.encoding.cols() {
            all
        } else {
            all / self.encoding.cols().max(1) * self.cols()
        }
    }

    /// The same matrix, ready for kernels that read rows: floats stored the other way round are
    /// copied, once, everything else is shared.
    pub fn packed(&self) -> Self {
        let float = match self.format() {
            WeightFormat::F32 => FloatType::F32,
            WeightFormat::F16 => FloatType::F16,
            WeightFormat::Bf16 => FloatType::Bf16,
            _ => return self.clone(),
        };
        if self.float_rows().is_some() {
            return self.clone();
        }
        let mut bytes = Vec::with_capacity(self.rows * self.cols() * float.size());
        let mut row = vec![0.0; self.cols()];
        for n in 0..self.rows {
            self.decode_row(n, &mut row);
            for v in &row {
                match float {
                    FloatType::F32 => bytes.extend_from_slice(&v.to_le_bytes()),
                    FloatType::F16 => bytes.extend_from_slice(&f16::from_f32(*v).to_le_bytes()),
                    FloatType::Bf16 => bytes.extend_from_slice(&bf16::from_f32(*v).to_le_bytes()),
                }
            }
        }
        match FloatEncoding::row_major(bytes.into(), float, self.rows, self.cols()) {
            Some(encoding) => Self::new(Arc::new(encoding)).with_input(self.input),
            None => self.clone(),
        }
    }

    /// The codes and scales that this matrix is a window of, with the window: every
    /// `row_step`-th row from `first_row` on, and some columns. `None` for other formats.
    pub fn scaled(&self) -> Option<ScaledWindow<'_>> {
        Some(ScaledWindow {
            scaled: self.encoding.scaled()?,
            first_row: self.first_row,
            row_step: self.row_step,
            cols: self.cols.clone(),
        })
    }

    /// The rows as plain floats in memory, where they are stored so: kernels read them in place.
    pub fn float_rows(&self) -> Option<FloatRows<'_>> {
        let all = self.encoding.float_rows()?;
        let start = (self.first_row * all.stride + self.cols.start) * all.float.size();
        Some(FloatRows { bytes: &all.bytes[start..], stride: all.stride * self.row_step, ..all })
    }
}

/// Where a [`Matrix`] lies in its codes and scales.
#[derive(Clone, Debug)]
pub struct ScaledWindow<'a> {
    /// The whole array.
    pub scaled: &'a Scaled,
    /// Its row that is the matrix's first.
    pub first_row: usize,
    /// From one row of the matrix to the next.
    pub row_step: usize,
    /// The matrix's columns.
    pub cols: Range<usize>,
}

impl std::fmt::Debug for Matrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} [{}, {}]", self.format(), self.rows, self.cols())
    }
}

/// Floats with strides: rows or columns may be the contiguous direction.
#[derive(Clone, Debug)]
pub struct FloatEncoding {
    bytes: Bytes,
    float: FloatType,
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl FloatEncoding {
    /// `rows × cols` elements, row after row. `None` if `bytes` has another length.
    pub fn row_major(bytes: Bytes, float: FloatType, rows: usize, cols: usize) -> Option<Self> {
        let fits = rows.checked_mul(cols)?.checked_mul(float.size())? == bytes.len();
        fits.then_some(Self { bytes, float, rows, cols, row_stride: cols, col_stride: 1 })
    }

    /// The transpose of a stored `[cols, rows]` array. `None` if `bytes` has another length.
    pub fn transposed(bytes: Bytes, float: FloatType, rows: usize, cols: usize) -> Option<Self> {
        let fits = rows.checked_mul(cols)?.checked_mul(float.size())? == bytes.len();
        fits.then_some(Self { bytes, float, rows, cols, row_stride: 1, col_stride: rows })
    }

    /// f32 values, `cols` to a row, owned.
    pub fn from_f32(values: &[f32], cols: usize) -> Option<Self> {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let rows = values.len().checked_div(cols)?;
        Self::row_major(bytes.into(), FloatType::F32, rows, cols)
    }

    /// `len` elements that lie in memory one after the other.
    fn run(&self, row: usize, col: usize, len: usize) -> &[u8] {
        let index = (row * self.row_stride + col * self.col_stride) * self.float.size();
        &self.bytes[index..index + len * self.float.size()]
    }

    fn at(&self, row: usize, col: usize) -> f32 {
        let bytes = self.run(row, col, 1);
        match self.float {
            FloatType::F32 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
            FloatType::F16 => f16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
            FloatType::Bf16 => bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
        }
    }
}

impl Encoding for FloatEncoding {
    fn format(&self) -> WeightFormat {
        match self.float {
            FloatType::F32 => WeightFormat::F32,
            FloatType::F16 => WeightFormat::F16,
            FloatType::Bf16 => WeightFormat::Bf16,
        }
    }

    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn decode(&self, row: usize, cols: Range<usize>, out: &mut [f32]) {
        assert_eq!(cols.len(), out.len());
        for (out, col) in out.iter_mut().zip(cols) {
            *out = self.at(row, col);
        }
    }

    fn bytes_of_rows(&self, rows: usize) -> usize {
        rows * self.cols * self.float.size()
    }

    fn write_rows(&self, window: RowWindow, to: &mut Writer) {
        let len = if self.col_stride == 1 { self.cols } else { 1 };
        write_floats(self.float, window, (self.cols, len), |row, col| self.run(row, col, len), to);
    }

    fn float_rows(&self) -> Option<FloatRows<'_>> {
        (self.col_stride == 1).then_some(FloatRows {
            bytes: &self.bytes,
            float: self.float,
            stride: self.row_stride,
        })
    }
}
