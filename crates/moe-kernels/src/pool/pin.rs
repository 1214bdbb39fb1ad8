//! Threads that stay on a processor.

use std::io;

/// Keeps the calling thread on processor `cpu`, and what it starts from now on.
///
/// # Errors
/// The process may not use that processor, or threads cannot be pinned (elsewhere than on Linux).
#[cfg(target_os = "linux")]
pub fn stay_on(cpu: usize) -> io::Result<()> {
    use rustix::thread::{CpuSet, sched_setaffinity};
    if cpu >= CpuSet::MAX_CPU {
        let reason = format!("processor {cpu}: threads are pinned to {} at most", CpuSet::MAX_CPU);
        return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
    }
    let mut only = CpuSet::new();
    only.set(cpu);
    Ok(sched_setaffinity(None, &only)?)
}

/// Fails: threads cannot be pinned here.
///
/// # Errors
/// Always.
#[cfg(not(target_os = "linux"))]
pub fn stay_on(_: usize) -> io::Result<()> {
    Err(io::Error::new(io::ErrorKind::Unsupported, "threads are pinned on Linux alone"))
}

/// Calls `start` with the calling thread on processor `cpu` alone: threads that it starts stay there.
/// Afterwards the calling thread is where it was.
#[cfg(target_os = "linux")]
pub(super) fn started_on<T>(cpu: usize, start: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    use rustix::thread::{sched_getaffinity, sched_setaffinity};
    let before = sched_getaffinity(None)?;
    stay_on(cpu)?;
    let started = start();
    sched_setaffinity(None, &before)?;
    started
}

#[cfg(not(target_os = "linux"))]
pub(super) fn started_on<T>(cpu: usize, start: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    stay_on(cpu).and_then(|()| start())
}
