//! The naive exchange: every rank of a group gets all of the group's rows, computes its share of
//! each, and the shares are reduced and scattered back to the rows' ranks.

use std::sync::Arc;

use super::wire::{Wire, is_here};
use super::{
    Completeness, DispatchedRows, Exchange, ExpertMap, LocalRows, SlotRows, local_ids, weighted_sum,
};
use crate::comm::{At, Communicator, Step};
use crate::router::{LocalId, LogicalId};
use crate::{Error, Result};

/// All-gather of rows, reduce-scatter of sums.
pub struct GatherExchange {
    layer: Arc<str>,
    group: Arc<dyn Communicator>,
    map: Arc<ExpertMap>,
    /// This rank among those of `map`.
    rank: usize,
    completeness: Completeness,
    wire: Wire,
    lanes: Vec<Lane>,
}

#[derive(Default)]
struct Lane {
    /// Rows of each rank of the group.
    counts: Vec<usize>,
    top_k: usize,
    stride: usize,
    hidden: Vec<f32>,
    ids: Vec<LocalId>,
    weights: Vec<f32>,
}

impl GatherExchange {
    /// `group` are the ranks with rows of their own. `rank` is this rank's place in `map`; without
    /// expert parallelism the map has one rank, and every rank a slice of all experts.
    /// `completeness`: whether the sum over `group` is the sum over all experts and slices.
    pub fn new(
        layer: &str,
        group: Arc<dyn Communicator>,
        (map, rank): (Arc<ExpertMap>, usize),
        completeness: Completeness,
        wire: Wire,
    ) -> Self {
        Self { layer: layer.into(), group, map, rank, completeness, wire, lanes: Vec::new() }
    }
}

impl std::fmt::Debug for GatherExchange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} over {} ranks of {}", self.name(), self.group.size(), self.group.name())
    }
}

impl Exchange for GatherExchange {
    fn name(&self) -> &'static str {
        "all-gather / reduce-scatter"
    }

    fn experts(&self) -> usize {
        self.map.experts()
    }

    fn local_experts(&self) -> usize {
        self.map.held_by(self.rank).len()
    }

    fn moves_rows(&self) -> bool {
        true
    }

    fn start_dispatch(&mut self, lane: usize, rows: LocalRows<'_>) -> Result<()> {
        self.lanes.resize_with(self.lanes.len().max(lane + 1), Lane::default);
        let k = rows.top_k;
        let row_bytes = self.wire.row_bytes(k, rows.width);
        let mut send = Vec::with_capacity(rows.tokens() * row_bytes);
        for (t, row) in rows.hidden.chunks_exact(rows.stride).enumerate() {
            // logical ids travel: each receiver maps them to its own
            let ids = rows.ids_of(t).iter().map(|id| LocalId(id.0));
            self.wire.write(&mut send, ids, rows.weights_of(t), &row[..rows.width]);
        }
        let at = At::new(&self.layer, Step::Dispatch);
        let gathered = self.group.all_gather_v(at, send)?;
        let lane = &mut self.lanes[lane];
        *lane = Lane {
            counts: gathered.counts().iter().map(|bytes| bytes / row_bytes).collect(),
            top_k: k,
            stride: rows.stride,
            ..std::mem::take(lane)
        };
        let Lane { hidden, ids, weights, .. } = lane;
        hidden.clear();
        ids.clear();
        weights.clear();
        // row by row of each rank: a replica is chosen by the row's number on its own rank
        for part in gathered.iter() {
            let start = ids.len();
            for row in part.chunks_exact(row_bytes) {
                self.wire.read(row, k, rows.stride, (ids, weights, hidden));
            }
            let logical: Vec<LogicalId> = ids.drain(start..).map(|id| LogicalId(id.0)).collect();
            ids.extend(local_ids(&self.map, self.rank, &logical, k));
        }
        Ok(())
    }

    fn finish_dispatch<'a>(
        &'a mut self,
        lane: usize,
        _rows: LocalRows<'a>,
    ) -> Result<DispatchedRows<'a>> {
        let Lane { top_k, hidden, ids, weights, .. } = &self.lanes[lane];
        Ok(DispatchedRows { hidden, top_k: *top_k, ids, weights })
    }

    fn start_combine(&mut self, _lane: usize, _slots: SlotRows<'_>) -> Result<()> {
        Ok(())
    }

    fn finish_combine(
        &mut self,
        lane: usize,
        rows: LocalRows<'_>,
        slots: SlotRows<'_>,
        out: &mut [f32],
    ) -> Result<Completeness> {
        let Lane { counts, top_k, stride, ids, weights, .. } = &self.lanes[lane];
        let total: usize = counts.iter().sum();
        let mut sums = vec![0.0; total * rows.width];
        let has = |slot: usize| is_here(&ids[slot]);
        weighted_sum(weights, *top_k, has, slots, *stride, (&mut sums, rows.width));
        let elements: Vec<usize> = counts.iter().map(|count| count * rows.width).collect();
        let at = At::new(&self.layer, Step::Combine);
        let mine = self.group.reduce_scatter_v(at, sums, &elements)?;
        if mine.len() != out.len() {
            return Err(Error::Communication(format!(
                "layer '{}': {} elements came back for {}",
                self.layer,
                mine.len(),
                out.len()
            )));
        }
        out.copy_from_slice(&mine);
        Ok(self.completeness)
    }
}
