//! The locks of ranks that are threads: the standard library's, or their doubles of the model checker
//! `loom` (`--cfg loom`), which tries every order in which ranks can meet.

#[cfg(loom)]
pub(super) use loom::sync::{Condvar, Mutex, MutexGuard};
#[cfg(not(loom))]
pub(super) use std::sync::{Condvar, Mutex, MutexGuard};

use std::sync::PoisonError;

/// A panic while a lock is held would be a bug of this module; others can still report it.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
