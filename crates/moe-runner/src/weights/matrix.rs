//! One projection `[out, in]`: a window of a stored array, and how the rows that it multiplies are
//! quantised.

use std::ops::Range;

use half::{bf16, f16};
use moe_kernels::stored::{
    Bytes, Codes, FloatRows, FloatType, Floats, Packing, Stored, View, WeightFormat,
};

use super::ActivationQuant;
use crate::{Error, Result};

/// One projection `[rows, cols]` = `[out, in]`. Cloning shares the stored numbers.
#[derive(Clone)]
pub struct Matrix {
    view: View,
    /// Quantisation of the rows that this matrix multiplies.
    pub input: ActivationQuant,
}

impl Matrix {
    /// All of a stored array.
    pub fn new(stored: impl Into<Stored>) -> Self {
        View::new(stored).into()
    }

    /// f32 values, row after row, copied.
    ///
    /// # Errors
    /// If there are not `rows · cols` of them.
    pub fn from_f32(values: &[f32], shape: [usize; 2]) -> Result<Self> {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        Self::from_bytes(bytes.into(), FloatType::F32, shape)
    }

    /// f16 values, row after row, copied.
    ///
    /// # Errors
    /// If there are not `rows · cols` of them.
    pub fn from_f16(values: &[f16], shape: [usize; 2]) -> Result<Self> {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        Self::from_bytes(bytes.into(), FloatType::F16, shape)
    }

    /// bf16 values, row after row, copied.
    ///
    /// # Errors
    /// If there are not `rows · cols` of them.
    pub fn from_bf16(values: &[bf16], shape: [usize; 2]) -> Result<Self> {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        Self::from_bytes(bytes.into(), FloatType::Bf16, shape)
    }

    /// Little-endian floats, row after row, where they lie: `bytes` may be anybody's memory
    /// ([`Bytes::new`]). Codes with scales come as [`Codes`] to [`Matrix::new`].
    ///
    /// # Errors
    /// If they are not `rows · cols` floats.
    pub fn from_bytes(bytes: Bytes, float: FloatType, shape: [usize; 2]) -> Result<Self> {
        let floats = Floats::row_major(bytes, float, shape);
        floats.map(Self::new).map_err(|misfit| Error::input("matrix", misfit.to_string()))
    }

    /// Every `step`-th row from `first` on, `rows` of them; `None` if they are not all there.
    pub fn rows_of(&self, first: usize, step: usize, rows: usize) -> Option<Self> {
        let view = self.view.rows_of(first, step, rows)?;
        Some(Self { view, input: self.input })
    }

    /// The columns of `range`; `None` if they are not all there.
    pub fn cols_of(&self, range: Range<usize>) -> Option<Self> {
        let view = self.view.cols_of(range)?;
        Some(Self { view, input: self.input })
    }

    /// The same matrix, multiplying rows quantised by `input`.
    pub fn with_input(self, input: ActivationQuant) -> Self {
        Self { input, ..self }
    }

    /// The stored numbers: what kernels pack.
    pub fn view(&self) -> &View {
        &self.view
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.view.rows()
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.view.cols()
    }

    /// Number format of the stored values.
    pub fn format(&self) -> WeightFormat {
        self.view.format()
    }

    /// The format with sizes of groups and all else that belongs to it, for people.
    pub fn describe(&self) -> String {
        self.view.describe()
    }

    /// Writes row `row` (`cols()` values): each the exact stored value, rounded once to f32.
    ///
    /// # Panics
    /// If `row` is not a row, or `out` has another length.
    pub fn decode_row(&self, row: usize, out: &mut [f32]) {
        self.view.decode_row(row, out);
    }

    /// Bytes of the file behind this matrix, scales included.
    pub fn stored_bytes(&self) -> usize {
        self.view.stored_bytes()
    }

    /// The codes and scales that this matrix is a window of; `None` for other formats.
    pub fn codes(&self) -> Option<&Codes> {
        self.view.codes()
    }

    /// The rows as plain floats in memory, where they are stored so: kernels read them in place.
    pub fn float_rows(&self) -> Option<FloatRows<'_>> {
        self.view.float_rows()
    }

    /// The same matrix, ready for kernels that read rows: what is stored in another order is copied,
    /// once, everything else is shared.
    pub fn packed(&self) -> Self {
        let by_rows = match self.view.stored() {
            Stored::Floats(floats) => !floats.is_transposed(),
            Stored::Codes(codes) => codes.packing() == Packing::Rows,
            Stored::Blocks(_) => true,
        };
        match by_rows {
            true => self.clone(),
            false => self.own_rows(),
        }
    }
}

impl From<View> for Matrix {
    fn from(view: View) -> Self {
        Self { view, input: ActivationQuant::None }
    }
}

impl std::fmt::Debug for Matrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} [{}, {}]", self.format(), self.rows(), self.cols())
    }
}
