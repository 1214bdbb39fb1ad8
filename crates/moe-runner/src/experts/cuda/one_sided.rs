//! A GPU's side of an exchange in which ranks write into each other's memory; the order of the steps, and what is where,
//! is [`one_sided`]'s. The second product itself puts a slot's output where its row's rank adds it up, so that the
//! way back takes no time of its own.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use moe_cuda::{Event, Gpu, Meeting, OneSidedVerbs, Rows, SlotOutputs, Stream, View, Windows};

use super::device::{Device, error};
use super::layer::Experts;
use super::pass::f32_rows;
use super::products::{FastWork, Products};
use super::ranks::{Grown, RanksPass, no_memory};
use crate::comm::nccl::Peers;
use crate::comm::shared::SharedMemory;
use crate::comm::watch::Awaited;
use crate::comm::{At, Step};
use crate::exchange::one_sided::{self, Places, Side, Signals};
use crate::{Error, Result};

/// What ranks share: what arrives, outputs, signals.
const ARRIVALS: usize = 0;
const OUTPUTS: usize = 1;
const SIGNALS: usize = 2;

/// What a layer has for such exchanges.
pub(super) struct OneSided {
    pub(super) verbs: OneSidedVerbs,
    /// By micro-batch, slots of the largest whose memory all ranks have made sure of together.
    ready: Mutex<Vec<usize>>,
}

/// The windows of groups of ranks, and other memory of passes over them.
#[derive(Default)]
pub(super) struct OneSidedWork {
    groups: Vec<Group>,
    /// Of products in f32: rows, rows between the products, outputs.
    wide: [Grown<f32>; 3],
    /// Of more than one micro-batch.
    lanes: Vec<Lane>,
    /// Names of layers by their numbers, as signals have them.
    layers: BTreeMap<u32, String>,
}

/// What a group's ranks share for one micro-batch.
struct Group {
    /// The ranks in the world, and which one that is here.
    members: Vec<usize>,
    world: u64,
    lane: usize,
    memory: SharedMemory,
}

/// A micro-batch's own stream, for what goes between ranks. Products of all of them are on the pass's.
pub(super) struct Lane {
    pub(super) stream: Stream,
    come: Event,
}

impl Lane {
    pub(super) fn new(gpu: &Gpu) -> Result<Self> {
        let (stream, come) = (Stream::new(gpu).map_err(error)?, Event::new(gpu).map_err(error)?);
        Ok(Self { stream, come })
    }

    /// What comes on the micro-batch's stream waits for what is on `pass`.
    pub(super) fn fork(&self, pass: &Stream) -> Result<()> {
        pass.record(&self.come).and_then(|()| self.stream.wait(&self.come)).map_err(error)
    }

    /// The other way.
    pub(super) fn join(&self, pass: &Stream) -> Result<()> {
        self.stream.record(&self.come).and_then(|()| pass.wait(&self.come)).map_err(error)
    }
}

impl OneSided {
    pub(super) fn new(device: &Device) -> Result<Self> {
        let verbs = OneSidedVerbs::new(&device.modules).map_err(error)?;
        Ok(Self { verbs, ready: Mutex::default() })
    }

    fn ready(&self) -> MutexGuard<'_, Vec<usize>> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Group {
    fn is_of(&self, peers: &Peers) -> bool {
        self.world == peers.world() && self.members == peers.members()
    }

    /// Ids of the slots that have arrived.
    fn ids(&self, places: Places, row: usize) -> View<'_, u32> {
        let (from, to) = (places.rows() * row, places.rows() * row + 4 * places.slots());
        let bytes = self.memory.own(ARRIVALS).part(from..to);
        // SAFETY: as many ids begin there, aligned.
        unsafe { View::from_raw(bytes.address(), places.slots()) }
    }
}

fn group<'g>(groups: &'g [Group], peers: &Peers, lane: usize) -> Result<&'g Group> {
    let mut of = groups.iter().filter(|group| group.is_of(peers));
    of.find(|group| group.lane == lane).ok_or_else(no_memory)
}

impl OneSidedWork {
    /// Ids of the slots that have arrived in the last pass.
    pub(super) fn ids(
        &self,
        peers: &Peers,
        lane: usize,
        places: Places,
        row: usize,
    ) -> Result<View<'_, u32>> {
        Ok(group(&self.groups, peers, lane)?.ids(places, row))
    }

    /// Outputs of all slots that have arrived, which nobody has computed: memory to copy from.
    pub(super) fn no_outputs(&self, experts: &Experts, fast: &mut FastWork) -> Result<SlotOutputs> {
        experts.no_outputs(fast, &self.wide[2])
    }

    /// For whom this rank's GPU waits now, by the signals in its memory.
    pub(super) fn late(&self, peers: &Peers, gpu: &Gpu) -> Option<Awaited> {
        // the pass's own stream is what waits
        let stream = Stream::new(gpu).ok()?;
        let ranks = peers.members().len();
        let signals = Signals { ranks };
        let late = self.groups.iter().filter(|group| group.is_of(peers)).find_map(|group| {
            let mut bytes = vec![0; Windows::signals(ranks)];
            stream.copy_out(group.memory.own(SIGNALS).part(0..bytes.len()), &mut bytes).ok()?;
            let words: Vec<u32> =
                bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect();
            signals.late(&words)
        })?;
        let name = |(meeting, layer): (one_sided::Meeting, u32)| {
            let known = self.layers.get(&layer).cloned();
            (known.unwrap_or_else(|| format!("layer {layer}")), meeting.step())
        };
        let rank = (peers.rank() + late.number) % ranks;
        Some(Awaited { rank, at: name(late.at), seen: late.seen.map(name) })
    }
}

/// One pass.
pub(super) struct Gpus<'g, 'p, 'a, 'o> {
    pub(super) pass: &'g mut RanksPass<'p, 'a, 'o>,
    pub(super) put: &'g OneSided,
    pub(super) memory: &'g mut OneSidedWork,
    /// Micro-batches.
    pub(super) lanes: usize,
    /// Of the whole pass.
    pub(super) places: Places,
}

impl Gpus<'_, '_, '_, '_> {
    fn at(&self, step: Step) -> At<'_> {
        self.pass.ranks.at(step)
    }

    fn windows<'g>(&self, places: Places, table: View<'g, u64>) -> Windows<'g> {
        let Places { ranks, most, top_k } = places;
        Windows { table, ranks, most, top_k, row_bytes: self.pass.row_bytes() }
    }

    /// The micro-batch's stream where there are several.
    fn lane(&self, lane: usize) -> Option<&Lane> {
        self.memory.lanes.get(lane).filter(|_| self.lanes > 1)
    }

    fn stream(&self, lane: usize) -> &Stream {
        self.lane(lane).map_or(&self.pass.device.stream, |lane| &lane.stream)
    }

    /// All ranks make sure of their memory for a micro-batch together, while none of their GPUs has anything to do.
    fn prepare(&mut self, lane: usize, places: Places) -> Result<()> {
        let (slots, gpu) = (places.slots(), &self.pass.device.gpu);
        self.pass.ranks.idle(self.pass.device)?;
        self.pass.ranks.barrier()?;
        while self.lanes > 1 && self.memory.lanes.len() < self.lanes {
            self.memory.lanes.push(Lane::new(gpu)?);
        }
        let tile = self.pass.experts.products.many_tile();
        self.pass.plans.reserve(gpu, slots, self.pass.experts.count(), tile)?;
        match &self.pass.experts.products {
            Products::Sm90(fast) => fast.reserve_many(self.pass.device, slots, self.pass.fast)?,
            Products::F32(_) => {
                let (hidden, inner) =
                    (self.pass.experts.hidden(), self.pass.experts.intermediate());
                for (wide, width) in self.memory.wide.iter_mut().zip([hidden, inner, hidden]) {
                    wide.reserve(gpu, slots * width)?;
                }
            }
        }
        // SAFETY: nothing is there, and nothing is read.
        let windows = self.windows(places, unsafe { View::from_raw(0, 0) });
        let signals = Windows::signals(places.ranks);
        let sizes =
            [windows.arrivals(), windows.outputs(self.pass.experts.output_of_slot()), signals];
        self.share(lane, sizes)?;
        // nobody writes before all have their windows
        self.pass.ranks.barrier()?;
        let mut ready = self.put.ready();
        let lanes = ready.len().max(lane + 1);
        ready.resize(lanes, 0);
        ready[lane] = slots;
        Ok(())
    }

    /// Windows of a micro-batch of at least these sizes, the same on all ranks.
    fn share(&mut self, lane: usize, sizes: [usize; 3]) -> Result<()> {
        let (ranks, device) = (self.pass.ranks, self.pass.device);
        let (peers, at) = (ranks.peers(), ranks.at(Step::Setup));
        // windows of a world that is no more
        self.memory
            .groups
            .retain(|group| group.members != peers.members() || group.world == peers.world());
        let known =
            self.memory.groups.iter().position(|group| group.is_of(peers) && group.lane == lane);
        let enough = known.is_some_and(|known| {
            let own = self.memory.groups[known].memory.sizes();
            own.zip(sizes).all(|(own, size)| own >= size)
        });
        if peers.most(at, [usize::from(!enough)])? == [0] {
            return Ok(());
        }
        let mut least = sizes;
        if let Some(known) = known {
            let Group { memory, .. } = self.memory.groups.swap_remove(known);
            least.iter_mut().zip(memory.sizes()).for_each(|(least, own)| *least = own.max(*least));
            memory.close(peers, at)?;
        }
        let memory = SharedMemory::new(peers, at, &device.stream, &least)?;
        let (members, world) = (peers.members().to_vec(), peers.world());
        self.memory.groups.push(Group { members, world, lane, memory });
        Ok(())
    }

    /// The outputs of this rank's slots.
    fn outputs(&self, group: &Group, places: Places) -> SlotOutputs {
        let of = self.pass.experts.output_of_slot();
        let values = group.memory.own(OUTPUTS).address();
        let scales = values + self.windows(places, group.memory.table()).scales_at(of) as u64;
        SlotOutputs { values, scales, ..of }
    }

    /// Copies `of` every slot that has arrived, an output each.
    fn put_outputs(&self, lane: usize, places: Places, of: SlotOutputs) -> Result<()> {
        let group = group(&self.memory.groups, self.pass.ranks.peers(), lane)?;
        let windows = self.windows(places, group.memory.table());
        let experts = self.pass.experts.count();
        // SAFETY: there is an output for each slot; the windows have room for them.
        unsafe { self.put.verbs.put_outputs(&self.pass.device.stream, of, experts, &windows) }
            .map_err(error)
    }
}

impl Side for Gpus<'_, '_, '_, '_> {
    fn agree(&mut self) -> Result<Places> {
        let (tokens, top_k) = (self.pass.of.x.rows(), self.pass.of.top_k);
        // who has no rows does not know
        let mine = [tokens, if tokens > 0 { top_k } else { 0 }];
        let [most, agreed] = self.pass.ranks.peers().most(self.at(Step::Dispatch), mine)?;
        if tokens > 0 && top_k != agreed {
            let reason = format!("{top_k} slots a row here, {agreed} on another rank");
            return Err(Error::input("exchange", reason));
        }
        self.places = Places { most, top_k: agreed, ..self.places };
        Ok(self.places)
    }

    fn make_room(&mut self, lanes: &[Places]) -> Result<()> {
        let ranks = self.pass.ranks;
        let name = || ranks.at(Step::Setup).layer.to_owned();
        self.memory.layers.entry(ranks.layer()).or_insert_with(name);
        for (lane, places) in lanes.iter().enumerate() {
            // all ranks know the same sizes, and come to the same
            let ready = self.put.ready().get(lane).copied().unwrap_or(0);
            if places.slots() > ready {
                self.prepare(lane, *places)?;
            }
        }
        Ok(())
    }

    fn put_rows(&mut self, lane: usize, places: Places) -> Result<()> {
        if let Some(lane) = self.lane(lane) {
            lane.fork(&self.pass.device.stream)?;
        }
        let group = group(&self.memory.groups, self.pass.ranks.peers(), lane)?;
        let (rows, slots) = self.pass.part(lane, self.lanes);
        let rows = (self.pass.of.x.part(rows), self.pass.of.ids.part(slots));
        let (windows, homes) =
            (self.windows(places, group.memory.table()), self.pass.ranks.homes());
        let (stream, marks) = (self.stream(lane), self.pass.marks);
        marks.span(stream, "dispatch", Some(lane), || {
            // SAFETY: the windows have been made for this; the ranks met over the outputs of the pass before.
            unsafe { self.put.verbs.put_rows(stream, rows, homes, &windows) }.map_err(error)
        })
    }

    fn meet(&mut self, lane: usize, meeting: one_sided::Meeting) -> Result<()> {
        let group = group(&self.memory.groups, self.pass.ranks.peers(), lane)?;
        // who meets is all that is read of them
        let windows = self.windows(self.places, group.memory.table());
        let (meeting, what) = match meeting {
            one_sided::Meeting::Rows => (Meeting::Rows, "wait for dispatch"),
            one_sided::Meeting::Outputs => (Meeting::Outputs, "wait for combine"),
        };
        let (verbs, patience) = (&self.put.verbs, self.pass.ranks.peers().patience());
        let at = (meeting, self.pass.ranks.layer());
        let (stream, fault) = (self.stream(lane), self.pass.faults.0);
        self.pass.marks.span(stream, what, Some(lane), || {
            // SAFETY: as above; all ranks take the same steps.
            unsafe { verbs.meet(stream, &windows, at, patience, fault) }.map_err(error)
        })
    }

    fn experts(&mut self, lane: usize, places: Places) -> Result<()> {
        if let Some(lane) = self.lane(lane) {
            lane.join(&self.pass.device.stream)?;
        }
        let opened = self.pass.marks.open(&self.pass.device.stream)?;
        self.products(lane, places)?;
        let (marks, stream) = (self.pass.marks, &self.pass.device.stream);
        marks.close(stream, opened, "experts", Some(lane))?;
        self.lane(lane).map_or(Ok(()), |lane| lane.fork(stream))
    }

    fn combine(&mut self, lane: usize, places: Places) -> Result<()> {
        let group = group(&self.memory.groups, self.pass.ranks.peers(), lane)?;
        let outputs = self.outputs(group, places);
        let (rows, slots) = self.pass.part(lane, self.lanes);
        let of = self.pass.of;
        let slots = (of.ids.part(slots.clone()), of.weights.part(slots));
        let by = (self.pass.ranks.homes().experts(), of.factor);
        let fault = self.pass.faults.1;
        // SAFETY: the rows of a micro-batch are its own, and the pass's for as long as this takes.
        let mut out = unsafe { self.pass.out.as_rows().part(rows).into_mut() };
        let (stream, verbs) = (self.stream(lane), &self.put.verbs);
        self.pass.marks.span(stream, "combine", Some(lane), || {
            verbs.combine(stream, outputs, slots, by, &mut out, fault).map_err(error)
        })?;
        self.lane(lane).map_or(Ok(()), |lane| lane.join(&self.pass.device.stream))
    }
}

impl Gpus<'_, '_, '_, '_> {
    /// Of all slots that have arrived, on the pass's stream: those of all micro-batches work in one memory.
    fn products(&mut self, lane: usize, places: Places) -> Result<()> {
        let row = self.pass.row_bytes();
        let Self {
            pass: RanksPass { ranks, device, experts, of, plans, fast, .. }, memory, ..
        } = self;
        let OneSidedWork { groups, wide, .. } = &mut **memory;
        let group = group(groups, ranks.peers(), lane)?;
        let (stream, width) = (&device.stream, of.x.cols());
        let tile = experts.products.many_tile();
        let plan = plans.reserve(&device.gpu, places.slots(), experts.count(), tile)?;
        let ids = group.ids(places, row);
        device.verbs.plan(stream, ids, places.top_k, plan).map_err(error)?;
        let bytes = group.memory.own(ARRIVALS).part(0..places.rows() * row);
        let x = Rows::of_bytes(bytes, of.x.float(), places.rows(), width).map_err(error)?;
        let table = group.memory.table();
        let Places { ranks, most, top_k } = places;
        let windows = Windows { table, ranks, most, top_k, row_bytes: row };
        if let Products::Sm90(fast_products) = &experts.products {
            let homes = windows.homes(experts.output_of_slot());
            // SAFETY: there is room for all outputs, and the ranks met over rows.
            return unsafe { fast_products.slots_to(device, x, plan, homes, fast) };
        }
        let (slots, inner) = (places.slots(), experts.intermediate());
        let [rows, h, y] = wide;
        let mut rows = f32_rows(rows.part_mut(0..slots * width), slots, width)?;
        device.slots.gather(stream, x, plan, None, &mut rows).map_err(error)?;
        let h = f32_rows(h.part_mut(0..slots * inner), slots, inner)?;
        let mut out = f32_rows(y.part_mut(0..slots * width), slots, width)?;
        experts.sorted_in_f32(device, rows, h, (ids, plan), &mut out)?;
        let values = y.address();
        let of = SlotOutputs { values, ..self.pass.experts.output_of_slot() };
        self.put_outputs(lane, places, of)
    }
}

/// The same steps with outputs that nobody has computed: what the exchange alone takes.
pub(super) struct WithoutExperts<'s, 'g, 'p, 'a, 'o>(pub(super) &'s mut Gpus<'g, 'p, 'a, 'o>);

impl Side for WithoutExperts<'_, '_, '_, '_, '_> {
    fn agree(&mut self) -> Result<Places> {
        self.0.agree()
    }

    fn make_room(&mut self, lanes: &[Places]) -> Result<()> {
        self.0.make_room(lanes)
    }

    fn put_rows(&mut self, lane: usize, places: Places) -> Result<()> {
        self.0.put_rows(lane, places)
    }

    fn meet(&mut self, lane: usize, meeting: one_sided::Meeting) -> Result<()> {
        self.0.meet(lane, meeting)
    }

    fn experts(&mut self, lane: usize, places: Places) -> Result<()> {
        let Gpus { pass: RanksPass { experts, fast, .. }, memory, .. } = &mut *self.0;
        let of = memory.no_outputs(experts, fast)?;
        let stream = &self.0.pass.device.stream;
        if let Some(lane) = self.0.lane(lane) {
            lane.join(stream)?;
        }
        self.0.put_outputs(lane, places, of)?;
        self.0.lane(lane).map_or(Ok(()), |lane| lane.fork(stream))
    }

    fn combine(&mut self, lane: usize, places: Places) -> Result<()> {
        self.0.combine(lane, places)
    }
}
