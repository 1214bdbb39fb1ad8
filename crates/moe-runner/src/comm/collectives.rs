//! The collectives: the same code for every [`Communicator`], on top of its exchange.

use std::marker::PhantomData;
use std::ops::Range;

use moe_kernels::pool::{Inline, ThreadPool};
use moe_kernels::region::for_each;

use super::{
    At, Communicator, Count, Element, Flight, Head, Kind, Outgoing, Received, Step, Sum, failure,
};
use crate::Result;

/// An all-reduce of at most this many bytes is one exchange, in which every rank sends all others
/// its contribution; a larger one is two, of which each moves 1/n of that.
const SMALL_ALL_REDUCE: usize = 4096;

/// Elements that a thread copies at a time.
const COPIED: usize = 8 << 10;

/// The collectives.
///
/// All ranks of the group call the same one with the same [`At`], and with lengths that agree as
/// stated; zero is a length like any other. Errors: [the module](super) says which.
impl dyn Communicator + '_ {
    /// Returns when all ranks are in it.
    pub fn barrier(&self, at: At<'_>) -> Result<()> {
        self.gather::<u8>(self.head::<u8>(Kind::Barrier, at, 0), &[]).map(drop)
    }

    /// Replaces `data` by that of rank `root`. Every rank's is of the same length.
    pub fn broadcast<T: Element>(&self, at: At<'_>, root: usize, data: &mut [T]) -> Result<()> {
        if root >= self.size() {
            return Err(self.refuse(format!("broadcast from rank {root} of {}", self.size())));
        }
        let head = Head { root: root as u32, ..self.head::<T>(Kind::Broadcast, at, data.len()) };
        let mine = if root == self.rank() { &*data } else { &[] };
        let received = self.gather(head, mine)?;
        self.expect(received.part(root).len(), data.len(), root)?;
        data.copy_from_slice(received.part(root));
        Ok(())
    }

    /// The contributions of all ranks, in rank order; all of the same length.
    pub fn all_gather<T: Element>(&self, at: At<'_>, mine: impl AsRef<[T]>) -> Result<Vec<T>> {
        Ok(self.all_gather_in_place(at, mine)?.to_vec())
    }

    /// `all_gather` without a copy: each contribution where it lies.
    pub fn all_gather_in_place<T: Element>(
        &self,
        at: At<'_>,
        mine: impl AsRef<[T]>,
    ) -> Result<Received<T>> {
        let mine = mine.as_ref();
        self.gather(self.head::<T>(Kind::AllGather, at, mine.len()), mine)
    }

    /// The contributions of all ranks, of any lengths, each where it lies.
    pub fn all_gather_v<T: Element>(
        &self,
        at: At<'_>,
        mine: impl AsRef<[T]>,
    ) -> Result<Received<T>> {
        self.start_all_gather_v(at, self.copied(mine.as_ref())?)?.wait(self)
    }

    /// `all_gather_v` in two steps: other work, and other collectives, may come between them.
    pub fn start_all_gather_v<T: Element>(
        &self,
        at: At<'_>,
        mine: Outgoing<T>,
    ) -> Result<Pending<T>> {
        self.begin(self.head::<T>(Kind::AllGatherV, at, mine.len()), 1, mine)
    }

    /// A buffer of `len` elements to send from, which hold anything. Exchanges that send from here
    /// allocate nothing in the long run.
    ///
    /// # Errors
    /// There is no memory for it.
    pub fn buffer<T: Element>(&self, len: usize) -> Result<Outgoing<T>> {
        self.buffers().take(T::DTYPE, len).map(Outgoing::new)
    }

    /// Replaces `data` by its sum over all ranks, added in rank order.
    pub fn all_reduce<T: Sum>(&self, at: At<'_>, data: &mut [T]) -> Result<()> {
        self.all_reduce_on(at, data, &Inline)
    }

    /// `all_reduce` whose copies and sums run on the threads of `pool`.
    pub fn all_reduce_on<T: Sum>(
        &self,
        at: At<'_>,
        data: &mut [T],
        pool: &dyn ThreadPool,
    ) -> Result<()> {
        let head = self.head::<T>(Kind::AllReduce, at, data.len());
        if size_of_val(data) <= SMALL_ALL_REDUCE {
            self.gather(head, data)?.sum_into(data, pool);
            return Ok(());
        }
        let (len, ranks) = (data.len(), self.size());
        let mut all = self.buffer(len)?;
        copy(pool, &mut all, data);
        all.message_mut().cut(ranks, |rank| share(len, rank, ranks).len());
        let parts = self.begin(head, 1, all)?.wait(self)?;
        let mine = share(len, self.rank(), ranks);
        self.expect_all(&parts, |_| mine.len())?;
        let mut sums = self.buffer(mine.len())?;
        parts.sum_into(&mut sums, pool);
        drop(parts);
        let sums = self.begin::<T>(head, 0, sums)?.wait(self)?;
        self.expect_all(&sums, |rank| share(len, rank, ranks).len())?;
        for (rank, part) in sums.iter().enumerate() {
            copy(pool, &mut data[share(len, rank, ranks)], part);
        }
        Ok(())
    }

    /// The sum over all ranks, added in rank order, of this rank's part of `data`: parts of equal
    /// length, in rank order. Every rank's `data` is of the same length, a multiple of the size.
    pub fn reduce_scatter<T: Sum>(&self, at: At<'_>, data: impl AsRef<[T]>) -> Result<Vec<T>> {
        let (data, n) = (data.as_ref(), self.size());
        if !data.len().is_multiple_of(n) {
            let len = data.len();
            return Err(self.refuse(format!("reduce-scatter of {len} elements over {n} ranks")));
        }
        let counts = vec![data.len() / n; n];
        let head = self.head::<T>(Kind::ReduceScatter, at, data.len());
        let pending = self.start_scatter(head, self.copied(data)?, &counts)?;
        let mut sums = vec![T::zeroed(); counts[self.rank()]];
        pending.sum(self, &mut sums, &Inline)?;
        Ok(sums)
    }

    /// The sum over all ranks, added in rank order, of this rank's part: `counts[rank]` elements.
    /// Every rank passes the same counts.
    pub fn reduce_scatter_v<T: Sum>(
        &self,
        at: At<'_>,
        data: impl AsRef<[T]>,
        counts: &[usize],
    ) -> Result<Vec<T>> {
        let pending = self.start_reduce_scatter_v(at, self.copied(data.as_ref())?, counts)?;
        let mut sums = vec![T::zeroed(); counts[self.rank()]];
        pending.sum(self, &mut sums, &Inline)?;
        Ok(sums)
    }

    /// `reduce_scatter_v` in two steps: [`Pending::sum`] is the second.
    pub fn start_reduce_scatter_v<T: Sum>(
        &self,
        at: At<'_>,
        data: Outgoing<T>,
        counts: &[usize],
    ) -> Result<Pending<T>> {
        self.start_scatter(self.head::<T>(Kind::ReduceScatterV, at, data.len()), data, counts)
    }

    /// Sends each rank its part, `counts[rank]` elements; returns the parts that came from each.
    pub fn all_to_all_v<T: Element>(
        &self,
        at: At<'_>,
        data: impl AsRef<[T]>,
        counts: &[usize],
    ) -> Result<Received<T>> {
        self.start_all_to_all_v(at, self.copied(data.as_ref())?, counts)?.wait(self)
    }

    /// `all_to_all_v` in two steps: other work, and other collectives, may come between them.
    pub fn start_all_to_all_v<T: Element>(
        &self,
        at: At<'_>,
        data: Outgoing<T>,
        counts: &[usize],
    ) -> Result<Pending<T>> {
        self.start_scatter(self.head::<T>(Kind::AllToAllV, at, data.len()), data, counts)
    }

    /// The ranks of this group that pass the same `color`, as their new group orders them: by
    /// `key`, then by rank.
    pub(super) fn split_members(&self, color: usize, key: usize) -> Result<Vec<usize>> {
        let head = self.head::<u64>(Kind::Split, At::new("", Step::Setup), 2);
        let all = self.gather(head, &[color as u64, key as u64])?;
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

    fn copied<T: Element>(&self, data: &[T]) -> Result<Outgoing<T>> {
        let mut buffer = self.buffer(data.len())?;
        buffer.copy_from_slice(data);
        Ok(buffer)
    }

    /// Every rank gets all of `mine`.
    fn gather<T: Element>(&self, head: Head, mine: &[T]) -> Result<Received<T>> {
        self.begin(head, 1, self.copied(mine)?)?.wait(self)
    }

    /// Every rank gets its part of `data`.
    fn start_scatter<T: Element>(
        &self,
        head: Head,
        mut data: Outgoing<T>,
        counts: &[usize],
    ) -> Result<Pending<T>> {
        let total = counts.iter().try_fold(0usize, |sum, &count| sum.checked_add(count));
        if counts.len() != self.size() || total != Some(data.len()) {
            let (n, len) = (self.size(), data.len());
            return Err(self.refuse(format!(
                "the parts {counts:?} of a buffer of {len} elements do not fit {n} ranks"
            )));
        }
        data.message_mut().cut(counts.len(), |rank| counts[rank]);
        self.begin(head, 1, data)
    }

    /// Starts an exchange; it counts as `calls` calls.
    fn begin<T: Element>(&self, head: Head, calls: u64, data: Outgoing<T>) -> Result<Pending<T>> {
        let others = (0..self.size()).filter(|&rank| rank != self.rank());
        let sent: usize = others.map(|rank| size_of::<T>() * data.message.span(rank).len()).sum();
        let mine = data.message.span(self.rank()).len();
        self.buffers().keep(data.message.clone());
        let flight = self.start(head, data.message)?;
        self.traffic().add(head.kind, Count { calls, sent: sent as u64, received: 0 });
        Ok(Pending { kind: head.kind, flight, mine, dtype: PhantomData })
    }

    fn expect(&self, got: usize, want: usize, from: usize) -> Result<()> {
        if got != want {
            return Err(self.refuse(format!("rank {from} sent {got} elements instead of {want}")));
        }
        Ok(())
    }

    fn expect_all<T: Element>(
        &self,
        parts: &Received<T>,
        want: impl Fn(usize) -> usize,
    ) -> Result<()> {
        let mut parts = parts.iter().enumerate();
        parts.try_for_each(|(rank, part)| self.expect(part.len(), want(rank), rank))
    }

    /// This rank cannot take part in what it was asked to: the others must not wait for it.
    fn refuse(&self, reason: String) -> crate::Error {
        self.abort(&reason);
        failure(self.rank(), &reason)
    }
}

pub(crate) fn copy<T: Element>(pool: &dyn ThreadPool, to: &mut [T], from: &[T]) {
    for_each(pool, to.chunks_mut(COPIED).zip(from.chunks(COPIED)), |(to, from)| {
        to.copy_from_slice(from);
    });
}

/// Bytes that `rank` of `ranks` sends in an all-reduce of `len` elements of `size` bytes.
pub fn all_reduce_sent(ranks: usize, rank: usize, len: usize, size: usize) -> usize {
    let others = ranks - 1;
    if len * size <= SMALL_ALL_REDUCE {
        return len * size * others;
    }
    let share = share(len, rank, ranks).len();
    (len - share + share * others) * size
}

/// The part of `len` things that falls to `rank` of `ranks`: runs as equal as can be, the first ones
/// longer.
pub(crate) fn share(len: usize, rank: usize, ranks: usize) -> Range<usize> {
    let (base, more) = (len / ranks, len % ranks);
    let start = rank * base + rank.min(more);
    start..start + base + usize::from(rank < more)
}

/// An exchange under way. Dropping it gives up what this rank would have received.
pub struct Pending<T> {
    kind: Kind,
    flight: Flight,
    /// Elements that this rank has for itself.
    mine: usize,
    dtype: PhantomData<T>,
}

impl<T: Element> Pending<T> {
    /// True when [`wait`](Pending::wait) would return at once. Moves the exchange on (MPI does so
    /// only inside calls: poll between pieces of other work); never blocks.
    pub fn poll(&mut self) -> Result<bool> {
        self.flight.arrive(false)
    }

    /// Waits for every rank's part, and leaves each where it lies. `comm` is the group in which this
    /// was started.
    pub fn wait(mut self, comm: &dyn Communicator) -> Result<Received<T>> {
        self.flight.arrive(true)?;
        let mut parts = comm.buffers().take_list();
        self.flight.take(&mut parts);
        let others = parts.iter().enumerate().filter(|(rank, _)| *rank != comm.rank());
        let received = others.map(|(_, (_, span))| (span.len() * size_of::<T>()) as u64).sum();
        comm.traffic().add(self.kind, Count { calls: 0, sent: 0, received });
        Received::new(parts, comm.buffers().clone())
            .ok_or_else(|| comm.refuse(format!("received what is not {}", T::DTYPE)))
    }

    /// Waits for every rank's part, and writes their sum, added in rank order, to `out`, on the
    /// threads of `pool`. `comm` is the group in which this was started.
    ///
    /// # Errors
    /// As [`wait`](Self::wait); `out`, or a part, is not as long as this rank's own.
    pub fn sum(self, comm: &dyn Communicator, out: &mut [T], pool: &dyn ThreadPool) -> Result<()>
    where
        T: Sum,
    {
        let mine = self.mine;
        let parts = self.wait(comm)?;
        comm.expect_all(&parts, |_| mine)?;
        comm.expect(out.len(), mine, comm.rank())?;
        parts.sum_into(out, pool);
        Ok(())
    }
}
