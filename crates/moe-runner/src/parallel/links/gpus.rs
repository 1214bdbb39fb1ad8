//! The same between the memories of GPUs, the way that rows would go.

use std::path::PathBuf;
use std::time::Duration;

use moe_cuda::{
    Buffer, Compiler, Event, FaultWord, Float, Gpu, Homes, Leg, Meeting, Modules, OneSidedVerbs,
    Rows, Stream, Windows,
};

use super::{LARGE, LINKS, LinkSpeed};
use crate::comm::Communicator;
use crate::comm::nccl::Peers;
use crate::comm::shared::SharedMemory;
use crate::{Error, Result};

/// Bytes of a row that is put, of messages that have as many.
const ROW: usize = 16 << 10;

impl LinkSpeed {
    /// The same between the memories of the ranks' GPUs: by writing into each other's where all reach it, which the second
    /// result tells; else by sends and receives of NCCL.
    ///
    /// # Errors
    /// As [`Self::measure`]; [`Error::Input`] where the GPUs are not connected.
    pub fn measure_gpus(group: &dyn Communicator) -> Result<(Self, bool)> {
        let Some(peers) = group.peers() else {
            return Err(Error::input("links", "the ranks' GPUs are not connected"));
        };
        let speed = match peers.reaches() {
            true => by_puts(group, &peers),
            false => by_sends(group, &peers),
        };
        Ok((speed?, peers.reaches()))
    }
}

/// A stream, and how long what is put on it takes.
struct Timed {
    stream: Stream,
    begin: Event,
    end: Event,
}

impl Timed {
    fn new(gpu: &Gpu) -> Result<Self> {
        let event = || Event::new(gpu).map_err(error);
        Ok(Self { stream: Stream::new(gpu).map_err(error)?, begin: event()?, end: event()? })
    }

    fn time(&self, peers: &Peers, work: impl FnOnce(&Stream) -> Result<()>) -> Result<Duration> {
        self.stream.record(&self.begin).map_err(error)?;
        work(&self.stream)?;
        self.stream.record(&self.end).map_err(error)?;
        peers.wait(LINKS, &self.end)?;
        let micros = self.end.microseconds_since(&self.begin).map_err(error)?;
        Ok(Duration::from_secs_f64(micros * 1e-6))
    }
}

/// Every rank writes rows into the memory of all others, and all meet.
fn by_puts(group: &dyn Communicator, peers: &Peers) -> Result<LinkSpeed> {
    let gpu = Gpu::new(peers.gpu()).map_err(error)?;
    let library = std::env::var_os("NVRTC").map(PathBuf::from);
    let compiler = Compiler::open(library.as_deref()).map_err(error)?;
    let modules = Modules::new(&gpu, compiler, Modules::user_cache());
    let verbs = OneSidedVerbs::new(&modules).map_err(error)?;
    let timed = Timed::new(&gpu)?;
    let stream = &timed.stream;
    let (me, ranks) = (group.rank(), group.size());
    // an expert on every rank; a row has slots of all but this rank's
    let copies: Vec<Vec<(u32, u32)>> = (0..ranks as u32).map(|rank| vec![(rank, 0)]).collect();
    let homes = Homes::new(stream, &copies, me, ranks).map_err(error)?;
    let top_k = ranks - 1;
    let shape = |bytes: usize| (bytes.div_ceil(ROW), bytes.next_multiple_of(16).min(ROW));
    let (most, _) = shape(LARGE[1]);
    let rows = Buffer::<u8>::new(&gpu, most * ROW, "measuring the links").map_err(error)?;
    let slots: Vec<u32> = (0..ranks as u32).filter(|rank| *rank != me as u32).collect();
    let ids = Buffer::from_slice(stream, &slots.repeat(most), "measuring the links");
    let (ids, fault) = (ids.map_err(error)?, FaultWord::new(&gpu, stream).map_err(error)?);
    // the table's windows: of what arrives, of outputs, of signals
    let arrivals = ranks * most * (ROW + 4 * top_k);
    let memory = SharedMemory::new(peers, LINKS, stream, &[arrivals, 16, Windows::signals(ranks)])?;
    let speed = LinkSpeed::measure_with(group, |bytes| {
        let (count, row_bytes) = shape(bytes);
        let windows = Windows { table: memory.table(), ranks, most: count, top_k, row_bytes };
        let x = rows.view().part(0..count * row_bytes);
        let x = Rows::of_bytes(x, Float::F32, count, row_bytes / 4).map_err(error)?;
        let ids = ids.view().part(0..count * top_k);
        group.barrier(LINKS)?;
        timed.time(peers, |stream| {
            // SAFETY: the memory is enough for the largest; nobody reads it, and all ranks meet.
            unsafe {
                verbs.put_rows(stream, (x, ids), &homes, &windows).map_err(error)?;
                verbs
                    .meet(stream, &windows, (Meeting::Rows, 0), peers.patience(), &fault)
                    .map_err(error)
            }
        })
    });
    memory.close(peers, LINKS)?;
    speed
}

/// Sends and receives of NCCL.
fn by_sends(group: &dyn Communicator, peers: &Peers) -> Result<LinkSpeed> {
    let gpu = Gpu::new(peers.gpu()).map_err(error)?;
    let (timed, most) = (Timed::new(&gpu)?, LARGE[1] * group.size());
    let buffer = || Buffer::<u8>::new(&gpu, most, "measuring the links").map_err(error);
    let (send, receive) = (buffer()?, buffer()?);
    let (ranks, me) = (group.size(), group.rank());
    LinkSpeed::measure_with(group, |bytes| {
        let legs = |base: u64| {
            let others = (0..ranks).filter(move |peer| *peer != me);
            others.map(move |peer| Leg { peer, address: base + (peer * bytes) as u64, bytes })
        };
        let (to, from) = (send.view().address(), receive.view().address());
        group.barrier(LINKS)?;
        timed.time(peers, |stream| {
            // SAFETY: both hold as many bytes for every rank, and are kept until the wait is over.
            unsafe { peers.start(LINKS, stream, &mut legs(to), &mut legs(from)) }
        })
    })
}

fn error(error: moe_cuda::Error) -> Error {
    Error::Device(error.to_string())
}
