//! Every collective over MPI against a sequential computation: `mpirun -n 4 mpi_selftest`; rank 0
//! prints "N passed, 0 failed".
//!
//! `mpi_selftest SCENARIO [TIMEOUT_MS [LIBRARY]]`: one of the ways to fail instead (see
//! `tests/comm_suite/scenario.rs`), another time-out, another MPI library.

#[path = "../tests/comm_suite/scenario.rs"]
mod scenario;
#[path = "../tests/comm_suite/mod.rs"]
mod suite;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use moe_runner::comm::{Options, mpi};

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let scenario = args.next().unwrap_or_else(|| "suite".to_owned());
    let timeout = args.next().and_then(|text| text.parse().ok()).unwrap_or(60_000);
    let options = Options { timeout: Duration::from_millis(timeout) };
    let library = args.next().map(PathBuf::from);
    let comm = mpi::open_with(options, library.as_deref());
    match comm.and_then(|comm| scenario::run(&*comm, &scenario)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // One write, so that lines of several ranks do not mix.
            let line = format!("error: {error}\n");
            let _ = std::io::stderr().write_all(line.as_bytes());
            ExitCode::FAILURE
        }
    }
}
