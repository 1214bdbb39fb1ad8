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

use super::wire::{Wire, is_here};
use super::{Completeness, DispatchedRows, Exchange, ExpertMap, LocalRows, SlotRows, weighted_sum};
use crate::comm::{At, Communicator, Parts, Pending, Step};
use crate::router::LocalId;
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
    stride: usize,
    /// This rank's share of its rows.
    own: Range<usize>,
    /// For each rank, the slots that it was sent (of rows in `own`, counted from its start).
    asked: Vec<Vec<u32>>,
    dispatch: Option<Pending<u8>>,
    combine: Option<Pending<f32>>,
    /// Rows received, in all, and by rank.
    counts: Vec<usize>,
    hidden: Vec<f32>,
    ids: Vec<LocalId>,
    weights: Vec<f32>,
    /// `[own · k, width]`: what came back.
    slots: Vec<f32>,
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

    fn start_dispatch(&mut self, lane: usize, rows: LocalRows<'_>) -> Result<()> {
        self.lanes.resize_with(self.lanes.len().max(lane + 1), Lane::default);
        let (tokens, k) = (rows.tokens(), rows.top_k);
        let own = match &self.same_rows {
            Some(group) => share(tokens, group.rank(), group.size()),
            None => 0..tokens,
        };
        let ranks = self.group.size();
        let mut asked = std::mem::take(&mut self.lanes[lane].asked);
        asked.resize_with(ranks, Vec::new);
        asked.iter_mut().for_each(Vec::clear);
        for (row, t) in own.clone().enumerate() {
            for (j, id) in rows.ids_of(t).iter().enumerate() {
                if let Some(home) = self.map.home(*id, t) {
                    asked[home.rank].push((row * k + j) as u32);
                }
            }
        }
        let row_bytes = self.wire.row_bytes(k, rows.width);
        let mut send = Vec::new();
        let mut counts = Vec::with_capacity(ranks);
        for (rank, slots) in asked.iter().enumerate() {
            let start = send.len();
            for same_row in slots.chunk_by(|a, b| *a as usize / k == *b as usize / k) {
                let t = own.start + same_row[0] as usize / k;
                let ids = rows.ids_of(t).iter().map(|id| self.map.local(*id, t, rank));
                let row = &rows.hidden[t * rows.stride..][..rows.width];
                self.wire.write(&mut send, ids, rows.weights_of(t), row);
            }
            debug_assert!((send.len() - start).is_multiple_of(row_bytes));
            counts.push(send.len() - start);
        }
        let pending =
            self.group.start_all_to_all_v(self.at(Step::Dispatch), Parts::new(send, counts)?)?;
        let lane = &mut self.lanes[lane];
        *lane = Lane {
            top_k: k,
            width: rows.width,
            stride: rows.stride,
            own,
            asked,
            dispatch: Some(pending),
            ..std::mem::take(lane)
        };
        Ok(())
    }

    fn finish_dispatch<'a>(
        &'a mut self,
        lane: usize,
        _rows: LocalRows<'a>,
    ) -> Result<DispatchedRows<'a>> {
        let pending = self.lanes.get_mut(lane).and_then(|lane| lane.dispatch.take());
        let received = match pending {
            Some(pending) => pending.wait(&*self.group)?,
            None => return Err(self.broken("a dispatch is finished that was not started")),
        };
        let wire = self.wire;
        let lane = &mut self.lanes[lane];
        let row_bytes = wire.row_bytes(lane.top_k, lane.width);
        lane.counts.clear();
        lane.counts.extend(received.counts().iter().map(|bytes| bytes / row_bytes));
        lane.hidden.clear();
        lane.ids.clear();
        lane.weights.clear();
        for row in received.data().chunks_exact(row_bytes) {
            let to = (&mut lane.ids, &mut lane.weights, &mut lane.hidden);
            wire.read(row, lane.top_k, lane.stride, to);
        }
        let Lane { top_k, hidden, ids, weights, .. } = &*lane;
        Ok(DispatchedRows { hidden, top_k: *top_k, ids, weights })
    }

    fn start_combine(&mut self, lane: usize, slots: SlotRows<'_>) -> Result<()> {
        let Lane { top_k, width, stride, counts, ids, .. } = &self.lanes[lane];
        let mut send = Vec::with_capacity(ids.len() * width);
        let mut send_counts = Vec::with_capacity(counts.len());
        let mut first = 0;
        for count in counts {
            let start = send.len();
            for slot in (first..first + count * top_k).filter(|slot| is_here(&ids[*slot])) {
                send.extend_from_slice(&slots.values[slot * stride..][..*width]);
            }
            first += count * top_k;
            send_counts.push(send.len() - start);
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
    ) -> Result<Completeness> {
        let received = match self.lanes[lane].combine.take() {
            Some(pending) => pending.wait(&*self.group)?,
            None => return Err(self.broken("a combine is finished that was not started")),
        };
        let Lane { top_k, width, own, asked, slots: returned, .. } = &mut self.lanes[lane];
        let (k, width) = (*top_k, *width);
        for (rank, (part, asked)) in received.iter().zip(asked.iter()).enumerate() {
            if part.len() != asked.len() * width {
                let (got, want) = (part.len(), asked.len() * width);
                return Err(self.broken(&format!(
                    "rank {rank} returned {got} elements, {want} were asked for"
                )));
            }
        }
        returned.resize(own.len() * k * width, 0.0);
        for (part, asked) in received.iter().zip(asked.iter()) {
            for (row, slot) in part.chunks_exact(width).zip(asked) {
                returned[*slot as usize * width..][..width].copy_from_slice(row);
            }
        }
        let LocalRows { ids, weights, .. } = rows.slice(own.clone());
        let experts = self.map.experts();
        let has = |slot: usize| ids[slot].index() < experts;
        let mine = &mut out[own.start * width..own.end * width];
        let slots = SlotRows { values: returned, ..slots };
        weighted_sum(weights, k, has, slots, width, (mine, width));
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
