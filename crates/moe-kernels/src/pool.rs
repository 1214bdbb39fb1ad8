//! A fork-join thread pool for regions of a few microseconds.
//!
//! [`Pool::run`] runs the items `0..n` of a region on the calling thread and the pool's workers,
//! and returns when all of them are done. Items are claimed one at a time, so uneven ones balance.
//! A worker without work spins for a short while, so that the next region of the same forward pass
//! finds it awake, and then sleeps, so that an idle pool costs nothing. The caller never waits for a
//! worker that claimed nothing: one that the operating system has set aside delays no region.
//!
//! # Why it is right
//!
//! One region runs at a time: `busy` is taken by a swap, and a caller that finds it taken (a nested
//! `run`, or another thread's) runs its own items inline, so nothing ever waits for a lock.
//!
//! Three words carry a region: `job`, a plain cell; `unclaimed`, the items that nobody has taken;
//! and `unfinished`, the items that have not returned.
//!
//! 1. *Claims see their job.* The caller writes `job` and `unfinished`, then stores `unclaimed`
//!    (release). A claim is `unclaimed.fetch_sub(1)` (acquire) that returns a positive number. That
//!    number was put there by the store or by claims after it, which continue its release sequence:
//!    the claimant sees `job`. At the end of a region `unclaimed` is zero or less, so a positive
//!    number always belongs to the region that is running, however late the claimant comes.
//! 2. *`job` is written by one and read by none.* It is read only between a successful claim and
//!    the claimant's `unfinished.fetch_sub` (release). The caller goes on only when it has read
//!    zero there (acquire), so every read of `job`, and everything that the items wrote, happens
//!    before `run` returns and before `job` is written again. Between two callers the order is that
//!    of `busy` (released at the end of a region, acquired at the next).
//! 3. *The borrowed closure outlives its use*, by 2: after the last `unfinished.fetch_sub` nobody
//!    touches `job` until the next region.
//! 4. *No wake-up is lost.* A worker that goes to sleep holds the `sleep` mutex, increments
//!    `sleepers`, then looks at `unclaimed`; the caller stores `unclaimed`, then looks at
//!    `sleepers`, all four sequentially consistent: in their one total order either the worker sees
//!    the items, or the caller sees the sleeper. In the latter case it takes the mutex before it
//!    notifies; then the worker is already waiting on the condition variable, or has yet to look.
//!    `stop` is set under the mutex and needs no such argument.
//! 5. *Panics.* Items run under `catch_unwind`; the first payload is kept and resumed by the caller
//!    after the region has ended in the usual way.

use std::any::Any;
use std::cell::UnsafeCell;
use std::hint::spin_loop;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicIsize, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How long a worker without work stays awake: longer than the serial work between the regions of
/// a forward pass, shorter than anyone would notice on an idle machine.
const AWAKE: Duration = Duration::from_micros(80);

/// How long a thread spins before it begins to give its processor to others between two looks: the
/// one it waits for may be among them.
const SPIN: Duration = Duration::from_micros(10);

/// Looks between two readings of the clock.
const LOOKS: u32 = 64;

/// Runs the items of a parallel region. Implement it to have kernels run on threads of your own.
pub trait ThreadPool: Sync {
    /// How many threads run a region, the caller's among them: at least one.
    fn threads(&self) -> usize;

    /// Calls `work(i)` once for every `i < items`, in any order, on any threads, and returns when
    /// all calls have returned. A panic in `work` reaches the caller.
    fn run(&self, items: usize, work: &(dyn Fn(usize) + Sync));
}

/// No threads: all items run in order on the calling thread.
#[derive(Clone, Copy, Debug, Default)]
pub struct Inline;

impl ThreadPool for Inline {
    fn threads(&self) -> usize {
        1
    }

    fn run(&self, items: usize, work: &(dyn Fn(usize) + Sync)) {
        (0..items).for_each(work);
    }
}

/// A fork-join pool of a fixed number of threads, the caller's among them. See the module's text.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

impl Pool {
    /// A pool of `threads` threads: `threads - 1` workers, and the thread that calls
    /// [`run`](Pool::run). With one thread or none there are no workers, and everything runs inline.
    ///
    /// # Errors
    /// The operating system refused to start a thread.
    pub fn new(threads: usize) -> io::Result<Pool> {
        let mut pool = Pool { shared: Arc::new(Shared::new()), workers: Vec::new() };
        for i in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let builder = thread::Builder::new().name(format!("moe-{i}"));
            // On an error, dropping the pool ends the workers that did start.
            pool.workers.push(builder.spawn(move || shared.work_until_stopped())?);
        }
        Ok(pool)
    }

    /// The number of threads that run a region, the caller's among them.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `work(i)` once for every `i < items`, on this thread and the workers, and returns when
    /// all calls have returned. While the pool runs another region (this one is nested in it, or
    /// another thread started it), the items run inline.
    ///
    /// # Panics
    /// With the first panic of `work`. Whether other items still run is not specified; all that
    /// started have ended.
    pub fn run(&self, items: usize, work: &(dyn Fn(usize) + Sync)) {
        let inline = items <= 1 || self.workers.is_empty() || items > isize::MAX as usize;
        if inline || self.shared.busy.swap(true, Ordering::Acquire) {
            return Inline.run(items, work);
        }
        self.shared.run_region(items, work, self.workers.len());
        let panic = lock(&self.shared.panic).take();
        self.shared.busy.store(false, Ordering::Release);
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
    }
}

impl ThreadPool for Pool {
    fn threads(&self) -> usize {
        Pool::threads(self)
    }

    fn run(&self, items: usize, work: &(dyn Fn(usize) + Sync)) {
        Pool::run(self, items, work);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        {
            let _sleep = lock(&self.shared.sleep);
            self.shared.stop.store(true, Ordering::SeqCst);
            self.shared.wake.notify_all();
        }
        for worker in self.workers.drain(..) {
            // A worker catches the panics of its items, and has none of its own to report.
            let _ = worker.join();
        }
    }
}

/// A value on cache lines of its own: 128 bytes, because CPUs prefetch lines in pairs.
#[repr(align(128))]
struct Line<T>(T);

/// What a region runs.
#[derive(Clone, Copy)]
struct Job {
    work: *const (dyn Fn(usize) + Sync),
    items: usize,
}

struct Shared {
    /// Items that nobody has claimed; zero or less between regions.
    unclaimed: Line<AtomicIsize>,
    /// Items that have not returned.
    unfinished: Line<AtomicUsize>,
    /// Workers that sleep, or are about to.
    sleepers: Line<AtomicUsize>,
    /// Whether a region runs.
    busy: AtomicBool,
    stop: AtomicBool,
    job: UnsafeCell<Option<Job>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    sleep: Mutex<()>,
    wake: Condvar,
}

// SAFETY: `job` is the only field that is not `Sync` and `Send` by itself. It is written only by the
// thread that holds `busy`, while no claim is unfinished, and read only under a claim (1 and 2 in
// the module's text); the closure that it points to is `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

impl Shared {
    fn new() -> Shared {
        Shared {
            unclaimed: Line(AtomicIsize::new(0)),
            unfinished: Line(AtomicUsize::new(0)),
            sleepers: Line(AtomicUsize::new(0)),
            busy: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            job: UnsafeCell::new(None),
            panic: Mutex::new(None),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
        }
    }

    /// Runs a region to its end; the caller holds `busy`. Panics of items are left in `panic`.
    fn run_region(&self, items: usize, work: &(dyn Fn(usize) + Sync), workers: usize) {
        // SAFETY: only the lifetime changes. The pointer is used under claims alone, and this
        // function returns after the last of them (3 in the module's text).
        let work = unsafe {
            std::mem::transmute::<*const (dyn Fn(usize) + Sync), *const (dyn Fn(usize) + Sync)>(
                work,
            )
        };
        // SAFETY: we hold `busy`, and no claim of an earlier region is unfinished (2).
        unsafe { *self.job.get() = Some(Job { work, items }) };
        self.unfinished.0.store(items, Ordering::Relaxed);
        self.unclaimed.0.store(items as isize, Ordering::SeqCst);
        if self.sleepers.0.load(Ordering::SeqCst) > 0 {
            drop(lock(&self.sleep));
            for _ in 0..workers.min(items - 1) {
                self.wake.notify_one();
            }
        }
        self.run_items();
        let mut wait = Wait::new();
        while self.unfinished.0.load(Ordering::Acquire) != 0 {
            wait.pause();
        }
    }

    /// Claims and runs items until none is unclaimed.
    fn run_items(&self) {
        let mut finished = 0;
        // The first look spares the line from writes of those who come too late.
        while self.unclaimed.0.load(Ordering::Relaxed) > 0 {
            let left = self.unclaimed.0.fetch_sub(1, Ordering::Acquire);
            if left <= 0 {
                break;
            }
            // SAFETY: `left > 0`: we hold a claim that is not finished (1 and 2).
            let job = unsafe { *self.job.get() };
            let Some(job) = job else { unreachable!("a region was published without its job") };
            // SAFETY: as above; the closure lives until our claim is finished (3).
            let work = unsafe { &*job.work };
            let item = job.items - left as usize;
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| work(item))) {
                lock(&self.panic).get_or_insert(payload);
            }
            finished += 1;
        }
        if finished > 0 {
            self.unfinished.0.fetch_sub(finished, Ordering::Release);
        }
    }

    /// The life of a worker.
    fn work_until_stopped(&self) {
        let mut wait = Wait::new();
        while !self.stop.load(Ordering::Relaxed) {
            if self.unclaimed.0.load(Ordering::Relaxed) > 0 {
                self.run_items();
                wait = Wait::new();
            } else if wait.waited() < AWAKE {
                wait.pause();
            } else {
                self.sleep_until_work();
                wait = Wait::new();
            }
        }
    }

    fn sleep_until_work(&self) {
        let mut sleep = lock(&self.sleep);
        self.sleepers.0.fetch_add(1, Ordering::SeqCst);
        while self.unclaimed.0.load(Ordering::SeqCst) <= 0 && !self.stop.load(Ordering::SeqCst) {
            sleep = self.wake.wait(sleep).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// No code that can panic runs under these locks, so a poisoned one is still in order.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The pauses of one wait: pure spinning first, then with the processor offered to other threads.
struct Wait {
    since: Instant,
    waited: Duration,
    looks: u32,
}

impl Wait {
    fn new() -> Wait {
        Wait { since: Instant::now(), waited: Duration::ZERO, looks: 0 }
    }

    /// Between two looks at what is waited for.
    fn pause(&mut self) {
        spin_loop();
        self.looks += 1;
        if self.looks.is_multiple_of(LOOKS) {
            self.waited = self.since.elapsed();
        }
        if self.waited > SPIN {
            thread::yield_now();
            self.waited = self.since.elapsed();
        }
    }

    /// How long this wait has lasted, as of the last reading of the clock.
    fn waited(&self) -> Duration {
        self.waited
    }
}

#[cfg(test)]
mod tests;
