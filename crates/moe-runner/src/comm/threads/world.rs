//! What all groups of one set of ranks share: who is there, who was seen where, and the first failure.

use std::sync::{Arc, OnceLock, Weak};
use std::thread;
use std::time::Duration;

use crate::Error;
use crate::comm::sync::{Mutex, lock};
use crate::comm::{Head, sighting};

/// A group whose ranks may be waiting.
pub(super) trait Wake: Send + Sync {
    /// Wakes them, to look again.
    fn wake(&self);
}

pub(super) struct World {
    pub(super) timeout: Duration,
    /// The first failure: set once, read by all.
    failed: OnceLock<String>,
    /// The error that a rank's own code ended with.
    error: Mutex<Option<Error>>,
    /// The collective that each rank entered last.
    seen: Vec<Mutex<Option<Head>>>,
    /// How each rank left, if it did.
    left: Vec<OnceLock<&'static str>>,
    /// Whom to wake on failure.
    groups: Mutex<Vec<Weak<dyn Wake>>>,
}

impl World {
    pub(super) fn new(size: usize, timeout: Duration) -> Arc<Self> {
        Arc::new(Self {
            timeout,
            failed: OnceLock::new(),
            error: Mutex::new(None),
            seen: (0..size).map(|_| Mutex::new(None)).collect(),
            left: (0..size).map(|_| OnceLock::new()).collect(),
            groups: Mutex::new(Vec::new()),
        })
    }

    /// Will be woken.
    pub(super) fn add(&self, group: Weak<dyn Wake>) {
        let mut groups = lock(&self.groups);
        groups.retain(|group| group.strong_count() > 0);
        groups.push(group);
    }

    /// `rank` enters a collective.
    pub(super) fn see(&self, rank: usize, head: Head) {
        *lock(&self.seen[rank]) = Some(head);
    }

    /// `rank`, as messages name it.
    pub(super) fn sighting(&self, rank: usize) -> String {
        let head = *lock(&self.seen[rank]);
        sighting(rank, head.as_ref())
    }

    /// How `rank` left, if it did.
    pub(super) fn left(&self, rank: usize) -> Option<&'static str> {
        self.left[rank].get().copied()
    }

    /// The first failure.
    pub(super) fn failed(&self) -> Option<&str> {
        self.failed.get().map(String::as_str)
    }

    /// Records the first failure, wakes everyone, and returns the cause. No lock may be held.
    pub(super) fn fail(&self, cause: String) -> &str {
        let cause = self.failed.get_or_init(|| cause);
        self.wake();
        cause
    }

    /// Wakes all that wait, in any group. No lock may be held.
    fn wake(&self) {
        let groups: Vec<_> = lock(&self.groups).iter().filter_map(Weak::upgrade).collect();
        groups.iter().for_each(|group| group.wake());
    }

    /// `rank`'s own code ended with `error`.
    pub(super) fn fail_by(&self, rank: usize, error: Error) {
        let mut first = lock(&self.error);
        if self.failed().is_none() {
            self.fail(format!("{}, failed: {error}", self.sighting(rank)));
            *first = Some(error);
        }
    }

    /// The error of the whole run.
    pub(super) fn error(&self) -> Error {
        let own = lock(&self.error).take();
        own.unwrap_or_else(|| Error::Communication(self.failed().unwrap_or_default().to_owned()))
    }
}

/// What all handles of one rank share: when the last is dropped, the rank has left.
pub(super) struct Presence {
    pub(super) world: Arc<World>,
    pub(super) rank: usize,
}

impl Drop for Presence {
    fn drop(&mut self) {
        let how = if thread::panicking() { "panicked" } else { "left" };
        self.world.left[self.rank].get_or_init(|| how);
        self.world.wake();
    }
}
