//! What goes between the memories of GPUs: sends and receives on a stream, and memory that ranks share.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use moe_cuda::{Buffer, Event, Gpu, Leg, NcclPeers, Offer, Opened, StopWord, Stream};

use super::watch::{Awaited, Watch};
use super::{At, Communicator, Step};
use crate::{Error, Result};

/// Where failures of the beginning happen.
pub(super) const SETUP: At<'static> = At { layer: "NCCL", step: Step::Setup };

/// All ranks' GPUs write into each other's memory.
pub(super) struct Reach {
    /// Process of each rank.
    processes: Vec<u64>,
    /// In use here, so that access to them does not end.
    _gpus: Vec<Gpu>,
}

impl Reach {
    /// `None` where a rank does not reach another one. All ranks call this together, and come to the same.
    pub(super) fn new(control: &dyn Communicator, gpu: &Gpu) -> Result<Option<Self>> {
        // the running system, not the machine's name, which several may have
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let mut digest = [0; 2];
        for (i, byte) in boot.bytes().filter(u8::is_ascii_hexdigit).enumerate() {
            let digit = u64::from((byte as char).to_digit(16).unwrap_or(0));
            digest[i / 16 % 2] = digest[i / 16 % 2] << 4 | digit;
        }
        let (process, me) = (u64::from(std::process::id()), control.rank());
        // something to open: whether that works is found out by doing it
        let probe = Buffer::<u8>::new(gpu, 64, "a probe").map_err(error)?;
        let mut mine = vec![digest[0], digest[1], process, gpu.index() as u64];
        mine.extend(probe.offer().unwrap_or_default());
        let each = mine.len();
        let all = control.all_gather(SETUP, mine)?;
        let of = |rank: usize| &all[each * rank..each * (rank + 1)];
        let mut gpus = Vec::new();
        let mut reaches = |rank: usize| {
            let theirs = of(rank);
            if theirs[..2] != digest || boot.is_empty() {
                return false;
            }
            if theirs[2] != process {
                let offer: Offer = theirs[4..].try_into().unwrap_or_default();
                return Opened::new(gpu, offer).is_ok();
            }
            Gpu::new(theirs[3] as usize).is_ok_and(|other| {
                let reached = gpu.reach(&other).unwrap_or(false);
                gpus.push(other);
                reached
            })
        };
        let ranks = control.size();
        let mine = (0..ranks).all(|rank| rank == me || reaches(rank));
        let all_reach =
            control.all_gather(SETUP, [u8::from(mine)])?.iter().all(|reach| *reach == 1);
        let processes = (0..ranks).map(|rank| of(rank)[2]).collect();
        Ok(all_reach.then_some(Self { processes, _gpus: gpus }))
    }
}

/// What all groups of a rank share for memory of the GPUs.
pub(super) struct Direct {
    peers: Mutex<NcclPeers>,
    timeout: Duration,
    reach: Option<Reach>,
    /// Ends kernels that wait for another rank.
    stop: StopWord,
    /// Tells it from others of this process.
    number: u64,
}

impl Direct {
    pub(super) fn new(peers: NcclPeers, timeout: Duration, reach: Option<Reach>) -> Result<Self> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let stop = StopWord::new(peers.gpu()).map_err(error)?;
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        Ok(Self { peers: Mutex::new(peers), timeout, reach, stop, number })
    }
}

/// What hangs does not hold up who frees its memory.
impl Drop for Direct {
    fn drop(&mut self) {
        self.stop.stop();
    }
}

/// Memory that another rank's kernels and this one's share, as it is addressed here.
#[derive(Debug)]
pub enum Shared {
    /// Of this process.
    Here(u64),
    /// Of another one.
    There(Opened),
}

impl Shared {
    /// Its address.
    pub fn address(&self) -> u64 {
        match self {
            Self::Here(address) => *address,
            Self::There(opened) => opened.address(),
        }
    }
}

/// The way between the memories of the GPUs of a group's ranks. What is put on it is in the order of a stream; who
/// waits does so with an eye on the other ranks.
#[derive(Clone)]
pub struct Peers {
    direct: Arc<Direct>,
    /// The ranks of the group in the world.
    members: Vec<usize>,
    control: Arc<dyn Communicator>,
}

impl Peers {
    pub(super) fn new(
        direct: Arc<Direct>,
        members: Vec<usize>,
        control: Arc<dyn Communicator>,
    ) -> Self {
        Self { direct, members, control }
    }

    /// All ranks' GPUs can write into each other's memory.
    pub fn reaches(&self) -> bool {
        self.direct.reach.is_some()
    }

    /// A number that tells the world that the group is of from others of this process.
    pub fn world(&self) -> u64 {
        self.direct.number
    }

    /// This rank, in the group.
    pub fn rank(&self) -> usize {
        self.control.rank()
    }

    /// The ranks in the world.
    pub fn members(&self) -> &[usize] {
        &self.members
    }

    /// What ends kernels that wait for another rank, and how many seconds they may wait at most: longer than the host,
    /// which knows more.
    pub fn patience(&self) -> (&StopWord, f64) {
        (&self.direct.stop, 1.5 * self.direct.timeout.as_secs_f64())
    }

    /// The most that a rank says, of each number. Through the group that the ranks met in, not their GPUs.
    ///
    /// # Errors
    /// A rank that has failed, or does not come.
    pub fn most<const N: usize>(&self, at: At<'_>, mine: [usize; N]) -> Result<[usize; N]> {
        // kernels that wait for who has failed would hold up who frees their memory
        let ended = |_: &Error| self.direct.stop.stop();
        let all = self.control.all_gather(at, mine.map(|number| number as u64));
        let all = all.inspect_err(ended)?;
        let of = |i| all.chunks_exact(N).map(|rank| rank[i] as usize).max().unwrap_or(0);
        Ok(std::array::from_fn(of))
    }

    /// The same buffer of all ranks, from this one on. None of them may go before all are done with it.
    ///
    /// # Errors
    /// As [`Self::most`], or what the driver refuses.
    pub fn share(&self, at: At<'_>, buffer: &Buffer<u8>) -> Result<Vec<Shared>> {
        let gpu = self.lock().gpu().clone();
        let Some(reach) = &self.direct.reach else {
            return Err(Error::Device("the ranks' GPUs do not reach each other's memory".into()));
        };
        let process = |rank: usize| reach.processes[self.members[rank]];
        let (me, ranks) = (self.control.rank(), self.control.size());
        let mut mine = vec![buffer.view().address()];
        // what nobody opens needs no handle
        let alone = (0..ranks).all(|rank| process(rank) == process(me));
        mine.extend(if alone { Offer::default() } else { buffer.offer().map_err(error)? });
        let each = mine.len();
        let all = self.control.all_gather(at, mine)?;
        let of = |d: usize| {
            let rank = (me + d) % ranks;
            let theirs = &all[each * rank..each * (rank + 1)];
            if process(rank) == process(me) {
                return Ok(Shared::Here(theirs[0]));
            }
            let offer: Offer = theirs[1..].try_into().unwrap_or_default();
            Opened::new(&gpu, offer).map(Shared::There).map_err(error)
        };
        (0..ranks).map(of).collect()
    }

    /// Number of this rank's GPU on its machine.
    pub fn gpu(&self) -> usize {
        self.lock().gpu().index()
    }

    /// Puts one exchange on `stream`, for which all ranks do the same at the other ends; peers are ranks of the group.
    /// Nothing is put on the stream where nobody has anything.
    ///
    /// # Safety
    /// The memory of all legs is there until they are done.
    ///
    /// # Errors
    /// [`Error::Communication`]: a rank that has failed, or does not come.
    pub unsafe fn start(
        &self,
        at: At<'_>,
        stream: &Stream,
        sends: &mut dyn Iterator<Item = Leg>,
        receives: &mut dyn Iterator<Item = Leg>,
    ) -> Result<()> {
        let legs = |legs: &mut dyn Iterator<Item = Leg>| -> Vec<Leg> {
            legs.filter(|leg| leg.bytes > 0)
                .map(|leg| Leg { peer: self.members[leg.peer], ..leg })
                .collect()
        };
        let (sends, receives) = (legs(sends), legs(receives));
        if sends.is_empty() && receives.is_empty() {
            return Ok(());
        }
        let mut peers = self.lock();
        // SAFETY: as the caller promises.
        let started = unsafe { peers.start(stream, &sends, &receives) };
        started.map_err(|cause| self.fail(&mut peers, at, &cause.to_string()))?;
        self.until(&mut peers, at, |peers| peers.is_ready(), || None)
    }

    /// Waits until `event` is reached.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn wait(&self, at: At<'_>, event: &Event) -> Result<()> {
        self.wait_or(at, event, || None)
    }

    /// The same; `late` is asked for whom when time is up.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn wait_or(
        &self,
        at: At<'_>,
        event: &Event,
        late: impl FnOnce() -> Option<Awaited>,
    ) -> Result<()> {
        let done = |peers: &NcclPeers| {
            // what the library has to say is an error of the wait
            peers.is_ready().and_then(|_| event.is_reached())
        };
        self.until(&mut self.lock(), at, done, late)
    }

    /// Waits for `done`, polled; ends what hangs where a rank has failed or time is up.
    fn until(
        &self,
        peers: &mut NcclPeers,
        at: At<'_>,
        done: impl Fn(&NcclPeers) -> moe_cuda::Result<bool>,
        late: impl FnOnce() -> Option<Awaited>,
    ) -> Result<()> {
        let waited = self.watch(at).until(|| done(peers), late);
        waited.inspect_err(|_| self.end(peers))
    }

    fn fail(&self, peers: &mut NcclPeers, at: At<'_>, cause: &str) -> Error {
        self.end(peers);
        self.watch(at).fail(cause)
    }

    fn watch<'a>(&'a self, at: At<'a>) -> Watch<'a> {
        Watch { group: &*self.control, timeout: self.direct.timeout, at }
    }

    /// Ends what hangs.
    fn end(&self, peers: &mut NcclPeers) {
        self.direct.stop.stop();
        peers.abort();
    }

    fn lock(&self) -> MutexGuard<'_, NcclPeers> {
        self.direct.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) fn error(error: moe_cuda::Error) -> Error {
    Error::Communication(error.to_string())
}
