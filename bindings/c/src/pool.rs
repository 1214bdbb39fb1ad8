//! Threads of the caller's own.

use std::any::Any;
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use moe_kernels::pool::{self, Work, Worker};
use moe_runner::{Error, Result};

/// What a pool calls, once for each item of a region. May be called on any thread, and never returns
/// anything: what goes wrong is told when the region has ended.
pub type Task = unsafe extern "C" fn(work: *const c_void, item: usize, worker: usize);

/// Threads of the caller's own.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ThreadPool {
    /// Handed to `run`.
    pub context: *mut c_void,
    /// The most that take part in one region, at least 1.
    pub threads: usize,
    /// Calls task(work, item, worker) once for every item < items, in any order, on any threads, and
    /// returns when all calls have returned. Workers are numbered from 0 to threads - 1; no two calls
    /// with one worker run at the same time. Regions of several handles may run at the same time.
    pub run: Option<
        unsafe extern "C" fn(context: *mut c_void, items: usize, task: Task, work: *const c_void),
    >,
}

/// A [`ThreadPool`] that was checked.
pub(crate) struct ForeignPool {
    pool: ThreadPool,
}

// SAFETY: the header says that `run` may be called from any thread with this context
unsafe impl Send for ForeignPool {}
// SAFETY: as above, and from several at once
unsafe impl Sync for ForeignPool {}

impl ForeignPool {
    pub(crate) fn new(pool: ThreadPool) -> Result<Self> {
        match (pool.threads, pool.run) {
            (1.., Some(_)) => Ok(Self { pool }),
            _ => Err(Error::input("options.pool", "needs a run function and at least one thread")),
        }
    }
}

/// One region, on the stack of the thread that runs it.
struct Region<'a> {
    work: Work<'a>,
    threads: usize,
    done: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

unsafe extern "C" fn task(region: *const c_void, item: usize, worker: usize) {
    // SAFETY: `run` gave the address of a region, and waits for this call
    let region = unsafe { &*region.cast::<Region<'_>>() };
    let ran = catch_unwind(AssertUnwindSafe(|| {
        assert!(worker < region.threads, "worker {worker} of a pool of {}", region.threads);
        (region.work)(Worker::new(worker), item);
    }));
    match ran {
        Ok(()) => {
            region.done.fetch_add(1, Ordering::Relaxed);
        }
        Err(panic) => {
            if let Ok(mut first) = region.panic.lock() {
                first.get_or_insert(panic);
            }
        }
    }
}

impl pool::ThreadPool for ForeignPool {
    fn threads(&self) -> usize {
        self.pool.threads
    }

    fn run(&self, items: usize, work: Work<'_>) {
        let region = Region {
            work,
            threads: self.pool.threads,
            done: AtomicUsize::new(0),
            panic: Mutex::new(None),
        };
        if let Some(run) = self.pool.run {
            // SAFETY: the caller's promise: it calls `task` with this address, and returns when all
            // those calls have
            unsafe { run(self.pool.context, items, task, (&raw const region).cast()) };
        }
        if let Some(panic) = region.panic.into_inner().ok().flatten() {
            resume_unwind(panic);
        }
        let done = region.done.into_inner();
        assert!(done == items, "the caller's thread pool ran {done} of {items} items of a region");
    }
}
