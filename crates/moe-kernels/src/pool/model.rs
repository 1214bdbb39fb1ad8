//! The pool under the model checker: every order in which its threads can meet, up to a bound on
//! preemptions. `RUSTFLAGS="--cfg loom" cargo test -p moe-kernels --lib pool::model`

use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use loom::sync::{Arc, Mutex};
use loom::thread;

use super::{Pool, Worker};

/// Cells that items write without any synchronisation of their own: the checker complains where an
/// access is not ordered after the last one.
struct Cells(Vec<UnsafeCell<usize>>);

// SAFETY: each item touches its own cell, and the test reads between regions.
unsafe impl Sync for Cells {}

impl Cells {
    fn new(cells: usize) -> Cells {
        Cells((0..cells).map(|_| UnsafeCell::new(0)).collect())
    }

    fn add(&self, cell: usize) {
        // SAFETY: what the checker is here to refute.
        self.0[cell].with_mut(|value| unsafe { *value += 1 });
    }

    fn read(&self) -> Vec<usize> {
        // SAFETY: as above.
        self.0.iter().map(|cell| cell.with(|value| unsafe { *value })).collect()
    }
}

/// Checks `threads` threads that do `what`: with more of them, fewer preemptions, so that each model
/// takes seconds.
fn check(threads: usize, what: impl Fn() + Sync + Send + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(if threads > 2 { 1 } else { 3 });
    model.check(what);
}

/// Every item runs once, and what it wrote is there when `run` returns; also in a second region,
/// which late claimants of the first may meet.
fn regions(threads: usize, items: [usize; 2]) {
    check(threads, move || {
        let pool = Pool::new(threads).unwrap();
        let cells = Cells::new(3);
        let mut want = [0; 3];
        for items in items {
            pool.run(items, &|_, item| cells.add(item));
            want[..items].iter_mut().for_each(|count| *count += 1);
            assert_eq!(cells.read(), want);
        }
    });
}

#[test]
fn two_regions_on_two_threads() {
    regions(2, [2, 3]);
}

#[test]
fn a_region_on_three_threads() {
    regions(3, [3, 0]);
}

/// Two items that wait for each other: a lost wake-up would leave one waiting for ever, which the
/// checker reports.
#[test]
fn no_wake_up_is_lost() {
    check(2, || {
        let pool = Pool::new(2).unwrap();
        let here = AtomicUsize::new(0);
        pool.run(2, &|_, _| {
            here.fetch_add(1, Relaxed);
            while here.load(Relaxed) < 2 {
                thread::yield_now();
            }
        });
    });
}

/// No two items run at the same time as one worker: what belongs to a worker needs no lock.
#[test]
fn workers_do_not_meet() {
    check(2, || {
        let pool = Pool::new(2).unwrap();
        let scratch = Cells::new(2);
        pool.run(3, &|worker: Worker, _| scratch.add(worker.index()));
        assert_eq!(scratch.read().iter().sum::<usize>(), 3);
    });
}

/// Two threads with a region each: both run, one after the other, on the whole pool.
#[test]
fn two_callers_take_turns() {
    check(3, || {
        let pool = Arc::new(Pool::new(2).unwrap());
        let cells = Arc::new(Cells::new(2));
        let other = {
            let (pool, cells) = (pool.clone(), cells.clone());
            thread::spawn(move || pool.run(2, &|_, item| cells.add(item)))
        };
        pool.run(2, &|_, item| cells.add(item));
        other.join().unwrap();
        assert_eq!(cells.read(), [2, 2]);
    });
}

/// Two threads of one pool share an older one: each waits for its turn.
#[test]
fn items_of_a_younger_pool_take_turns() {
    check(3, || {
        let [older, younger] = [2, 2].map(|threads| Pool::new(threads).unwrap());
        let cells = Cells::new(2);
        younger.run(2, &|_, _| older.run(2, &|_, item| cells.add(item)));
        assert_eq!(cells.read(), [2, 2]);
    });
}

/// A region that starts inside an item neither waits for itself nor for a pool in a circle.
#[test]
fn nested_regions_do_not_wait() {
    check(2, || {
        let pool = Pool::new(2).unwrap();
        let count = Mutex::new(0);
        pool.run(2, &|_, _| pool.run(2, &|_, _| *count.lock().unwrap() += 1));
        assert_eq!(*count.lock().unwrap(), 4);
    });
}
