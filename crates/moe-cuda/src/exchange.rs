//! What a rank's GPU does with rows that go to other ranks: sorting and packing by rank, unpacking what has
//! arrived, and the sum of what comes back. The way between the GPUs is [`NcclPeers`](crate::NcclPeers)'.

use crate::module::{Argument, Function, Launch, Modules};
use crate::plan::Plan;
use crate::sources::EXCHANGE;
use crate::{Buffer, Error, FaultWord, Gpu, Result, Rows, RowsMut, Stream, Verbs, View, ViewMut};

/// The verbs, compiled and loaded. Ranks are counted from this one on: number 0 is this rank.
pub struct ExchangeVerbs {
    homes: Function,
    counts: Function,
    pack_slots: Function,
    pack_rows: Function,
    unpack: Function,
    in_order: Function,
    combine: Function,
}

/// Where every expert is: the ranks that hold a copy, and its place there.
#[derive(Debug)]
pub struct Homes {
    offsets: Buffer<u32>,
    ranks: Buffer<u32>,
    locals: Buffer<u32>,
    load: Option<Buffer<u64>>,
    all: usize,
    me: usize,
}

impl Homes {
    /// Of rank `me` of `all`; `copies[e]` are the ranks and places of expert e's copies.
    ///
    /// # Errors
    /// If a rank is none of them, or the GPU has no memory.
    pub fn new(stream: &Stream, copies: &[Vec<(u32, u32)>], me: usize, all: usize) -> Result<Self> {
        if me >= all || copies.iter().flatten().any(|(rank, _)| *rank as usize >= all) {
            return Err(Error::input("homes of experts", format!("a rank beyond {all}")));
        }
        let ends = copies.iter().scan(0, |end, copies| {
            *end += copies.len() as u32;
            Some(*end)
        });
        let offsets: Vec<u32> = std::iter::once(0).chain(ends).collect();
        let of = |pick: fn(&(u32, u32)) -> u32| copies.iter().flatten().map(pick).collect();
        let (ranks, locals): (Vec<u32>, Vec<u32>) = (of(|copy| copy.0), of(|copy| copy.1));
        let buffer = |values: &[u32]| Buffer::from_slice(stream, values, "homes of experts");
        Ok(Self {
            offsets: buffer(&offsets)?,
            ranks: buffer(&ranks)?,
            locals: buffer(&locals)?,
            load: None,
            all,
            me,
        })
    }

    /// From here on, every slot that is sorted or put counts for its expert in `load`, `[experts]`; `None`: none does.
    ///
    /// # Errors
    /// If its length does not fit.
    pub fn count(&mut self, load: Option<Buffer<u64>>) -> Result<()> {
        if load.as_ref().is_some_and(|load| load.len() != self.experts()) {
            return Err(Error::input("load of experts", "not a count for each"));
        }
        self.load = load;
        Ok(())
    }

    /// The counts, where there are some.
    pub fn load(&mut self) -> Option<&mut Buffer<u64>> {
        self.load.as_mut()
    }

    /// The counts, for others to go on with.
    pub fn take_load(&mut self) -> Option<Buffer<u64>> {
        self.load.take()
    }

    /// Number of ranks.
    pub fn ranks(&self) -> usize {
        self.all
    }

    /// This rank.
    pub fn me(&self) -> usize {
        self.me
    }

    /// Number of experts.
    pub fn experts(&self) -> usize {
        self.offsets.len() - 1
    }

    pub(crate) fn raw(&self) -> RawHomes {
        RawHomes {
            offsets: self.offsets.view().pointer,
            ranks: self.ranks.view().pointer,
            locals: self.locals.view().pointer,
            load: self.load.as_ref().map_or(0, |load| load.view().pointer),
            experts: self.experts() as u32,
            all: self.all as u32,
            me: self.me as u32,
            padding: 0,
        }
    }
}

/// Places for the slots and the rows that go from one rank to another. Of 0: as many as there are, which the host
/// must know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Room {
    /// Slots.
    pub slots: usize,
    /// Rows.
    pub rows: usize,
}

/// One batch's slots and rows by rank, and how many every rank has for every rank.
#[derive(Debug)]
pub struct Parts {
    tokens: usize,
    all: usize,
    dest: Buffer<u32>,
    local: Buffer<u32>,
    row_dest: Buffer<u32>,
    slots: Plan,
    rows: Plan,
    counts: Buffer<u32>,
}

impl Parts {
    /// Memory for batches of up to `tokens` rows of up to `top_k` slots each, for `all` ranks.
    ///
    /// # Errors
    /// If the GPU has no memory.
    pub fn new(gpu: &Gpu, tokens: usize, top_k: usize, all: usize) -> Result<Self> {
        let (tokens, top_k) = (tokens.max(1), top_k.max(1));
        let buffer = |len| Buffer::new(gpu, len, "slots by rank");
        // tiles are not used: as few as can be
        let plan = |slots: usize| Plan::new(gpu, slots, all, slots);
        Ok(Self {
            tokens,
            all,
            dest: buffer(tokens * top_k)?,
            local: buffer(tokens * top_k)?,
            row_dest: buffer(tokens * all)?,
            slots: plan(tokens * top_k)?,
            rows: plan(tokens * all)?,
            counts: buffer(2 * all * all)?,
        })
    }

    /// Whether a batch of this size fits.
    pub fn takes(&self, tokens: usize, top_k: usize, all: usize) -> bool {
        all == self.all && tokens <= self.tokens && tokens * top_k <= self.dest.len()
    }

    /// `[R, 2 R]`: what every rank has for every rank, slots and then rows. This rank's line is written by
    /// [`ExchangeVerbs::sort`]; the others' come from them.
    pub fn counts(&self) -> View<'_, u32> {
        self.counts.view()
    }
}

/// Memory for packed slots and rows.
#[derive(Debug)]
pub struct Packed<'a> {
    /// `[slots, 2]`: the expert's place, and the row among those of its part.
    pub records: ViewMut<'a, u32>,
    /// `[rows, bytes of a row]`.
    pub rows: ViewMut<'a, u8>,
}

/// The experts' outputs by slot, as kernels leave them.
#[derive(Clone, Copy, Debug)]
pub struct SlotOutputs {
    /// Device pointer of the values, and bytes of a slot's.
    pub values: u64,
    /// See [`Self::values`].
    pub value_bytes: usize,
    /// Device pointer of the scales, and bytes of a slot's: none for f32.
    pub scales: u64,
    /// See [`Self::scales`].
    pub scale_bytes: usize,
    /// Columns that share a scale; 0 for f32.
    pub tile: usize,
}

#[repr(C)]
pub(crate) struct RawHomes {
    offsets: u64,
    ranks: u64,
    locals: u64,
    load: u64,
    experts: u32,
    all: u32,
    me: u32,
    padding: u32,
}

// SAFETY: `struct Homes` of exchange.cu.
unsafe impl Argument for RawHomes {}

#[repr(C)]
struct RawReturned {
    own: u64,
    far: u64,
    own_scales: u64,
    far_scales: u64,
    place: u64,
    offsets: u64,
    all: u32,
    room: u32,
    tile: u32,
    padding: u32,
}

// SAFETY: `struct Returned` of exchange.cu.
unsafe impl Argument for RawReturned {}

impl ExchangeVerbs {
    /// Compiles (or finds in the cache) and loads what the verbs need.
    ///
    /// # Errors
    /// If a kernel does not compile or load.
    pub fn new(modules: &Modules) -> Result<Self> {
        let get = |name| modules.function(&EXCHANGE, &[], name);
        Ok(Self {
            homes: get("slot_homes")?,
            counts: get("part_counts")?,
            pack_slots: get("pack_slots")?,
            pack_rows: get("pack_rows")?,
            unpack: get("unpack_slots")?,
            in_order: get("rows_in_order")?,
            combine: get("combine_returned")?,
        })
    }

    /// Sorts the slots `ids` `[T, k]` and their rows by rank, and counts them.
    ///
    /// # Errors
    /// If the batch does not fit `parts`, or an earlier step failed.
    pub fn sort(
        &self,
        stream: &Stream,
        verbs: &Verbs,
        homes: &Homes,
        (ids, top_k): (View<'_, u32>, usize),
        parts: &mut Parts,
    ) -> Result<()> {
        let tokens = ids.len() / top_k.max(1);
        if top_k == 0 || !parts.takes(tokens, top_k, homes.all) || tokens * top_k != ids.len() {
            let sizes = format!("{} ids of top-{top_k} for {} ranks", ids.len(), homes.all);
            return Err(Error::input("slots by rank", sizes));
        }
        let (all, raw) = (homes.all, homes.raw());
        if tokens > 0 {
            let launch = Launch::plain(tokens.div_ceil(8) as u32, 256);
            let (dest, local, rows) = (
                parts.dest.view_mut().pointer,
                parts.local.view_mut().pointer,
                parts.row_dest.view_mut().pointer,
            );
            // SAFETY: the parameters of `slot_homes`; the memory was checked.
            unsafe {
                self.homes.launch(
                    stream,
                    launch,
                    &[&ids.pointer, &(tokens as u32), &(top_k as u32), &raw, &dest, &local, &rows],
                )?;
            }
        }
        let Parts { dest, row_dest, slots, rows, counts, .. } = parts;
        verbs.plan(stream, dest.view().part(0..tokens * top_k), top_k, slots)?;
        verbs.plan(stream, row_dest.view().part(0..tokens * all), all, rows)?;
        let mine = counts.view_mut().part(2 * all * homes.me..2 * all * (homes.me + 1)).pointer;
        let (of_slots, of_rows) = (slots.offsets().pointer, rows.offsets().pointer);
        let (all, me) = (all as u32, homes.me as u32);
        // SAFETY: the parameters of `part_counts`; the offsets have one more than ranks, the counts two for each.
        unsafe {
            self.counts.launch(
                stream,
                Launch::plain(1, 64),
                &[&of_slots, &of_rows, &all, &me, &mine],
            )
        }
    }

    /// Packs the sorted slots and rows: this rank's to `stay`, the others' to `go`, rank by rank. `x` `[T, H]` are the
    /// rows, of whole 16 bytes. What has no place is a fault.
    ///
    /// # Safety
    /// Without `room`, the memory is enough for what was counted.
    ///
    /// # Errors
    /// If a shape does not fit, or an earlier step failed.
    pub unsafe fn pack(
        &self,
        stream: &Stream,
        x: Rows<'_>,
        (parts, room): (&Parts, Room),
        (stay, go): (Packed<'_>, Packed<'_>),
        fault: &FaultWord,
    ) -> Result<()> {
        let (all, slots) = (parts.all, parts.slots.slots_used);
        let top_k = parts.slots.top_k;
        let tokens = slots / top_k;
        let bytes = x.float().bytes();
        x.expect("rows to pack", tokens, x.cols())?;
        let aligned = x.address().is_multiple_of(16)
            && (x.stride() * bytes).is_multiple_of(16)
            && (x.cols() * bytes).is_multiple_of(16);
        // without room, the caller has what is needed from the counts
        let (own, far) = (stay.records.len() / 2, go.records.len() / 2);
        let (own_rows, far_rows) = (stay.rows.len(), go.rows.len());
        let (others, row) = (all - 1, room.rows * x.cols() * bytes);
        let enough = own >= room.slots
            && far >= others * room.slots
            && own_rows >= row
            && far_rows >= others * row;
        if !aligned || !enough {
            return Err(Error::input(
                "rows to pack",
                "not of whole 16 bytes, or too little memory",
            ));
        }
        let (ranks, k) = (all as u32, top_k as u32);
        let (slot_room, row_room) = (room.slots as u32, room.rows as u32);
        let (order, offsets) = (parts.slots.order().pointer, parts.slots.offsets().pointer);
        let (row_order, row_offsets) = (parts.rows.order().pointer, parts.rows.offsets().pointer);
        let (dest, local) = (parts.dest.view().pointer, parts.local.view().pointer);
        let row_place = parts.rows.place().pointer;
        let word = fault.view().pointer;
        let (stay_records, go_records) = (stay.records.pointer, go.records.pointer);
        if room != Room::default() {
            // places that nobody fills have no expert
            stream.fill(stay.records, 0xff)?;
            stream.fill(go.records, 0xff)?;
        }
        let (pieces, stride) = ((x.cols() * bytes / 16) as u32, (x.stride() * bytes / 16) as u64);
        if tokens == 0 {
            return Ok(());
        }
        // SAFETY: the parameters of both kernels; parts lie one after another, with as many places as they need (the
        // caller's promise, who knows the counts) or have, and for those there is memory.
        unsafe {
            self.pack_slots.launch(
                stream,
                Launch::plain(slots.div_ceil(256).min(1 << 16) as u32, 256),
                &[
                    &order,
                    &offsets,
                    &dest,
                    &local,
                    &row_place,
                    &row_offsets,
                    &ranks,
                    &k,
                    &slot_room,
                    &stay_records,
                    &go_records,
                    &word,
                ],
            )?;
            let rows = tokens * all.min(top_k);
            self.pack_rows.launch(
                stream,
                Launch::plain(rows.div_ceil(8).min(1 << 16) as u32, 256),
                &[
                    &x.raw.data,
                    &stride,
                    &row_order,
                    &row_offsets,
                    &ranks,
                    &row_room,
                    &pieces,
                    &stay.rows.pointer,
                    &go.rows.pointer,
                    &word,
                ],
            )
        }
    }

    /// Ids and rows of the slots that have arrived, from `records` `[places, 2]`. Without room all counts are there.
    ///
    /// # Errors
    /// If a length does not fit, or an earlier step failed.
    pub fn unpack(
        &self,
        stream: &Stream,
        records: View<'_, u32>,
        (parts, homes, room): (&Parts, &Homes, Room),
        ids: ViewMut<'_, u32>,
        rows: ViewMut<'_, u32>,
    ) -> Result<()> {
        let places = ids.len();
        if records.len() != 2 * places || rows.len() != places {
            return Err(Error::input("slots that arrived", format!("{places} places")));
        }
        if places == 0 {
            return Ok(());
        }
        let (all, me) = (homes.all as u32, homes.me as u32);
        let (slot_room, row_room) = (room.slots as u32, room.rows as u32);
        let launch = Launch::plain(places.div_ceil(256).min(1 << 16) as u32, 256);
        // SAFETY: the parameters of `unpack_slots`; the lengths were checked.
        unsafe {
            self.unpack.launch(
                stream,
                launch,
                &[
                    &records.pointer,
                    &parts.counts.view().pointer,
                    &all,
                    &me,
                    &slot_room,
                    &row_room,
                    &(places as u32),
                    &ids.pointer,
                    &rows.pointer,
                ],
            )
        }
    }

    /// The row of every planned slot, in the plan's order.
    ///
    /// # Errors
    /// If a length does not fit, or an earlier step failed.
    pub fn rows_in_order(
        &self,
        stream: &Stream,
        rows: View<'_, u32>,
        plan: &Plan,
        to: ViewMut<'_, u32>,
    ) -> Result<()> {
        let slots = plan.slots_used;
        if rows.len() != slots || to.len() != slots {
            return Err(Error::input("rows of slots", format!("{} for {slots}", rows.len())));
        }
        if slots == 0 {
            return Ok(());
        }
        let launch = Launch::plain(slots.div_ceil(256).min(1 << 16) as u32, 256);
        let (order, offsets) = (plan.order().pointer, plan.offsets().pointer);
        // SAFETY: the parameters of `rows_in_order`; the lengths were checked.
        unsafe {
            self.in_order.launch(
                stream,
                launch,
                &[&rows.pointer, &order, &offsets, &(plan.experts() as u32), &to.pointer],
            )
        }
    }

    /// `out[t] = factor · Σ_j weights[t, j] · output of slot (t, j)`, in slot order, from the outputs of this rank's
    /// experts for its own rows (`own`, first among all that it computed) and those that have come back (`far`).
    ///
    /// # Errors
    /// If a shape does not fit, or an earlier step failed.
    pub fn combine(
        &self,
        stream: &Stream,
        (parts, room): (&Parts, Room),
        (own, far): (SlotOutputs, SlotOutputs),
        (weights, factor): (View<'_, f32>, f32),
        out: &mut RowsMut<'_>,
        fault: &FaultWord,
    ) -> Result<()> {
        let (slots, top_k) = (parts.slots.slots_used, parts.slots.top_k);
        out.expect("sum of slots", slots / top_k, out.cols())?;
        if weights.len() != slots
            || !out.cols().is_multiple_of(8)
            || (own.value_bytes, own.scale_bytes, own.tile)
                != (far.value_bytes, far.scale_bytes, far.tile)
        {
            let reason = format!("{} weights for {slots} slots", weights.len());
            return Err(Error::input("sum of slots", reason));
        }
        if slots == 0 {
            return Ok(());
        }
        let raw = RawReturned {
            own: own.values,
            far: far.values,
            own_scales: own.scales,
            far_scales: far.scales,
            place: parts.slots.place().pointer,
            offsets: parts.slots.offsets().pointer,
            all: parts.all as u32,
            room: room.slots as u32,
            tile: own.tile as u32,
            padding: 0,
        };
        let blocks = (out.rows() * out.cols() / 8).div_ceil(256).min(1 << 20) as u32;
        // SAFETY: the parameters of `combine_returned`; every place of the sorted slots has an output.
        unsafe {
            self.combine.launch(
                stream,
                Launch::plain(blocks, 256),
                &[
                    &raw,
                    &weights.pointer,
                    &(top_k as u32),
                    &factor,
                    &out.raw,
                    &fault.view().pointer,
                ],
            )
        }
    }
}
