//! One region at a time: how items are handed out, and how the caller knows that all are done.
//!
//! # Why it is right
//!
//! Who runs a region holds the `turn` mutex. Three words carry the region: `job`, a plain cell;
//! `unclaimed`, the items that nobody has taken; and `unfinished`, the items that have not returned.
//!
//! 1. *Claims see their job.* The caller writes `job` and `unfinished`, then swaps `unclaimed`
//!    (release). A claim is `unclaimed.fetch_sub(1)` (acquire) that returns a positive number. That
//!    number was put there by the swap or by claims after it, which continue its release sequence:
//!    the claimant sees `job`. At the end of a region `unclaimed` is zero or less, so a positive
//!    number always belongs to the region that is running, however late the claimant comes.
//! 2. *`job` is written by one and read by none.* It is read only between a successful claim and
//!    the claimant's `unfinished.fetch_sub` (release). The caller goes on only when it has read
//!    zero there (acquire), so every read of `job`, and everything that the items wrote, happens
//!    before `run` returns and before `job` is written again. Between two callers the order is that
//!    of the `turn`.
//! 3. *The borrowed closure outlives its use*, by 2: after the last `unfinished.fetch_sub` nobody
//!    touches `job` until the next region.
//! 4. *No wake-up is lost.* A worker that goes to sleep holds the `sleep` mutex, increments
//!    `sleepers`, then looks at `unclaimed`; the caller stores `unclaimed`, then looks at
//!    `sleepers`; both with a sequentially consistent fence in between. Either the worker's fence
//!    comes after the caller's, and it sees the items, or the caller's comes after the worker's, and
//!    it sees the sleeper. In the latter case it takes the mutex before it notifies; then the worker
//!    is already waiting on the condition variable, or has yet to look. `stop` is set under the
//!    mutex and needs no such argument.
//! 5. *Panics.* Items run under `catch_unwind`; the first payload is kept, and resumed by the caller
//!    after the region has ended in the usual way. Later ones are forgotten, not dropped: a drop
//!    that panics again would end a worker between its claim and its report.
//! 6. *No waiting in a circle.* A thread inside items waits only for the turn of a pool that is older
//!    than all of theirs; of others it takes the turn where it is free, and runs inline where it is
//!    not. So whoever waits, waits for an older pool than those that wait for it.

use std::any::Any;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::PoisonError;

use super::sync::{
    AtomicBool, AtomicIsize, AtomicUsize, Condvar, Mutex, MutexGuard, Ordering, UnsafeCell, fence,
};
use super::wait::Wait;
use super::{Work, Worker};

/// What a panic carries.
type Payload = Box<dyn Any + Send>;

/// A value on cache lines of its own: 128 bytes, because CPUs prefetch lines in pairs.
#[repr(align(128))]
struct Line<T>(T);

/// What a region runs.
#[derive(Clone, Copy)]
struct Job {
    work: *const (dyn Fn(Worker, usize) + Sync),
    items: usize,
}

/// The right to start a region.
pub(super) struct Turn<'a>(#[expect(dead_code, reason = "held, not read")] MutexGuard<'a, ()>);

/// What the threads of a pool share.
pub(super) struct Shared {
    /// Items that nobody has claimed; zero or less between regions.
    unclaimed: Line<AtomicIsize>,
    /// Items that have not returned.
    unfinished: Line<AtomicUsize>,
    /// Workers that sleep, or are about to.
    sleepers: Line<AtomicUsize>,
    stop: AtomicBool,
    job: UnsafeCell<Option<Job>>,
    panic: Mutex<Option<Payload>>,
    turn: Mutex<()>,
    sleep: Mutex<()>,
    wake: Condvar,
}

// SAFETY: `job` is the only field that is not `Sync` and `Send` by itself. It is written only by the
// thread whose turn it is, while no claim is unfinished, and read only under a claim (1 and 2 in
// the module's text); the closure that it points to is `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

impl Shared {
    pub(super) fn new() -> Shared {
        Shared {
            unclaimed: Line(AtomicIsize::new(0)),
            unfinished: Line(AtomicUsize::new(0)),
            sleepers: Line(AtomicUsize::new(0)),
            stop: AtomicBool::new(false),
            job: UnsafeCell::new(None),
            panic: Mutex::new(None),
            turn: Mutex::new(()),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
        }
    }

    /// The turn; with `wait` when it comes, else only if it is free.
    pub(super) fn turn(&self, wait: bool) -> Option<Turn<'_>> {
        let guard = match wait {
            true => lock(&self.turn),
            false => self.turn.try_lock().ok()?,
        };
        Some(Turn(guard))
    }

    /// Runs a region to its end. Returns the first panic of its items.
    pub(super) fn run_region(
        &self,
        _turn: &Turn<'_>,
        items: usize,
        work: Work<'_>,
    ) -> Option<Payload> {
        // SAFETY: only the lifetime changes. The pointer is used under claims alone, and this
        // function returns after the last of them (3 in the module's text).
        let work = unsafe {
            mem::transmute::<
                *const (dyn Fn(Worker, usize) + Sync),
                *const (dyn Fn(Worker, usize) + Sync),
            >(work)
        };
        // SAFETY: it is our turn, and no claim of an earlier region is unfinished (2).
        self.job.with_mut(|job| unsafe { *job = Some(Job { work, items }) });
        self.unfinished.0.store(items, Ordering::Relaxed);
        // A swap, which even the model checker orders after the claims of those who came too late.
        self.unclaimed.0.swap(items as isize, Ordering::Release);
        fence(Ordering::SeqCst);
        let sleepers = self.sleepers.0.load(Ordering::Relaxed);
        if sleepers > 0 {
            drop(lock(&self.sleep));
            // one item is the caller's own
            (1..items).take(sleepers).for_each(|_| self.wake.notify_one());
        }
        self.run_items(Worker(0));
        let mut wait = Wait::new();
        while self.unfinished.0.load(Ordering::Acquire) != 0 {
            wait.pause();
        }
        lock(&self.panic).take()
    }

    /// Claims and runs items until none is unclaimed.
    fn run_items(&self, worker: Worker) {
        let mut finished = 0;
        // The first look spares the line from writes of those who come too late.
        while self.unclaimed.0.load(Ordering::Relaxed) > 0 {
            let left = self.unclaimed.0.fetch_sub(1, Ordering::Acquire);
            if left <= 0 {
                break;
            }
            // SAFETY: `left > 0`: we hold a claim that is not finished (1 and 2).
            let job = self.job.with(|job| unsafe { *job });
            let Some(job) = job else { unreachable!("a region was published without its job") };
            // SAFETY: as above; the closure lives until our claim is finished (3).
            let work = unsafe { &*job.work };
            let item = job.items - left as usize;
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| work(worker, item))) {
                let mut first = lock(&self.panic);
                match &*first {
                    None => *first = Some(payload),
                    Some(_) => mem::forget(payload),
                }
            }
            finished += 1;
        }
        if finished > 0 {
            self.unfinished.0.fetch_sub(finished, Ordering::Release);
        }
    }

    /// The life of a worker.
    pub(super) fn work_until_stopped(&self, worker: Worker) {
        let mut wait = Wait::new();
        while !self.stop.load(Ordering::Relaxed) {
            if self.unclaimed.0.load(Ordering::Relaxed) > 0 {
                self.run_items(worker);
                wait = Wait::new();
            } else if wait.is_long() {
                self.sleep_until_work();
                wait = Wait::new();
            } else {
                wait.pause();
            }
        }
    }

    fn sleep_until_work(&self) {
        let mut sleep = lock(&self.sleep);
        self.sleepers.0.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        while self.unclaimed.0.load(Ordering::Relaxed) <= 0 && !self.stop.load(Ordering::Relaxed) {
            sleep = self.wake.wait(sleep).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.0.fetch_sub(1, Ordering::Relaxed);
    }

    /// Ends the workers.
    pub(super) fn stop(&self) {
        let _sleep = lock(&self.sleep);
        self.stop.store(true, Ordering::Relaxed);
        self.wake.notify_all();
    }

    /// Workers that sleep, or are about to.
    #[cfg(all(test, not(loom)))]
    pub(super) fn sleepers(&self) -> usize {
        self.sleepers.0.load(Ordering::Relaxed)
    }
}

/// No code that can panic runs under these locks, so a poisoned one is still in order.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
