//! Rows of floats on the device, as the verbs take them: pointer, type, shape, stride.

use std::marker::PhantomData;
use std::ops::Range;

use crate::memory::Pod;
use crate::module::Argument;
use crate::{Error, Result, View, ViewMut};

/// A float type of rows. The order is that of common.cuh.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Float {
    /// 32 bits.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an f32.
    Bf16,
}

impl Float {
    /// Bytes of one number.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

/// A matrix as the kernels see it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct RawRows {
    pub(crate) data: u64,
    pub(crate) stride: u64,
    pub(crate) float: u32,
    pub(crate) rows: u32,
    pub(crate) cols: u32,
    padding: u32,
}

// SAFETY: `struct Rows` of common.cuh.
unsafe impl Argument for RawRows {}

/// Rows `[rows, cols]` to read; row r begins `r · stride` numbers after the pointer.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    pub(crate) raw: RawRows,
    float: Float,
    of: PhantomData<&'a ()>,
}

/// Rows to write.
#[derive(Debug)]
pub struct RowsMut<'a> {
    pub(crate) raw: RawRows,
    float: Float,
    of: PhantomData<&'a mut ()>,
}

impl RawRows {
    fn new(data: u64, float: Float, rows: usize, cols: usize, stride: usize) -> Result<Self> {
        let fits = |n: usize| {
            u32::try_from(n).map_err(|_| Error::input("rows", format!("{n} is too large")))
        };
        if stride < cols {
            return Err(Error::input(
                "rows",
                format!("stride {stride} is less than {cols} columns"),
            ));
        }
        if !data.is_multiple_of(float.bytes() as u64) {
            return Err(Error::input("rows", format!("{data:#x} is not aligned for {float:?}")));
        }
        let (rows, cols) = (fits(rows)?, fits(cols)?);
        Ok(Self { data, stride: stride as u64, float: float as u32, rows, cols, padding: 0 })
    }
}

impl RawRows {
    fn part(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.rows as usize, "{range:?}");
        let bytes = if self.float == Float::F32 as u32 { 4 } else { 2 };
        let data = self.data + range.start as u64 * self.stride * bytes;
        Self { data, rows: range.len() as u32, ..self }
    }
}

macro_rules! shape {
    ($type:ident) => {
        impl $type<'_> {
            /// Number of rows.
            pub fn rows(&self) -> usize {
                self.raw.rows as usize
            }

            /// Numbers of a row.
            pub fn cols(&self) -> usize {
                self.raw.cols as usize
            }

            /// Numbers from one row's begin to the next one's.
            pub fn stride(&self) -> usize {
                self.raw.stride as usize
            }

            /// The device pointer.
            pub fn address(&self) -> u64 {
                self.raw.data
            }

            /// What the numbers are.
            pub fn float(&self) -> Float {
                self.float
            }

            /// An error unless the shape is `[rows, cols]`.
            pub(crate) fn expect(
                &self,
                what: &'static str,
                rows: usize,
                cols: usize,
            ) -> Result<()> {
                if (self.rows(), self.cols()) == (rows, cols) {
                    return Ok(());
                }
                let is =
                    format!("rows are [{}, {}], not [{rows}, {cols}]", self.rows(), self.cols());
                Err(Error::input(what, is))
            }
        }
    };
}

shape!(Rows);
shape!(RowsMut);

/// How many numbers of `T` stand for one of `float`: 16-bit floats come as `u16`.
fn same_size<T: Pod>(float: Float) -> Result<()> {
    if size_of::<T>() == float.bytes() {
        return Ok(());
    }
    Err(Error::input(
        "rows",
        format!("{float:?} does not lie in elements of {} bytes", size_of::<T>()),
    ))
}

fn inside(len: usize, rows: usize, cols: usize) -> Result<()> {
    if rows.checked_mul(cols) == Some(len) {
        return Ok(());
    }
    Err(Error::input("rows", format!("{len} numbers are not [{rows}, {cols}]")))
}

impl<'a> Rows<'a> {
    /// Some of the rows.
    ///
    /// # Panics
    /// If the range ends outside.
    pub fn part(self, range: Range<usize>) -> Self {
        Self { raw: self.raw.part(range), ..self }
    }

    /// The same, to be written.
    ///
    /// # Safety
    /// Nothing else reads or writes them meanwhile, and they may be written.
    pub unsafe fn into_mut(self) -> RowsMut<'a> {
        RowsMut { raw: self.raw, float: self.float, of: PhantomData }
    }

    /// Rows without gaps in `view`: of `f32`, or of `u16` for the 16-bit floats.
    ///
    /// # Errors
    /// If the view does not hold exactly `rows · cols` numbers of that size.
    pub fn new<T: Pod>(view: View<'a, T>, float: Float, rows: usize, cols: usize) -> Result<Self> {
        same_size::<T>(float)?;
        inside(view.len, rows, cols)?;
        // SAFETY: the view holds that many numbers as long as it lives.
        unsafe { Self::from_raw(view.pointer, float, rows, cols, cols) }
    }

    /// Rows without gaps that fill `bytes`.
    ///
    /// # Errors
    /// If they do not hold exactly `rows · cols` numbers, or are not aligned for them.
    pub fn of_bytes(bytes: View<'a, u8>, float: Float, rows: usize, cols: usize) -> Result<Self> {
        inside(bytes.len, rows, cols.saturating_mul(float.bytes()))?;
        // SAFETY: the view holds that many numbers as long as it lives.
        unsafe { Self::from_raw(bytes.pointer, float, rows, cols, cols) }
    }

    /// Rows in somebody else's memory.
    ///
    /// # Safety
    /// All rows can be read at `pointer` on the GPU for as long as work that was given them may run.
    ///
    /// # Errors
    /// If the stride is less than the columns, the pointer not aligned, or a size over 32 bits.
    pub unsafe fn from_raw(
        pointer: u64,
        float: Float,
        rows: usize,
        cols: usize,
        stride: usize,
    ) -> Result<Self> {
        Ok(Self { raw: RawRows::new(pointer, float, rows, cols, stride)?, float, of: PhantomData })
    }
}

impl<'a> RowsMut<'a> {
    /// As [`Rows::new`].
    ///
    /// # Errors
    /// As [`Rows::new`].
    pub fn new<T: Pod>(
        view: ViewMut<'a, T>,
        float: Float,
        rows: usize,
        cols: usize,
    ) -> Result<Self> {
        same_size::<T>(float)?;
        inside(view.len, rows, cols)?;
        // SAFETY: the view holds that many numbers as long as it lives, and nothing else uses it.
        unsafe { Self::from_raw(view.pointer, float, rows, cols, cols) }
    }

    /// As [`Rows::of_bytes`].
    ///
    /// # Errors
    /// As [`Rows::of_bytes`].
    pub fn of_bytes(
        bytes: ViewMut<'a, u8>,
        float: Float,
        rows: usize,
        cols: usize,
    ) -> Result<Self> {
        inside(bytes.len, rows, cols.saturating_mul(float.bytes()))?;
        // SAFETY: the view holds that many numbers as long as it lives, and nothing else uses it.
        unsafe { Self::from_raw(bytes.pointer, float, rows, cols, cols) }
    }

    /// As [`Rows::from_raw`].
    ///
    /// # Safety
    /// As [`Rows::from_raw`], for writing; nothing else uses the rows meanwhile.
    ///
    /// # Errors
    /// As [`Rows::from_raw`].
    pub unsafe fn from_raw(
        pointer: u64,
        float: Float,
        rows: usize,
        cols: usize,
        stride: usize,
    ) -> Result<Self> {
        Ok(Self { raw: RawRows::new(pointer, float, rows, cols, stride)?, float, of: PhantomData })
    }

    /// The same, to read.
    pub fn as_rows(&self) -> Rows<'_> {
        Rows { raw: self.raw, float: self.float, of: PhantomData }
    }

    /// The same, for a shorter time.
    pub fn reborrow(&mut self) -> RowsMut<'_> {
        RowsMut { raw: self.raw, float: self.float, of: PhantomData }
    }

    /// Some of the rows, for a shorter time.
    ///
    /// # Panics
    /// If the range ends outside.
    pub fn part(&mut self, range: Range<usize>) -> RowsMut<'_> {
        RowsMut { raw: self.raw.part(range), float: self.float, of: PhantomData }
    }

    /// The same, written and from here on only read.
    pub fn into_rows(self) -> Rows<'a> {
        Rows { raw: self.raw, float: self.float, of: PhantomData }
    }
}
