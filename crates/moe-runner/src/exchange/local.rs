//! The exchange of one rank that owns all experts: nothing moves.

use crate::Result;
use crate::exchange::{DispatchedRows, Exchange, LocalRows, Partial, Reduced, Sum, weighted_sum};
use crate::router::{LocalId, Routing};
use crate::spec::WeightOn;

/// Nothing moves. With tensor parallelism the experts hold a share of the intermediate width, and
/// the sum is partial.
#[derive(Clone, Debug)]
pub struct LocalExchange {
    experts: usize,
    sharded: bool,
    ids: Vec<LocalId>,
}

impl LocalExchange {
    /// All `experts` live here; `sharded`: each rank of the tensor-parallel group holds a part of
    /// every one of them.
    pub fn new(experts: usize, sharded: bool) -> Self {
        Self { experts, sharded, ids: Vec::new() }
    }
}

impl Exchange for LocalExchange {
    fn dispatch<'a>(&'a mut self, rows: LocalRows<'a>) -> Result<DispatchedRows<'a>> {
        // all experts are here: a logical id is the local one, and idle ids lie beyond the experts
        self.ids.clear();
        self.ids.extend(rows.routing.ids.iter().map(|id| LocalId(id.0)));
        let Routing { weights, .. } = rows.routing;
        Ok(DispatchedRows { hidden: rows.hidden, ids: &self.ids, weights })
    }

    fn combine(
        &mut self,
        rows: LocalRows<'_>,
        weight_on: WeightOn,
        slots: &[f32],
        mut out: Vec<f32>,
    ) -> Result<Sum> {
        let Routing { ids, weights, top_k, .. } = rows.routing;
        weighted_sum(ids, weights, *top_k, self.experts, weight_on, (slots, rows.stride), &mut out);
        Ok(match self.sharded {
            true => Sum::Partial(Partial::new(out)),
            false => Sum::Reduced(Reduced::new(out)),
        })
    }
}
