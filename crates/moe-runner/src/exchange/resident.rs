//! The all-to-all of rows that stay where they are computed with: in a device's memory, from the gate to the sum.
//!
//! ```text
//! sort     the slots and rows of this rank, by the rank that has their expert
//! counts   what every rank has for every rank                     a small all-gather; not with room
//! pack     rows once for each rank, records of slots              what stays is in its place at once
//! send     rows and records ⇒ what has arrived                    all-to-all
//! experts  one output for each slot that has arrived
//! return   outputs ⇒ what comes back, where it was sent from      all-to-all
//! combine  the weighted sum of each row's slots, in slot order
//! ```
//! [`run`] is that order, and [`Ways`] what goes where; a [`Side`] has the memory and does the steps: a GPU with
//! NCCL, or plain memory with threads. Ranks are counted from this one on: number d is rank (me + d) mod R, so that
//! what stays is always first.
//!
//! **Micro-batches** ("lanes") have memory of their own: the rows of all are sent before the experts of the first begin, and
//! outputs are on their way back while another's experts work.
//!
//! With [`Room`] every rank sends every other as much, filled or not: there are no counts, no memory depends on one,
//! and the whole pass can be captured. What has no place then is an error. Without room, the host waits for the counts
//! once a pass.

use std::ops::Range;

use crate::Result;

/// Places for what goes from one rank to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Slots.
    pub slots: usize,
    /// Rows.
    pub rows: usize,
}

impl Room {
    /// For batches of up to `tokens` rows of `top_k` slots on each of `ranks` ranks, if no rank gets more than
    /// `factor` times its even share of another's slots; rows can be no more than tokens.
    pub fn for_share(tokens: usize, top_k: usize, ranks: usize, factor: f64) -> Self {
        let even = (tokens * top_k) as f64 / ranks.max(1) as f64;
        let slots = ((even * factor).ceil() as usize).clamp(1, (tokens * top_k).max(1));
        Self { slots, rows: tokens.min(slots).max(1) }
    }
}

/// Places among what goes from here, and among what has arrived here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Share {
    /// Of what this rank sends.
    pub go: Range<usize>,
    /// Of what it gets.
    pub come: Range<usize>,
}

/// What this rank and another one have for each other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Way {
    /// The other rank.
    pub peer: usize,
    /// Slots, and on the way back their outputs.
    pub slots: Share,
    /// Rows.
    pub rows: Share,
}

/// All ways of one rank.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ways {
    /// To and from every other rank, in the order in which they are counted.
    pub all: Vec<Way>,
    /// Slots that go, and places for those that have arrived, this rank's own first.
    pub slots: [usize; 2],
    /// Rows, likewise.
    pub rows: [usize; 2],
    /// Ranks have told each other what they have.
    pub counted: bool,
}

impl Ways {
    /// Of rank `me` of `ranks`. `counts` `[R, 2 R]` says what every rank has for every rank, slots and then rows.
    pub fn counted(counts: &[u32], me: usize, ranks: usize) -> Self {
        let of = |from: usize, to: usize| {
            let line = &counts[2 * ranks * from..2 * ranks * (from + 1)];
            (line[to] as usize, line[ranks + to] as usize)
        };
        let ways = Self::of(me, ranks, |peer| of(me, peer), |peer| of(peer, me));
        Self { counted: true, ..ways }
    }

    /// The same with as many places for everything.
    pub fn with_room(room: Room, me: usize, ranks: usize) -> Self {
        let Room { slots, rows } = room;
        Self::of(me, ranks, |_| (slots, rows), |_| (slots, rows))
    }

    /// Bytes that are sent to and received from other ranks, of `ranks`: with counts (`None`: there are none), there,
    /// and back.
    pub fn traffic(&self, wire: ResidentWire, ranks: usize) -> [Option<(usize, usize)>; 3] {
        let counts = (ranks - 1) * 2 * ranks * ResidentWire::COUNT;
        let counts = self.counted.then_some((counts, counts));
        let sum = |of: fn(&Way) -> usize| self.all.iter().map(of).sum::<usize>();
        let (go, come) = (sum(|way| way.slots.go.len()), sum(|way| way.slots.come.len()));
        let rows = [sum(|way| way.rows.go.len()), sum(|way| way.rows.come.len())];
        let there = |slots: usize, rows: usize| slots * ResidentWire::SLOT + rows * wire.row;
        let back = (come * wire.output, go * wire.output);
        [counts, Some((there(go, rows[0]), there(come, rows[1]))), Some(back)]
    }

    fn of(
        me: usize,
        ranks: usize,
        go: impl Fn(usize) -> (usize, usize),
        come: impl Fn(usize) -> (usize, usize),
    ) -> Self {
        let (own_slots, own_rows) = come(me);
        let (mut slots, mut rows) = ([0, own_slots], [0, own_rows]);
        let next = |ends: &mut [usize; 2], go: usize, come: usize| {
            let [from, to] = *ends;
            *ends = [from + go, to + come];
            Share { go: from..from + go, come: to..to + come }
        };
        let all = (1..ranks)
            .map(|d| {
                let peer = (me + d) % ranks;
                let ((go_slots, go_rows), (come_slots, come_rows)) = (go(peer), come(peer));
                Way {
                    peer,
                    slots: next(&mut slots, go_slots, come_slots),
                    rows: next(&mut rows, go_rows, come_rows),
                }
            })
            .collect();
        Self { all, slots, rows, counted: false }
    }
}

/// What does the steps, of each micro-batch on memory of its own. All ranks take the same steps in the same order.
pub trait Side {
    /// Sorts the micro-batch's slots and rows by rank, and counts them.
    ///
    /// # Errors
    /// What the memory or the device refuses; so for all the others.
    fn sort(&mut self, lane: usize) -> Result<()>;

    /// Gives this rank's counts to all others, and gets theirs.
    ///
    /// # Errors
    /// A rank that does not arrive.
    fn share_counts(&mut self, lane: usize) -> Result<()>;

    /// Packs what stays and what goes. With room, records of places that nothing fills name no expert.
    ///
    /// # Errors
    /// As [`Self::sort`].
    fn pack(&mut self, lane: usize) -> Result<()>;

    /// All counts `[R, 2 R]`, once they are known here: waits.
    ///
    /// # Errors
    /// A rank that does not arrive.
    fn counts(&mut self, lane: usize) -> Result<Vec<u32>>;

    /// Makes sure of the memory for what comes; what was packed is kept, or packed again.
    ///
    /// # Errors
    /// Too little memory.
    fn make_room(&mut self, lane: usize, ways: &Ways) -> Result<()>;

    /// Rows and records of slots to the others, and theirs here.
    ///
    /// # Errors
    /// A rank that does not arrive.
    fn send(&mut self, lane: usize, ways: &Ways) -> Result<()>;

    /// The outputs of all slots that have arrived.
    ///
    /// # Errors
    /// As [`Self::sort`].
    fn experts(&mut self, lane: usize, ways: &Ways) -> Result<()>;

    /// Those of other ranks' slots back to them, and this rank's back here.
    ///
    /// # Errors
    /// A rank that does not arrive.
    fn send_back(&mut self, lane: usize, ways: &Ways) -> Result<()>;

    /// The sums.
    ///
    /// # Errors
    /// As [`Self::sort`].
    fn combine(&mut self, lane: usize) -> Result<()>;
}

/// One batch in so many micro-batches, on rank `me` of `ranks`; with `room` in each, without the host.
///
/// # Errors
/// As the steps of `side`.
pub fn run(
    side: &mut dyn Side,
    (me, ranks): (usize, usize),
    room: Option<Room>,
    lanes: usize,
) -> Result<Vec<Ways>> {
    let lanes = 0..lanes.max(1);
    for lane in lanes.clone() {
        side.sort(lane)?;
        match room {
            Some(room) => side.make_room(lane, &Ways::with_room(room, me, ranks))?,
            None => side.share_counts(lane)?,
        }
        // what this rank packs while counts are on their way needs none
        side.pack(lane)?;
    }
    let mut all = Vec::with_capacity(lanes.len());
    for lane in lanes {
        let ways = match room {
            Some(room) => Ways::with_room(room, me, ranks),
            None => {
                let ways = Ways::counted(&side.counts(lane)?, me, ranks);
                side.make_room(lane, &ways)?;
                ways
            }
        };
        side.send(lane, &ways)?;
        all.push(ways);
    }
    for (lane, ways) in all.iter().enumerate() {
        side.experts(lane, ways)?;
        side.send_back(lane, ways)?;
    }
    for lane in 0..all.len() {
        side.combine(lane)?;
    }
    Ok(all)
}

/// Bytes that cross between two ranks for one row, one slot and one output: what a kernel keeps on its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResidentWire {
    /// A row's values.
    pub row: usize,
    /// A slot's output on its way back.
    pub output: usize,
}

impl ResidentWire {
    /// A slot: its expert's place, and its row.
    pub const SLOT: usize = 8;
    /// A count.
    pub const COUNT: usize = 4;
    /// What a rank has of a slot, where nothing is packed.
    pub const ID: usize = 4;
}
