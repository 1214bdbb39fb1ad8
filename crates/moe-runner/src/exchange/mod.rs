//! Dispatch and combine: how rows reach the ranks that own their experts, and how results return.
//!
//! * [`LocalExchange`]: the rows stay; each rank's experts see all of them.
//! * [`GatherExchange`]: every rank gets all rows of the group; partial sums are reduced and
//!   scattered back (the naive dispatch and combine).
//! * [`AllToAllExchange`]: each row goes only to the ranks that own its experts; the experts' rows
//!   come back and are added on the token's own rank.
//!
//! * [`BatchedExchange`]: one of these, with each expert's rows together.
//! * [`resident`]: all-to-all of rows that stay in a device's memory; [`one_sided`]: where ranks write into each other's.
//! * [`moves`]: experts that go from one placement to another.
//!
//! Dispatch takes *all* inputs of a row together, so that rows before and after it cannot be mixed
//! up. Experts' outputs are weighted and added in one function, `weighted_sum`: in slot order, in
//! f32. Each exchange says whether the sum it returns is complete, and that is all that decides on a
//! later reduction. Both directions are split into start and finish, and several batches ("lanes")
//! may be under way, so that other work can run in between.

mod all_to_all;
mod arrivals;
mod batched;
mod gather;
mod local;
mod map;
pub mod moves;
pub mod one_sided;
pub mod resident;
mod sum;
mod wire;

pub(crate) use crate::comm::share;
pub use all_to_all::AllToAllExchange;
pub use batched::BatchedExchange;
pub use gather::GatherExchange;
pub use local::LocalExchange;
pub use map::{ExpertMap, Home};
pub use sum::{Completeness, Partial, Reduced, Sum};
pub use wire::Wire;

use std::ops::Range;

use moe_kernels::pool::ThreadPool;
use moe_kernels::region::{for_each, rows_together};

use crate::plan::NO_PLACE;
use crate::router::{LocalId, LogicalId, Routing};
use crate::{Error, Result};

/// How rows come to a kernel. Either way a plan says which rows belong to which expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowFormat {
    /// `[rows, H]` in any order.
    Standard,
    /// `[experts, capacity, H]`, each expert's rows together.
    Batched,
}

impl RowFormat {
    /// Both.
    pub const ALL: &'static [Self] = &[Self::Standard, Self::Batched];

    /// "standard" or "batched".
    pub fn name(self) -> &'static str {
        match self {
            Self::Standard => "standard",
            Self::Batched => "batched",
        }
    }
}

/// How rows that stay on the ranks' GPUs go from one to the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BetweenGpus {
    /// Ranks write into each other's memory ([`one_sided`]).
    OneSided,
    /// Sends and receives of as much as ranks have for each other, which they tell each other first.
    Counted,
    /// Sends and receives of as much as there is room for.
    WithRoom(resident::Room),
}

impl BetweenGpus {
    /// "one-sided", "counts first", "with room".
    pub fn name(self) -> &'static str {
        match self {
            Self::OneSided => "one-sided",
            Self::Counted => "counts first",
            Self::WithRoom(_) => "with room",
        }
    }
}

/// The rows of this rank, with everything that belongs to them.
#[derive(Clone, Copy, Debug)]
pub struct LocalRows<'a> {
    /// `[T, width]`.
    pub hidden: &'a [f32],
    /// Columns of a row.
    pub width: usize,
    /// k.
    pub top_k: usize,
    /// `[T, k]`.
    pub ids: &'a [LogicalId],
    /// `[T, k]`.
    pub weights: &'a [f32],
}

impl<'a> LocalRows<'a> {
    /// `hidden` `[T, width]`, routed.
    pub fn new(hidden: &'a [f32], width: usize, routing: &'a Routing) -> Self {
        let Routing { top_k, ids, weights, .. } = routing;
        Self { hidden, width, top_k: *top_k, ids, weights }
    }

    /// T.
    pub fn tokens(&self) -> usize {
        self.ids.len() / self.top_k.max(1)
    }

    /// The rows of `range`.
    pub fn slice(&self, range: Range<usize>) -> Self {
        let slots = range.start * self.top_k..range.end * self.top_k;
        Self {
            hidden: &self.hidden[range.start * self.width..range.end * self.width],
            ids: &self.ids[slots.clone()],
            weights: &self.weights[slots],
            ..*self
        }
    }

    fn row(&self, t: usize) -> &'a [f32] {
        &self.hidden[t * self.width..][..self.width]
    }

    fn ids_of(&self, t: usize) -> &'a [LogicalId] {
        &self.ids[t * self.top_k..][..self.top_k]
    }

    fn weights_of(&self, t: usize) -> &'a [f32] {
        &self.weights[t * self.top_k..][..self.top_k]
    }
}

/// The rows that this rank's experts get: after dispatch.
#[derive(Clone, Copy, Debug)]
pub struct DispatchedRows<'a> {
    /// `[rows, width]`.
    pub hidden: &'a [f32],
    /// Slots of each row, k: the router's, or 1 where every row has a copy at each of its experts.
    pub top_k: usize,
    /// Ids of this rank's experts `[rows, k]`; any other means: not here.
    pub ids: &'a [LocalId],
    /// Weights `[rows, k]`.
    pub weights: &'a [f32],
    /// The rows are quantised as the experts' first product asks for it: not to be done again.
    pub quantised: bool,
}

/// What the experts made of the dispatched rows.
#[derive(Clone, Copy, Debug)]
pub struct SlotRows<'a> {
    /// `[places, width]`, in the order of the plan.
    pub values: &'a [f32],
    /// Columns of a row.
    pub width: usize,
    /// `[rows · k]`: the place of each slot; [`NO_PLACE`] without an expert here.
    pub places: &'a [u32],
    /// Weights have been applied: to the experts' input, or by a kernel that rounds after it.
    pub weighted: bool,
}

impl<'a> SlotRows<'a> {
    /// The row of a slot, if it has an expert here.
    fn row(&self, slot: usize) -> Option<&'a [f32]> {
        let place = self.places[slot];
        (place != NO_PLACE).then(|| &self.values[place as usize * self.width..][..self.width])
    }
}

/// Brings rows to experts and results back. For each lane the four steps come in order; lanes may
/// interleave. All ranks of a group take the same steps in the same order. Work on rows is spread
/// over the threads of `pool`.
pub trait Exchange: Send + std::fmt::Debug {
    /// For messages and reports.
    fn name(&self) -> &'static str;

    /// How rows are handed to the experts.
    fn row_format(&self) -> RowFormat {
        RowFormat::Standard
    }

    /// Where every expert lives, and this rank's number there.
    fn map(&self) -> (&ExpertMap, usize);

    /// The experts of the layer, on all ranks.
    fn experts(&self) -> usize {
        self.map().0.experts()
    }

    /// The experts that this rank holds.
    fn local_experts(&self) -> usize {
        let (map, rank) = self.map();
        map.held_by(rank).len()
    }

    /// Rows leave this rank: kernels must not route by themselves, and other work can run while
    /// they are on their way.
    fn moves_rows(&self) -> bool;

    /// Rows are quantised before they leave, as the experts' first product asks for it.
    fn quantises_rows(&self) -> bool {
        false
    }

    /// Bytes that are held for one lane of `tokens` rows of `width` columns with `top_k` slots, if
    /// all ranks have as many and their slots are spread evenly over the experts.
    fn workspace_bytes(&self, tokens: usize, top_k: usize, width: usize) -> usize;

    /// Sends rows to the ranks that own their experts. Does not wait.
    ///
    /// # Errors
    /// As [`Self::finish_dispatch`].
    fn start_dispatch(
        &mut self,
        lane: usize,
        rows: LocalRows<'_>,
        pool: &dyn ThreadPool,
    ) -> Result<()>;

    /// The rows that have arrived for this rank's experts. `rows` as given to the start.
    ///
    /// # Errors
    /// [`Error::Communication`]: a rank that does not arrive.
    fn finish_dispatch<'a>(
        &'a mut self,
        lane: usize,
        rows: LocalRows<'a>,
        pool: &dyn ThreadPool,
    ) -> Result<DispatchedRows<'a>>;

    /// Sends back what the experts made of the dispatched rows. Does not wait.
    ///
    /// # Errors
    /// As [`Self::finish_combine`].
    fn start_combine(
        &mut self,
        lane: usize,
        slots: SlotRows<'_>,
        pool: &dyn ThreadPool,
    ) -> Result<()>;

    /// Writes the weighted sum of each of this rank's rows to `out` `[T, width]`. `rows` and
    /// `slots` as given to the starts.
    ///
    /// # Errors
    /// [`Error::Communication`]: a rank that does not arrive.
    fn finish_combine(
        &mut self,
        lane: usize,
        rows: LocalRows<'_>,
        slots: SlotRows<'_>,
        out: &mut [f32],
        pool: &dyn ThreadPool,
    ) -> Result<Completeness>;
}

/// `out[t] = Σ_j w_j · slot(t·k + j)`, in slot order, over the slots that have a row; without `w_j`
/// where the rows are `weighted` already. `out` is `[T, width]`, rows are `width` long.
pub(crate) fn weighted_sum<'a>(
    (weights, weighted): (&[f32], bool),
    top_k: usize,
    slot: impl Fn(usize) -> Option<&'a [f32]> + Sync,
    (out, width): (&mut [f32], usize),
    pool: &dyn ThreadPool,
) {
    let row_bytes = (top_k + 1) * width * size_of::<f32>();
    let together = rows_together(out.len() / width, row_bytes, pool.threads());
    for_each(pool, out.chunks_mut(together * width).enumerate(), |(part, rows)| {
        for (t, out) in (part * together..).zip(rows.chunks_exact_mut(width)) {
            out.fill(0.0);
            for (j, &weight) in weights[t * top_k..][..top_k].iter().enumerate() {
                let weight = if weighted { 1.0 } else { weight };
                let row = slot(t * top_k + j).unwrap_or_default();
                for (out, value) in out.iter_mut().zip(row) {
                    *out += weight * value;
                }
            }
        }
    });
}

/// A lane's step is finished that was not started: a bug, told as an error so that the other ranks
/// hear of it.
fn not_started(layer: &str, step: &str) -> Error {
    Error::Communication(format!("layer '{layer}': a {step} is finished that was not started"))
}

/// The ids of one rank's copies for the rows of `ids` `[T, k]`, in order.
fn local_ids<'a>(
    map: &'a ExpertMap,
    rank: usize,
    ids: &'a [LogicalId],
    top_k: usize,
) -> impl Iterator<Item = LocalId> + 'a {
    ids.iter().enumerate().map(move |(slot, id)| map.local(*id, slot / top_k.max(1), rank))
}
