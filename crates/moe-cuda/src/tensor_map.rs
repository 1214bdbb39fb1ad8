//! Tensor maps: how the copy engine finds tiles of a matrix (sm_90 and newer).

use crate::driver::call;
use crate::module::Argument;
use crate::{Error, Gpu, Result};

/// `CUtensorMap`, as the driver makes it. Kernels take it by value.
#[repr(C, align(128))]
#[derive(Clone, Copy)]
pub(crate) struct TensorMap([u8; 128]);

// SAFETY: `struct TensorMap` of ptx.cuh.
unsafe impl Argument for TensorMap {}

/// A matrix of numbers of `bytes` 1 or 2 without gaps between rows.
pub(crate) struct Matrix {
    pub(crate) address: u64,
    /// 1: bytes; 2: bf16.
    pub(crate) bytes: usize,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
}

impl TensorMap {
    /// Tiles of `tile_rows` rows × 128 bytes, which arrive in shared memory with their 16-byte pieces
    /// swizzled: piece p of row r stands at p ^ (r & 7). Beyond the matrix they are zeros.
    pub(crate) fn new(gpu: &Gpu, matrix: &Matrix, tile_rows: usize) -> Result<Self> {
        let driver = gpu.bind()?;
        let row_bytes = matrix.cols * matrix.bytes;
        if !row_bytes.is_multiple_of(16) || !matrix.address.is_multiple_of(16) {
            let reason = format!("rows of {row_bytes} bytes at {:#x}", matrix.address);
            return Err(Error::input(
                "tensor map",
                format!("{reason} are not aligned to 16 bytes"),
            ));
        }
        // The numbers are those of cuda.h.
        let (uint8, bfloat16) = (0, 9);
        let (no_interleave, swizzle_128, promote_256, fill_zeros) = (0, 3, 3, 0);
        let kind = if matrix.bytes == 2 { bfloat16 } else { uint8 };
        let sizes = [matrix.cols as u64, matrix.rows as u64];
        let strides = [row_bytes as u64];
        let tile = [(128 / matrix.bytes) as u32, tile_rows as u32];
        let steps = [1, 1];
        let mut map = Self([0; 128]);
        // SAFETY: the map is aligned and as large as the driver takes it to be; the arrays hold one
        // number for each of two dimensions, the strides one less.
        call!(driver.cuTensorMapEncodeTiled(
            map.0.as_mut_ptr().cast(),
            kind,
            2,
            matrix.address,
            sizes.as_ptr(),
            strides.as_ptr(),
            tile.as_ptr(),
            steps.as_ptr(),
            no_interleave,
            swizzle_128,
            promote_256,
            fill_zeros,
        ))?;
        Ok(map)
    }

    /// One that no kernel reads.
    pub(crate) fn unused() -> Self {
        Self([0; 128])
    }
}
