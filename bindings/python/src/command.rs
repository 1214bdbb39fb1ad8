//! The command `moe-runner`, as a program and as functions.

use std::ffi::OsString;

use pyo3::prelude::*;

use crate::errors;

/// Runs the command as a program, with the program's name first; returns the exit status.
#[pyfunction]
pub(crate) fn main(py: Python<'_>, args: Vec<OsString>) -> u8 {
    py.detach(|| moe_runner_cli::main(args))
}

/// Runs the command as a function; returns the JSON text of its report.
#[pyfunction]
pub(crate) fn report(py: Python<'_>, args: Vec<OsString>) -> PyResult<String> {
    let named = std::iter::once("moe-runner".into()).chain(args);
    py.detach(|| moe_runner_cli::report(named)).map_err(|failure| {
        let class = match failure.kind {
            "arguments" | "input" => "InputError",
            "io" | "file" | "tensor" | "config" => "CheckpointError",
            "no_kernel" => "NoKernelError",
            _ => "Error",
        };
        errors::of_class(py, class, failure.message)
    })
}
