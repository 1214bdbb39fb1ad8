//! The library's errors as Python's exceptions, with the library's words.

use moe_runner::Error;
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::PyType;

/// The exception that a Python program can tell this error by.
pub(crate) fn exception(py: Python<'_>, error: &Error) -> PyErr {
    let class = match error {
        Error::Input { .. } | Error::UnknownLayer { .. } => "InputError",
        Error::Io { .. } | Error::File { .. } | Error::Tensor { .. } | Error::Config { .. } => {
            "CheckpointError"
        }
        Error::NoKernel(_) => "NoKernelError",
        _ => "Error",
    };
    let mut words = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(next) = cause {
        words += &format!(": {next}");
        cause = next.source();
    }
    of_class(py, class, words)
}

/// An exception of the package by the name of its class.
pub(crate) fn of_class(py: Python<'_>, class: &str, words: String) -> PyErr {
    let found = py.import("moe_runner._errors").and_then(|module| module.getattr(class));
    match found.map(|class| class.cast_into::<PyType>()) {
        Ok(Ok(class)) => PyErr::from_type(class, words),
        _ => PyRuntimeError::new_err(words),
    }
}

/// What is wrong with an argument.
pub(crate) fn input(py: Python<'_>, what: &'static str, reason: impl Into<String>) -> PyErr {
    exception(py, &Error::input(what, reason))
}

/// An error that becomes an exception.
pub(crate) trait OrRaise<T> {
    /// The value, or the exception.
    fn or_raise(self, py: Python<'_>) -> PyResult<T>;
}

impl<T> OrRaise<T> for moe_runner::Result<T> {
    fn or_raise(self, py: Python<'_>) -> PyResult<T> {
        self.map_err(|error| exception(py, &error))
    }
}
