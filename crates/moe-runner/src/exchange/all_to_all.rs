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

use super::wire::{Arrivals, Wire};
use super::{Completeness, DispatchedRows, Exchange, ExpertMap, LocalRows, SlotRows, weighted_sum};
use crate::comm::{At, Communicator, Parts, Pending, Step};
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
    dispatch: Option<Pending<u8>>,
    combine: Option<Pending<f32>>,
    /// Rows received from each rank.
    counts: Vec<usize>,
    arrivals: Arrivals,
}

impl Lane {
    /// Finds the rank of every slot of `rows`, and the rows for every rank of `map`.
    fn plan(&mut self, rows: LocalRows<'_>, map: &ExpertMap) {
        let Self { homes, asked, own, .. } = self;
        homes.clear();
        asked.resize_with(map.ranks(), Default::default);
        for (slots, rows) in asked.iter_mut() {
            *slots = 0;
            rows.clear();
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

    /// A lane's step was not started, or another rank sent what cannot be: a bug, told as an error
    /// so that the other ranks hear of it.
    fn broken(&self, what: &str) -> Error {
        Error::Communication(format!("layer '{}': {what}", self.layer))
    }
}

impl std::fmt::Debug for AllToAllExchange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} over {} ranks of {}", self.name(), self.group.size(), self.group.name())
    }
}

/// The part of `tokens` rows that falls to `rank` of `ranks`: runs as equal as can be, the first
/// ones longer.
pub(crate) fn share(tokens: usize, rank: usize, ranks: usize) -> Range<usize> {
    let (base, more) = (tokens / ranks, tokens % ranks);
    let start = rank * base + rank.min(more);
    start..start + base + usize::from(rank < more)
}

impl Exchange for AllToAllExchange {
    fn name(&self) -> &'static str {
        "all-to-all"
    }

    fn experts(&self) -> usize {
        self.map.experts()
    }

    fn local_experts(&self) -> usize {
        self.map.held_by(self.group.rank()).len()
    }

    fn moves_rows(&self) -> bool {
        true
    }

    fn start_dispatch(
        &mut self,
        lane: usize,
        rows: LocalRows<'_>,
        _pool: &dyn ThreadPool,
    ) -> Result<()> {
        self.lanes.resize_with(self.lanes.len().max(lane + 1), Lane::default);
        let (tokens, k) = (rows.tokens(), rows.top_k);
        let own = match &self.same_rows {
            Some(group) => share(tokens, group.rank(), group.size()),
            None => 0..tokens,
        };
        let row_bytes = self.wire.row_bytes(k, rows.width);
        let entry = &mut self.lanes[lane];
        (entry.top_k, entry.width) = (k, rows.width);
        entry.own = own;
        entry.plan(rows, &self.map);

        let counts: Vec<usize> =
            entry.asked.iter().map(|(_, rows)| rows.len() * row_bytes).collect();
        let mut send = self.group.buffer(counts.iter().sum());
        let mut to = send.chunks_exact_mut(row_bytes);
        for (rank, (_, asked)) in entry.asked.iter().enumerate() {
            for (t, to) in asked.iter().map(|t| *t as usize).zip(&mut to) {
                let ids = rows.ids_of(t).iter().map(|id| self.map.local(*id, t, rank));
                self.wire.write(to, ids, rows.weights_of(t), rows.row(t));
            }
        }
        let parts = Parts::new(send, counts)?;
        let pending = self.group.start_all_to_all_v(self.at(Step::Dispatch), parts)?;
        self.lanes[lane].dispatch = Some(pending);
        Ok(())
    }

    fn finish_dispatch<'a>(
        &'a mut self,
        lane: usize,
        _rows: LocalRows<'a>,
        _pool: &dyn ThreadPool,
    ) -> Result<DispatchedRows<'a>> {
        let pending = self.lanes.get_mut(lane).and_then(|lane| lane.dispatch.take());
        let received = match pending {
            Some(pending) => pending.wait_in_place(&*self.group)?,
            None => return Err(self.broken("a dispatch is finished that was not started")),
        };
        let Lane { top_k, width, counts, arrivals, .. } = &mut self.lanes[lane];
        let row_bytes = self.wire.row_bytes(*top_k, *width);
        counts.clear();
        counts.extend(received.iter().map(|part| part.len() / row_bytes));
        arrivals.reset(counts.iter().sum(), *width, *top_k);
        received.iter().for_each(|part| self.wire.read(part, arrivals));
        Ok(arrivals.dispatched())
    }

    fn start_combine(
        &mut self,
        lane: usize,
        slots: SlotRows<'_>,
        _pool: &dyn ThreadPool,
    ) -> Result<()> {
        let Lane { top_k, width, counts, .. } = &self.lanes[lane];
        let mut first = 0;
        let here = counts.iter().map(|count| {
            let of_rank = first..first + count * top_k;
            first = of_rank.end;
            of_rank.filter(|slot| slots.row(*slot).is_some()).count() * width
        });
        let send_counts: Vec<usize> = here.collect();
        let mut send = self.group.buffer(send_counts.iter().sum());
        let here = (0..slots.places.len()).filter_map(|slot| slots.row(slot));
        for (to, row) in send.chunks_exact_mut(*width).zip(here) {
            to.copy_from_slice(row);
        }
        let parts = Parts::new(send, send_counts)?;
        let pending = self.group.start_all_to_all_v(self.at(Step::Combine), parts)?;
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
        let received = match self.lanes[lane].combine.take() {
            Some(pending) => pending.wait_in_place(&*self.group)?,
            None => return Err(self.broken("a combine is finished that was not started")),
        };
        let Lane { top_k, width, own, asked, homes, .. } = &self.lanes[lane];
        let width = *width;
        for (rank, (part, (asked, _))) in received.iter().zip(asked).enumerate() {
            let (got, want) = (part.len(), *asked as usize * width);
            if got != want {
                return Err(self.broken(&format!(
                    "rank {rank} returned {got} elements, {want} were asked for"
                )));
            }
        }
        let parts: Vec<&[f32]> = received.iter().collect();
        let slot = |slot: usize| {
            let (rank, before) = homes[slot]?;
            Some(&parts[rank as usize][before as usize * width..][..width])
        };
        let mine = &mut out[own.start * width..own.end * width];
        let weights = rows.slice(own.clone()).weights;
        weighted_sum((weights, slots.weighted), *top_k, slot, (mine, width), pool);
        if let Some(group) = &self.same_rows {
            let mine = out[own.start * width..own.end * width].to_vec();
            let at = At::new(&self.layer, Step::Combine);
            let all = group.all_gather_v(at, mine)?;
            if all.data().len() != out.len() {
                return Err(
                    self.broken("the ranks with the same rows have different numbers of them")
                );
            }
            out.copy_from_slice(all.data());
        }
        Ok(Completeness::Complete)
    }
}
