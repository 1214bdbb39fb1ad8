//! Hidden states as they come from and go to the caller: rows [T, H] in f32, f16 or bf16.
//!
//! Inside the layer rows are f32; values are rounded to the activation dtype only where this crate
//! says so. No tensor framework: plain slices with a width.

use half::{bf16, f16};
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
}

impl Rows<'_> {
    /// Number of elements, T·H.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(data) => data.len(),
            Self::F16(data) => data.len(),
            Self::Bf16(data) => data.len(),
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
        }
    }

    /// Number of rows of `width` elements; an error if the elements do not fill whole rows.
    pub fn tokens(&self, what: &'static str, width: usize) -> Result<usize> {
        if width == 0 || !self.len().is_multiple_of(width) {
            return Err(Error::input(
                what,
                format!("{} elements are not whole rows of {width}", self.len()),
            ));
        }
        Ok(self.len() / width)
    }

    /// Replaces the content of `out` by these rows, widened to f32 (exactly).
    pub fn widen_into(&self, out: &mut Vec<f32>) {
        out.clear();
        match self {
            Self::F32(data) => out.extend_from_slice(data),
            Self::F16(data) => out.extend(data.iter().map(|v| v.to_f32())),
            Self::Bf16(data) => out.extend(data.iter().map(|v| v.to_f32())),
        }
    }
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
}

impl RowsMut<'_> {
    /// Number of elements, T·H.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(data) => data.len(),
            Self::F16(data) => data.len(),
            Self::Bf16(data) => data.len(),
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
        }
    }

    /// Writes `values`, rounded to this dtype (ties to even). Lengths must agree: the caller checks.
    pub(crate) fn write(&mut self, values: &[f32]) {
        debug_assert_eq!(self.len(), values.len());
        match self {
            Self::F32(out) => out.copy_from_slice(values),
            Self::F16(out) => {
                for (o, v) in out.iter_mut().zip(values) {
                    *o = f16::from_f32(*v);
                }
            }
            Self::Bf16(out) => {
                for (o, v) in out.iter_mut().zip(values) {
                    *o = bf16::from_f32(*v);
                }
            }
        }
    }
}
