//! A window of a stored array.

use std::ops::Range;
use std::sync::Arc;

use super::{Codes, FloatRows, Stored, WeightFormat};

/// One projection `[rows, cols]` = `[out, in]`: a window of a [`Stored`] array. Cloning shares it.
#[derive(Clone, Debug)]
pub struct View {
    stored: Arc<Stored>,
    first: usize,
    step: usize,
    rows: usize,
    cols: Range<usize>,
}

impl View {
    /// All of `stored`.
    pub fn new(stored: impl Into<Stored>) -> Self {
        let stored = stored.into();
        let (rows, cols) = (stored.rows(), stored.cols());
        Self { stored: Arc::new(stored), first: 0, step: 1, rows, cols: 0..cols }
    }

    /// Every `step`-th row from `first` on, `rows` of them; `None` if they are not all there.
    pub fn rows_of(&self, first: usize, step: usize, rows: usize) -> Option<Self> {
        let last = rows.checked_sub(1)?.checked_mul(step)?.checked_add(first)?;
        if last >= self.rows || step == 0 {
            return None;
        }
        let (first, step) = (self.first + first * self.step, self.step * step);
        Some(Self { first, step, rows, ..self.clone() })
    }

    /// The columns of `range`; `None` if they are not all there.
    pub fn cols_of(&self, range: Range<usize>) -> Option<Self> {
        if range.start > range.end || range.end > self.cols() {
            return None;
        }
        let cols = self.cols.start + range.start..self.cols.start + range.end;
        Some(Self { cols, ..self.clone() })
    }

    /// The whole array.
    pub fn stored(&self) -> &Stored {
        &self.stored
    }

    /// The array's row that is row `row` of the window.
    pub fn stored_row(&self, row: usize) -> usize {
        self.first + row * self.step
    }

    /// From one row of the window to the next, in rows of the array.
    pub fn step(&self) -> usize {
        self.step
    }

    /// The array's columns that are the window's.
    pub fn stored_cols(&self) -> Range<usize> {
        self.cols.clone()
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
        self.stored.format()
    }

    /// The format with sizes of groups and all else that belongs to it, for people.
    pub fn describe(&self) -> String {
        self.stored.describe()
    }

    /// Writes row `row` (`cols()` values): each the exact stored value, rounded once to f32.
    ///
    /// # Panics
    /// If `row` is not a row, or `out` has another length.
    pub fn decode_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        self.stored.decode(self.stored_row(row), self.cols.clone(), out);
    }

    /// The codes and scales that this is a window of, where it is made of such.
    pub fn codes(&self) -> Option<&Codes> {
        match &*self.stored {
            Stored::Codes(codes) => Some(codes),
            Stored::Floats(_) | Stored::Blocks(_) => None,
        }
    }

    /// The rows as plain floats in memory, where they are stored so.
    pub fn float_rows(&self) -> Option<FloatRows<'_>> {
        let Stored::Floats(floats) = &*self.stored else { return None };
        let all = floats.float_rows()?;
        let start = (self.first * all.stride + self.cols.start) * all.float.size();
        Some(FloatRows { bytes: &all.bytes[start..], stride: all.stride * self.step, ..all })
    }

    /// Bytes of the file behind this window: its share of the array's, scales included.
    pub fn stored_bytes(&self) -> usize {
        let all = self.stored.stored_bytes() as u128;
        let elements = self.stored.rows() as u128 * self.stored.cols() as u128;
        let window = self.rows as u128 * self.cols() as u128;
        (all * window).checked_div(elements).unwrap_or(0) as usize
    }
}
