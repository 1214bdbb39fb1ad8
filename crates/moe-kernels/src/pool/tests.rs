use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use super::*;

fn pool(threads: usize) -> Pool {
    Pool::new(threads).unwrap()
}

/// How often each item ran.
fn counts(pool: &Pool, items: usize) -> Vec<usize> {
    let counts: Vec<AtomicUsize> = (0..items).map(|_| AtomicUsize::new(0)).collect();
    pool.run(items, &|_, i| {
        counts[i].fetch_add(1, Relaxed);
    });
    counts.into_iter().map(AtomicUsize::into_inner).collect()
}

#[test]
fn every_item_runs_exactly_once() {
    for threads in [0, 1, 2, 3, 8] {
        let pool = pool(threads);
        assert_eq!(pool.threads(), threads.max(1));
        for items in [0, 1, 2, 3, 7, 64, 1000] {
            assert_eq!(counts(&pool, items), vec![1; items], "{threads} threads, {items} items");
        }
    }
}

/// What the items wrote without any synchronisation of their own is there when `run` returns, and
/// no item of an earlier region runs in a later one.
#[test]
fn many_tiny_regions_with_plain_writes() {
    struct Cells(Vec<UnsafeCell<usize>>);
    // SAFETY: each item touches its own cell, and the test reads between regions.
    unsafe impl Sync for Cells {}
    let pool = pool(3);
    let cells = Cells((0..5).map(|_| UnsafeCell::new(0)).collect());
    let cells = &cells;
    for region in 0..20_000 {
        let items = 2 + region % 4;
        pool.run(items, &|_, i| {
            // SAFETY: item i alone touches cell i.
            unsafe { *cells.0[i].get() += i + region };
        });
    }
    for (i, cell) in cells.0.iter().enumerate() {
        let ran = (0..20_000).filter(|region| i < 2 + region % 4);
        // SAFETY: no region is running.
        assert_eq!(unsafe { *cell.get() }, ran.map(|region| i + region).sum::<usize>());
    }
}

/// With two items that wait for each other, the region ends only if two threads take part.
#[test]
fn workers_take_part_awake_or_asleep() {
    let pool = pool(2);
    for pause in [Duration::ZERO, Duration::from_millis(5), Duration::from_millis(20)] {
        thread::sleep(pause);
        let here = AtomicUsize::new(0);
        pool.run(2, &|_, _| {
            here.fetch_add(1, Relaxed);
            let since = Instant::now();
            while here.load(Relaxed) < 2 {
                assert!(since.elapsed() < Duration::from_secs(60), "nobody else came");
                thread::yield_now();
            }
        });
    }
}

#[test]
fn idle_workers_sleep() {
    let pool = pool(3);
    counts(&pool, 10);
    let since = Instant::now();
    while pool.shared.sleepers() < 2 {
        assert!(since.elapsed() < Duration::from_secs(60), "a worker stays awake");
        thread::yield_now();
    }
    assert_eq!(counts(&pool, 100), vec![1; 100]);
}

#[test]
fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
    for threads in [1, 2, 4] {
        let pool = pool(threads);
        for bad in [0, 7, 15] {
            let ended = AtomicUsize::new(0);
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(16, &|_, i| {
                    assert!(i != bad, "item {i} failed");
                    ended.fetch_add(1, Relaxed);
                });
            }));
            let payload = result.unwrap_err();
            let message = payload.downcast_ref::<String>().unwrap();
            assert_eq!(*message, format!("item {bad} failed"));
            assert!(ended.load(Relaxed) <= 15);
            assert_eq!(counts(&pool, 16), vec![1; 16]);
        }
        // All items at once.
        let result = catch_unwind(AssertUnwindSafe(|| pool.run(8, &|_, _| panic!("all fail"))));
        assert_eq!(result.unwrap_err().downcast_ref::<&str>(), Some(&"all fail"));
        assert_eq!(counts(&pool, 16), vec![1; 16]);
    }
}

#[test]
fn a_nested_region_runs_inline() {
    let pool = pool(3);
    let inner = AtomicUsize::new(0);
    pool.run(6, &|_, _| {
        let thread = thread::current().id();
        pool.run(5, &|_, _| {
            assert_eq!(thread::current().id(), thread);
            inner.fetch_add(1, Relaxed);
        });
    });
    assert_eq!(inner.into_inner(), 30);
}

#[test]
fn one_pool_for_several_callers() {
    let pool = pool(3);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for items in 0..200 {
                    assert_eq!(counts(&pool, items), vec![1; items]);
                }
            });
        }
    });
}

#[test]
fn several_pools_and_more_threads_than_cores() {
    let pools: Vec<Pool> = (0..4).map(|_| pool(9)).collect();
    thread::scope(|scope| {
        for pool in &pools {
            scope.spawn(move || {
                for items in 0..100 {
                    assert_eq!(counts(pool, items), vec![1; items]);
                }
            });
        }
    });
    // One pool's items may use another pool.
    let inner = AtomicUsize::new(0);
    pools[0].run(3, &|_, _| {
        pools[1].run(4, &|_, _| {
            inner.fetch_add(1, Relaxed);
        });
    });
    assert_eq!(inner.into_inner(), 12);
}

#[test]
fn dropped_unused_awake_and_asleep() {
    for pause in [0, 1, 10] {
        let unused = pool(4);
        let used = pool(4);
        counts(&used, 10);
        thread::sleep(Duration::from_millis(pause));
        drop((unused, used));
    }
}

/// A second thread's region waits for its turn and then has the whole pool: its items can wait for
/// each other, which they could not do on one thread.
#[test]
fn a_second_caller_gets_all_threads() {
    let pool = pool(2);
    let meet = || {
        let here = AtomicUsize::new(0);
        pool.run(2, &|_, _| {
            here.fetch_add(1, Relaxed);
            let since = Instant::now();
            while here.load(Relaxed) < 2 {
                assert!(since.elapsed() < Duration::from_secs(60), "the region runs on one thread");
                thread::yield_now();
            }
        });
    };
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| (0..100).for_each(|_| meet()));
        }
    });
    // so do two items of a younger pool
    let pair = Pool::new(2).unwrap();
    (0..100).for_each(|_| pair.run(2, &|_, _| meet()));
}

/// Two pools whose items use each other's: nobody waits in a circle.
#[test]
fn pools_that_use_each_other() {
    let pools = [pool(2), pool(2)];
    let count = AtomicUsize::new(0);
    thread::scope(|scope| {
        for (here, there) in [(0, 1), (1, 0)] {
            let (pools, count) = (&pools, &count);
            scope.spawn(move || {
                for _ in 0..500 {
                    pools[here].run(2, &|_, _| {
                        pools[there].run(2, &|_, _| {
                            count.fetch_add(1, Relaxed);
                        });
                    });
                }
            });
        }
    });
    assert_eq!(count.into_inner(), 2 * 500 * 4);
}

/// While two items run at the same time, their workers differ; a worker's number is below the
/// number of threads.
#[test]
fn no_two_items_at_a_time_have_one_worker() {
    for threads in [1, 2, 5] {
        let pool = pool(threads);
        let taken: Vec<AtomicUsize> = (0..threads).map(|_| AtomicUsize::new(0)).collect();
        let mine = thread::current().id();
        pool.run(500, &|worker: Worker, _| {
            assert_eq!(worker.index() == 0, thread::current().id() == mine);
            assert_eq!(taken[worker.index()].swap(1, Relaxed), 0);
            thread::yield_now();
            taken[worker.index()].store(0, Relaxed);
        });
    }
}

/// A payload whose drop panics, thrown by every item: the pool neither hangs nor dies of it.
#[test]
fn a_payload_that_panics_when_dropped() {
    struct Bomb;
    impl Drop for Bomb {
        fn drop(&mut self) {
            if !thread::panicking() {
                panic!("dropped");
            }
        }
    }
    let pool = pool(3);
    for _ in 0..20 {
        let run = || pool.run(50, &|_, _| std::panic::panic_any(Bomb));
        let payload = catch_unwind(AssertUnwindSafe(run)).unwrap_err();
        assert!(payload.is::<Bomb>());
        std::mem::forget(payload);
        assert_eq!(counts(&pool, 16), vec![1; 16]);
    }
}

/// Workers stay on their processors, and the thread that started them may go where it might before.
#[cfg(target_os = "linux")]
#[test]
fn pinned_workers_stay() {
    use rustix::thread::{sched_getaffinity, sched_getcpu};
    let cpus = crate::isa::cpus().unwrap();
    let before = sched_getaffinity(None).unwrap();
    let pool = Pool::pinned(&cpus).unwrap();
    assert_eq!(sched_getaffinity(None).unwrap(), before);
    let strayed = AtomicUsize::new(0);
    for _ in 0..50 {
        pool.run(64, &|worker, _| {
            if worker.index() > 0 && sched_getcpu() != cpus[worker.index()] {
                strayed.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    assert_eq!(strayed.load(Ordering::Relaxed), 0);
    for nowhere in [1000, 1 << 20] {
        assert!(Pool::pinned(&[0, nowhere]).is_err(), "{nowhere}");
        assert_eq!(sched_getaffinity(None).unwrap(), before);
    }
}
