//! Parallel regions: the items of an iterator, on all threads of a pool.
//!
//! Items are what the iterator yields: rows of several buffers zipped together, tiles of one, plain
//! numbers. Each is yielded once, under a lock that is held for no longer than that, so whatever may
//! be split into an iterator may be written in parallel, and a pool that misbehaves can do no harm.
//! A thread takes one piece of scratch memory for all the items that it gets. Tiles, of which a few
//! tokens have hundreds that take a microsecond each, are claimed by a counter in place of the lock,
//! which costs sixteen threads half a microsecond a turn.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::pool::ThreadPool;
use crate::rows::{RowsMut, Tile, Tiles};

/// Calls `work` once for each of `items`, on the threads of `pool`.
///
/// # Panics
/// With the panic of `work`, if it panics.
pub fn for_each<T: Send>(
    pool: &dyn ThreadPool,
    items: impl Iterator<Item = T> + Send,
    work: impl Fn(T) + Sync,
) {
    for_each_with(pool, std::iter::repeat(()), items, |(), item| work(item));
}

/// Calls `work` once for each of `items`, on the threads of `pool`; each thread brings the one of
/// `scratch` that it took first. At most [`ThreadPool::threads`] of them are taken.
///
/// # Panics
/// With the panic of `work`, if it panics; if `scratch` yields nothing.
pub fn for_each_with<S, T: Send>(
    pool: &dyn ThreadPool,
    scratch: impl Iterator<Item = S> + Send,
    items: impl Iterator<Item = T> + Send,
    work: impl Fn(&mut S, T) + Sync,
) {
    let workers = items.size_hint().1.unwrap_or(usize::MAX).min(pool.threads());
    if workers == 0 {
        return;
    }
    let left = Mutex::new((scratch, items));
    pool.run(workers, &|_, _| {
        let mut mine = None;
        loop {
            let mut batch = [const { None }; BATCH];
            {
                let (scratch, items) = &mut *lock(&left);
                take(items, workers, &mut batch);
                if batch[0].is_none() {
                    return;
                }
                if mine.is_none() {
                    mine = scratch.next();
                }
            }
            let mine = mine.as_mut().expect("scratch for every thread");
            batch.into_iter().flatten().for_each(|item| work(mine, item));
        }
    });
    assert!(lock(&left).1.next().is_none(), "the thread pool did not run all items");
}

/// Calls `work` once for each of `tiles`, on the threads of `pool`; each thread brings its own equal
/// part of `scratch`.
///
/// # Panics
/// With the panic of `work`, if it panics.
pub fn for_each_tile(
    pool: &dyn ThreadPool,
    scratch: &mut [f32],
    tiles: &Tiles<'_>,
    work: impl Fn(&mut [f32], Tile<'_>) + Sync,
) {
    let workers = tiles.count().min(pool.threads());
    if workers == 0 {
        return;
    }
    let each = scratch.len() / pool.threads();
    let mut scratch = RowsMut::new(scratch, pool.threads(), each, each);
    let scratch = scratch.even_tiles(1, each.max(1));
    pool.run(workers, &|_, _| {
        let Some(first) = tiles.claim() else { return };
        let mut mine = (each > 0).then(|| scratch.claim().expect("scratch for every thread"));
        let mine = mine.as_mut().map_or(&mut [][..], |mine| mine.out.row_mut(0));
        work(mine, first);
        while let Some(tile) = tiles.claim() {
            work(mine, tile);
        }
    });
    assert!(tiles.claim().is_none(), "the thread pool did not run all tiles");
}

/// How many rows of `row_bytes` bytes a part of a region should have, so that `rows` of them keep
/// `threads` threads busy, and each part is worth the handing out.
pub fn rows_together(rows: usize, row_bytes: usize, threads: usize) -> usize {
    /// Some microseconds of copying.
    const WORTHWHILE: usize = 32 << 10;
    match threads {
        0 | 1 => rows.max(1),
        _ => rows.div_ceil(4 * threads).min(WORTHWHILE.div_ceil(row_bytes.max(1))).max(1),
    }
}

/// Items that a thread takes at once, at most.
const BATCH: usize = 8;

/// Some of the next items, in order: many while many are left, so that sixteen threads do not queue
/// for every one, and single ones at the end, so that all threads end together.
fn take<T>(items: &mut impl Iterator<Item = T>, threads: usize, batch: &mut [Option<T>; BATCH]) {
    let left = items.size_hint().1.unwrap_or(0);
    let count = (left / threads).clamp(1, BATCH);
    batch[..count].iter_mut().for_each(|item| *item = items.next());
}

/// The iterators run no code of others under the lock but `next`; one that panicked there yields
/// nothing that was yielded before, so a poisoned lock is in order.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::{Inline, Pool, Work, Worker};
    use std::collections::HashSet;
    use std::thread::{ThreadId, current};

    #[test]
    fn every_item_once_and_a_thread_keeps_its_scratch() {
        let pool = Pool::new(3).unwrap();
        for pool in [&Inline as &dyn ThreadPool, &pool] {
            for len in [0, 1, 2, 100] {
                let mut data = vec![0u32; len];
                let mut owners = [const { Vec::<ThreadId>::new() }; 3];
                for_each_with(pool, owners.iter_mut(), data.iter_mut(), |owner, value| {
                    *value += 1;
                    owner.push(current().id());
                });
                assert!(data.iter().all(|v| *v == 1));
                assert_eq!(owners.iter().map(Vec::len).sum::<usize>(), len);
                for owner in owners {
                    assert!(owner.iter().collect::<HashSet<_>>().len() <= 1, "one thread's own");
                }
            }
        }
    }

    /// A pool that runs every item twice, and one that runs but the first.
    struct Odd(usize);

    impl ThreadPool for Odd {
        fn threads(&self) -> usize {
            4
        }

        fn run(&self, items: usize, work: Work<'_>) {
            (0..items * self.0).for_each(|i| work(Worker::new(0), i % items));
        }
    }

    #[test]
    fn a_pool_that_repeats_items_repeats_no_work() {
        let mut data = [0; 9];
        for_each(&Odd(2), data.iter_mut(), |value| *value += 1);
        assert_eq!(data, [1; 9]);
    }

    #[test]
    #[should_panic(expected = "did not run all items")]
    fn a_pool_that_runs_nothing_is_noticed() {
        for_each(&Odd(0), 0..9, |_| ());
    }
}
