//! The exchange in which rows stay where they are: every rank of the group has all of them.

use std::sync::Arc;

use moe_kernels::pool::ThreadPool;

use super::{
    Completeness, DispatchedRows, Exchange, ExpertMap, LocalRows, SlotRows, local_ids, weighted_sum,
};
use crate::Result;
use crate::router::LocalId;

/// Nothing moves. One rank with all experts; or, in a tensor-parallel group whose ranks all have the
/// same rows, a rank with a slice of every expert or with some whole ones, whose sum is partial.
#[derive(Clone, Debug)]
pub struct LocalExchange {
    map: Arc<ExpertMap>,
    rank: usize,
    completeness: Completeness,
    lanes: Vec<Vec<LocalId>>,
}

impl LocalExchange {
    /// One rank, all of the experts.
    pub fn new(experts: usize) -> Self {
        Self::of(Arc::new(ExpertMap::one_rank(experts)), 0, Completeness::Complete)
    }

    /// The experts that `map` gives to `rank`.
    pub fn of(map: Arc<ExpertMap>, rank: usize, completeness: Completeness) -> Self {
        Self { map, rank, completeness, lanes: Vec::new() }
    }
}

impl Exchange for LocalExchange {
    fn name(&self) -> &'static str {
        "local"
    }

    fn map(&self) -> (&ExpertMap, usize) {
        (&self.map, self.rank)
    }

    fn moves_rows(&self) -> bool {
        false
    }

    fn workspace_bytes(&self, tokens: usize, top_k: usize, _width: usize) -> usize {
        tokens * top_k * size_of::<LocalId>()
    }

    fn start_dispatch(
        &mut self,
        lane: usize,
        rows: LocalRows<'_>,
        _pool: &dyn ThreadPool,
    ) -> Result<()> {
        if self.lanes.len() <= lane {
            self.lanes.resize(lane + 1, Vec::new());
        }
        let ids = &mut self.lanes[lane];
        ids.clear();
        ids.extend(local_ids(&self.map, self.rank, rows.ids, rows.top_k));
        Ok(())
    }

    fn finish_dispatch<'a>(
        &'a mut self,
        lane: usize,
        rows: LocalRows<'a>,
        _pool: &dyn ThreadPool,
    ) -> Result<DispatchedRows<'a>> {
        let LocalRows { hidden, top_k, weights, .. } = rows;
        Ok(DispatchedRows { hidden, top_k, ids: &self.lanes[lane], weights, quantised: false })
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
        _lane: usize,
        rows: LocalRows<'_>,
        slots: SlotRows<'_>,
        out: &mut [f32],
        pool: &dyn ThreadPool,
    ) -> Result<Completeness> {
        let LocalRows { weights, top_k, width, .. } = rows;
        let slot = |slot| slots.row(slot);
        weighted_sum((weights, slots.weighted), top_k, slot, (out, width), pool);
        Ok(self.completeness)
    }
}
