//! Hidden states as they come from and go to the caller: rows [T, H] in f32, f16 or bf16, on the host
//! or on a GPU, one after another or with gaps between them.
//!
//! Inside the layer rows are f32; values are rounded to the activation dtype only where this crate
//! says so. No tensor framework: plain slices with a width, or a pointer with shape and stride.

mod device;

pub use device::{DevicePlace, DeviceRouting, DeviceRows, DeviceRowsMut};

use std::ops::Range;

use half::{bf16, f16};
use moe_kernels::numerics::float16;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The dtype of activations, and of the layer's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ActivationDtype {
    /// IEEE binary32.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE binary16.
    F16,
}

impl ActivationDtype {
    /// "f32", "bf16" or "f16".
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }

    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }

    /// Rounds all of `values` to this dtype, ties to even.
    pub(crate) fn round_all(self, values: &mut [f32]) {
        /// Values that are converted and back at a time, so that they stay in registers' reach.
        const CHUNK: usize = 64;
        let chunks = values.chunks_mut(CHUNK);
        match self {
            Self::F32 => {}
            Self::Bf16 => chunks.for_each(|values| {
                let narrow = &mut [bf16::ZERO; CHUNK][..values.len()];
                float16::f32_to_bf16(values, narrow);
                float16::bf16_to_f32(narrow, values);
            }),
            Self::F16 => chunks.for_each(|values| {
                let narrow = &mut [f16::ZERO; CHUNK][..values.len()];
                float16::f32_to_f16(values, narrow);
                float16::f16_to_f32(narrow, values);
            }),
        }
    }

    /// `value` rounded to this dtype, ties to even.
    pub fn round(self, value: f32) -> f32 {
        match self {
            Self::F32 => value,
            Self::Bf16 => bf16::from_f32(value).to_f32(),
            Self::F16 => f16::from_f32(value).to_f32(),
        }
    }
}

/// Rows [T, H], borrowed from the caller.
#[derive(Clone, Copy, Debug)]
pub enum Rows<'a> {
    /// f32 elements, row after row.
    F32(&'a [f32]),
    /// f16 elements, row after row.
    F16(&'a [f16]),
    /// bf16 elements, row after row.
    Bf16(&'a [bf16]),
    /// Rows with gaps between them: [`Rows::strided`].
    Strided(StridedRows<'a>),
    /// Rows in the memory of a GPU.
    Device(DeviceRows<'a>),
}

/// Rows [T, H] to be written, borrowed from the caller.
#[derive(Debug)]
pub enum RowsMut<'a> {
    /// f32 elements, row after row.
    F32(&'a mut [f32]),
    /// f16 elements, row after row.
    F16(&'a mut [f16]),
    /// bf16 elements, row after row.
    Bf16(&'a mut [bf16]),
    /// Rows with gaps between them: [`RowsMut::strided`].
    Strided(StridedRowsMut<'a>),
    /// Rows in the memory of a GPU.
    Device(DeviceRowsMut<'a>),
}

/// Floats of the host in any of the dtypes.
#[derive(Clone, Copy, Debug)]
enum Values<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
}

/// The same, to be written.
#[derive(Debug)]
enum ValuesMut<'a> {
    F32(&'a mut [f32]),
    F16(&'a mut [f16]),
    Bf16(&'a mut [bf16]),
}

/// Rows of the host with gaps between them.
#[derive(Clone, Copy, Debug)]
pub struct StridedRows<'a> {
    values: Values<'a>,
    shape: [usize; 2],
    stride: usize,
}

/// Rows of the host with gaps between them, to be written; what is in the gaps stays.
#[derive(Debug)]
pub struct StridedRowsMut<'a> {
    values: ValuesMut<'a>,
    shape: [usize; 2],
    stride: usize,
}

fn misfit([rows, cols]: [usize; 2], stride: usize, of: &str) -> Error {
    Error::input("rows", format!("[{rows}, {cols}] with stride {stride} do not fit rows {of}"))
}

/// Checks that `len` elements hold rows of this shape and stride.
fn inside(len: usize, shape: [usize; 2], stride: usize) -> Result<()> {
    let [rows, cols] = shape;
    let last = rows.checked_sub(1).map(|before| before.checked_mul(stride));
    let end = match last {
        None => Some(0),
        Some(last) => last.and_then(|last| last.checked_add(cols)),
    };
    match end {
        Some(end) if end <= len && stride >= cols && cols > 0 => Ok(()),
        _ => Err(misfit(shape, stride, &format!("of {len} elements"))),
    }
}

impl<'a> Rows<'a> {
    /// Rows `[rows, cols]` of these elements, each `stride` elements after the one before.
    ///
    /// # Errors
    /// If the elements do not hold them, rows overlap, or these are not plain rows of the host.
    pub fn strided(self, shape: [usize; 2], stride: usize) -> Result<Self> {
        let values = match self {
            Self::F32(data) => Values::F32(data),
            Self::F16(data) => Values::F16(data),
            Self::Bf16(data) => Values::Bf16(data),
            Self::Strided(_) | Self::Device(_) => {
                return Err(misfit(shape, stride, "that have a stride already"));
            }
        };
        inside(self.len(), shape, stride)?;
        Ok(Self::Strided(StridedRows { values, shape, stride }))
    }

    /// Number of elements, T·H.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(data) => data.len(),
            Self::F16(data) => data.len(),
            Self::Bf16(data) => data.len(),
            Self::Strided(StridedRows { shape: [rows, cols], .. }) => rows * cols,
            Self::Device(DeviceRows { place, .. }) => place.shape[0] * place.shape[1],
        }
    }

    /// True for zero tokens.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements' dtype.
    pub fn dtype(&self) -> ActivationDtype {
        match self {
            Self::F32(_) => ActivationDtype::F32,
            Self::F16(_) => ActivationDtype::F16,
            Self::Bf16(_) => ActivationDtype::Bf16,
            Self::Strided(StridedRows { values, .. }) => values.dtype(),
            Self::Device(DeviceRows { place, .. }) => place.dtype,
        }
    }

    /// They lie in the memory of a GPU.
    pub fn is_on_device(&self) -> bool {
        matches!(self, Self::Device(_))
    }

    /// An error unless rows that know their width have this one.
    pub(crate) fn expect_width(&self, what: &'static str, width: usize) -> Result<()> {
        expect_width(what, self.cols(), width)
    }

    /// Columns of a row, where these rows know it.
    fn cols(&self) -> Option<usize> {
        match self {
            Self::F32(_) | Self::F16(_) | Self::Bf16(_) => None,
            Self::Strided(StridedRows { shape, .. }) => Some(shape[1]),
            Self::Device(DeviceRows { place, .. }) => Some(place.shape[1]),
        }
    }

    /// Number of rows of `width` elements; an error if the elements do not fill whole rows.
    pub fn tokens(&self, what: &'static str, width: usize) -> Result<usize> {
        expect_width(what, self.cols(), width)?;
        if width == 0 || !self.len().is_multiple_of(width) {
            return Err(Error::input(
                what,
                format!("{} elements are not whole rows of {width}", self.len()),
            ));
        }
        Ok(self.len() / width)
    }

    /// Writes the elements of `range`, widened to f32 (exactly). Of rows with gaps, whole rows; there
    /// is nothing to be had of a GPU's.
    pub(crate) fn widen(&self, range: Range<usize>, out: &mut [f32]) {
        match self {
            Self::F32(data) => Values::F32(data).widen(range, out),
            Self::F16(data) => Values::F16(data).widen(range, out),
            Self::Bf16(data) => Values::Bf16(data).widen(range, out),
            Self::Strided(StridedRows { values, shape: [_, cols], stride }) => {
                let rows = range.start / cols..range.end / cols;
                for (row, out) in rows.zip(out.chunks_exact_mut(*cols)) {
                    values.widen(row * stride..row * stride + cols, out);
                }
            }
            Self::Device(_) => out.fill(f32::NAN),
        }
    }
}

impl Values<'_> {
    fn dtype(&self) -> ActivationDtype {
        match self {
            Self::F32(_) => ActivationDtype::F32,
            Self::F16(_) => ActivationDtype::F16,
            Self::Bf16(_) => ActivationDtype::Bf16,
        }
    }

    fn widen(&self, range: Range<usize>, out: &mut [f32]) {
        match self {
            Self::F32(data) => out.copy_from_slice(&data[range]),
            Self::F16(data) => float16::f16_to_f32(&data[range], out),
            Self::Bf16(data) => float16::bf16_to_f32(&data[range], out),
        }
    }
}

impl ValuesMut<'_> {
    /// Writes `values` from `start` on, rounded to this dtype, ties to even.
    fn write(&mut self, start: usize, values: &[f32]) {
        let range = start..start + values.len();
        match self {
            Self::F32(out) => out[range].copy_from_slice(values),
            Self::F16(out) => float16::f32_to_f16(values, &mut out[range]),
            Self::Bf16(out) => float16::f32_to_bf16(values, &mut out[range]),
        }
    }
}

impl<'a> ValuesMut<'a> {
    /// Takes the first `len` elements off, or what there is.
    fn take(&mut self, len: usize) -> ValuesMut<'a> {
        fn split<'a, T>(data: &mut &'a mut [T], len: usize) -> &'a mut [T] {
            let len = len.min(data.len());
            let (taken, rest) = std::mem::take(data).split_at_mut(len);
            *data = rest;
            taken
        }
        match self {
            Self::F32(data) => ValuesMut::F32(split(data, len)),
            Self::F16(data) => ValuesMut::F16(split(data, len)),
            Self::Bf16(data) => ValuesMut::Bf16(split(data, len)),
        }
    }
}

fn expect_width(what: &'static str, cols: Option<usize>, width: usize) -> Result<()> {
    match cols {
        Some(cols) if cols != width => {
            Err(Error::input(what, format!("rows of {cols} columns, {width} are needed")))
        }
        _ => Ok(()),
    }
}

impl<'a> RowsMut<'a> {
    /// Rows `[rows, cols]` of these elements, each `stride` elements after the one before.
    ///
    /// # Errors
    /// As [`Rows::strided`].
    pub fn strided(self, shape: [usize; 2], stride: usize) -> Result<Self> {
        inside(self.len(), shape, stride)?;
        let values = match self {
            Self::F32(data) => ValuesMut::F32(data),
            Self::F16(data) => ValuesMut::F16(data),
            Self::Bf16(data) => ValuesMut::Bf16(data),
            Self::Strided(_) | Self::Device(_) => {
                return Err(misfit(shape, stride, "that have a stride already"));
            }
        };
        Ok(Self::Strided(StridedRowsMut { values, shape, stride }))
    }

    /// Number of elements, T·H.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(data) => data.len(),
            Self::F16(data) => data.len(),
            Self::Bf16(data) => data.len(),
            Self::Strided(StridedRowsMut { shape: [rows, cols], .. }) => rows * cols,
            Self::Device(DeviceRowsMut { place, .. }) => place.shape[0] * place.shape[1],
        }
    }

    /// True for zero tokens.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements' dtype.
    pub fn dtype(&self) -> ActivationDtype {
        match self {
            Self::F32(_) => ActivationDtype::F32,
            Self::F16(_) => ActivationDtype::F16,
            Self::Bf16(_) => ActivationDtype::Bf16,
            Self::Strided(StridedRowsMut { values, .. }) => match values {
                ValuesMut::F32(_) => ActivationDtype::F32,
                ValuesMut::F16(_) => ActivationDtype::F16,
                ValuesMut::Bf16(_) => ActivationDtype::Bf16,
            },
            Self::Device(DeviceRowsMut { place, .. }) => place.dtype,
        }
    }

    /// They lie in the memory of a GPU.
    pub fn is_on_device(&self) -> bool {
        matches!(self, Self::Device(_))
    }

    /// An error unless rows that know their width have this one.
    pub(crate) fn expect_width(&self, what: &'static str, width: usize) -> Result<()> {
        let cols = match self {
            Self::F32(_) | Self::F16(_) | Self::Bf16(_) => None,
            Self::Strided(StridedRowsMut { shape, .. }) => Some(shape[1]),
            Self::Device(DeviceRowsMut { place, .. }) => Some(place.shape[1]),
        };
        expect_width(what, cols, width)
    }

    /// Writes `values`, rounded to this dtype (ties to even). Lengths must agree: the caller checks.
    /// Nothing is written to a GPU's rows.
    pub(crate) fn write(&mut self, values: &[f32]) {
        debug_assert_eq!(self.len(), values.len());
        match self {
            Self::F32(out) => out.copy_from_slice(values),
            Self::F16(out) => float16::f32_to_f16(values, out),
            Self::Bf16(out) => float16::f32_to_bf16(values, out),
            Self::Strided(StridedRowsMut { values: out, shape: [_, cols], stride }) => {
                for (row, values) in values.chunks_exact(*cols).enumerate() {
                    out.write(row * *stride, values);
                }
            }
            Self::Device(_) => {}
        }
    }

    /// Parts of `len` elements, the last one shorter; of rows with gaps, `len` is whole rows.
    pub(crate) fn chunks(self, len: usize) -> impl ExactSizeIterator<Item = RowsMut<'a>> + Send {
        let parts = self.len().div_ceil(len);
        let mut rest = self;
        (0..parts).map(move |_| rest.take(len))
    }

    /// Takes the first `len` elements off, or what there is.
    fn take(&mut self, len: usize) -> RowsMut<'a> {
        let plain = |values: ValuesMut<'a>| match values {
            ValuesMut::F32(data) => RowsMut::F32(data),
            ValuesMut::F16(data) => RowsMut::F16(data),
            ValuesMut::Bf16(data) => RowsMut::Bf16(data),
        };
        let mut values = match self {
            Self::F32(data) => ValuesMut::F32(std::mem::take(data)),
            Self::F16(data) => ValuesMut::F16(std::mem::take(data)),
            Self::Bf16(data) => ValuesMut::Bf16(std::mem::take(data)),
            Self::Strided(StridedRowsMut { values, shape: [rows, cols], stride }) => {
                let taken = (len / *cols).min(*rows);
                *rows -= taken;
                // the last row has no gap behind it
                let values = values.take(taken * *stride);
                let shape = [taken, *cols];
                return RowsMut::Strided(StridedRowsMut { values, shape, stride: *stride });
            }
            Self::Device(_) => return RowsMut::F32(&mut []),
        };
        let taken = values.take(len);
        *self = plain(values);
        plain(taken)
    }
}
