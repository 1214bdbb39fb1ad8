//! A GPU's side of an exchange in which ranks write into each other's memory; the order of the steps, and what is where,
//! is [`one_sided`]'s. The second product itself puts a slot's output where its row's rank adds it up, so that the
//! way back takes no time of its own.

use std::sync::atomic::{AtomicUsize, Ordering};

use moe_cuda::{Buffer, Meeting, OneSidedVerbs, Rows, SlotOutputs, View, Windows};

use super::device::{Device, error};
use super::layer::Experts;
use super::pass::f32_rows;
use super::products::{FastWork, Products};
use super::ranks::{Grown, RanksPass, no_memory};
use crate::comm::nccl::{Peers, Shared};
use crate::comm::{At, Step};
use crate::exchange::one_sided::{self, Places, Side};
use crate::{Error, Result};

/// What a layer has for such exchanges.
pub(super) struct OneSided {
    pub(super) verbs: OneSidedVerbs,
    /// Slots of the largest pass whose memory all ranks have made sure of together.
    ready: AtomicUsize,
}

/// The windows of one group of ranks, and other memory of passes over them.
#[derive(Default)]
pub(super) struct OneSidedWork {
    groups: Vec<Group>,
    /// Of products in f32: rows, rows between the products, outputs.
    wide: [Grown<f32>; 3],
}

/// What a group's ranks share: what arrives, outputs, signals.
struct Group {
    /// The ranks in the world, and which one that is here.
    members: Vec<usize>,
    world: u64,
    own: [Buffer<u8>; 3],
    /// Those of all ranks, by number; nothing of other processes stays open for longer.
    all: [Vec<Shared>; 3],
    /// Their addresses, `[3, R]`.
    table: Buffer<u64>,
}

impl OneSided {
    pub(super) fn new(device: &Device) -> Result<Self> {
        let verbs = OneSidedVerbs::new(&device.modules).map_err(error)?;
        Ok(Self { verbs, ready: AtomicUsize::new(0) })
    }
}

impl Group {
    fn is_of(&self, peers: &Peers) -> bool {
        self.world == peers.world() && self.members == peers.members()
    }

    /// Ids of the slots that have arrived.
    fn ids(&self, places: Places, row: usize) -> View<'_, u32> {
        let (from, to) = (places.rows() * row, places.rows() * row + 4 * places.slots());
        let bytes = self.own[0].view().part(from..to);
        // SAFETY: as many ids begin there, aligned.
        unsafe { View::from_raw(bytes.address(), places.slots()) }
    }
}

fn group<'g>(groups: &'g [Group], peers: &Peers) -> Result<&'g Group> {
    groups.iter().find(|group| group.is_of(peers)).ok_or_else(no_memory)
}

impl OneSidedWork {
    /// Ids of the slots that have arrived in the last pass.
    pub(super) fn ids(&self, peers: &Peers, places: Places, row: usize) -> Result<View<'_, u32>> {
        Ok(group(&self.groups, peers)?.ids(places, row))
    }
}

/// One pass.
pub(super) struct Gpus<'g, 'p, 'a, 'o> {
    pub(super) pass: &'g mut RanksPass<'p, 'a, 'o>,
    pub(super) put: &'g OneSided,
    pub(super) memory: &'g mut OneSidedWork,
    /// Of the pass, once agreed.
    pub(super) places: Places,
}

impl Gpus<'_, '_, '_, '_> {
    fn at(&self, step: Step) -> At<'_> {
        self.pass.ranks.at(step)
    }

    fn windows<'g>(&self, table: View<'g, u64>) -> Windows<'g> {
        let Places { ranks, most, top_k } = self.places;
        Windows { table, ranks, most, top_k, row_bytes: self.pass.row_bytes() }
    }

    /// All ranks make sure of their memory together, while none of their GPUs has anything to do.
    fn prepare(&mut self) -> Result<()> {
        let (slots, gpu) = (self.places.slots(), &self.pass.device.gpu);
        self.pass.ranks.idle(self.pass.device)?;
        self.pass.ranks.barrier()?;
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
        let windows = self.windows(unsafe { View::from_raw(0, 0) });
        let signals = Windows::signals(self.places.ranks);
        let sizes =
            [windows.arrivals(), windows.outputs(self.pass.experts.output_of_slot()), signals];
        self.share(sizes)?;
        // nobody writes before all have their windows
        self.pass.ranks.barrier()?;
        self.put.ready.store(slots, Ordering::Relaxed);
        Ok(())
    }

    /// Windows of at least these sizes, the same on all ranks.
    fn share(&mut self, sizes: [usize; 3]) -> Result<()> {
        let (ranks, device) = (self.pass.ranks, self.pass.device);
        let (peers, at) = (ranks.peers(), ranks.at(Step::Setup));
        // windows of a world that is no more
        self.memory
            .groups
            .retain(|group| group.members != peers.members() || group.world == peers.world());
        let known = self.memory.groups.iter().position(|group| group.is_of(peers));
        let enough = known.is_some_and(|known| {
            let own = &self.memory.groups[known].own;
            own.iter().zip(sizes).all(|(own, size)| own.len() >= size)
        });
        if peers.most(at, [usize::from(!enough)])? == [0] {
            return Ok(());
        }
        let mut least = sizes;
        if let Some(known) = known {
            let Group { own, all, .. } = self.memory.groups.swap_remove(known);
            least.iter_mut().zip(&own).for_each(|(least, own)| *least = own.len().max(*least));
            // what others have opened goes after they have closed it
            drop(all);
            ranks.barrier()?;
        }
        let mut own = Vec::with_capacity(3);
        for size in least {
            let mut buffer =
                Buffer::new(&device.gpu, size, "rows of other ranks").map_err(error)?;
            device.stream.fill(buffer.view_mut(), 0).map_err(error)?;
            own.push(buffer);
        }
        device.stream.synchronize().map_err(error)?;
        let mut all = Vec::with_capacity(3);
        for buffer in &own {
            all.push(peers.share(at, buffer)?);
        }
        let addresses: Vec<u64> = all.iter().flatten().map(Shared::address).collect();
        let table = Buffer::from_slice(&device.stream, &addresses, "windows").map_err(error)?;
        let (Ok(own), Ok(all)) = (own.try_into(), all.try_into()) else {
            return Err(no_memory());
        };
        let (members, world) = (peers.members().to_vec(), peers.world());
        self.memory.groups.push(Group { members, world, own, all, table });
        Ok(())
    }

    /// The outputs of this rank's slots.
    fn outputs(&self, group: &Group) -> SlotOutputs {
        let of = self.pass.experts.output_of_slot();
        let values = group.own[1].view().address();
        let scales = values + self.windows(group.table.view()).scales_at(of) as u64;
        SlotOutputs { values, scales, ..of }
    }

    /// Copies `of` every slot that has arrived, an output each.
    fn put_outputs(&self, of: SlotOutputs) -> Result<()> {
        let group = group(&self.memory.groups, self.pass.ranks.peers())?;
        let windows = self.windows(group.table.view());
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

    fn make_room(&mut self, places: Places) -> Result<()> {
        // all ranks know the same sizes, and come to the same
        match places.slots() > self.put.ready.load(Ordering::Relaxed) {
            true => self.prepare(),
            false => Ok(()),
        }
    }

    fn put_rows(&mut self, _: Places) -> Result<()> {
        let group = group(&self.memory.groups, self.pass.ranks.peers())?;
        let (windows, rows) =
            (self.windows(group.table.view()), (self.pass.of.x, self.pass.of.ids));
        let homes = self.pass.ranks.homes();
        // SAFETY: the windows have been made for this; the ranks met over the outputs of the pass before.
        unsafe { self.put.verbs.put_rows(&self.pass.device.stream, rows, homes, &windows) }
            .map_err(error)
    }

    fn meet(&mut self, meeting: one_sided::Meeting) -> Result<()> {
        let group = group(&self.memory.groups, self.pass.ranks.peers())?;
        let windows = self.windows(group.table.view());
        let meeting = match meeting {
            one_sided::Meeting::Rows => Meeting::Rows,
            one_sided::Meeting::Outputs => Meeting::Outputs,
        };
        let (verbs, patience) = (&self.put.verbs, self.pass.ranks.peers().patience());
        // SAFETY: as above; all ranks take the same steps.
        unsafe {
            verbs.meet(&self.pass.device.stream, &windows, meeting, patience, self.pass.faults.0)
        }
        .map_err(error)
    }

    fn experts(&mut self, places: Places) -> Result<()> {
        let row = self.pass.row_bytes();
        let Self {
            pass: RanksPass { ranks, device, experts, of, plans, fast, .. }, memory, ..
        } = self;
        let OneSidedWork { groups, wide } = &mut **memory;
        let group = group(groups, ranks.peers())?;
        let (stream, width) = (&device.stream, of.x.cols());
        let tile = experts.products.many_tile();
        let plan = plans.reserve(&device.gpu, places.slots(), experts.count(), tile)?;
        let ids = group.ids(places, row);
        device.verbs.plan(stream, ids, places.top_k, plan).map_err(error)?;
        let bytes = group.own[0].view().part(0..places.rows() * row);
        let x = Rows::of_bytes(bytes, of.x.float(), places.rows(), width).map_err(error)?;
        let table = group.table.view();
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
        self.put_outputs(SlotOutputs { values, ..self.pass.experts.output_of_slot() })
    }

    fn combine(&mut self, _: Places) -> Result<()> {
        let group = group(&self.memory.groups, self.pass.ranks.peers())?;
        let (outputs, experts) = (self.outputs(group), self.pass.ranks.homes().experts());
        let (ids, weights, factor) = (self.pass.of.ids, self.pass.of.weights, self.pass.of.factor);
        let (stream, fault) = (&self.pass.device.stream, self.pass.faults.1);
        let verbs = &self.put.verbs;
        verbs
            .combine(stream, outputs, (ids, weights), (experts, factor), self.pass.out, fault)
            .map_err(error)
    }
}

/// Outputs of all slots that have arrived, which nobody has computed: memory to copy from.
pub(super) fn no_outputs(
    experts: &Experts,
    fast: &mut FastWork,
    work: &OneSidedWork,
) -> Result<SlotOutputs> {
    match &experts.products {
        Products::Sm90(products) => products.no_outputs(fast),
        Products::F32(_) => {
            Ok(SlotOutputs { values: work.wide[2].address(), ..experts.output_of_slot() })
        }
    }
}

/// The same steps with outputs that nobody has computed: what the exchange alone takes.
pub(super) struct WithoutExperts<'s, 'g, 'p, 'a, 'o>(pub(super) &'s mut Gpus<'g, 'p, 'a, 'o>);

impl Side for WithoutExperts<'_, '_, '_, '_, '_> {
    fn agree(&mut self) -> Result<Places> {
        self.0.agree()
    }

    fn make_room(&mut self, places: Places) -> Result<()> {
        self.0.make_room(places)
    }

    fn put_rows(&mut self, places: Places) -> Result<()> {
        self.0.put_rows(places)
    }

    fn meet(&mut self, meeting: one_sided::Meeting) -> Result<()> {
        self.0.meet(meeting)
    }

    fn experts(&mut self, _: Places) -> Result<()> {
        let Gpus { pass: RanksPass { experts, fast, .. }, memory, .. } = &mut *self.0;
        let of = no_outputs(experts, fast, memory)?;
        self.0.put_outputs(of)
    }

    fn combine(&mut self, places: Places) -> Result<()> {
        self.0.combine(places)
    }
}
