//! The naive exchange: every rank of a group gets all of the group's rows, computes its share of
//! each, and the shares are reduced and scattered back to the rows' ranks.

use std::sync::Arc;

use moe_kernels::pool::ThreadPool;
use moe_kernels::region::{for_each, rows_together};

use super::arrivals::Arrivals;
use super::{
    Completeness, DispatchedRows, Exchange, ExpertMap, LocalRows, SlotRows, Wire, not_started,
    weighted_sum,
};
use crate::comm::{At, Communicator, Pending, Step};
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
    top_k: usize,
    width: usize,
    dispatch: Option<Pending<u8>>,
    arrivals: Arrivals,
    combine: Option<Pending<f32>>,
    /// Elements of the sums that go to each rank.
    counts: Vec<usize>,
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

    fn map(&self) -> (&ExpertMap, usize) {
        (&self.map, self.rank)
    }

    fn moves_rows(&self) -> bool {
        true
    }

    fn quantises_rows(&self) -> bool {
        self.wire.quantises()
    }

    fn workspace_bytes(&self, tokens: usize, top_k: usize, width: usize) -> usize {
        let row_bytes = self.wire.row_bytes(top_k, width);
        let rows = tokens * self.group.size();
        // sent; arrived; the sums
        tokens * row_bytes + Arrivals::bytes(rows, top_k, width) + rows * width * size_of::<f32>()
    }

    fn start_dispatch(
        &mut self,
        lane: usize,
        rows: LocalRows<'_>,
        pool: &dyn ThreadPool,
    ) -> Result<()> {
        self.lanes.resize_with(self.lanes.len().max(lane + 1), Lane::default);
        let row_bytes = self.wire.row_bytes(rows.top_k, rows.width).max(1);
        let mut send = self.group.buffer(rows.tokens() * row_bytes)?;
        let together = rows_together(rows.tokens(), row_bytes, pool.threads());
        for_each(pool, send.chunks_mut(together * row_bytes).enumerate(), |(chunk, to)| {
            for (t, to) in (chunk * together..).zip(to.chunks_exact_mut(row_bytes)) {
                // logical ids travel: each receiver maps them to its own
                let ids = rows.ids_of(t).iter().map(|id| LocalId(id.0));
                self.wire.write(to, ids, rows.weights_of(t), rows.row(t));
            }
        });
        let at = At::new(&self.layer, Step::Dispatch);
        let pending = self.group.start_all_gather_v(at, send)?;
        let lane = &mut self.lanes[lane];
        (lane.top_k, lane.width) = (rows.top_k, rows.width);
        lane.dispatch = Some(pending);
        Ok(())
    }

    fn finish_dispatch<'a>(
        &'a mut self,
        lane: usize,
        _rows: LocalRows<'a>,
        pool: &dyn ThreadPool,
    ) -> Result<DispatchedRows<'a>> {
        let Self { layer, group, map, rank, wire, lanes, .. } = self;
        let Lane { top_k, width, dispatch, arrivals, .. } = &mut lanes[lane];
        let pending = dispatch.take().ok_or_else(|| not_started(layer, "dispatch"))?;
        let received = pending.wait(&**group)?;
        // a replica is chosen by the row's number on its own rank
        let local = |id: LocalId, row| map.local(LogicalId(id.0), row, *rank);
        arrivals
            .read(&received, (wire, *top_k, *width), local, pool)
            .map_err(|reason| Error::Communication(format!("layer '{layer}': {reason}")))?;
        Ok(arrivals.dispatched())
    }

    fn start_combine(
        &mut self,
        lane: usize,
        slots: SlotRows<'_>,
        pool: &dyn ThreadPool,
    ) -> Result<()> {
        let Lane { top_k, width, arrivals, combine, counts, .. } = &mut self.lanes[lane];
        let (top_k, width) = (*top_k, *width);
        let mut sums = self.group.buffer(arrivals.rows() * width)?;
        let weights = (arrivals.dispatched().weights, slots.weighted);
        weighted_sum(weights, top_k, |slot| slots.row(slot), (&mut sums, width), pool);
        counts.clear();
        counts.extend(arrivals.slots_of_ranks().map(|slots| slots.len() / top_k.max(1) * width));
        let at = At::new(&self.layer, Step::Combine);
        *combine = Some(self.group.start_reduce_scatter_v(at, sums, counts)?);
        Ok(())
    }

    fn finish_combine(
        &mut self,
        lane: usize,
        _rows: LocalRows<'_>,
        _slots: SlotRows<'_>,
        out: &mut [f32],
        pool: &dyn ThreadPool,
    ) -> Result<Completeness> {
        let pending = self.lanes[lane].combine.take();
        let pending = pending.ok_or_else(|| not_started(&self.layer, "combine"))?;
        pending.sum(&*self.group, out, pool)?;
        Ok(self.completeness)
    }
}
