//! A fork-join thread pool for regions of a few microseconds.
//!
//! [`Pool::run`] runs the items `0..n` of a region on the calling thread and the pool's workers,
//! and returns when all of them are done. Items are claimed one at a time, so uneven ones balance.
//! Each item is told its [`Worker`], so that scratch can be a worker's own. A worker without work
//! spins for a short while, so that the next region of the same forward pass finds it awake, and
//! then sleeps, so that an idle pool costs nothing. The caller never waits for a worker that claimed
//! nothing: one that the operating system has set aside delays no region.
//!
//! One region runs at a time. A second thread that brings a region waits for its turn, and then has
//! all of the pool. Only a region that starts inside an item of the same pool, or of an older one,
//! may run on its own thread alone: where its pool is busy, it cannot wait without the danger of
//! waiting for itself.
//!
//! `region` holds the protocol, and the argument why it is right.

use std::cell::Cell;
use std::io;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

mod pin;
mod region;
mod sync;
mod wait;

pub use pin::stay_on;
use region::Shared;
use sync::{JoinHandle, thread_local};

/// Who runs an item: the same number for all items that one thread runs of one region, and for no
/// other thread's. The thread that started the region is number 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Worker(usize);

impl Worker {
    /// Number `index`, for a pool of your own.
    pub const fn new(index: usize) -> Worker {
        Worker(index)
    }

    /// The number, less than [`ThreadPool::threads`].
    pub const fn index(self) -> usize {
        self.0
    }
}

/// What a region does with its items.
pub type Work<'a> = &'a (dyn Fn(Worker, usize) + Sync);

/// Runs the items of a parallel region. Implement it to have kernels run on threads of your own.
pub trait ThreadPool: Sync {
    /// The number of threads that may take part in one region.
    fn threads(&self) -> usize;

    /// Calls `work(worker, i)` once for every `i < items`, in any order, on any threads, and returns
    /// when all calls have returned. No two calls run at the same time with the same worker of one
    /// region. A panic in `work` reaches the caller.
    fn run(&self, items: usize, work: Work<'_>);
}

/// No threads: all items run in order on the calling thread.
#[derive(Clone, Copy, Debug, Default)]
pub struct Inline;

impl ThreadPool for Inline {
    fn threads(&self) -> usize {
        1
    }

    fn run(&self, items: usize, work: Work<'_>) {
        (0..items).for_each(|item| work(Worker(0), item));
    }
}

/// A fork-join pool of a fixed number of threads, the caller's among them. See the module's text.
pub struct Pool {
    /// Pools are numbered as they are made.
    number: usize,
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

/// The pools that there have been.
static POOLS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// The lowest number of the pools in whose items this thread is. It waits for older ones alone:
    /// so nobody waits in a circle.
    static INSIDE: Cell<usize> = const { Cell::new(usize::MAX) };
}

impl Pool {
    /// A pool of `threads` threads: `threads - 1` workers, and the thread that calls
    /// [`run`](Pool::run). With one thread or none there are no workers, and everything runs inline.
    ///
    /// # Errors
    /// The operating system refused to start a thread.
    pub fn new(threads: usize) -> io::Result<Pool> {
        Pool::start(threads, |_, spawn| spawn())
    }

    /// The same with every worker on a processor of its own, where it stays: number `i` on
    /// `cpus[i]`. The first one is left to the thread that calls [`run`](Pool::run), which is not
    /// touched: it may [`stay_on`] it. [`isa::cpus`](crate::isa::cpus) has what there is.
    ///
    /// # Errors
    /// The operating system refused to start a thread, or to pin it: the process may not use that
    /// processor, or threads cannot be pinned at all (elsewhere than on Linux).
    pub fn pinned(cpus: &[usize]) -> io::Result<Pool> {
        Pool::start(cpus.len(), |number, spawn| pin::started_on(cpus[number], spawn))
    }

    /// A pool whose workers `start(number, spawn)` spawns.
    fn start(
        threads: usize,
        start: impl Fn(
            usize,
            &mut dyn FnMut() -> io::Result<JoinHandle<()>>,
        ) -> io::Result<JoinHandle<()>>,
    ) -> io::Result<Pool> {
        let order = POOLS.fetch_add(1, Ordering::Relaxed);
        let shared = Arc::new(Shared::new());
        let mut pool = Pool { number: order, shared, workers: Vec::new() };
        for number in 1..threads {
            // On an error, dropping the pool ends the workers that did start.
            let worker = start(number, &mut || {
                let shared = Arc::clone(&pool.shared);
                let builder = sync::Builder::new().name(format!("moe-{number}"));
                builder.spawn(move || {
                    INSIDE.with(|inside| inside.set(order));
                    shared.work_until_stopped(Worker(number));
                })
            })?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// The number of threads that run a region, the caller's among them.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `work(worker, i)` once for every `i < items`, on this thread and the workers, and
    /// returns when all calls have returned. While the pool runs another thread's region, this one
    /// waits; but where it starts inside an item, of this pool or an older one, its items run inline.
    ///
    /// # Panics
    /// With the first panic of `work`. Whether other items still run is not specified; all that
    /// started have ended.
    pub fn run(&self, items: usize, work: Work<'_>) {
        if items <= 1 || self.workers.is_empty() || items > isize::MAX as usize {
            return Inline.run(items, work);
        }
        let inside = INSIDE.with(Cell::get);
        let Some(turn) = self.shared.turn(self.number < inside) else {
            return Inline.run(items, work);
        };
        INSIDE.with(|lowest| lowest.set(inside.min(self.number)));
        let panic = self.shared.run_region(&turn, items, work);
        INSIDE.with(|lowest| lowest.set(inside));
        drop(turn);
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
    }
}

impl ThreadPool for Pool {
    fn threads(&self) -> usize {
        Pool::threads(self)
    }

    fn run(&self, items: usize, work: Work<'_>) {
        Pool::run(self, items, work);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop();
        for worker in self.workers.drain(..) {
            // A worker catches the panics of its items, and has none of its own to report.
            let _ = worker.join();
        }
    }
}

#[cfg(all(test, loom))]
mod model;
#[cfg(all(test, not(loom)))]
mod tests;
