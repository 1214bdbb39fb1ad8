//! DLPack: tensors of any library, borrowed for the length of a call.
//!
//! Two ways lead to the same description. A library's table of C functions (DLPack 1.2 and newer; PyTorch
//! has it) lends it in tens of nanoseconds; `__dlpack__` hands it over in a capsule.
//! <https://dmlc.github.io/dlpack/latest/c_api.html>

use std::ffi::{CStr, c_int, c_void};
use std::mem::MaybeUninit;

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyCapsule, PyDict, PyType};

use crate::errors;

/// A tensor as DLPack describes it.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Description {
    pub(crate) data: *mut c_void,
    pub(crate) device: Device,
    pub(crate) ndim: i32,
    pub(crate) dtype: DataType,
    pub(crate) shape: *const i64,
    /// In elements; null: rows one after the other.
    pub(crate) strides: *const i64,
    pub(crate) byte_offset: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Device {
    pub(crate) kind: i32,
    pub(crate) id: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DataType {
    pub(crate) code: u8,
    pub(crate) bits: u8,
    pub(crate) lanes: u16,
}

/// What a capsule named "dltensor_versioned" holds.
#[repr(C)]
struct Versioned {
    version: [u32; 2],
    manager: *mut c_void,
    deleter: *mut c_void,
    flags: u64,
    description: Description,
}

/// The flag of tensors that must not be written.
const READ_ONLY: u64 = 1;

/// The beginning of a library's table of functions.
#[repr(C)]
struct Table {
    version: [u32; 2],
    previous: *mut c_void,
    allocate: *mut c_void,
    managed_from_python: *mut c_void,
    managed_to_python: *mut c_void,
    borrow: Option<unsafe extern "C" fn(*mut c_void, *mut Description) -> c_int>,
}

/// A description, and what keeps it.
pub(crate) struct Borrowed<'py> {
    pub(crate) description: Description,
    pub(crate) read_only: bool,
    /// Frees the description, where it came in one.
    pub(crate) capsule: Option<Bound<'py, PyCapsule>>,
}

/// The first type of tensor that has a table, and its table: later calls find it at once.
static KNOWN: PyOnceLock<(Py<PyType>, usize)> = PyOnceLock::new();

/// Describes `tensor`; `what` is named in errors.
pub(crate) fn borrow<'py>(
    what: &'static str,
    tensor: &Bound<'py, PyAny>,
) -> PyResult<Borrowed<'py>> {
    let py = tensor.py();
    let class = tensor.get_type();
    if let Some((known, table)) = KNOWN.get(py)
        && class.is(known)
    {
        return by_table(what, *table, tensor);
    }
    if let Some(table) = table(&class)? {
        // another thread may have been the first
        let _ = KNOWN.set(py, (class.unbind(), table));
        return by_table(what, table, tensor);
    }
    by_capsule(what, tensor)
}

/// The address of the table of a type, where it has one that lends.
fn table(class: &Bound<'_, PyType>) -> PyResult<Option<usize>> {
    const NAME: &CStr = c"dlpack_exchange_api";
    let Some(capsule) = class.getattr_opt("__dlpack_c_exchange_api__")? else { return Ok(None) };
    let Ok(capsule) = capsule.cast_into::<PyCapsule>() else { return Ok(None) };
    let Ok(table) = capsule.pointer_checked(Some(NAME)) else { return Ok(None) };
    // SAFETY: a capsule of that name holds a table, which stays for as long as the process
    let first = unsafe { table.cast::<Table>().as_ref() };
    Ok((first.version[0] == 1 && first.borrow.is_some())
        .then_some(table.as_ptr().expose_provenance()))
}

fn by_table<'py>(
    what: &'static str,
    table: usize,
    tensor: &Bound<'py, PyAny>,
) -> PyResult<Borrowed<'py>> {
    let py = tensor.py();
    // the other way refuses those by itself
    if tensor.getattr("requires_grad")?.is_truthy()? {
        let reason = "requires gradients, and there are none here: call under torch.no_grad(), or \
                      give its .detach()";
        return Err(errors::input(py, what, reason));
    }
    // SAFETY: the address came from `table`; tables stay for as long as the process
    let table = unsafe { &*std::ptr::with_exposed_provenance::<Table>(table) };
    let borrow = table.borrow.ok_or_else(|| PyTypeError::new_err("a table that lends nothing"))?;
    let mut description = MaybeUninit::<Description>::uninit();
    // SAFETY: the function of this tensor's type; it writes the description if it returns 0
    match unsafe { borrow(tensor.as_ptr().cast(), description.as_mut_ptr()) } {
        0 => {
            // SAFETY: as above
            let description = unsafe { description.assume_init() };
            Ok(Borrowed { description, read_only: false, capsule: None })
        }
        // the first line of many
        _ => {
            let words = PyErr::fetch(py).value(py).to_string();
            Err(errors::input(py, what, words.lines().next().unwrap_or_default()))
        }
    }
}

fn by_capsule<'py>(what: &'static str, tensor: &Bound<'py, PyAny>) -> PyResult<Borrowed<'py>> {
    const PLAIN: &CStr = c"dltensor";
    const VERSIONED: &CStr = c"dltensor_versioned";
    let py = tensor.py();
    let Some(method) = tensor.getattr_opt("__dlpack__")? else {
        let class = tensor.get_type();
        let class = class.name()?;
        let reason = format!("a {class}; a tensor of torch, numpy or another library is needed");
        return Err(errors::input(py, what, reason));
    };
    let refused = |error: PyErr| errors::input(py, what, error.value(py).to_string());
    let newest = PyDict::new(py);
    newest.set_item("max_version", (1, 0))?;
    let capsule = match method.call((), Some(&newest)) {
        Err(error) if error.is_instance_of::<PyTypeError>(py) => method.call0(),
        answer => answer,
    };
    let capsule = capsule.map_err(refused)?.cast_into::<PyCapsule>()?;
    let (description, read_only) = match capsule.pointer_checked(Some(VERSIONED)) {
        Ok(held) => {
            // SAFETY: a capsule of that name holds this, and is kept
            let held = unsafe { held.cast::<Versioned>().as_ref() };
            if held.version[0] != 1 {
                let [major, minor] = held.version;
                return Err(errors::input(py, what, format!("DLPack {major}.{minor}, not 1")));
            }
            (held.description, held.flags & READ_ONLY != 0)
        }
        Err(_) => {
            let held = capsule.pointer_checked(Some(PLAIN))?;
            // SAFETY: a capsule of that name holds a struct that begins with the description
            (unsafe { *held.cast::<Description>().as_ref() }, false)
        }
    };
    // nobody takes the tensor out of the capsule: dropping it frees the description
    Ok(Borrowed { description, read_only, capsule: Some(capsule) })
}
