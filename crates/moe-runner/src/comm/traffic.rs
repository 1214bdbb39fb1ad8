//! How many collectives a rank took part in, and how many bytes it moved.

use std::sync::atomic::{AtomicU64, Ordering};

use super::Kind;

const KINDS: usize = Kind::ALL.len();

/// Calls and bytes of one kind of collective, at one rank.
///
/// Bytes are payload that leaves, or comes from, *other* ranks. Each rank sends:
/// all-to-all-v: the parts for others; all-gather(-v): its contribution to each of the n−1 others;
/// reduce-scatter(-v): the parts of others; all-reduce: [`all_reduce_sent`]; broadcast: the
/// root to each of n−1; barrier: nothing; split: 16 bytes to each of n−1.
///
/// [`all_reduce_sent`]: super::all_reduce_sent
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Number of calls.
    pub calls: u64,
    /// Bytes sent to other ranks.
    pub sent: u64,
    /// Bytes received from other ranks.
    pub received: u64,
}

/// A reading of a [`TrafficCounter`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    counts: [Count; KINDS],
}

impl Traffic {
    /// Calls and bytes of `kind`.
    pub fn of(&self, kind: Kind) -> Count {
        self.counts[kind as usize]
    }

    /// Over all kinds.
    pub fn total(&self) -> Count {
        self.counts.iter().fold(Count::default(), |sum, count| Count {
            calls: sum.calls + count.calls,
            sent: sum.sent + count.sent,
            received: sum.received + count.received,
        })
    }

    /// The counts of both.
    pub fn plus(&self, other: &Traffic) -> Traffic {
        let mut counts = self.counts;
        for (count, other) in counts.iter_mut().zip(&other.counts) {
            count.calls += other.calls;
            count.sent += other.sent;
            count.received += other.received;
        }
        Traffic { counts }
    }

    /// What happened between the reading `before` and this one.
    pub fn since(&self, before: &Traffic) -> Traffic {
        let mut counts = self.counts;
        for (count, before) in counts.iter_mut().zip(&before.counts) {
            count.calls -= before.calls;
            count.sent -= before.sent;
            count.received -= before.received;
        }
        Traffic { counts }
    }
}

/// Counts what one rank does in one group.
#[derive(Debug, Default)]
pub struct TrafficCounter {
    counts: [[AtomicU64; 3]; KINDS],
}

impl TrafficCounter {
    /// The counts so far.
    pub fn read(&self) -> Traffic {
        let mut traffic = Traffic::default();
        for (to, from) in traffic.counts.iter_mut().zip(&self.counts) {
            let [calls, sent, received] = from.each_ref().map(|x| x.load(Ordering::Relaxed));
            *to = Count { calls, sent, received };
        }
        traffic
    }

    /// Adds collectives of a kind: what moves other than through the group's own, such as between devices.
    pub fn add(&self, kind: Kind, count: Count) {
        let to = &self.counts[kind as usize];
        for (to, n) in to.iter().zip([count.calls, count.sent, count.received]) {
            to.fetch_add(n, Ordering::Relaxed);
        }
    }
}
