//! The experts of a layer that is spread over ranks: rows stay on the GPUs from the gate to the sum, and go
//! from one to the other by NCCL.
//!
//! The order of the steps, and what goes where, is [`resident`]'s; here is a GPU's side of it. Each slot's output
//! comes back as the kernel left it, and is added on its token's rank, in slot order: whole experts anywhere give
//! the bits of one GPU.

use std::sync::{Mutex, MutexGuard, PoisonError};

use moe_cuda::{
    Buffer, Event, ExchangeVerbs, FaultWord, Gpu, Homes, Leg, Packed, Parts, Pinned, Pod, Room,
    Rows, RowsMut, SlotOutputs, View, ViewMut,
};

use super::device::{Device, Plans, error};
use super::layer::Experts;
use super::pass::f32_rows;
use super::products::{FastWork, Products};
use crate::comm::nccl::Peers;
use crate::comm::{At, Count, Kind, Step};
use crate::exchange::resident::{self, ResidentWire, Side, Ways};
use crate::experts::{ExchangeTime, Spread};
use crate::{Error, Result};

/// Exchanges that are timed together.
const TOGETHER: usize = 4;

/// The ranks, as one of them sees them.
pub(super) struct Ranks {
    layer: String,
    verbs: ExchangeVerbs,
    homes: Homes,
    spread: Spread,
    peers: Peers,
    /// Of the last pass: what its exchange alone is timed with.
    last: Mutex<Option<Last>>,
    /// This rank's experts that the last pass with a report has used.
    active: Mutex<Vec<u32>>,
}

#[derive(Clone)]
struct Last {
    ways: Ways,
    outputs: SlotOutputs,
}

/// Memory of passes over ranks, which grows to what the largest needed.
#[derive(Default)]
pub(super) struct RanksWork {
    parts: Option<Parts>,
    counts: Option<Pinned<u32>>,
    event: Option<Event>,
    /// What stays or has arrived, and what goes: records of slots, and rows.
    here: [Grown<u32>; 2],
    here_rows: Grown<u8>,
    go_rows: Grown<u8>,
    /// Ids, rows, and rows in the order of the plan, of the slots that have arrived.
    slots: [Grown<u32>; 3],
    /// Of products in f32: rows, rows between the products, outputs.
    wide: [Grown<f32>; 3],
    /// What comes back: values and scales.
    back: [Grown<u8>; 2],
}

/// Device memory that is replaced by more where it must be.
struct Grown<T>(Option<Buffer<T>>);

impl<T> Default for Grown<T> {
    fn default() -> Self {
        Self(None)
    }
}

impl<T: Pod> Grown<T> {
    /// Makes sure of `len` elements; what was in it is lost if that is more: true then.
    fn reserve(&mut self, gpu: &Gpu, len: usize) -> Result<bool> {
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

    fn part(&self, range: std::ops::Range<usize>) -> View<'_, T> {
        match &self.0 {
            Some(buffer) => buffer.view().part(range),
            // SAFETY: nothing is there, and nothing is read.
            None => unsafe { View::from_raw(0, 0) },
        }
    }

    fn part_mut(&mut self, range: std::ops::Range<usize>) -> ViewMut<'_, T> {
        match &mut self.0 {
            Some(buffer) => buffer.view_mut().part(range),
            // SAFETY: nothing is there, and nothing is written.
            None => unsafe { ViewMut::from_raw(0, 0) },
        }
    }

    fn all_mut(&mut self) -> ViewMut<'_, T> {
        let len = self.0.as_ref().map_or(0, Buffer::len);
        self.part_mut(0..len)
    }

    fn address(&self) -> u64 {
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
            spread,
            peers,
            last: Mutex::new(None),
            active: Mutex::default(),
        })
    }

    fn last(&self) -> MutexGuard<'_, Option<Last>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes which of this rank's experts the last pass used; all of it is done.
    pub(super) fn note_active(&self, device: &Device, work: &RanksWork) -> Result<()> {
        let places = self.last().as_ref().map_or(0, |last| last.ways.slots[1]);
        let mut ids = vec![0; places];
        device.stream.copy_out(work.slots[0].part(0..places), &mut ids).map_err(error)?;
        ids.sort_unstable();
        ids.dedup();
        *self.active.lock().unwrap_or_else(PoisonError::into_inner) = ids;
        Ok(())
    }

    /// See [`Self::note_active`].
    pub(super) fn active(&self) -> Vec<u32> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn at(&self, step: Step) -> At<'_> {
        At::new(&self.layer, step)
    }

    fn room(&self) -> Room {
        self.spread.room.map_or(Room::default(), |room| Room { slots: room.slots, rows: room.rows })
    }

    /// Waits for what is on the device's stream, with an eye on the other ranks.
    pub(super) fn wait(&self, device: &Device, work: &mut RanksWork) -> Result<()> {
        let event = work.event(&device.gpu)?;
        device.stream.record(event).map_err(error)?;
        self.peers.wait(self.at(Step::Combine), event)
    }

    /// `out[t] = factor · Σ_j weights[t, j] · expert(ids[t, j])(x[t])`, wherever the experts are.
    pub(super) fn run(
        &self,
        device: &Device,
        experts: &Experts,
        of: RanksBatch<'_>,
        work: (&mut Plans, &mut FastWork, &mut RanksWork),
        out: &mut RowsMut<'_>,
        faults: (&FaultWord, &FaultWord),
    ) -> Result<()> {
        let (me, all) = (self.homes.me(), self.homes.ranks());
        let room = self.spread.room;
        let (plans, fast, memory) = work;
        let mut side = Gpus {
            ranks: self,
            device,
            experts,
            of,
            plans,
            fast,
            memory,
            out,
            faults,
            outputs: experts.output_of_slot(),
        };
        let ways = resident::run(&mut side, (me, all), room)?;
        self.count(&ways, side.wire());
        let outputs = side.outputs;
        *self.last() = Some(Last { ways, outputs });
        Ok(())
    }

    /// See [`LayerKernel::exchange_time`](crate::experts::LayerKernel::exchange_time).
    pub(super) fn exchange_time(
        &self,
        device: &Device,
        experts: &Experts,
        of: RanksBatch<'_>,
        work: (&mut Plans, &mut FastWork, &mut RanksWork),
        out: &mut RowsMut<'_>,
        (faults, runs): ((&FaultWord, &FaultWord), usize),
    ) -> Result<Option<ExchangeTime>> {
        let Some(Last { ways, outputs }) = self.last().clone() else { return Ok(None) };
        let (me, all) = (self.homes.me(), self.homes.ranks());
        let room = self.spread.room;
        let (plans, fast, memory) = work;
        let mut side =
            Gpus { ranks: self, device, experts, of, plans, fast, memory, out, faults, outputs };
        let events =
            [Event::new(&device.gpu).map_err(error)?, Event::new(&device.gpu).map_err(error)?];
        let stream = &device.stream;
        let median = |timed: &mut dyn FnMut() -> Result<()>| -> Result<f64> {
            // several together: ranks do not begin at the same microsecond
            let mut together = || (0..TOGETHER).try_for_each(|_| timed());
            let mut graph = None;
            if room.is_some() {
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
        };
        let seconds = median(&mut || {
            resident::run(&mut WithoutExperts(&mut side), (me, all), room).map(drop)
        })?;
        let bare_seconds = median(&mut || {
            side.send(&ways)?;
            side.send_back(&ways)
        })?;
        let [_, there, back] = ways.traffic(side.wire(), all);
        let sent = [there, back].into_iter().flatten().map(|(sent, _)| sent).sum();
        Ok(Some(ExchangeTime { seconds, bare_seconds, sent }))
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

/// Rows `[T, H]` in what the experts read, ids and weights `[T, k]`, k, and the factor.
pub(super) struct RanksBatch<'a> {
    pub(super) x: Rows<'a>,
    pub(super) ids: View<'a, u32>,
    pub(super) weights: View<'a, f32>,
    pub(super) top_k: usize,
    pub(super) factor: f32,
}

/// A GPU's side of one pass's exchange.
struct Gpus<'p, 'a, 'o> {
    ranks: &'p Ranks,
    device: &'p Device,
    experts: &'p Experts,
    of: RanksBatch<'a>,
    plans: &'p mut Plans,
    fast: &'p mut FastWork,
    memory: &'p mut RanksWork,
    out: &'p mut RowsMut<'o>,
    faults: (&'p FaultWord, &'p FaultWord),
    /// Of the slots that have arrived.
    outputs: SlotOutputs,
}

impl RanksWork {
    fn event(&mut self, gpu: &Gpu) -> Result<&Event> {
        if self.event.is_none() {
            self.event = Some(Event::new(gpu).map_err(error)?);
        }
        self.event.as_ref().ok_or_else(no_memory)
    }

    fn parts(&self) -> Result<&Parts> {
        self.parts.as_ref().ok_or_else(no_memory)
    }

    /// What comes back, as outputs like `of`.
    fn back(&self, of: SlotOutputs) -> SlotOutputs {
        let [values, scales] = &self.back;
        SlotOutputs { values: values.address(), scales: scales.address(), ..of }
    }
}

/// The steps come in one order, and the first of them makes the memory.
fn no_memory() -> Error {
    Error::Device("an exchange without memory".into())
}

impl Gpus<'_, '_, '_> {
    fn row_bytes(&self) -> usize {
        self.of.x.cols() * self.of.x.float().bytes()
    }

    /// What crosses between ranks.
    fn wire(&self) -> ResidentWire {
        let SlotOutputs { value_bytes, scale_bytes, .. } = self.outputs;
        ResidentWire { row: self.row_bytes(), output: value_bytes + scale_bytes }
    }

    /// Ids and rows of the slots that have arrived.
    fn unpack(&mut self, ways: &Ways) -> Result<()> {
        let Self { ranks, device, memory, .. } = self;
        let places = ways.slots[1];
        let RanksWork { parts, here, slots: [ids, row_of, _], .. } = &mut **memory;
        let parts = parts.as_ref().ok_or_else(no_memory)?;
        let records = here[0].part(0..2 * places);
        let by = (parts, &ranks.homes, ranks.room());
        let (ids, rows) = (ids.part_mut(0..places), row_of.part_mut(0..places));
        ranks.verbs.unpack(&device.stream, records, by, ids, rows).map_err(error)
    }
}

impl Side for Gpus<'_, '_, '_> {
    fn sort(&mut self) -> Result<()> {
        let Self { ranks, device, of, memory, .. } = self;
        let (gpu, all) = (&device.gpu, ranks.homes.ranks());
        let (tokens, k) = (of.x.rows(), of.top_k);
        if !memory.parts.as_ref().is_some_and(|parts| parts.takes(tokens, k, all)) {
            memory.parts = None;
            memory.parts = Some(Parts::new(gpu, tokens, k, all).map_err(error)?);
        }
        let parts = memory.parts.as_mut().ok_or_else(no_memory)?;
        let ids = (of.ids, k);
        ranks.verbs.sort(&device.stream, &device.verbs, &ranks.homes, ids, parts).map_err(error)
    }

    fn share_counts(&mut self) -> Result<()> {
        let Self { ranks, device, memory, .. } = self;
        let (me, all) = (ranks.homes.me(), ranks.homes.ranks());
        let base = memory.parts()?.counts().address();
        let bytes = 2 * all * ResidentWire::COUNT;
        let line = |peer, of: usize| Leg { peer, address: base + (of * bytes) as u64, bytes };
        let others = || (0..all).filter(|peer| *peer != me);
        // SAFETY: the counts are [all, 2 all], and live with the memory of passes.
        unsafe {
            ranks.peers.start(
                ranks.at(Step::Dispatch),
                &device.stream,
                &mut others().map(|peer| line(peer, me)),
                &mut others().map(|peer| line(peer, peer)),
            )
        }
    }

    fn pack(&mut self) -> Result<()> {
        let row = self.row_bytes();
        let Self { ranks, device, of, memory, faults, .. } = self;
        let (gpu, all) = (&device.gpu, ranks.homes.ranks());
        if ranks.spread.room.is_none() {
            // as much as this batch can need
            let (slots, rows) = (of.ids.len(), of.x.rows());
            memory.here[0].reserve(gpu, 2 * slots)?;
            memory.here_rows.reserve(gpu, rows * row)?;
            memory.here[1].reserve(gpu, 2 * slots)?;
            memory.go_rows.reserve(gpu, rows * of.top_k.min(all - 1) * row)?;
        }
        let RanksWork { parts, here: [stay, go], here_rows, go_rows, .. } = &mut **memory;
        let parts = parts.as_ref().ok_or_else(no_memory)?;
        let stay = Packed { records: stay.all_mut(), rows: here_rows.all_mut() };
        let go = Packed { records: go.all_mut(), rows: go_rows.all_mut() };
        let (stream, room) = (&device.stream, ranks.room());
        // SAFETY: a row goes to each other rank at most once, and no more often than it has slots.
        unsafe { ranks.verbs.pack(stream, of.x, (parts, room), (stay, go), faults.0) }
            .map_err(error)
    }

    fn counts(&mut self) -> Result<Vec<u32>> {
        let Self { ranks, device, memory, .. } = self;
        let (gpu, all) = (&device.gpu, ranks.homes.ranks());
        if memory.counts.as_ref().is_none_or(|counts| counts.as_slice().len() != 2 * all * all) {
            memory.counts = Some(Pinned::new(gpu, 2 * all * all).map_err(error)?);
        }
        memory.event(gpu)?;
        let RanksWork { parts, counts, event, .. } = &mut **memory;
        let (Some(parts), Some(counts), Some(event)) = (parts, counts, event) else {
            return Err(no_memory());
        };
        device.stream.copy_to(parts.counts(), counts).map_err(error)?;
        device.stream.record(event).map_err(error)?;
        ranks.peers.wait(ranks.at(Step::Dispatch), event)?;
        Ok(counts.as_slice().to_vec())
    }

    fn make_room(&mut self, ways: &Ways) -> Result<()> {
        let row = self.row_bytes();
        let gpu = &self.device.gpu;
        let ([go, here], [go_rows, here_rows]) = (ways.slots, ways.rows);
        let memory = &mut *self.memory;
        let lost = [
            memory.here[0].reserve(gpu, 2 * here)?,
            memory.here_rows.reserve(gpu, here_rows * row)?,
            memory.here[1].reserve(gpu, 2 * go)?,
            memory.go_rows.reserve(gpu, go_rows * row)?,
        ];
        for slots in &mut memory.slots {
            slots.reserve(gpu, here)?;
        }
        memory.back[0].reserve(gpu, go * self.outputs.value_bytes)?;
        memory.back[1].reserve(gpu, go * self.outputs.scale_bytes)?;
        match self.ranks.spread.room.is_none() && lost.contains(&true) {
            true => self.pack(),
            false => Ok(()),
        }
    }

    fn send(&mut self, ways: &Ways) -> Result<()> {
        let (row, slot) = (self.row_bytes(), ResidentWire::SLOT);
        let Self { ranks, device, memory, .. } = self;
        let [here, go] = &memory.here;
        let (rows, go_rows) = (memory.here_rows.address(), memory.go_rows.address());
        let mut sends = ways.all.iter().flat_map(|way| {
            [
                leg(way.peer, go.address(), &way.slots.go, slot),
                leg(way.peer, go_rows, &way.rows.go, row),
            ]
        });
        let mut receives = ways.all.iter().flat_map(|way| {
            [
                leg(way.peer, here.address(), &way.slots.come, slot),
                leg(way.peer, rows, &way.rows.come, row),
            ]
        });
        let at = ranks.at(Step::Dispatch);
        // SAFETY: there is room for all of it, which lives with the memory of passes.
        unsafe { ranks.peers.start(at, &device.stream, &mut sends, &mut receives) }
    }

    fn experts(&mut self, ways: &Ways) -> Result<()> {
        self.unpack(ways)?;
        let Self { ranks, device, experts, of, memory, .. } = self;
        let (places, rows) = (ways.slots[1], ways.rows[1]);
        let stream = &device.stream;
        let RanksWork { here_rows, slots: [ids, row_of, sorted], wide, .. } = &mut **memory;
        if places == 0 {
            return Ok(());
        }
        let (width, float) = (of.x.cols(), of.x.float());
        let bytes = here_rows.part(0..rows * width * float.bytes());
        let x = Rows::of_bytes(bytes, float, rows, width).map_err(error)?;
        let tile = experts.products.many_tile();
        let plan = self.plans.reserve(&device.gpu, places, experts.count(), tile)?;
        let ids = ids.part(0..places);
        device.verbs.plan(stream, ids, 1, plan).map_err(error)?;
        let (row_of, to) = (row_of.part(0..places), sorted.part_mut(0..places));
        ranks.verbs.rows_in_order(stream, row_of, plan, to).map_err(error)?;
        let row_of = sorted.part(0..places);
        self.outputs = match &experts.products {
            // SAFETY: every record names a row of its own part.
            Products::Sm90(fast) => unsafe { fast.slots(device, x, row_of, plan, self.fast)? },
            Products::F32(_) => {
                let [rows, h, y] = wide;
                rows.reserve(&device.gpu, places * width)?;
                h.reserve(&device.gpu, places * experts.intermediate())?;
                y.reserve(&device.gpu, places * width)?;
                let mut rows = f32_rows(rows.part_mut(0..places * width), places, width)?;
                // SAFETY: as above.
                unsafe { device.slots.gather_rows(stream, x, row_of, plan, &mut rows) }
                    .map_err(error)?;
                let h = f32_rows(
                    h.part_mut(0..places * experts.intermediate()),
                    places,
                    experts.intermediate(),
                )?;
                let mut out = f32_rows(y.part_mut(0..places * width), places, width)?;
                experts.sorted_in_f32(device, rows, h, (ids, plan), &mut out)?;
                SlotOutputs { values: y.address(), ..experts.output_of_slot() }
            }
        };
        Ok(())
    }

    fn send_back(&mut self, ways: &Ways) -> Result<()> {
        let Self { ranks, device, memory, outputs, .. } = self;
        let back = memory.back(*outputs);
        // SAFETY: the outputs are the workspace's, with one for every slot; there is room for what comes back.
        unsafe { return_legs(ranks, device, ways, *outputs, back) }
    }

    fn combine(&mut self) -> Result<()> {
        let Self { ranks, device, of, memory, out, faults, outputs, .. } = self;
        let by = (memory.parts()?, ranks.room());
        let (own, far) = (*outputs, memory.back(*outputs));
        let weights = (of.weights, of.factor);
        ranks.verbs.combine(&device.stream, by, (own, far), weights, out, faults.1).map_err(error)
    }
}

/// The same steps, where the outputs are those of the pass before: what the exchange alone takes.
struct WithoutExperts<'s, 'p, 'a, 'o>(&'s mut Gpus<'p, 'a, 'o>);

impl Side for WithoutExperts<'_, '_, '_, '_> {
    fn sort(&mut self) -> Result<()> {
        self.0.sort()
    }

    fn share_counts(&mut self) -> Result<()> {
        self.0.share_counts()
    }

    fn pack(&mut self) -> Result<()> {
        self.0.pack()
    }

    fn counts(&mut self) -> Result<Vec<u32>> {
        self.0.counts()
    }

    fn make_room(&mut self, ways: &Ways) -> Result<()> {
        self.0.make_room(ways)
    }

    fn send(&mut self, ways: &Ways) -> Result<()> {
        self.0.send(ways)
    }

    fn experts(&mut self, ways: &Ways) -> Result<()> {
        self.0.unpack(ways)
    }

    fn send_back(&mut self, ways: &Ways) -> Result<()> {
        self.0.send_back(ways)
    }

    fn combine(&mut self) -> Result<()> {
        self.0.combine()
    }
}

/// Places `of` elements of so many bytes, from `address` on, to or from a rank.
fn leg(peer: usize, address: u64, of: &std::ops::Range<usize>, bytes: usize) -> Leg {
    Leg { peer, address: address + (of.start * bytes) as u64, bytes: of.len() * bytes }
}

/// Outputs to those that sent the slots, and this rank's back.
///
/// # Safety
/// As [`Peers::start`].
unsafe fn return_legs(
    ranks: &Ranks,
    device: &Device,
    ways: &Ways,
    from: SlotOutputs,
    to: SlotOutputs,
) -> Result<()> {
    let legs = |way: &resident::Way, of: SlotOutputs, range: &std::ops::Range<usize>| {
        [
            leg(way.peer, of.values, range, of.value_bytes),
            leg(way.peer, of.scales, range, of.scale_bytes),
        ]
    };
    let mut sends = ways.all.iter().flat_map(|way| legs(way, from, &way.slots.come));
    let mut receives = ways.all.iter().flat_map(|way| legs(way, to, &way.slots.go));
    let at = ranks.at(Step::Combine);
    // SAFETY: as the caller promises.
    unsafe { ranks.peers.start(at, &device.stream, &mut sends, &mut receives) }
}
