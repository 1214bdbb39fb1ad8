//! What passes between both languages: a status, the words for it, no panic.

use std::any::Any;
use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

use moe_runner::Error;

/// How a call ended. More may be added at the end.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// All is well.
    Ok = 0,
    /// An argument does not fit: null, of the wrong size, a name or number that does not exist; hidden
    /// states that are not finite.
    Argument = 1,
    /// A file could not be read.
    Io = 2,
    /// The checkpoint is wrong, incomplete, or of an architecture that is not known.
    Checkpoint = 3,
    /// A layer's description contradicts itself.
    Spec = 4,
    /// No kernel can run this, or the named one cannot; the words give every reason.
    NoKernel = 5,
    /// A bug of the library. The handle cannot be used any more, but for freeing it.
    Bug = 6,
    /// Anything else.
    Failed = 7,
}

thread_local! {
    static LAST: RefCell<CString> = RefCell::default();
}

/// Why the last call on this thread that did not return MOE_STATUS_OK failed: one line of UTF-8. Valid
/// until the next call on this thread fails.
#[unsafe(no_mangle)]
pub extern "C" fn moe_last_error() -> *const c_char {
    LAST.with(|last| last.borrow().as_ptr())
}

/// Runs `work`; what it returns or how it panics becomes a status and words.
pub(crate) fn call(work: impl FnOnce() -> moe_runner::Result<()>) -> Status {
    let (status, words) = match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(())) => return Status::Ok,
        Ok(Err(error)) => (status(&error), words(&error)),
        Err(panic) => (Status::Bug, format!("a bug in moe-runner: {}", panic_words(&*panic))),
    };
    LAST.with(|last| *last.borrow_mut() = c_string(words));
    status
}

fn status(error: &Error) -> Status {
    match error {
        Error::Input { .. } => Status::Argument,
        Error::Io { .. } => Status::Io,
        Error::File { .. } | Error::Tensor { .. } | Error::Config { .. } => Status::Checkpoint,
        Error::UnknownLayer { .. } => Status::Argument,
        Error::Spec { .. } => Status::Spec,
        Error::NoKernel(_) => Status::NoKernel,
        _ => Status::Failed,
    }
}

/// The error with its causes.
fn words(error: &Error) -> String {
    let mut words = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(next) = cause {
        words += &format!(": {next}");
        cause = next.source();
    }
    words
}

fn panic_words(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic without words")
}

/// Text for C, without what would end it early.
pub(crate) fn c_string(text: String) -> CString {
    CString::new(text.replace('\0', "")).unwrap_or_default()
}

/// The object that a handle stands for.
///
/// # Safety
/// `handle` is null, or was given out by this library and is not freed while `'a` lasts.
pub(crate) unsafe fn handle<'a, T>(
    what: &'static str,
    handle: *const T,
) -> moe_runner::Result<&'a T> {
    // SAFETY: the caller's promise
    unsafe { handle.as_ref() }.ok_or_else(|| Error::input(what, "is null"))
}

/// Gives `made` to the caller as a handle.
///
/// # Safety
/// `to` is null, or can be written.
pub(crate) unsafe fn give<T>(
    to: *mut *mut T,
    make: impl FnOnce() -> moe_runner::Result<T>,
) -> Status {
    call(|| {
        if to.is_null() {
            return Err(Error::input("the address of the handle", "is null"));
        }
        // what a caller who does not look at the status frees
        // SAFETY: not null; the caller's promise
        unsafe { to.write(std::ptr::null_mut()) };
        let made = Box::into_raw(Box::new(make()?));
        // SAFETY: as above
        unsafe { to.write(made) };
        Ok(())
    })
}

/// Frees what a handle stands for; null is ignored.
///
/// # Safety
/// `handle` is null, or was given out by this library, is not freed, and is used by nobody any more.
pub(crate) unsafe fn free<T>(handle: *mut T) {
    if !handle.is_null() {
        // SAFETY: it came from `give`, and is not freed yet
        let owned = unsafe { Box::from_raw(handle) };
        call(|| {
            drop(owned);
            Ok(())
        });
    }
}

/// A caller's text; `None` for null.
///
/// # Errors
/// [`Error::Input`] if it is no UTF-8.
///
/// # Safety
/// `text` is null or a string that ends with a zero byte, and stays for `'a`.
pub(crate) unsafe fn text<'a>(
    what: &'static str,
    text: *const c_char,
) -> moe_runner::Result<Option<&'a str>> {
    if text.is_null() {
        return Ok(None);
    }
    // SAFETY: not null; the caller's promise
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str().map(Some).map_err(|_| Error::input(what, "is no UTF-8"))
}

/// A struct that begins with its size, as far as the caller knows it; the rest is zero.
///
/// # Errors
/// [`Error::Input`] for sizes below `least`, or that no version has.
///
/// # Safety
/// At `from` are as many bytes as its first field says; zeros are a value of `T`.
pub(crate) unsafe fn sized<T: Copy>(
    what: &'static str,
    from: *const T,
    least: usize,
) -> moe_runner::Result<T> {
    if from.is_null() {
        return Err(Error::input(what, "is null"));
    }
    if !from.is_aligned() {
        return Err(Error::input(what, "is not aligned"));
    }
    // SAFETY: the first field is the size
    let size = unsafe { from.cast::<usize>().read() };
    if size < least || size > 4096 {
        return Err(Error::input(
            what,
            format!("its size is {size}, not that of the struct ({}): set it", size_of::<T>()),
        ));
    }
    let mut value = std::mem::MaybeUninit::<T>::zeroed();
    let known = size.min(size_of::<T>());
    // SAFETY: so many bytes are there, and have room; zeros are a value of what is not copied
    unsafe {
        std::ptr::copy_nonoverlapping(from.cast::<u8>(), value.as_mut_ptr().cast::<u8>(), known);
        Ok(value.assume_init())
    }
}
