//! The naive exchange: every rank of a group gets all of the group's rows, computes its share of
//! each, and the shares are reduced and scattered back to the rows' ranks.

use std::sync::Arc;

use moe_kernels::pool::ThreadPool;

use super::wire::{Arrivals, Wire};
use super::{Completeness, DispatchedRows, Exchange, ExpertMap, LocalRows, SlotRows, weighted_sum};
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
    arrivals: Arrivals,
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

    fn start_dispatch(
        &mut self,
        lane: usize,
        rows: LocalRows<'_>,
        _pool: &dyn ThreadPool,
    ) -> Result<()> {
        self.lanes.resize_with(self.lanes.len().max(lane + 1), Lane::default);
        let k = rows.top_k;
        let row_bytes = self.wire.row_bytes(k, rows.width);
        let mut send = self.group.buffer(rows.tokens() * row_bytes);
        for (t, to) in send.chunks_exact_mut(row_bytes).enumerate() {
            // logical ids travel: each receiver maps them to its own
            let ids = rows.ids_of(t).iter().map(|id| LocalId(id.0));
            self.wire.write(to, ids, rows.weights_of(t), rows.row(t));
        }
        let at = At::new(&self.layer, Step::Dispatch);
        let gathered = self.group.all_gather_v_in_place(at, send)?;
        let Lane { counts, arrivals } = &mut self.lanes[lane];
        counts.clear();
        counts.extend(gathered.iter().map(|part| part.len() / row_bytes));
        arrivals.reset(counts.iter().sum(), rows.width, k);
        let mut first = 0;
        for part in gathered.iter() {
            self.wire.read(part, arrivals);
            // a replica is chosen by the row's number on its own rank
            for (slot, id) in arrivals.ids[first..].iter_mut().enumerate() {
                *id = self.map.local(LogicalId(id.0), slot / k, self.rank);
            }
            first = arrivals.ids.len();
        }
        Ok(())
    }

    fn finish_dispatch<'a>(
        &'a mut self,
        lane: usize,
        _rows: LocalRows<'a>,
        _pool: &dyn ThreadPool,
    ) -> Result<DispatchedRows<'a>> {
        Ok(self.lanes[lane].arrivals.dispatched())
    }

    fn start_combine(
        &mut self,
        _lane: usize,
        _slots: SlotRows<'_>,
        _pool: &dyn ThreadPool,
    ) -> Result<()> {
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
        let Lane { counts, arrivals } = &self.lanes[lane];
        let LocalRows { top_k, width, .. } = rows;
        let mut sums = self.group.buffer(counts.iter().sum::<usize>() * width);
        let slot = |slot| slots.row(slot);
        let weights = (arrivals.weights(), slots.weighted);
        weighted_sum(weights, top_k, slot, (&mut sums, width), pool);
        let elements: Vec<usize> = counts.iter().map(|count| count * width).collect();
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
