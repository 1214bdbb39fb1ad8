//! The experts of a layer that is spread over ranks: rows stay on the GPUs from the gate to the sum, and go
//! from one to the other by NCCL.
//!
//! The order of the steps, and what goes where, is [`resident`]'s; here is a GPU's side of it. Each slot's output
//! comes back as the kernel left it, and is added on its token's rank, in slot order: whole experts anywhere give
//! the bits of one GPU. Where ranks write into each other's memory, it is [`one_sided`](super::one_sided)'s.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use moe_cuda::{
    Buffer, Event, ExchangeVerbs, FaultWord, Gpu, Homes, Pod, Room, Rows, RowsMut, Stream, View,
    ViewMut, Windows,
};

use super::device::{Device, Plans, error};
use super::layer::Experts;
use super::marks::Marks;
use super::one_sided::{self as put, OneSided, OneSidedWork};
use super::products::FastWork;
use super::two_sided::{self, TwoSidedWork};
use crate::comm::nccl::Peers;
use crate::comm::{At, Communicator, Count, Kind, Step};
use crate::exchange::one_sided::{self, Places};
use crate::exchange::resident::{self, ResidentWire, Ways};
use crate::exchange::{BetweenGpus, ExpertMap, share};
use crate::experts::{ExchangeTime, Spread};
use crate::router::LogicalId;
use crate::{Error, Result};

/// What has no expert here.
const NO_EXPERT: u32 = u32::MAX;

// what a kernel's word has bits for
const _: () = assert!(one_sided::MOST_RANKS <= Windows::MOST_RANKS);

/// Exchanges that are timed together.
const TOGETHER: usize = 4;

/// The ranks, as one of them sees them.
pub(super) struct Ranks {
    layer: String,
    /// The layer's number.
    number: u32,
    verbs: ExchangeVerbs,
    homes: Homes,
    spread: Spread,
    peers: Peers,
    /// Where ranks write into each other's memory.
    one_sided: Option<OneSided>,
    /// Of the last pass: what its exchange alone is timed with.
    last: Mutex<Option<Last>>,
    /// This rank's experts that the last pass with a report has used.
    active: Mutex<Vec<u32>>,
}

#[derive(Clone)]
enum Last {
    Sent { ways: Vec<Ways> },
    Put { lanes: Vec<Places>, wire: ResidentWire },
}

/// Memory of passes over ranks, one way or the other.
#[derive(Default)]
pub(super) struct RanksWork {
    event: Option<Event>,
    pub(super) one_sided: OneSidedWork,
    /// By micro-batch.
    pub(super) two_sided: Vec<TwoSidedWork>,
}

impl RanksWork {
    fn event(&mut self, gpu: &Gpu) -> Result<&Event> {
        if self.event.is_none() {
            self.event = Some(Event::new(gpu).map_err(error)?);
        }
        self.event.as_ref().ok_or_else(no_memory)
    }
}

/// The steps come in one order, and the first of them makes the memory.
pub(super) fn no_memory() -> Error {
    Error::Device("an exchange without memory".into())
}

/// Device memory that is replaced by more where it must be.
pub(super) struct Grown<T>(Option<Buffer<T>>);

impl<T> Default for Grown<T> {
    fn default() -> Self {
        Self(None)
    }
}

impl<T: Pod> Grown<T> {
    /// Makes sure of `len` elements; what was in it is lost if that is more: true then.
    pub(super) fn reserve(&mut self, gpu: &Gpu, len: usize) -> Result<bool> {
        let len = len.max(1);
        if self.0.as_ref().is_some_and(|buffer| buffer.len() >= len) {
            return Ok(false);
        }
        self.0 = None;
        // some more, so that loads that vary a little do not allocate each time
        let buffer = Buffer::new(gpu, len + len / 8, "rows of other ranks").map_err(error)?;
        self.0 = Some(buffer);
        Ok(true)
    }

    pub(super) fn part(&self, range: Range<usize>) -> View<'_, T> {
        match &self.0 {
            Some(buffer) => buffer.view().part(range),
            // SAFETY: nothing is there, and nothing is read.
            None => unsafe { View::from_raw(0, 0) },
        }
    }

    pub(super) fn part_mut(&mut self, range: Range<usize>) -> ViewMut<'_, T> {
        match &mut self.0 {
            Some(buffer) => buffer.view_mut().part(range),
            // SAFETY: nothing is there, and nothing is written.
            None => unsafe { ViewMut::from_raw(0, 0) },
        }
    }

    pub(super) fn all_mut(&mut self) -> ViewMut<'_, T> {
        let len = self.0.as_ref().map_or(0, Buffer::len);
        self.part_mut(0..len)
    }

    pub(super) fn address(&self) -> u64 {
        self.0.as_ref().map_or(0, |buffer| buffer.view().address())
    }
}

impl Ranks {
    /// Of the layer `name`, on `device`.
    ///
    /// # Errors
    /// [`Error::NoKernel`] where ranks have no way between their GPUs.
    pub(super) fn new(
        device: &Device,
        (name, number): (&str, usize),
        spread: Spread,
    ) -> Result<Self> {
        let Spread { group, map, .. } = &spread;
        let (me, all) = (group.rank(), group.size());
        let peers = group.peers().filter(|peers| peers.gpu() == device.gpu.index());
        let Some(peers) = peers else {
            return Err(Error::NoKernel("the ranks' GPUs are not connected".into()));
        };
        Ok(Self {
            layer: name.to_owned(),
            number: number as u32,
            verbs: ExchangeVerbs::new(&device.modules).map_err(error)?,
            homes: homes(&device.stream, map, me, all)?,
            one_sided: match spread.way {
                BetweenGpus::OneSided => Some(OneSided::new(device)?),
                BetweenGpus::Counted | BetweenGpus::WithRoom(_) => None,
            },
            spread,
            peers,
            last: Mutex::new(None),
            active: Mutex::default(),
        })
    }

    /// The ranks.
    pub(super) fn group(&self) -> &dyn Communicator {
        &*self.spread.group
    }

    /// Where every expert is.
    pub(super) fn map(&self) -> &ExpertMap {
        &self.spread.map
    }

    /// The same on the GPU, for another map.
    pub(super) fn homes_of(&self, stream: &Stream, map: &ExpertMap) -> Result<Homes> {
        homes(stream, map, self.homes.me(), self.homes.ranks())
    }

    /// Experts are where `map` says from here on. What is counted goes on; returns what the GPU knew.
    pub(super) fn replace(&mut self, map: Arc<ExpertMap>, homes: Homes) -> Result<Homes> {
        let load = self.homes.take_load();
        self.spread.map = map;
        let old = std::mem::replace(&mut self.homes, homes);
        self.homes.count(load).map_err(error).map(|()| old)
    }

    /// See [`LayerKernel::count_load`](crate::experts::LayerKernel::count_load).
    pub(super) fn count_load(&mut self, device: &Device, on: bool) -> Result<()> {
        let load = match on {
            true => {
                let zeros = vec![0_u64; self.homes.experts()];
                let load = Buffer::from_slice(&device.stream, &zeros, "load of experts");
                Some(load.map_err(error)?)
            }
            false => None,
        };
        self.homes.count(load).map_err(error)
    }

    /// What is put from here on counts for nobody.
    pub(super) fn pause_load(&mut self) -> Option<Buffer<u64>> {
        self.homes.take_load()
    }

    /// Goes on with these counts.
    pub(super) fn resume_load(&mut self, load: Option<Buffer<u64>>) -> Result<()> {
        self.homes.count(load).map_err(error)
    }

    /// See [`LayerKernel::take_load`](crate::experts::LayerKernel::take_load).
    pub(super) fn take_load(&mut self, device: &Device) -> Result<Vec<u64>> {
        let Some(load) = self.homes.load() else {
            return Err(Error::input("expert load", "nobody counts it"));
        };
        let mut counts = vec![0; load.len()];
        device.stream.copy_out(load.view(), &mut counts).map_err(error)?;
        device.stream.fill(load.view_mut(), 0).map_err(error)?;
        Ok(counts)
    }

    fn last(&self) -> MutexGuard<'_, Option<Last>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes which of this rank's experts the last pass used, with `ids` `[T, k]` of this rank's rows; all of it is done.
    pub(super) fn note(&self, device: &Device, work: &RanksWork, ids: View<'_, u32>) -> Result<()> {
        let Some(last) = self.last().clone() else { return Ok(()) };
        let read = |ids: View<'_, u32>| {
            let mut read = vec![0; ids.len()];
            device.stream.copy_out(ids, &mut read).map_err(error).map(|()| read)
        };
        let mut active = Vec::new();
        match &last {
            Last::Sent { ways } => {
                for (ways, work) in ways.iter().zip(&work.two_sided) {
                    active.extend(read(work.ids(ways))?);
                }
            }
            Last::Put { lanes, wire } => {
                let own = read(ids)?;
                for (lane, places) in lanes.iter().enumerate() {
                    let arrived =
                        read(work.one_sided.ids(&self.peers, lane, *places, wire.row)?)?;
                    let k = places.top_k.max(1);
                    let rows = share(own.len() / k, lane, self.spread.lanes);
                    self.count_put(*places, *wire, (&own[rows.start * k..rows.end * k], &arrived));
                    active.extend(arrived);
                }
            }
        }
        active.retain(|id| *id != NO_EXPERT);
        active.sort_unstable();
        active.dedup();
        *self.active.lock().unwrap_or_else(PoisonError::into_inner) = active;
        Ok(())
    }

    /// Counts what a pass put, whose slots have the experts `own`, and at whose places `arrived` the ids that came.
    fn count_put(&self, places: Places, wire: ResidentWire, (own, arrived): (&[u32], &[u32])) {
        let (me, all, k) = (self.homes.me(), self.homes.ranks(), places.top_k.max(1));
        // [R, 2 R] as ranks that count have it, as far as it has to do with this rank
        let mut counts = vec![0; 2 * all * all];
        let mut count = |from: usize, to: usize, slots: usize| {
            counts[2 * all * from + to] += slots as u32;
            counts[2 * all * from + all + to] += u32::from(slots > 0);
        };
        for (t, row) in own.chunks_exact(k).enumerate() {
            let homes = row.iter().filter_map(|id| self.spread.map.home(LogicalId(*id), t));
            let to: Vec<usize> = homes.map(|home| home.rank).collect();
            (0..all).for_each(|rank| count(me, rank, to.iter().filter(|to| **to == rank).count()));
        }
        for (at, row) in arrived.chunks_exact(k).enumerate() {
            let d = at / places.most.max(1);
            if d > 0 {
                let slots = row.iter().filter(|id| **id != NO_EXPERT).count();
                count((me + d) % all, me, slots);
            }
        }
        let ways = Ways::counted(&counts, me, all);
        for (sent, received) in places.traffic(&ways, wire) {
            let traffic = self.spread.group.traffic();
            let (sent, received) = (sent as u64, received as u64);
            traffic.add(Kind::AllToAllV, Count { calls: 1, sent, received });
        }
    }

    /// See [`Self::note`].
    pub(super) fn active(&self) -> Vec<u32> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The layer's number, which signals have.
    pub(super) fn layer(&self) -> u32 {
        self.number
    }

    pub(super) fn at(&self, step: Step) -> At<'_> {
        At::new(&self.layer, step)
    }

    pub(super) fn peers(&self) -> &Peers {
        &self.peers
    }

    pub(super) fn homes(&self) -> &Homes {
        &self.homes
    }

    pub(super) fn verbs(&self) -> &ExchangeVerbs {
        &self.verbs
    }

    /// What NCCL sends is as much as there is, not as much as there is room for: also what a one-sided exchange is measured
    /// against.
    pub(super) fn is_counted(&self) -> bool {
        self.given_room().is_none()
    }

    /// No host learns a count.
    pub(super) fn can_be_captured(&self) -> bool {
        self.spread.way != BetweenGpus::Counted
    }

    /// Returns when all ranks are here.
    pub(super) fn barrier(&self) -> Result<()> {
        self.peers.most(self.at(Step::Setup), [0]).map(drop)
    }

    /// Waits for the device, with an eye on the other ranks.
    pub(super) fn idle(&self, device: &Device) -> Result<()> {
        let event = Event::new(&device.gpu).map_err(error)?;
        device.stream.record(&event).map_err(error)?;
        self.peers.wait(self.at(Step::Setup), &event)
    }

    /// The same room for what every rank has for every other, where there is such.
    fn given_room(&self) -> Option<resident::Room> {
        match self.spread.way {
            BetweenGpus::WithRoom(room) => Some(room),
            BetweenGpus::OneSided | BetweenGpus::Counted => None,
        }
    }

    pub(super) fn room(&self) -> Room {
        self.given_room()
            .map_or(Room::default(), |room| Room { slots: room.slots, rows: room.rows })
    }

    /// Waits for what is on the device's stream, with an eye on the other ranks.
    pub(super) fn wait(&self, device: &Device, work: &mut RanksWork) -> Result<()> {
        work.event(&device.gpu)?;
        let RanksWork { event: Some(event), one_sided, .. } = work else { return Err(no_memory()) };
        device.stream.record(event).map_err(error)?;
        let late = || one_sided.late(&self.peers, &device.gpu);
        self.peers.wait_or(self.at(Step::Combine), event, late)
    }

    /// The time of one of what `timed` puts on the stream, in seconds.
    fn median(
        &self,
        device: &Device,
        runs: usize,
        timed: &mut dyn FnMut() -> Result<()>,
    ) -> Result<f64> {
        let events =
            [Event::new(&device.gpu).map_err(error)?, Event::new(&device.gpu).map_err(error)?];
        let stream = &device.stream;
        // several together: ranks do not begin at the same microsecond
        let mut together = || (0..TOGETHER).try_for_each(|_| timed());
        let mut graph = None;
        if self.can_be_captured() {
            // as such passes run
            let mut refused = None;
            let captured = stream.capture(|| {
                refused = together().err();
                Ok(())
            });
            refused.map_or(Ok(()), Err)?;
            graph = Some(captured.map_err(error)?);
        }
        let mut micros = Vec::with_capacity(runs);
        for _ in 0..runs.max(1) {
            self.spread.group.barrier(self.at(Step::Setup))?;
            stream.record(&events[0]).map_err(error)?;
            match &graph {
                // SAFETY: the memory of passes is as it was captured.
                Some(graph) => unsafe { stream.replay(graph) }.map_err(error)?,
                None => together()?,
            }
            stream.record(&events[1]).map_err(error)?;
            self.peers.wait(self.at(Step::Combine), &events[1])?;
            micros.push(events[1].microseconds_since(&events[0]).map_err(error)?);
        }
        micros.sort_by(f64::total_cmp);
        Ok(micros[micros.len() / 2] * 1e-6 / TOGETHER as f64)
    }

    /// Counts what the pass moved.
    fn count(&self, ways: &Ways, wire: ResidentWire) {
        let traffic = self.spread.group.traffic();
        let kinds = [Kind::AllGather, Kind::AllToAllV, Kind::AllToAllV];
        for (kind, bytes) in kinds.into_iter().zip(ways.traffic(wire, self.homes.ranks())) {
            let Some((sent, received)) = bytes else { continue };
            traffic.add(kind, Count { calls: 1, sent: sent as u64, received: received as u64 });
        }
    }
}

/// Where the experts of `map` are, as the GPU knows it.
fn homes(stream: &Stream, map: &ExpertMap, me: usize, all: usize) -> Result<Homes> {
    let of = |id: u32| {
        let homes = map.copies(LogicalId(id)).iter();
        homes.map(|home| (home.rank as u32, home.local.0)).collect()
    };
    let copies: Vec<Vec<(u32, u32)>> = (0..map.experts() as u32).map(of).collect();
    Homes::new(stream, &copies, me, all).map_err(error)
}

/// One rank's part of a pass over ranks, or of an exchange alone.
pub(super) struct RanksPass<'p, 'a, 'o> {
    pub(super) ranks: &'p Ranks,
    pub(super) device: &'p Device,
    pub(super) experts: &'p Experts,
    pub(super) of: RanksBatch<'a>,
    pub(super) plans: &'p mut Plans,
    pub(super) fast: &'p mut FastWork,
    pub(super) out: &'p mut RowsMut<'o>,
    /// Of the data, and what is nobody's fault.
    pub(super) faults: (&'p FaultWord, &'p FaultWord),
    pub(super) marks: &'p Marks,
}

impl RanksPass<'_, '_, '_> {
    /// Bytes of a row as it travels.
    pub(super) fn row_bytes(&self) -> usize {
        self.of.x.cols() * self.of.x.float().bytes()
    }

    /// This rank's rows of one of so many micro-batches, and their slots.
    pub(super) fn part(&self, lane: usize, lanes: usize) -> (Range<usize>, Range<usize>) {
        let rows = share(self.of.x.rows(), lane, lanes);
        let slots = rows.start * self.of.top_k..rows.end * self.of.top_k;
        (rows, slots)
    }

    /// `out[t] = factor · Σ_j weights[t, j] · expert(ids[t, j])(x[t])`, wherever the experts are.
    pub(super) fn run(&mut self, memory: &mut RanksWork) -> Result<()> {
        let ranks = self.ranks;
        let (me, all) = (ranks.homes.me(), ranks.homes.ranks());
        let outputs = self.experts.output_of_slot();
        let last = match &ranks.one_sided {
            Some(put) => {
                let wire = two_sided::wire(self, outputs);
                let places = Places { ranks: all, most: 0, top_k: self.of.top_k };
                let (memory, lanes) = (&mut memory.one_sided, ranks.spread.lanes);
                let mut side = put::Gpus { pass: self, put, memory, lanes, places };
                Last::Put { lanes: one_sided::run(&mut side, lanes)?, wire }
            }
            None => {
                let (memory, lanes) = (&mut memory.two_sided, ranks.spread.lanes);
                let mut side = two_sided::Gpus::new(self, memory, vec![outputs; lanes])?;
                let ways = resident::run(&mut side, (me, all), ranks.given_room(), lanes)?;
                let wire = two_sided::wire(self, outputs);
                ways.iter().for_each(|ways| ranks.count(ways, wire));
                Last::Sent { ways }
            }
        };
        *ranks.last() = Some(last);
        Ok(())
    }

    /// See [`LayerKernel::exchange_time`](crate::experts::LayerKernel::exchange_time).
    pub(super) fn exchange_time(
        &mut self,
        memory: &mut RanksWork,
        runs: usize,
    ) -> Result<Option<ExchangeTime>> {
        let (ranks, device) = (self.ranks, self.device);
        let Some(last) = ranks.last().clone() else { return Ok(None) };
        let (of_all, room) = ((ranks.homes.me(), ranks.homes.ranks()), ranks.given_room());
        let outputs = match &last {
            Last::Sent { ways } => two_sided::no_outputs(self, &mut memory.two_sided, ways)?,
            Last::Put { .. } => {
                // memory for the slots that can arrive in one micro-batch
                let of = memory.one_sided.no_outputs(self.experts, self.fast)?;
                vec![of; ranks.spread.lanes]
            }
        };
        // the same rows and outputs as NCCL takes them
        let mut sent = two_sided::Gpus::new(&mut *self, &mut memory.two_sided, outputs)?;
        let ways = match &last {
            Last::Sent { ways } => ways.clone(),
            Last::Put { .. } => {
                let side = &mut two_sided::WithoutExperts(&mut sent);
                resident::run(side, of_all, None, ranks.spread.lanes)?
            }
        };
        let bare_seconds = ranks.median(device, runs, &mut || sent.bare(&ways))?;
        let (seconds, moved) = match (last, &ranks.one_sided) {
            (Last::Put { lanes, wire }, Some(put)) if !lanes.is_empty() => {
                let memory = &mut memory.one_sided;
                let places = Places { most: lanes.iter().map(|lane| lane.most).sum(), ..lanes[0] };
                let count = ranks.spread.lanes;
                let mut side = put::Gpus { pass: self, put, memory, lanes: count, places };
                let seconds = ranks.median(device, runs, &mut || {
                    one_sided::exchange(&mut put::WithoutExperts(&mut side), &lanes)
                })?;
                let moved = |(ways, places): (&Ways, &Places)| places.traffic(ways, wire);
                (seconds, ways.iter().zip(&lanes).flat_map(moved).collect())
            }
            _ => {
                let seconds = ranks.median(device, runs, &mut || {
                    let side = &mut two_sided::WithoutExperts(&mut sent);
                    resident::run(side, of_all, room, ways.len()).map(drop)
                })?;
                let wire = two_sided::wire(sent.pass, sent.outputs[0]);
                let rows = ways.iter().flat_map(|ways| {
                    let [_, there, back] = ways.traffic(wire, of_all.1);
                    [there, back]
                });
                (seconds, rows.flatten().collect::<Vec<_>>())
            }
        };
        let sent = moved.into_iter().map(|(sent, _)| sent).sum();
        Ok(Some(ExchangeTime { seconds, bare_seconds, sent }))
    }
}

/// Rows `[T, H]` in what the experts read, ids and weights `[T, k]`, k, and the factor.
#[derive(Clone, Copy)]
pub(super) struct RanksBatch<'a> {
    pub(super) x: Rows<'a>,
    pub(super) ids: View<'a, u32>,
    pub(super) weights: View<'a, f32>,
    pub(super) top_k: usize,
    pub(super) factor: f32,
}
