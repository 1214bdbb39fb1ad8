//! A GPU's side of an exchange by sends and receives of NCCL: rows and slots are packed by rank. The order of the steps,
//! and what goes where, is [`resident`]'s.

use std::ops::Range;

use moe_cuda::{Event, Gpu, Leg, Packed, Parts, Pinned, Rows, SlotOutputs, Stream, View};

use super::device::error;
use super::one_sided::Lane;
use super::pass::f32_rows;
use super::products::{FastWork, Products};
use super::ranks::{Grown, Ranks, RanksPass, no_memory};
use crate::Result;
use crate::comm::Step;
use crate::exchange::resident::{self, ResidentWire, Side, Ways};

/// Memory of a micro-batch of such passes, which grows to what the largest needed.
#[derive(Default)]
pub(super) struct TwoSidedWork {
    /// Of more than one micro-batch: its stream, and memory of products, whose outputs stay until they are sent. The first one
    /// has the pass's.
    lane: Option<Lane>,
    fast: FastWork,
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

impl TwoSidedWork {
    fn event(&mut self, gpu: &Gpu) -> Result<&Event> {
        if self.event.is_none() {
            self.event = Some(Event::new(gpu).map_err(error)?);
        }
        self.event.as_ref().ok_or_else(no_memory)
    }

    /// Ids of the slots that have arrived in the last pass.
    pub(super) fn ids(&self, ways: &Ways) -> View<'_, u32> {
        self.slots[0].part(0..ways.slots[1])
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

/// What crosses between ranks, where outputs are such.
pub(super) fn wire(pass: &RanksPass<'_, '_, '_>, outputs: SlotOutputs) -> ResidentWire {
    let SlotOutputs { value_bytes, scale_bytes, .. } = outputs;
    ResidentWire { row: pass.row_bytes(), output: value_bytes + scale_bytes }
}

/// Outputs of the slots that arrive by `ways`, one for each micro-batch, which nobody has computed: memory to copy from, as
/// the passes since have left it, of whatever layer.
pub(super) fn no_outputs(
    pass: &mut RanksPass<'_, '_, '_>,
    memory: &mut [TwoSidedWork],
    ways: &[Ways],
) -> Result<Vec<SlotOutputs>> {
    let lanes = ways.iter().zip(memory).enumerate();
    lanes
        .map(|(lane, (ways, memory))| match ways.slots[1] {
            0 => Ok(pass.experts.output_of_slot()),
            _ => {
                let fast = if lane == 0 { &mut *pass.fast } else { &mut memory.fast };
                pass.experts.no_outputs(fast, &memory.wide[2])
            }
        })
        .collect()
}

/// A GPU's side of one pass's exchange.
pub(super) struct Gpus<'g, 'p, 'a, 'o> {
    pub(super) pass: &'g mut RanksPass<'p, 'a, 'o>,
    /// By micro-batch.
    pub(super) memory: &'g mut [TwoSidedWork],
    /// Of the slots that have arrived, by micro-batch.
    pub(super) outputs: Vec<SlotOutputs>,
}

impl<'g, 'p, 'a, 'o> Gpus<'g, 'p, 'a, 'o> {
    /// In so many micro-batches, whose outputs are such.
    pub(super) fn new(
        pass: &'g mut RanksPass<'p, 'a, 'o>,
        memory: &'g mut Vec<TwoSidedWork>,
        outputs: Vec<SlotOutputs>,
    ) -> Result<Self> {
        let lanes = outputs.len();
        while memory.len() < lanes {
            memory.push(TwoSidedWork::default());
        }
        let memory = &mut memory[..lanes];
        for lane in memory.iter_mut().filter(|lane| lanes > 1 && lane.lane.is_none()) {
            lane.lane = Some(Lane::new(&pass.device.gpu)?);
        }
        Ok(Self { pass, memory, outputs })
    }

    /// The micro-batch's stream where there are several.
    fn lane(&self, lane: usize) -> Option<&Lane> {
        self.memory[lane].lane.as_ref().filter(|_| self.memory.len() > 1)
    }

    fn stream(&self, lane: usize) -> &Stream {
        self.lane(lane).map_or(&self.pass.device.stream, |lane| &lane.stream)
    }

    /// Rows and outputs there and back, and nothing else.
    pub(super) fn bare(&mut self, all: &[Ways]) -> Result<()> {
        for (lane, ways) in all.iter().enumerate() {
            if let Some(lane) = self.lane(lane) {
                lane.fork(&self.pass.device.stream)?;
            }
            self.send(lane, ways)?;
        }
        for (lane, ways) in all.iter().enumerate() {
            self.send_back(lane, ways)?;
            if let Some(lane) = self.lane(lane) {
                lane.join(&self.pass.device.stream)?;
            }
        }
        Ok(())
    }

    /// Ids and rows of the slots that have arrived.
    fn unpack(&mut self, lane: usize, ways: &Ways) -> Result<()> {
        let Self { pass: RanksPass { ranks, device, .. }, memory, .. } = self;
        let places = ways.slots[1];
        let TwoSidedWork { parts, here, slots: [ids, row_of, _], .. } = &mut memory[lane];
        let parts = parts.as_ref().ok_or_else(no_memory)?;
        let records = here[0].part(0..2 * places);
        let by = (parts, ranks.homes(), ranks.room());
        let (ids, rows) = (ids.part_mut(0..places), row_of.part_mut(0..places));
        ranks.verbs().unpack(&device.stream, records, by, ids, rows).map_err(error)
    }
}

impl Side for Gpus<'_, '_, '_, '_> {
    fn sort(&mut self, lane: usize) -> Result<()> {
        if let Some(lane) = self.lane(lane) {
            lane.fork(&self.pass.device.stream)?;
        }
        let (rows, slots) = self.pass.part(lane, self.memory.len());
        let Self { pass: RanksPass { ranks, device, of, .. }, memory, .. } = self;
        let (gpu, all, several) = (&device.gpu, ranks.homes().ranks(), memory.len() > 1);
        let (tokens, k) = (rows.len(), of.top_k);
        let memory = &mut memory[lane];
        if !memory.parts.as_ref().is_some_and(|parts| parts.takes(tokens, k, all)) {
            memory.parts = None;
            memory.parts = Some(Parts::new(gpu, tokens, k, all).map_err(error)?);
        }
        let TwoSidedWork { parts, lane, .. } = memory;
        let parts = parts.as_mut().ok_or_else(no_memory)?;
        let own = lane.as_ref().filter(|_| several);
        let stream = own.map_or(&device.stream, |lane| &lane.stream);
        let ids = (of.ids.part(slots), k);
        ranks.verbs().sort(stream, &device.verbs, ranks.homes(), ids, parts).map_err(error)
    }

    fn share_counts(&mut self, lane: usize) -> Result<()> {
        let ranks = self.pass.ranks;
        let (me, all) = (ranks.homes().me(), ranks.homes().ranks());
        let base = self.memory[lane].parts()?.counts().address();
        let bytes = 2 * all * ResidentWire::COUNT;
        let line = |peer, of: usize| Leg { peer, address: base + (of * bytes) as u64, bytes };
        let others = || (0..all).filter(|peer| *peer != me);
        // SAFETY: the counts are [all, 2 all], and live with the memory of passes.
        unsafe {
            ranks.peers().start(
                ranks.at(Step::Dispatch),
                self.stream(lane),
                &mut others().map(|peer| line(peer, me)),
                &mut others().map(|peer| line(peer, peer)),
            )
        }
    }

    fn pack(&mut self, lane: usize) -> Result<()> {
        let (row, (rows, slots)) = (self.pass.row_bytes(), self.pass.part(lane, self.memory.len()));
        let Self { pass: RanksPass { ranks, device, of, faults, marks, .. }, memory, .. } = self;
        let (gpu, all, several) = (&device.gpu, ranks.homes().ranks(), memory.len() > 1);
        let (x, memory) = (of.x.part(rows), &mut memory[lane]);
        if ranks.is_counted() {
            // as much as this batch can need
            let (slots, rows) = (slots.len(), x.rows());
            memory.here[0].reserve(gpu, 2 * slots)?;
            memory.here_rows.reserve(gpu, rows * row)?;
            memory.here[1].reserve(gpu, 2 * slots)?;
            memory.go_rows.reserve(gpu, rows * of.top_k.min(all - 1) * row)?;
        }
        let TwoSidedWork { lane: own, parts, here: [stay, go], here_rows, go_rows, .. } = memory;
        let parts = parts.as_ref().ok_or_else(no_memory)?;
        let stay = Packed { records: stay.all_mut(), rows: here_rows.all_mut() };
        let go = Packed { records: go.all_mut(), rows: go_rows.all_mut() };
        let own = own.as_ref().filter(|_| several);
        let (stream, room) = (own.map_or(&device.stream, |lane| &lane.stream), ranks.room());
        marks.span(stream, "dispatch", Some(lane), || {
            // SAFETY: a row goes to each other rank at most once, and no more often than it has slots.
            unsafe { ranks.verbs().pack(stream, x, (parts, room), (stay, go), faults.0) }
                .map_err(error)
        })
    }

    fn counts(&mut self, lane: usize) -> Result<Vec<u32>> {
        let Self { pass: RanksPass { ranks, device, .. }, memory, .. } = self;
        let (gpu, all, several) = (&device.gpu, ranks.homes().ranks(), memory.len() > 1);
        let memory = &mut memory[lane];
        if memory.counts.as_ref().is_none_or(|counts| counts.as_slice().len() != 2 * all * all) {
            memory.counts = Some(Pinned::new(gpu, 2 * all * all).map_err(error)?);
        }
        memory.event(gpu)?;
        let TwoSidedWork { lane, parts, counts, event, .. } = memory;
        let (Some(parts), Some(counts), Some(event)) = (parts, counts, event) else {
            return Err(no_memory());
        };
        let own = lane.as_ref().filter(|_| several);
        let stream = own.map_or(&device.stream, |lane| &lane.stream);
        stream.copy_to(parts.counts(), counts).map_err(error)?;
        stream.record(event).map_err(error)?;
        ranks.peers().wait(ranks.at(Step::Dispatch), event)?;
        Ok(counts.as_slice().to_vec())
    }

    fn make_room(&mut self, lane: usize, ways: &Ways) -> Result<()> {
        let row = self.pass.row_bytes();
        let gpu = &self.pass.device.gpu;
        let ([go, here], [go_rows, here_rows]) = (ways.slots, ways.rows);
        let memory = &mut self.memory[lane];
        let of = self.outputs[lane];
        let lost = [
            memory.here[0].reserve(gpu, 2 * here)?,
            memory.here_rows.reserve(gpu, here_rows * row)?,
            memory.here[1].reserve(gpu, 2 * go)?,
            memory.go_rows.reserve(gpu, go_rows * row)?,
        ];
        for slots in &mut memory.slots {
            slots.reserve(gpu, here)?;
        }
        memory.back[0].reserve(gpu, go * of.value_bytes)?;
        memory.back[1].reserve(gpu, go * of.scale_bytes)?;
        match self.pass.ranks.is_counted() && lost.contains(&true) {
            true => self.pack(lane),
            false => Ok(()),
        }
    }

    fn send(&mut self, lane: usize, ways: &Ways) -> Result<()> {
        let (row, slot) = (self.pass.row_bytes(), ResidentWire::SLOT);
        let (ranks, memory) = (self.pass.ranks, &self.memory[lane]);
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
        let (at, stream) = (ranks.at(Step::Dispatch), self.stream(lane));
        self.pass.marks.span(stream, "wait for dispatch", Some(lane), || {
            // SAFETY: there is room for all of it, which lives with the memory of passes.
            unsafe { ranks.peers().start(at, stream, &mut sends, &mut receives) }
        })
    }

    fn experts(&mut self, lane: usize, ways: &Ways) -> Result<()> {
        if let Some(lane) = self.lane(lane) {
            lane.join(&self.pass.device.stream)?;
        }
        let opened = self.pass.marks.open(&self.pass.device.stream)?;
        self.unpack(lane, ways)?;
        self.products(lane, ways)?;
        let (marks, stream) = (self.pass.marks, &self.pass.device.stream);
        marks.close(stream, opened, "experts", Some(lane))?;
        self.lane(lane).map_or(Ok(()), |lane| lane.fork(stream))
    }

    fn send_back(&mut self, lane: usize, ways: &Ways) -> Result<()> {
        let (ranks, outputs) = (self.pass.ranks, self.outputs[lane]);
        let (back, stream) = (self.memory[lane].back(outputs), self.stream(lane));
        self.pass.marks.span(stream, "wait for combine", Some(lane), || {
            // SAFETY: the outputs are the workspace's, with one for every slot; there is room for what comes back.
            unsafe { return_legs(ranks, stream, ways, outputs, back) }
        })
    }

    fn combine(&mut self, lane: usize) -> Result<()> {
        let (rows, slots) = self.pass.part(lane, self.memory.len());
        let (ranks, of, faults) = (self.pass.ranks, self.pass.of, self.pass.faults);
        let memory = &self.memory[lane];
        let by = (memory.parts()?, ranks.room());
        let (own, far) = (self.outputs[lane], memory.back(self.outputs[lane]));
        let weights = (of.weights.part(slots), of.factor);
        // SAFETY: the rows of a micro-batch are its own, and the pass's for as long as this takes.
        let mut out = unsafe { self.pass.out.as_rows().part(rows).into_mut() };
        let stream = self.stream(lane);
        self.pass.marks.span(stream, "combine", Some(lane), || {
            ranks
                .verbs()
                .combine(stream, by, (own, far), weights, &mut out, faults.1)
                .map_err(error)
        })?;
        self.lane(lane).map_or(Ok(()), |lane| lane.join(&self.pass.device.stream))
    }
}

impl Gpus<'_, '_, '_, '_> {
    /// Of all slots that have arrived, on the pass's stream.
    fn products(&mut self, lane: usize, ways: &Ways) -> Result<()> {
        let Self { pass: RanksPass { ranks, device, experts, of, .. }, memory, .. } = self;
        let (places, rows) = (ways.slots[1], ways.rows[1]);
        let stream = &device.stream;
        let TwoSidedWork { fast: own, here_rows, slots: [ids, row_of, sorted], wide, .. } =
            &mut memory[lane];
        let work = if lane == 0 { &mut *self.pass.fast } else { own };
        if places == 0 {
            return Ok(());
        }
        let (width, float) = (of.x.cols(), of.x.float());
        let bytes = here_rows.part(0..rows * width * float.bytes());
        let x = Rows::of_bytes(bytes, float, rows, width).map_err(error)?;
        let tile = experts.products.many_tile();
        let plan = self.pass.plans.reserve(&device.gpu, places, experts.count(), tile)?;
        let ids = ids.part(0..places);
        device.verbs.plan(stream, ids, 1, plan).map_err(error)?;
        let (row_of, to) = (row_of.part(0..places), sorted.part_mut(0..places));
        ranks.verbs().rows_in_order(stream, row_of, plan, to).map_err(error)?;
        let row_of = sorted.part(0..places);
        self.outputs[lane] = match &experts.products {
            // SAFETY: every record names a row of its own part.
            Products::Sm90(fast) => unsafe { fast.slots(device, x, row_of, plan, work)? },
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
}

/// The same steps, where the outputs are those of the pass before: what the exchange alone takes.
pub(super) struct WithoutExperts<'s, 'g, 'p, 'a, 'o>(pub(super) &'s mut Gpus<'g, 'p, 'a, 'o>);

impl Side for WithoutExperts<'_, '_, '_, '_, '_> {
    fn sort(&mut self, lane: usize) -> Result<()> {
        self.0.sort(lane)
    }

    fn share_counts(&mut self, lane: usize) -> Result<()> {
        self.0.share_counts(lane)
    }

    fn pack(&mut self, lane: usize) -> Result<()> {
        self.0.pack(lane)
    }

    fn counts(&mut self, lane: usize) -> Result<Vec<u32>> {
        self.0.counts(lane)
    }

    fn make_room(&mut self, lane: usize, ways: &Ways) -> Result<()> {
        self.0.make_room(lane, ways)
    }

    fn send(&mut self, lane: usize, ways: &Ways) -> Result<()> {
        self.0.send(lane, ways)
    }

    fn experts(&mut self, lane: usize, ways: &Ways) -> Result<()> {
        let stream = &self.0.pass.device.stream;
        if let Some(lane) = self.0.lane(lane) {
            lane.join(stream)?;
        }
        self.0.unpack(lane, ways)?;
        self.0.lane(lane).map_or(Ok(()), |lane| lane.fork(stream))
    }

    fn send_back(&mut self, lane: usize, ways: &Ways) -> Result<()> {
        self.0.send_back(lane, ways)
    }

    fn combine(&mut self, lane: usize) -> Result<()> {
        self.0.combine(lane)
    }
}

/// Places `of` elements of so many bytes, from `address` on, to or from a rank.
fn leg(peer: usize, address: u64, of: &Range<usize>, bytes: usize) -> Leg {
    Leg { peer, address: address + (of.start * bytes) as u64, bytes: of.len() * bytes }
}

/// Outputs to those that sent the slots, and this rank's back.
///
/// # Safety
/// As [`Peers::start`].
unsafe fn return_legs(
    ranks: &Ranks,
    stream: &Stream,
    ways: &Ways,
    from: SlotOutputs,
    to: SlotOutputs,
) -> Result<()> {
    let legs = |way: &resident::Way, of: SlotOutputs, range: &Range<usize>| {
        [
            leg(way.peer, of.values, range, of.value_bytes),
            leg(way.peer, of.scales, range, of.scale_bytes),
        ]
    };
    let mut sends = ways.all.iter().flat_map(|way| legs(way, from, &way.slots.come));
    let mut receives = ways.all.iter().flat_map(|way| legs(way, to, &way.slots.go));
    let at = ranks.at(Step::Combine);
    // SAFETY: as the caller promises.
    unsafe { ranks.peers().start(at, stream, &mut sends, &mut receives) }
}
