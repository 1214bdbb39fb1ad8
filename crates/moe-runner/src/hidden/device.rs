//! Rows, and finished routing, in the memory of a GPU: addresses that the caller vouches for.

use std::marker::PhantomData;

use super::{ActivationDtype, misfit};
use crate::{Error, Result};

/// Rows in the memory of a GPU: pointer, dtype, shape and stride.
#[derive(Clone, Copy, Debug)]
pub struct DeviceRows<'a> {
    pub(super) place: DevicePlace,
    of: PhantomData<&'a ()>,
}

/// Rows in the memory of a GPU, to be written.
#[derive(Debug)]
pub struct DeviceRowsMut<'a> {
    pub(super) place: DevicePlace,
    of: PhantomData<&'a mut ()>,
}

/// Where rows lie on a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DevicePlace {
    /// An address of the GPU's memory.
    pub pointer: u64,
    /// What the elements are.
    pub dtype: ActivationDtype,
    /// T and H.
    pub shape: [usize; 2],
    /// Elements from the begin of one row to that of the next.
    pub stride: usize,
}

impl DevicePlace {
    fn new(pointer: u64, dtype: ActivationDtype, shape: [usize; 2], stride: usize) -> Result<Self> {
        let [rows, cols] = shape;
        if stride < cols || rows.checked_mul(stride.max(1)).is_none() {
            return Err(misfit(shape, stride, "of a GPU"));
        }
        if !pointer.is_multiple_of(dtype.size() as u64) {
            let name = dtype.name();
            return Err(Error::input("rows", format!("{pointer:#x} is not aligned for {name}")));
        }
        Ok(Self { pointer, dtype, shape, stride })
    }
}

impl<'a> DeviceRows<'a> {
    /// Rows `[rows, cols]` of `dtype`, each `stride` elements after the one before.
    ///
    /// # Safety
    /// The GPU that the layer runs on can read them all at `pointer`, an address of its memory, and they
    /// stay as they are until the work that reads them is done: until the runner is
    /// [synchronised](crate::runner::MoeRunner::synchronize), or what the caller orders after it on
    /// the runner's stream.
    ///
    /// # Errors
    /// If rows overlap, or the pointer is not aligned for the dtype.
    pub unsafe fn new(
        pointer: u64,
        dtype: ActivationDtype,
        shape: [usize; 2],
        stride: usize,
    ) -> Result<Self> {
        Ok(Self { place: DevicePlace::new(pointer, dtype, shape, stride)?, of: PhantomData })
    }

    /// Where they lie.
    pub fn place(&self) -> DevicePlace {
        self.place
    }
}

impl<'a> DeviceRowsMut<'a> {
    /// As [`DeviceRows::new`].
    ///
    /// # Safety
    /// As [`DeviceRows::new`], for writing; nothing else uses the rows meanwhile.
    ///
    /// # Errors
    /// As [`DeviceRows::new`].
    pub unsafe fn new(
        pointer: u64,
        dtype: ActivationDtype,
        shape: [usize; 2],
        stride: usize,
    ) -> Result<Self> {
        Ok(Self { place: DevicePlace::new(pointer, dtype, shape, stride)?, of: PhantomData })
    }

    /// Where they lie.
    pub fn place(&self) -> DevicePlace {
        self.place
    }
}

/// Routing in the memory of a GPU that was finished there: ids and weights `[T, k]`.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "read where there are GPU kernels"))]
pub struct DeviceRouting<'a> {
    pub(crate) ids: u64,
    pub(crate) weights: u64,
    pub(crate) shape: [usize; 2],
    of: PhantomData<&'a ()>,
}

impl<'a> DeviceRouting<'a> {
    /// `ids` points to i32 and `weights` to f32, both `[tokens, top_k]` without gaps. An id that is
    /// negative or no expert's means: not here.
    ///
    /// # Safety
    /// As [`DeviceRows::new`], for both.
    ///
    /// # Errors
    /// If a pointer is not aligned, or there are no slots a token.
    pub unsafe fn new(ids: u64, weights: u64, shape: [usize; 2]) -> Result<Self> {
        if !(ids | weights).is_multiple_of(4) || shape[1] == 0 {
            let reason = format!("{ids:#x} and {weights:#x} for {shape:?}");
            return Err(Error::input("routing", reason));
        }
        Ok(Self { ids, weights, shape, of: PhantomData })
    }
}
