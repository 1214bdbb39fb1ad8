//! How a layer is to run, as C says it.

use std::ffi::c_char;
use std::sync::Arc;

use moe_runner::hidden::ActivationDtype;
use moe_runner::runner::NonFinite;
use moe_runner::{Error, Result, runner};

use crate::boundary::{sized, text};
use crate::pool::{ForeignPool, ThreadPool};

/// Element types of rows and of weights.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE binary32.
    F32 = 0,
    /// bfloat16.
    Bf16 = 1,
    /// IEEE binary16.
    F16 = 2,
}

/// The dtype of that number: what C gives is any number, so no function takes the enum itself.
pub(crate) fn dtype(what: &'static str, number: u32) -> Result<ActivationDtype> {
    Ok(match number {
        n if n == Dtype::F32 as u32 => ActivationDtype::F32,
        n if n == Dtype::Bf16 as u32 => ActivationDtype::Bf16,
        n if n == Dtype::F16 as u32 => ActivationDtype::F16,
        n => return Err(Error::input(what, format!("{n} is no moe_dtype"))),
    })
}

/// How a layer or experts are to run. Zeros are defaults; a null pointer to options is all defaults.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// sizeof(moe_options).
    pub size: usize,
    /// The moe_dtype of hidden states and outputs.
    pub dtype: u32,
    /// Rows that hold NaN or infinities go through, and spoil no other row; else such rows are an error
    /// that names row and column.
    pub non_finite: bool,
    /// Threads to run on; 0: the physical cores that this process may use. Handles with equally many
    /// share them.
    pub threads: usize,
    /// A kernel by name (moe_layer_explain lists them), used or refused; null: the first that can.
    pub kernel: *const c_char,
    /// Threads of the caller's own in place of `threads`; null: none. It is copied; its context must
    /// stay until the handle is freed.
    pub pool: *const ThreadPool,
}

/// The library's options.
///
/// # Safety
/// `options` is null or as the header says.
pub(crate) unsafe fn resolve(options: *const Options) -> Result<runner::Options> {
    if options.is_null() {
        return moe_foreign::options(ActivationDtype::F32, 0, None);
    }
    // SAFETY: the caller's promise; zeros are null pointers and numbers
    let options: Options = unsafe { sized("options", options, size_of::<Options>())? };
    // SAFETY: the caller's promise
    let kernel = unsafe { text("options.kernel", options.kernel)? };
    let dtype = dtype("options.dtype", options.dtype)?;
    // a pool of the caller's own: none is started beside it
    let threads = if options.pool.is_null() { options.threads } else { 1 };
    let mut resolved = moe_foreign::options(dtype, threads, kernel)?;
    // SAFETY: the caller's promise
    if let Some(pool) = unsafe { options.pool.as_ref() } {
        resolved.pool = Arc::new(ForeignPool::new(*pool)?);
    }
    if options.non_finite {
        resolved.non_finite = NonFinite::LetThrough;
    }
    Ok(resolved)
}
