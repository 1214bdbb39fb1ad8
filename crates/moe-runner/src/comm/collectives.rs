//! The collectives: the same code for every [`Communicator`], on top of its exchange.

use std::marker::PhantomData;
use std::sync::Arc;

use super::element::sum_parts;
use super::{
    Arrived, At, Communicator, Count, Element, Exchange, Head, InFlight, Kind, Part, Parts,
    Received, Spans, Step, Sum, failure,
};
use crate::Result;

/// An all-reduce of at most this many bytes is one exchange, in which every rank sends all others
/// its contribution; a larger one is two, of which each moves 1/n of that.
const SMALL_ALL_REDUCE: usize = 4096;

/// The collectives.
///
/// All ranks of the group call the same one with the same [`At`], and with lengths that agree as
/// stated; zero is a length like any other. Errors: [the module](super) says which.
impl dyn Communicator + '_ {
    /// Returns when all ranks are in it.
    pub fn barrier(&self, at: At<'_>) -> Result<()> {
        self.gather::<u8>(self.head::<u8>(Kind::Barrier, at, 0), Vec::new()).map(drop)
    }

    /// Replaces `data` by that of rank `root`. Every rank's is of the same length.
    pub fn broadcast<T: Element>(&self, at: At<'_>, root: usize, data: &mut [T]) -> Result<()> {
        if root >= self.size() {
            return Err(self.refuse(format!("broadcast from rank {root} of {}", self.size())));
        }
        let head = Head { root: root as u32, ..self.head::<T>(Kind::Broadcast, at, data.len()) };
        let mine = if root == self.rank() { data.to_vec() } else { Vec::new() };
        let received = self.gather(head, mine)?;
        self.expect(received.part(root).len(), data.len(), root)?;
        data.copy_from_slice(received.part(root));
        Ok(())
    }

    /// The contributions of all ranks, in rank order; all of the same length.
    pub fn all_gather<T: Element>(&self, at: At<'_>, mine: impl Into<Vec<T>>) -> Result<Vec<T>> {
        let mine = mine.into();
        let received = self.gather(self.head::<T>(Kind::AllGather, at, mine.len()), mine)?;
        Ok(received.gather(self).into_inner().0)
    }

    /// The contributions of all ranks, of any lengths.
    pub fn all_gather_v<T: Element>(
        &self,
        at: At<'_>,
        mine: impl Into<Vec<T>>,
    ) -> Result<Parts<T>> {
        let received = self.all_gather_v_in_place(at, mine)?;
        Ok(received.gather(self))
    }

    /// `all_gather_v` without a copy: each part where it lies.
    pub fn all_gather_v_in_place<T: Element>(
        &self,
        at: At<'_>,
        mine: impl Into<Vec<T>>,
    ) -> Result<Received<T>> {
        let mine = mine.into();
        self.gather(self.head::<T>(Kind::AllGatherV, at, mine.len()), mine)
    }

    /// A buffer of `len` elements to send from, which hold anything: one that has travelled before,
    /// or a new one. Exchanges of large buffers from here allocate nothing in the long run.
    pub fn buffer<T: Element>(&self, len: usize) -> Vec<T> {
        T::unwrap(self.pool().take(T::DTYPE, len)).unwrap_or_default()
    }

    /// Replaces `data` by its sum over all ranks, added in rank order.
    pub fn all_reduce<T: Sum>(&self, at: At<'_>, data: &mut [T]) -> Result<()> {
        let head = self.head::<T>(Kind::AllReduce, at, data.len());
        if size_of_val(data) <= SMALL_ALL_REDUCE {
            let parts = self.gather(head, data.to_vec())?;
            data.copy_from_slice(&sum_parts(parts.iter()));
            return Ok(());
        }
        let shares = shares(data.len(), self.size());
        let share = self.scatter(head, data.to_vec(), &shares)?;
        let sums = self.begin::<T>(head, 0, share, Spans::Whole)?.wait_in_place(self)?;
        for (rank, (part, len)) in sums.iter().zip(shares).enumerate() {
            self.expect(part.len(), len, rank)?;
        }
        let mut rest = data;
        for part in sums.iter() {
            let (to, after) = rest.split_at_mut(part.len());
            to.copy_from_slice(part);
            rest = after;
        }
        Ok(())
    }

    /// The sum over all ranks, added in rank order, of this rank's part of `data`: parts of equal
    /// length, in rank order. Every rank's `data` is of the same length, a multiple of the size.
    pub fn reduce_scatter<T: Sum>(&self, at: At<'_>, data: impl Into<Vec<T>>) -> Result<Vec<T>> {
        let (data, n) = (data.into(), self.size());
        if !data.len().is_multiple_of(n) {
            let len = data.len();
            return Err(self.refuse(format!("reduce-scatter of {len} elements over {n} ranks")));
        }
        let counts = vec![data.len() / n; n];
        self.scatter(self.head::<T>(Kind::ReduceScatter, at, data.len()), data, &counts)
    }

    /// The sum over all ranks, added in rank order, of this rank's part: `counts[rank]` elements.
    /// Every rank passes the same counts.
    pub fn reduce_scatter_v<T: Sum>(
        &self,
        at: At<'_>,
        data: impl Into<Vec<T>>,
        counts: &[usize],
    ) -> Result<Vec<T>> {
        let data = data.into();
        self.check_counts(counts, data.len())?;
        self.scatter(self.head::<T>(Kind::ReduceScatterV, at, data.len()), data, counts)
    }

    /// Sends each rank its part; returns the parts that came from each.
    pub fn all_to_all_v<T: Element>(&self, at: At<'_>, send: Parts<T>) -> Result<Parts<T>> {
        self.start_all_to_all_v(at, send)?.wait(self)
    }

    /// `all_to_all_v` in two steps: other work, and other
    /// collectives, may come between them.
    pub fn start_all_to_all_v<T: Element>(&self, at: At<'_>, send: Parts<T>) -> Result<Pending<T>> {
        self.check_counts(send.counts(), send.data().len())?;
        let (data, counts) = send.into_inner();
        let head = self.head::<T>(Kind::AllToAllV, at, data.len());
        self.begin(head, 1, data, Spans::of_counts(&counts))
    }

    /// The ranks of this group that pass the same `color`, as their new group orders them: by
    /// `key`, then by rank.
    pub(super) fn split_members(&self, color: usize, key: usize) -> Result<Vec<usize>> {
        let head = self.head::<u64>(Kind::Split, At::new("", Step::Setup), 2);
        let all = self.gather(head, vec![color as u64, key as u64])?;
        let mut members: Vec<(u64, usize)> = all
            .iter()
            .enumerate()
            .filter(|(_, part)| part[0] == color as u64)
            .map(|(rank, part)| (part[1], rank))
            .collect();
        members.sort_unstable();
        Ok(members.into_iter().map(|(_, rank)| rank).collect())
    }

    fn head<T: Element>(&self, kind: Kind, at: At<'_>, total: usize) -> Head {
        Head { kind, dtype: T::DTYPE, root: 0, total: total as u64, place: at.into() }
    }

    /// Every rank gets all of `mine`.
    fn gather<T: Element>(&self, head: Head, mine: Vec<T>) -> Result<Received<T>> {
        self.begin(head, 1, mine, Spans::Whole)?.wait_in_place(self)
    }

    /// The sum of the parts for this rank.
    fn scatter<T: Sum>(&self, head: Head, data: Vec<T>, counts: &[usize]) -> Result<Vec<T>> {
        let parts = self.begin(head, 1, data, Spans::of_counts(counts))?.wait_in_place(self)?;
        for (rank, part) in parts.iter().enumerate() {
            self.expect(part.len(), counts[self.rank()], rank)?;
        }
        Ok(sum_parts(parts.iter()))
    }

    /// Starts an exchange; it counts as `calls` calls.
    fn begin<T: Element>(
        &self,
        head: Head,
        calls: u64,
        data: Vec<T>,
        spans: Spans,
    ) -> Result<Pending<T>> {
        let sent: usize = (0..self.size())
            .filter(|&rank| rank != self.rank())
            .map(|rank| spans.to(rank, data.len()).len() * size_of::<T>())
            .sum();
        let send = Arc::new(T::wrap(data));
        let flight = self.start(Exchange { head, send, spans })?;
        self.traffic().add(head.kind, Count { calls, sent: sent as u64, received: 0 });
        Ok(Pending { kind: head.kind, flight, dtype: PhantomData })
    }

    fn check_counts(&self, counts: &[usize], len: usize) -> Result<()> {
        let total = counts.iter().try_fold(0usize, |sum, &count| sum.checked_add(count));
        if counts.len() != self.size() || total != Some(len) {
            let n = self.size();
            return Err(self.refuse(format!(
                "the parts {counts:?} of a buffer of {len} elements do not fit {n} ranks"
            )));
        }
        Ok(())
    }

    fn expect(&self, got: usize, want: usize, from: usize) -> Result<()> {
        if got != want {
            return Err(self.refuse(format!("rank {from} sent {got} elements instead of {want}")));
        }
        Ok(())
    }

    /// This rank cannot take part in what it was asked to: the others must not wait for it.
    fn refuse(&self, reason: String) -> crate::Error {
        self.abort(&reason);
        failure(self.rank(), &reason)
    }
}

/// Bytes that `rank` of `ranks` sends in an all-reduce of `len` elements of `size` bytes.
pub fn all_reduce_sent(ranks: usize, rank: usize, len: usize, size: usize) -> usize {
    let others = ranks - 1;
    if len * size <= SMALL_ALL_REDUCE {
        return len * size * others;
    }
    let share = shares(len, ranks)[rank];
    (len - share + share * others) * size
}

/// `len` elements in `ranks` runs, as equal as can be, the first ones longer.
fn shares(len: usize, ranks: usize) -> Vec<usize> {
    (0..ranks).map(|rank| len / ranks + usize::from(rank < len % ranks)).collect()
}

/// An all-to-all under way. Dropping it gives up what this rank would have received.
pub struct Pending<T> {
    kind: Kind,
    flight: Box<dyn InFlight>,
    dtype: PhantomData<T>,
}

impl<T: Element> Pending<T> {
    /// True when [`wait`](Pending::wait) would return at once. Moves the exchange on (MPI does so
    /// only inside calls: poll between pieces of other work); never blocks.
    pub fn poll(&mut self) -> Result<bool> {
        self.flight.poll()
    }

    /// Waits for every rank's part, and copies them together. `comm` is the group in which this was
    /// started.
    pub fn wait(self, comm: &dyn Communicator) -> Result<Parts<T>> {
        match self.flight.wait()? {
            Arrived::Together(elements, counts) => {
                count_received::<T>(comm, self.kind, counts.iter().copied());
                match T::unwrap(elements) {
                    Some(data) => Parts::new(data, counts),
                    None => Err(comm.refuse(format!("received what is not {}", T::DTYPE))),
                }
            }
            Arrived::Apart(parts) => {
                let parts = Self::received(comm, self.kind, parts)?;
                Ok(parts.gather(comm))
            }
        }
    }

    /// Waits for every rank's part, and leaves each where it lies. `comm` is the group in which this
    /// was started.
    pub fn wait_in_place(self, comm: &dyn Communicator) -> Result<Received<T>> {
        let parts = match self.flight.wait()? {
            Arrived::Together(elements, counts) => {
                let elements = Arc::new(elements);
                comm.pool().keep(elements.clone());
                let spans = Spans::of_counts(&counts);
                let part = |rank| (elements.clone(), spans.to(rank, elements.len()));
                (0..counts.len()).map(part).collect()
            }
            Arrived::Apart(parts) => parts,
        };
        Self::received(comm, self.kind, parts)
    }

    fn received(comm: &dyn Communicator, kind: Kind, parts: Vec<Part>) -> Result<Received<T>> {
        count_received::<T>(comm, kind, parts.iter().map(|(_, span)| span.len()));
        Received::new(parts)
            .ok_or_else(|| comm.refuse(format!("received what is not {}", T::DTYPE)))
    }
}

/// Counts what came from the other ranks, of the parts of these lengths.
fn count_received<T>(comm: &dyn Communicator, kind: Kind, counts: impl Iterator<Item = usize>) {
    let others = counts.enumerate().filter(|(rank, _)| *rank != comm.rank());
    let received = others.map(|(_, count)| (count * size_of::<T>()) as u64).sum();
    comm.traffic().add(kind, Count { calls: 0, sent: 0, received });
}
