//! Hidden states as they come from and go to the caller: rows [T, H] in f32, f16 or bf16.
//!
//! Inside the layer rows are f32; values are rounded to the activation dtype only where this crate
//! says so. No tensor framework: plain slices with a width.

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

    /// Writes the elements of `range`, widened to f32 (exactly).
    pub(crate) fn widen(&self, range: Range<usize>, out: &mut [f32]) {
        match self {
            Self::F32(data) => out.copy_from_slice(&data[range]),
            Self::F16(data) => float16::f16_to_f32(&data[range], out),
            Self::Bf16(data) => float16::bf16_to_f32(&data[range], out),
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
            Self::F16(out) => float16::f32_to_f16(values, out),
            Self::Bf16(out) => float16::f32_to_bf16(values, out),
        }
    }
}

impl<'a> RowsMut<'a> {
    /// Parts of `len` elements, the last one shorter.
    pub(crate) fn chunks(self, len: usize) -> impl ExactSizeIterator<Item = RowsMut<'a>> + Send {
        let parts = self.len().div_ceil(len);
        let mut rest = self;
        (0..parts).map(move |_| rest.take(len))
    }

    /// Takes the first `len` elements off, or what there is.
    fn take(&mut self, len: usize) -> RowsMut<'a> {
        fn split<'a, T>(data: &mut &'a mut [T], len: usize) -> &'a mut [T] {
            let len = len.min(data.len());
            let (taken, rest) = std::mem::take(data).split_at_mut(len);
            *data = rest;
            taken
        }
        match self {
            Self::F32(data) => RowsMut::F32(split(data, len)),
            Self::F16(data) => RowsMut::F16(split(data, len)),
            Self::Bf16(data) => RowsMut::Bf16(split(data, len)),
        }
    }
}
