//! Slices at addresses.

use std::ffi::c_void;

use bytemuck::Pod;
use moe_runner::hidden::{ActivationDtype, Rows, RowsMut};
use moe_runner::{Error, Result};

/// `len` elements at `data`, which may be null if there are none. `what` is named in errors.
///
/// # Errors
/// [`Error::Input`] for an address that is null or not aligned, and for more than memory can hold.
///
/// # Safety
/// At `data` are `len` elements that stay there, and that nobody writes, for `'a`.
pub unsafe fn slice<'a, T: Pod>(
    what: &'static str,
    data: *const c_void,
    len: usize,
) -> Result<&'a [T]> {
    match check::<T>(what, data, len)? {
        // SAFETY: not null, aligned, of a size that memory has; the rest is the caller's promise
        true => Ok(unsafe { std::slice::from_raw_parts(data.cast(), len) }),
        false => Ok(&[]),
    }
}

/// As [`slice`], to be written.
///
/// # Errors
/// As [`slice`].
///
/// # Safety
/// At `data` are `len` elements that stay there, and that nobody else reads or writes, for `'a`.
pub unsafe fn slice_mut<'a, T: Pod>(
    what: &'static str,
    data: *mut c_void,
    len: usize,
) -> Result<&'a mut [T]> {
    match check::<T>(what, data, len)? {
        // SAFETY: not null, aligned, of a size that memory has; the rest is the caller's promise
        true => Ok(unsafe { std::slice::from_raw_parts_mut(data.cast(), len) }),
        false => Ok(&mut []),
    }
}

/// Whether there is anything at `data`.
fn check<T>(what: &'static str, data: *const c_void, len: usize) -> Result<bool> {
    let fail = |reason: String| Err(Error::input(what, reason));
    if len == 0 {
        return Ok(false);
    }
    if data.is_null() {
        return fail(format!("is null, {len} elements are needed"));
    }
    if !data.cast::<T>().is_aligned() {
        return fail(format!("{data:?} is not aligned to {} bytes", align_of::<T>()));
    }
    match len.checked_mul(size_of::<T>()).is_some_and(|bytes| isize::try_from(bytes).is_ok()) {
        true => Ok(true),
        false => fail(format!("{len} elements are more than memory can hold")),
    }
}

/// Rows of `len` elements in all.
///
/// # Errors
/// As [`slice`].
///
/// # Safety
/// As [`slice`].
pub unsafe fn rows<'a>(
    what: &'static str,
    data: *const c_void,
    dtype: ActivationDtype,
    len: usize,
) -> Result<Rows<'a>> {
    // SAFETY: the caller's promise
    unsafe {
        Ok(match dtype {
            ActivationDtype::F32 => Rows::F32(slice(what, data, len)?),
            ActivationDtype::F16 => Rows::F16(slice(what, data, len)?),
            ActivationDtype::Bf16 => Rows::Bf16(slice(what, data, len)?),
        })
    }
}

/// Rows of `len` elements in all, to be written.
///
/// # Errors
/// As [`slice`].
///
/// # Safety
/// As [`slice_mut`].
pub unsafe fn rows_mut<'a>(
    what: &'static str,
    data: *mut c_void,
    dtype: ActivationDtype,
    len: usize,
) -> Result<RowsMut<'a>> {
    // SAFETY: the caller's promise
    unsafe {
        Ok(match dtype {
            ActivationDtype::F32 => RowsMut::F32(slice_mut(what, data, len)?),
            ActivationDtype::F16 => RowsMut::F16(slice_mut(what, data, len)?),
            ActivationDtype::Bf16 => RowsMut::Bf16(slice_mut(what, data, len)?),
        })
    }
}

/// Refuses an output that overlaps an input: what is read would change while it is read.
///
/// # Errors
/// [`Error::Input`] naming the input.
pub fn apart(
    (what, input, input_bytes): (&'static str, *const c_void, usize),
    (output, output_bytes): (*const c_void, usize),
) -> Result<()> {
    let (a, b) = (input.addr(), output.addr());
    match a < b.saturating_add(output_bytes) && b < a.saturating_add(input_bytes) {
        true => Err(Error::input(what, "the output overlaps it; give memory of its own to each")),
        false => Ok(()),
    }
}

/// Bytes that somebody else owns: `owner` keeps them, and is dropped when the last view of them is.
pub struct Foreign<O> {
    data: *const u8,
    len: usize,
    _owner: O,
}

impl<O> Foreign<O> {
    /// The `len` bytes at `data`.
    ///
    /// # Errors
    /// As [`slice`].
    ///
    /// # Safety
    /// They stay there, and nobody writes them, for as long as `owner` lives.
    pub unsafe fn new(
        what: &'static str,
        data: *const c_void,
        len: usize,
        owner: O,
    ) -> Result<Self> {
        check::<u8>(what, data, len)?;
        Ok(Self { data: data.cast(), len, _owner: owner })
    }
}

impl<O> AsRef<[u8]> for Foreign<O> {
    fn as_ref(&self) -> &[u8] {
        match self.len {
            0 => &[],
            // SAFETY: checked and promised in `new`
            len => unsafe { std::slice::from_raw_parts(self.data, len) },
        }
    }
}

// SAFETY: the bytes are only read, from any thread; the owner may be dropped on any, if it says so
unsafe impl<O: Send> Send for Foreign<O> {}
// SAFETY: as above; nothing gives out the owner
unsafe impl<O: Send> Sync for Foreign<O> {}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ptr::{null, null_mut};

    #[test]
    fn addresses_are_checked_before_they_are_used() {
        let values = [1.0f32, 2.0, 3.0];
        let data: *const c_void = values.as_ptr().cast();
        // SAFETY: the array outlives the call
        unsafe {
            assert_eq!(slice::<f32>("x", data, 3).unwrap(), values);
            assert!(slice::<f32>("x", null(), 0).unwrap().is_empty());
            assert!(slice_mut::<f32>("x", null_mut(), 0).unwrap().is_empty());
            let message = |result: Result<&[f32]>| result.unwrap_err().to_string();
            assert_eq!(message(slice("x", null(), 3)), "x: is null, 3 elements are needed");
            assert!(message(slice("x", data.byte_add(1), 1)).ends_with("not aligned to 4 bytes"));
            assert!(message(slice("x", data, usize::MAX / 2)).contains("more than memory"));
        }
    }

    #[test]
    fn overlaps_are_seen() {
        let at = |offset: usize| std::ptr::without_provenance(0x1000 + offset);
        assert!(apart(("x", at(0), 16), (at(16), 16)).is_ok());
        assert!(apart(("x", at(16), 16), (at(0), 16)).is_ok());
        assert!(apart(("x", at(0), 16), (at(15), 1)).is_err());
        assert!(apart(("x", at(4), 4), (at(0), 16)).is_err());
        assert!(apart(("x", at(0), 0), (at(0), 0)).is_ok());
    }

    #[test]
    fn an_owner_is_let_go_of_with_the_last_view() {
        use moe_runner::weights::Bytes;
        use std::sync::Arc;
        let owner = Arc::new(vec![1u8, 2, 3]);
        // SAFETY: the vector lives in its owner, and is not written
        let foreign = unsafe { Foreign::new("x", owner.as_ptr().cast(), 3, owner.clone()) };
        let bytes = Bytes::new(Arc::new(foreign.unwrap()));
        let part = bytes.slice(1..3).unwrap();
        drop(bytes);
        assert_eq!((&part[..], Arc::strong_count(&owner)), (&[2u8, 3][..], 2));
        drop(part);
        assert_eq!(Arc::strong_count(&owner), 1);
    }
}
