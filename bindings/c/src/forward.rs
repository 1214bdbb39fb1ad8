//! Rows in and out.

use std::ffi::c_void;

use moe_runner::hidden::{ActivationDtype, Rows, RowsMut};
use moe_runner::{Error, Result};

/// The rows of a call.
#[derive(Clone, Copy)]
pub(crate) struct Call {
    pub(crate) hidden: *const c_void,
    pub(crate) output: *mut c_void,
    pub(crate) tokens: usize,
}

impl Call {
    /// Both as rows `[tokens, width]` of `dtype`.
    ///
    /// # Safety
    /// As the header says: they are there for as long as the call lasts, and nobody else writes them.
    pub(crate) unsafe fn rows<'a>(
        self,
        dtype: ActivationDtype,
        width: usize,
    ) -> Result<(Rows<'a>, RowsMut<'a>)> {
        let Self { hidden, output, tokens } = self;
        let len = product("hidden", tokens, width)?;
        let bytes = product("hidden", len, dtype.size())?;
        moe_foreign::apart(("hidden", hidden, bytes), (output, bytes))?;
        // SAFETY: the caller's promise; they do not overlap
        unsafe {
            let hidden = moe_foreign::rows("hidden", hidden, dtype, len)?;
            Ok((hidden, moe_foreign::rows_mut("output", output, dtype, len)?))
        }
    }
}

/// A finished routing.
#[derive(Clone, Copy)]
pub(crate) struct Routing {
    pub(crate) ids: *const i32,
    pub(crate) weights: *const f32,
    pub(crate) top_k: usize,
}

impl Routing {
    /// Ids and weights `[tokens, top_k]`.
    ///
    /// # Safety
    /// As [`Call::rows`].
    pub(crate) unsafe fn slices<'a>(self, tokens: usize) -> Result<(&'a [i32], &'a [f32])> {
        let len = product("ids", tokens, self.top_k)?;
        // SAFETY: the caller's promise
        unsafe {
            let ids = moe_foreign::slice("ids", self.ids.cast(), len)?;
            Ok((ids, moe_foreign::slice("weights", self.weights.cast(), len)?))
        }
    }
}

/// How many elements there are in all.
pub(crate) fn product(what: &'static str, a: usize, b: usize) -> Result<usize> {
    a.checked_mul(b).ok_or_else(|| Error::input(what, format!("{a} · {b} elements are too many")))
}

/// After a panic the state of a handle is not known.
pub(crate) fn poisoned() -> Error {
    Error::input("handle", "an earlier call on it ended in a bug; free it")
}
