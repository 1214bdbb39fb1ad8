//! What can go wrong, in one line each: what, where, and what to do.

use std::path::PathBuf;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of the driver, the compiler, a kernel, or of what was asked for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A library is not on this machine, or lacks a function.
    #[error("no {what}: {reason}")]
    Library {
        /// "NVIDIA driver" or "NVRTC".
        what: &'static str,
        /// What was tried, and what to install.
        reason: String,
    },
    /// There is no GPU, or not this one, or one that is too old.
    #[error("GPU {index}: {reason}")]
    Gpu {
        /// The GPU's number, from 0.
        index: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// The driver refused a call. Kernels run later than they are launched: such an error belongs to
    /// one of the steps that `at` names.
    #[error("{call}: {code} ({text}){at}")]
    Call {
        /// The driver's function.
        call: &'static str,
        /// The error's name, such as `CUDA_ERROR_ILLEGAL_ADDRESS`.
        code: String,
        /// The driver's explanation.
        text: String,
        /// Layer and steps that had been launched, or nothing.
        at: String,
    },
    /// Not enough memory on the GPU.
    #[error("GPU memory: {wanted} bytes wanted for {purpose}, {free} of {total} bytes are free")]
    OutOfMemory {
        /// Bytes that were asked for.
        wanted: u64,
        /// What for.
        purpose: String,
        /// Bytes free on the GPU.
        free: u64,
        /// Bytes of the GPU.
        total: u64,
    },
    /// A kernel does not compile: a fault of this crate, or a compiler that does not know the GPU.
    #[error("kernel {kernel} for {arch}: {reason}\n{log}")]
    Compile {
        /// Which source.
        kernel: &'static str,
        /// For what, such as `sm_90a`.
        arch: String,
        /// The compiler's verdict.
        reason: String,
        /// Its messages.
        log: String,
    },
    /// Shapes, options or pointers that do not fit each other.
    #[error("{what}: {reason}")]
    Input {
        /// Of which verb.
        what: &'static str,
        /// What does not fit.
        reason: String,
    },
    /// Data that a kernel met cannot be computed with.
    #[error("{0}")]
    Fault(#[from] crate::fault::Fault),
    /// A file of the cache of compiled kernels.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
}

impl Error {
    pub(crate) fn input(what: &'static str, reason: impl Into<String>) -> Self {
        Self::Input { what, reason: reason.into() }
    }
}
