//! The exchange that sends each row only to the ranks that own its experts.
//!
//! ```text
//! dispatch: to each rank the rows with an expert there, once: k local ids, k weights, the values
//! combine:  from each rank one f32 row for every slot it had; added here in slot order
//! ```
//! A row's sum is thus added on its own rank, in the order of its slots, whatever the placement of
//! the experts: results do not depend on it, bit by bit.

use std::ops::Range;
use std::sync::Arc;

use moe_kernels::pool::ThreadPool;
use moe_kernels::region::{for_each, rows_together};

use super::arrivals::Arrivals;
use super::{
    Completeness, DispatchedRows, Exchange, ExpertMap, LocalRows, SlotRows, Wire, not_started,
    weighted_sum,
};
use crate::comm::{At, Communicator, Pending, Received, Step, copy, share};
use crate::plan::NO_PLACE;
use crate::{Error, Result};

/// All-to-all of rows, and back.
pub struct AllToAllExchange {
    layer: Arc<str>,
    group: Arc<dyn Communicator>,
    map: Arc<ExpertMap>,
    /// Ranks that all have the same rows: each sends its share of them, and gets the others' sums.
    same_rows: Option<Arc<dyn Communicator>>,
    wire: Wire,
    lanes: Vec<Lane>,
}

#[derive(Default)]
struct Lane {
    top_k: usize,
    width: usize,
    /// This rank's share of its rows.
    own: Range<usize>,
    /// For each slot of those rows, the rank that has its expert, and how many slots before this
    /// one that rank has.
    homes: Vec<Option<(u32, u32)>>,
    /// For each rank, its number of slots, and its rows.
    asked: Vec<(u32, Vec<u32>)>,
    /// Elements for each rank, of what is sent next.
    counts: Vec<usize>,
    dispatch: Option<Pending<u8>>,
    arrivals: Arrivals,
    /// The places of the slots that have an expert here, in slot order.
    places: Vec<u32>,
    combine: Option<Pending<f32>>,
}

impl Lane {
    /// Finds the rank of every slot of `rows`, and the rows for every rank of `map`.
    fn plan(&mut self, rows: LocalRows<'_>, map: &ExpertMap) {
        let Self { homes, asked, own, .. } = self;
        homes.clear();
        homes.reserve(own.len() * rows.top_k);
        asked.resize_with(map.ranks(), Default::default);
        for (slots, rows) in asked.iter_mut() {
            *slots = 0;
            rows.clear();
            rows.reserve(own.len());
        }
        for t in own.clone() {
            homes.extend(rows.ids_of(t).iter().map(|id| {
                let rank = map.home(*id, t)?.rank;
                let (slots, rows) = &mut asked[rank];
                if rows.last() != Some(&(t as u32)) {
                    rows.push(t as u32);
                }
                *slots += 1;
                Some((rank as u32, *slots - 1))
            }));
        }
    }

    /// The rows from number `first` on of those that are sent, rank by rank, with their ranks.
    fn sent_from(&self, mut first: usize) -> impl Iterator<Item = (usize, usize)> {
        self.asked.iter().enumerate().flat_map(move |(rank, (_, rows))| {
            let skipped = first.min(rows.len());
            first -= skipped;
            rows[skipped..].iter().map(move |t| (rank, *t as usize))
        })
    }
}

impl AllToAllExchange {
    /// `group` are the expert-parallel ranks, in the order of `map`. `same_rows` are the ranks that
    /// have the same rows as this one, where there are others.
    pub fn new(
        layer: &str,
        group: Arc<dyn Communicator>,
        map: Arc<ExpertMap>,
        same_rows: Option<Arc<dyn Communicator>>,
        wire: Wire,
    ) -> Self {
        Self { layer: layer.into(), group, map, same_rows, wire, lanes: Vec::new() }
    }

    fn at(&self, step: Step) -> At<'_> {
        At::new(&self.layer, step)
    }

    /// The share of `tokens` rows that this rank sends.
    fn own(&self, tokens: usize) -> Range<usize> {
        match &self.same_rows {
            Some(group) => share(tokens, group.rank(), group.size()),
            None => 0..tokens,
        }
    }
}

/// Another rank sent what cannot be: a bug, told as an error so that the other ranks hear of it.
fn broken(layer: &str, what: &str) -> Error {
    Error::Communication(format!("layer '{layer}': {what}"))
}

impl std::fmt::Debug for AllToAllExchange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} over {} ranks of {}", self.name(), self.group.size(), self.group.name())
    }
}

impl Exchange for AllToAllExchange {
    fn name(&self) -> &'static str {
        "all-to-all"
    }

    fn map(&self) -> (&ExpertMap, usize) {
        (&self.map, self.group.rank())
    }

    fn moves_rows(&self) -> bool {
        true
    }

    fn quantises_rows(&self) -> bool {
        self.wire.quantises()
    }

    fn workspace_bytes(&self, tokens: usize, top_k: usize, width: usize) -> usize {
        let (own, ranks) = (self.own(tokens).len(), self.group.size());
        let copies = own * top_k.min(ranks);
        let slots = own * top_k;
        let same_rows = if self.same_rows.is_some() { own * width * size_of::<f32>() } else { 0 };
        // sent, arrived; sent back; where all that is
        copies * self.wire.row_bytes(top_k, width)
            + Arrivals::bytes(copies, top_k, width)
            + slots * width * size_of::<f32>()
            + slots * (size_of::<Option<(u32, u32)>>() + size_of::<u32>())
            + own * ranks * size_of::<u32>()
            + same_rows
    }

    fn start_dispatch(
        &mut self,
        lane: usize,
        rows: LocalRows<'_>,
        pool: &dyn ThreadPool,
    ) -> Result<()> {
        if u32::try_from(rows.ids.len()).is_err() {
            let slots = rows.ids.len();
            return Err(Error::input("batch", format!("{slots} slots are too many; split it")));
        }
        self.lanes.resize_with(self.lanes.len().max(lane + 1), Lane::default);
        let own = self.own(rows.tokens());
        let entry = &mut self.lanes[lane];
        (entry.top_k, entry.width, entry.own) = (rows.top_k, rows.width, own);
        entry.plan(rows, &self.map);
        let row_bytes = self.wire.row_bytes(rows.top_k, rows.width).max(1);
        entry.counts.clear();
        entry.counts.extend(entry.asked.iter().map(|(_, rows)| rows.len() * row_bytes));

        let entry = &self.lanes[lane];
        let mut send = self.group.buffer(entry.counts.iter().sum())?;
        let together = rows_together(send.len() / row_bytes, row_bytes, pool.threads());
        for_each(pool, send.chunks_mut(together * row_bytes).enumerate(), |(chunk, to)| {
            let sent = entry.sent_from(chunk * together);
            for ((rank, t), to) in sent.zip(to.chunks_exact_mut(row_bytes)) {
                let ids = rows.ids_of(t).iter().map(|id| self.map.local(*id, t, rank));
                self.wire.write(to, ids, rows.weights_of(t), rows.row(t));
            }
        });
        let at = self.at(Step::Dispatch);
        let pending = self.group.start_all_to_all_v(at, send, &entry.counts)?;
        self.lanes[lane].dispatch = Some(pending);
        Ok(())
    }

    fn finish_dispatch<'a>(
        &'a mut self,
        lane: usize,
        _rows: LocalRows<'a>,
        pool: &dyn ThreadPool,
    ) -> Result<DispatchedRows<'a>> {
        let Self { layer, group, wire, lanes, .. } = self;
        let Lane { top_k, width, dispatch, arrivals, .. } = &mut lanes[lane];
        let pending = dispatch.take().ok_or_else(|| not_started(layer, "dispatch"))?;
        let received = pending.wait(&**group)?;
        arrivals
            .read(&received, (wire, *top_k, *width), |id, _| id, pool)
            .map_err(|reason| broken(layer, &reason))?;
        Ok(arrivals.dispatched())
    }

    fn start_combine(
        &mut self,
        lane: usize,
        slots: SlotRows<'_>,
        pool: &dyn ThreadPool,
    ) -> Result<()> {
        let Lane { width, arrivals, places, counts, .. } = &mut self.lanes[lane];
        let width = *width;
        let here = |place: &u32| *place != NO_PLACE;
        places.clear();
        places.reserve(slots.places.len());
        places.extend(slots.places.iter().copied().filter(here));
        counts.clear();
        let of_ranks = arrivals.slots_of_ranks();
        counts
            .extend(of_ranks.map(|of| slots.places[of].iter().filter(|p| here(p)).count() * width));
        let mut send = self.group.buffer(places.len() * width)?;
        let together = rows_together(places.len(), width * size_of::<f32>(), pool.threads());
        let chunks = send.chunks_mut((together * width).max(1)).zip(places.chunks(together));
        for_each(pool, chunks, |(to, places)| {
            for (to, place) in to.chunks_exact_mut(width).zip(places) {
                to.copy_from_slice(&slots.values[*place as usize * width..][..width]);
            }
        });
        let Lane { counts, .. } = &self.lanes[lane];
        let pending = self.group.start_all_to_all_v(self.at(Step::Combine), send, counts)?;
        self.lanes[lane].combine = Some(pending);
        Ok(())
    }

    fn finish_combine(
        &mut self,
        lane: usize,
        rows: LocalRows<'_>,
        slots: SlotRows<'_>,
        out: &mut [f32],
        pool: &dyn ThreadPool,
    ) -> Result<Completeness> {
        let pending = self.lanes[lane].combine.take();
        let pending = pending.ok_or_else(|| not_started(&self.layer, "combine"))?;
        let received = pending.wait(&*self.group)?;
        let lane = &self.lanes[lane];
        for (rank, (part, (asked, _))) in received.iter().zip(&lane.asked).enumerate() {
            let (got, want) = (part.len(), *asked as usize * lane.width);
            if got != want {
                let what = format!("rank {rank} returned {got} elements, {want} were asked for");
                return Err(broken(&self.layer, &what));
            }
        }
        let weights = (rows.slice(lane.own.clone()).weights, slots.weighted);
        match &self.same_rows {
            None => lane.sum(&received, weights, out, pool),
            Some(group) => {
                let mut mine = group.buffer(lane.own.len() * lane.width)?;
                lane.sum(&received, weights, &mut mine, pool);
                let all = group.start_all_gather_v(self.at(Step::Combine), mine)?;
                self.spread(&all.wait(&**group)?, lane.width, out, pool)?;
            }
        }
        Ok(Completeness::Complete)
    }
}

impl Lane {
    /// The weighted sums of this rank's share of the rows.
    fn sum(
        &self,
        received: &Received<f32>,
        weights: (&[f32], bool),
        out: &mut [f32],
        pool: &dyn ThreadPool,
    ) {
        let width = self.width;
        let slot = |slot: usize| {
            let (rank, before) = self.homes[slot]?;
            Some(&received.part(rank as usize)[before as usize * width..][..width])
        };
        weighted_sum(weights, self.top_k, slot, (out, width), pool);
    }
}

impl AllToAllExchange {
    /// Puts together the sums of the ranks that have the same rows.
    fn spread(
        &self,
        all: &Received<f32>,
        width: usize,
        out: &mut [f32],
        pool: &dyn ThreadPool,
    ) -> Result<()> {
        let (tokens, ranks) = (out.len() / width.max(1), all.ranks());
        for (rank, part) in all.iter().enumerate() {
            let rows = share(tokens, rank, ranks);
            if part.len() != rows.len() * width {
                let what = "the ranks with the same rows have different numbers of them";
                return Err(broken(&self.layer, what));
            }
            copy(pool, &mut out[rows.start * width..rows.end * width], part);
        }
        Ok(())
    }
}
