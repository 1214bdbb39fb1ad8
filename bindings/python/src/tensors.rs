//! Borrowed tensors as what the library takes: checked shapes, dtypes, devices and strides.

use std::ffi::c_void;
use std::sync::Arc;

use half::{bf16, f16};
use moe_runner::hidden::{ActivationDtype, Rows, RowsMut};
use moe_runner::weights::{Bytes, FloatType};
use pyo3::prelude::*;

use crate::dlpack::{self, Borrowed, DataType, Description};
use crate::errors::{self, OrRaise};

const CPU: i32 = 1;
/// Memory of the host that GPUs can read, too.
const PINNED: [i32; 2] = [3, 11];

const INT: u8 = 0;
const UINT: u8 = 1;
const FLOAT: u8 = 2;
const BFLOAT: u8 = 4;

/// A tensor in this machine's memory, its elements one after the other.
pub(crate) struct Tensor<'py> {
    what: &'static str,
    object: Bound<'py, PyAny>,
    borrowed: Borrowed<'py>,
    len: usize,
}

impl<'py> Tensor<'py> {
    /// Borrows `object`, named `what` in errors.
    pub(crate) fn borrow(what: &'static str, object: &Bound<'py, PyAny>) -> PyResult<Self> {
        let borrowed = dlpack::borrow(what, object)?;
        let Description { device, ndim, .. } = borrowed.description;
        let fail = |reason: &str| Err(errors::input(object.py(), what, reason));
        if device.kind != CPU && !PINNED.contains(&device.kind) {
            return fail("on another device; only the CPU's memory is read: give its .cpu()");
        }
        if !(0..=64).contains(&ndim) {
            return fail("of too many dimensions");
        }
        let mut tensor = Self { what, object: object.clone(), borrowed, len: 1 };
        let mut sizes = tensor.shape().iter();
        let len = sizes.try_fold(1usize, |len, &size| len.checked_mul(usize::try_from(size).ok()?));
        let Some(len) = len else { return fail("larger than memory") };
        tensor.len = len;
        match tensor.is_contiguous() {
            true => Ok(tensor),
            false => fail("its elements do not lie one after the other; give its .contiguous()"),
        }
    }

    fn py(&self) -> Python<'py> {
        self.object.py()
    }

    pub(crate) fn fail<T>(&self, reason: impl Into<String>) -> PyResult<T> {
        Err(errors::input(self.py(), self.what, reason))
    }

    pub(crate) fn shape(&self) -> &[i64] {
        let Description { shape, ndim, .. } = self.borrowed.description;
        match ndim {
            0 => &[],
            // SAFETY: DLPack's promise: so many sizes are there, as long as the description is
            ndim => unsafe { std::slice::from_raw_parts(shape, ndim as usize) },
        }
    }

    fn is_contiguous(&self) -> bool {
        let Description { strides, ndim, .. } = self.borrowed.description;
        if strides.is_null() || ndim == 0 || self.len == 0 {
            return true;
        }
        // SAFETY: DLPack's promise: as many strides as sizes
        let strides = unsafe { std::slice::from_raw_parts(strides, ndim as usize) };
        let mut expected = 1;
        self.shape().iter().zip(strides).rev().all(|(&size, &stride)| {
            let fits = size == 1 || stride == expected;
            expected *= size;
            fits
        })
    }

    fn data(&self) -> *mut c_void {
        let Description { data, byte_offset, .. } = self.borrowed.description;
        // in memory that the tensor has: no overflow
        data.wrapping_byte_add(byte_offset as usize)
    }

    fn dtype(&self) -> DataType {
        self.borrowed.description.dtype
    }

    /// The dtype of rows. Sixteen-bit integers are the bits of bf16 where that is what is asked for:
    /// numpy has no bf16.
    pub(crate) fn float(&self, bits_of: Option<ActivationDtype>) -> PyResult<ActivationDtype> {
        let DataType { code, bits, lanes } = self.dtype();
        match (code, bits, lanes) {
            (FLOAT, 32, 1) => Ok(ActivationDtype::F32),
            (FLOAT, 16, 1) => Ok(ActivationDtype::F16),
            (BFLOAT, 16, 1) => Ok(ActivationDtype::Bf16),
            (INT | UINT, 16, 1) if bits_of == Some(ActivationDtype::Bf16) => {
                Ok(ActivationDtype::Bf16)
            }
            _ => self.fail(format!("{}; f32, bf16 or f16 is needed", self.dtype_name())),
        }
    }

    fn dtype_name(&self) -> String {
        let DataType { code, bits, .. } = self.dtype();
        match code {
            INT => format!("int{bits}"),
            UINT => format!("uint{bits}"),
            FLOAT => format!("float{bits}"),
            _ => format!("{bits} bits of DLPack's type {code}"),
        }
    }

    /// The first sizes, all but the last, as one; and the last.
    pub(crate) fn tokens_and_width(&self) -> PyResult<(usize, usize)> {
        match self.shape() {
            [leading @ .., width] => {
                Ok((leading.iter().map(|&size| size as usize).product(), *width as usize))
            }
            [] => self.fail("a single number; rows are needed"),
        }
    }

    /// Rows for a layer of `dtype`.
    pub(crate) fn rows(&self, dtype: ActivationDtype) -> PyResult<Rows<'_>> {
        let float = self.float(Some(dtype))?;
        // SAFETY: the tensor is there while it is borrowed; that nobody writes it meanwhile is the
        // promise of whoever gave it
        unsafe { moe_foreign::rows(self.what, self.data(), float, self.len) }.or_raise(self.py())
    }

    /// Rows to write, of a layer of `dtype`.
    pub(crate) fn rows_mut(&mut self, dtype: ActivationDtype) -> PyResult<RowsMut<'_>> {
        if self.borrowed.read_only {
            return self.fail("is read-only");
        }
        let float = self.float(Some(dtype))?;
        // SAFETY: as above
        unsafe { moe_foreign::rows_mut(self.what, self.data(), float, self.len) }
            .or_raise(self.py())
    }

    /// Refuses `self` as the input of a call whose output is `output`, where they share memory.
    pub(crate) fn apart_from(&self, output: &Tensor<'_>) -> PyResult<()> {
        let bytes = |tensor: &Tensor<'_>| tensor.len * usize::from(tensor.dtype().bits / 8);
        let (input, written) = (bytes(self), bytes(output));
        moe_foreign::apart((self.what, self.data(), input), (output.data(), written))
            .or_raise(self.py())
    }

    /// Whole numbers as 32-bit ids: in place, or in `buffer`. What 32 bits do not hold is no expert's.
    pub(crate) fn ids<'a>(&'a self, buffer: &'a mut Vec<i32>) -> PyResult<&'a [i32]> {
        let (what, data, len, py) = (self.what, self.data(), self.len, self.py());
        let DataType { code, bits, lanes } = self.dtype();
        match (code, bits, lanes) {
            (INT, 32, 1) => {
                // SAFETY: as in `rows`
                unsafe { moe_foreign::slice(what, data, len) }.or_raise(py)
            }
            (INT, 64, 1) => {
                // SAFETY: as in `rows`
                let ids = unsafe { moe_foreign::slice::<i64>(what, data, len) }.or_raise(py)?;
                buffer.clear();
                buffer.extend(ids.iter().map(|&id| i32::try_from(id).unwrap_or(-1)));
                Ok(buffer)
            }
            _ => self.fail(format!("{}; int64 or int32 is needed", self.dtype_name())),
        }
    }

    /// Ids of tokens, by which some layers route.
    pub(crate) fn token_ids(&self) -> PyResult<Vec<u32>> {
        let mut buffer = Vec::new();
        // what is no id is none of the table's either: the library says so
        let ids = self.ids(&mut buffer)?.iter();
        Ok(ids.map(|&id| u32::try_from(id).unwrap_or(u32::MAX)).collect())
    }

    /// Floats as f32: in place, or in `buffer`.
    pub(crate) fn floats<'a>(&'a self, buffer: &'a mut Vec<f32>) -> PyResult<&'a [f32]> {
        let (what, data, len, py) = (self.what, self.data(), self.len, self.py());
        buffer.clear();
        // SAFETY: as in `rows`
        unsafe {
            match self.float(None)? {
                ActivationDtype::F32 => return moe_foreign::slice(what, data, len).or_raise(py),
                ActivationDtype::Bf16 => {
                    let values = moe_foreign::slice::<bf16>(what, data, len).or_raise(py)?;
                    buffer.extend(values.iter().map(|value| value.to_f32()));
                }
                ActivationDtype::F16 => {
                    let values = moe_foreign::slice::<f16>(what, data, len).or_raise(py)?;
                    buffer.extend(values.iter().map(|value| value.to_f32()));
                }
            }
        }
        Ok(buffer)
    }

    /// The elements as stored floats, which keep the tensor.
    pub(crate) fn stored(&self) -> PyResult<(Bytes, FloatType)> {
        let dtype = self.float(None)?;
        let owner = (
            self.object.clone().unbind(),
            self.borrowed.capsule.as_ref().map(|capsule| capsule.clone().unbind()),
        );
        let bytes = self.len.saturating_mul(dtype.size());
        // SAFETY: the owner keeps the tensor; that nobody writes it meanwhile is promised by whoever
        // gave it
        let foreign = unsafe { moe_foreign::Foreign::new(self.what, self.data(), bytes, owner) };
        let foreign = foreign.or_raise(self.py())?;
        Ok((Bytes::new(Arc::new(foreign)), moe_foreign::float_type(dtype)))
    }
}

/// A tensor for the output of `hidden`, of its library where that is known.
pub(crate) fn empty_like<'py>(hidden: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    let shape = hidden.getattr("shape")?;
    match hidden.getattr_opt("new_empty")? {
        Some(new_empty) => new_empty.call1((shape,)),
        None => hidden.py().import("numpy")?.call_method1("empty_like", (hidden,)),
    }
}
