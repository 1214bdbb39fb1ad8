//! The layer in Python: the native half of the package `moe_runner`.
//!
//! Tensors come as they are, by DLPack, and nothing is copied; the interpreter runs other threads
//! while a pass runs. What each class and function does is told where Python reads it.

// arguments of Python are keywords
#![allow(clippy::too_many_arguments)]

mod command;
mod dlpack;
mod errors;
mod experts;
mod layer;
mod settings;
mod tensors;

use pyo3::prelude::*;

/// The native half of `moe_runner`.
#[pymodule(gil_used = false)]
mod _native {
    #[pymodule_export]
    use crate::command::{main, report};
    #[pymodule_export]
    use crate::experts::Experts;
    #[pymodule_export]
    use crate::layer::{Checkpoint, Layer};

    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
