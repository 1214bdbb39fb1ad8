//! The command `moe-runner`, as a program and as functions.

use std::ffi::OsString;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, mpsc};
use std::thread::Builder;
use std::time::Duration;

use pyo3::prelude::*;

use crate::errors;

/// What the main thread of a program has.
const STACK: usize = 8 << 20;

/// How long a signal may wait.
const LOOKS: Duration = Duration::from_millis(50);

/// Runs the command as a program, with the program's name first; returns the exit status.
#[pyfunction]
pub(crate) fn main(py: Python<'_>, args: Vec<OsString>) -> u8 {
    py.detach(|| moe_runner_cli::main(args))
}

/// Runs the command as a function; returns the JSON text of its report. Signals are looked at meanwhile,
/// as Python does between its own steps.
#[pyfunction]
pub(crate) fn report(py: Python<'_>, args: Vec<OsString>) -> PyResult<String> {
    let named = std::iter::once("moe-runner".into()).chain(args);
    let stop = Arc::new(AtomicBool::new(false));
    let asked = stop.clone();
    let (done, result) = mpsc::channel();
    let work = move || {
        let reported = moe_runner_cli::report(named, asked);
        // the receiver waits for it
        let _ = done.send(reported);
    };
    let thread = Builder::new().stack_size(STACK).spawn(work)?;
    let ended = py.detach(move || {
        let ended = loop {
            match result.recv_timeout(LOOKS) {
                Ok(reported) => break Ok(reported),
                Err(RecvTimeoutError::Timeout) => {}
                // it has panicked
                Err(RecvTimeoutError::Disconnected) => break Err(None),
            }
            if let Err(raised) = Python::attach(|py| py.check_signals()) {
                stop.store(true, Ordering::Release);
                break Err(Some(raised));
            }
        };
        thread.join().map(|()| ended)
    });
    match ended {
        Ok(Ok(reported)) => reported.map_err(|failure| exception(py, failure)),
        Ok(Err(Some(raised))) => Err(raised),
        Ok(Err(None)) => Err(errors::of_class(py, "Error", "there is no report".into())),
        Err(panic) => resume_unwind(panic),
    }
}

fn exception(py: Python<'_>, failure: moe_runner_cli::Failure) -> PyErr {
    let class = match failure.kind {
        "arguments" | "input" => "InputError",
        "io" | "file" | "tensor" | "config" => "CheckpointError",
        "no_kernel" => "NoKernelError",
        _ => "Error",
    };
    errors::of_class(py, class, failure.message)
}
