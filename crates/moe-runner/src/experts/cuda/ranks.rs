//! The experts of a layer that is spread over ranks: rows stay on the GPUs from the gate to the sum, and go
//! from one to the other by NCCL.
//!
//! The order of the steps, and what goes where, is [`resident`]'s; here is a GPU's side of it. Each slot's output
//! comes back as the kernel left it, and is added on its token's rank, in slot order: whole experts anywhere give
//! the bits of one GPU. Where ranks write into each other's memory, it is [`one_sided`](super::one_sided)'s.

use std::sync::{Mutex, MutexGuard, PoisonError};

use moe_cuda::{
    Buffer, Event, ExchangeVerbs, FaultWord, Gpu, Homes, Pod, Room, Rows, RowsMut, SlotOutputs,
    View, ViewMut, Windows,
};

use super::device::{Device, Plans, error};
use super::layer::Experts;
use super::one_sided::{self as put, OneSided, OneSidedWork};
use super::products::FastWork;
use super::two_sided::{self, TwoSidedWork};
use crate::comm::nccl::Peers;
use crate::comm::{At, Count, Kind, Step};
use crate::exchange::one_sided::{self, Places};
use crate::exchange::resident::{self, ResidentWire, Side, Ways};
use crate::experts::{ExchangeTime, Spread};
use crate::router::LogicalId;
use crate::{Error, Result};

/// What has no expert here.
const NO_EXPERT: u32 = u32::MAX;

/// Exchanges that are timed together.
const TOGETHER: usize = 4;

/// The ranks, as one of them sees them.
pub(super) struct Ranks {
    layer: String,
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
    Sent { ways: Ways, outputs: SlotOutputs },
    Put { places: Places, wire: ResidentWire },
}

/// Memory of passes over ranks, one way or the other.
#[derive(Default)]
pub(super) struct RanksWork {
    event: Option<Event>,
    pub(super) one_sided: OneSidedWork,
    pub(super) two_sided: TwoSidedWork,
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

    pub(super) fn part(&self, range: std::ops::Range<usize>) -> View<'_, T> {
        match &self.0 {
            Some(buffer) => buffer.view().part(range),
            // SAFETY: nothing is there, and nothing is read.
            None => unsafe { View::from_raw(0, 0) },
        }
    }

    pub(super) fn part_mut(&mut self, range: std::ops::Range<usize>) -> ViewMut<'_, T> {
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
    pub(super) fn new(device: &Device, name: &str, spread: Spread) -> Result<Self> {
        let Spread { group, map, .. } = &spread;
        let peers = group.peers().filter(|peers| peers.gpu() == device.gpu.index());
        let Some(peers) = peers else {
            return Err(Error::NoKernel("the ranks' GPUs are not connected".into()));
        };
        let copies: Vec<Vec<(u32, u32)>> = (0..map.experts())
            .map(|id| {
                let homes = map.copies(crate::router::LogicalId(id as u32));
                homes.iter().map(|home| (home.rank as u32, home.local.0)).collect()
            })
            .collect();
        let (me, all) = (group.rank(), group.size());
        Ok(Self {
            layer: name.to_owned(),
            verbs: ExchangeVerbs::new(&device.modules).map_err(error)?,
            homes: Homes::new(&device.stream, &copies, me, all).map_err(error)?,
            one_sided: (spread.one_sided && spread.room.is_none() && all <= Windows::MOST_RANKS)
                .then_some(())
                .filter(|()| peers.reaches())
                .map(|()| OneSided::new(device))
                .transpose()?,
            spread,
            peers,
            last: Mutex::new(None),
            active: Mutex::default(),
        })
    }

    fn last(&self) -> MutexGuard<'_, Option<Last>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes which of this rank's experts the last pass used, with `ids` `[T, k]` of this rank's rows; all of it is done.
    pub(super) fn note(&self, device: &Device, work: &RanksWork, ids: View<'_, u32>) -> Result<()> {
        let Some(last) = self.last().clone() else { return Ok(()) };
        let arrived = match &last {
            Last::Sent { ways, .. } => work.two_sided.ids(ways),
            Last::Put { places, .. } if places.most == 0 => ids.part(0..0),
            Last::Put { places, wire } => work.one_sided.ids(&self.peers, *places, wire.row)?,
        };
        let mut active = vec![0; arrived.len()];
        device.stream.copy_out(arrived, &mut active).map_err(error)?;
        if let Last::Put { places, wire } = last {
            let mut own = vec![0; ids.len()];
            device.stream.copy_out(ids, &mut own).map_err(error)?;
            self.count_put(places, wire, (&own, &active));
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

    /// Ranks send as much as they have, not as much as there is room for.
    pub(super) fn is_counted(&self) -> bool {
        self.spread.room.is_none()
    }

    /// No host learns a count.
    pub(super) fn can_be_captured(&self) -> bool {
        self.one_sided.is_some() || self.spread.room.is_some()
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

    pub(super) fn room(&self) -> Room {
        self.spread.room.map_or(Room::default(), |room| Room { slots: room.slots, rows: room.rows })
    }

    /// Waits for what is on the device's stream, with an eye on the other ranks.
    pub(super) fn wait(&self, device: &Device, work: &mut RanksWork) -> Result<()> {
        let event = work.event(&device.gpu)?;
        device.stream.record(event).map_err(error)?;
        self.peers.wait(self.at(Step::Combine), event)
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
}

impl RanksPass<'_, '_, '_> {
    /// Bytes of a row as it travels.
    pub(super) fn row_bytes(&self) -> usize {
        self.of.x.cols() * self.of.x.float().bytes()
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
                let memory = &mut memory.one_sided;
                let mut side = put::Gpus { pass: self, put, memory, places };
                Last::Put { places: one_sided::run(&mut side)?, wire }
            }
            None => {
                let memory = &mut memory.two_sided;
                let mut side = two_sided::Gpus { pass: self, memory, outputs };
                let ways = resident::run(&mut side, (me, all), ranks.spread.room)?;
                let outputs = side.outputs;
                ranks.count(&ways, two_sided::wire(self, outputs));
                Last::Sent { ways, outputs }
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
        let (of_all, room) = ((ranks.homes.me(), ranks.homes.ranks()), ranks.spread.room);
        let outputs = match &last {
            Last::Sent { outputs, .. } => *outputs,
            Last::Put { .. } => put::no_outputs(self.experts, self.fast, &memory.one_sided)?,
        };
        // the same rows and outputs as NCCL takes them
        let mut sent = two_sided::Gpus { pass: &mut *self, memory: &mut memory.two_sided, outputs };
        let ways = match &last {
            Last::Sent { ways, .. } => ways.clone(),
            Last::Put { .. } => {
                resident::run(&mut two_sided::WithoutExperts(&mut sent), of_all, None)?
            }
        };
        let bare_seconds = ranks.median(device, runs, &mut || {
            sent.send(&ways)?;
            sent.send_back(&ways)
        })?;
        let (seconds, ways) = match (last, &ranks.one_sided) {
            (Last::Put { places, wire }, Some(put)) if places.most > 0 => {
                let memory = &mut memory.one_sided;
                let mut side = put::Gpus { pass: self, put, memory, places };
                let seconds = ranks.median(device, runs, &mut || {
                    one_sided::exchange(&mut put::WithoutExperts(&mut side), places)
                })?;
                (seconds, places.traffic(&ways, wire).map(Some))
            }
            _ => {
                let seconds = ranks.median(device, runs, &mut || {
                    let side = &mut two_sided::WithoutExperts(&mut sent);
                    resident::run(side, of_all, room).map(drop)
                })?;
                let wire = two_sided::wire(sent.pass, sent.outputs);
                let [_, there, back] = ways.traffic(wire, of_all.1);
                (seconds, [there, back])
            }
        };
        let sent = ways.into_iter().flatten().map(|(sent, _)| sent).sum();
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
