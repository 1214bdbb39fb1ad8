//! The shared experts of one forward pass: run at one point, collected once.

use moe_kernels::pool::ThreadPool;

use super::slices::Slices;
use crate::Result;
use crate::router::Routing;
use crate::shared_experts::{Point, SharedExperts, SharedOrder, SharedRows, SharedWork};

/// Owned by the forward pass that made it; nothing is kept between passes.
pub(super) struct SharedCall<'a>(Option<Parts<'a>>);

/// What they run with; gone when they have run.
pub(super) struct Parts<'a> {
    pub(super) experts: &'a SharedExperts,
    pub(super) order: SharedOrder,
    /// `[T, H]`.
    pub(super) rows: &'a [f32],
    /// `[T, H]`.
    pub(super) out: &'a mut [f32],
    /// The experts are slices, whose rows are quantised with one scale for a whole row.
    pub(super) slices: Option<&'a Slices>,
    pub(super) pool: &'a dyn ThreadPool,
    pub(super) work: &'a mut SharedWork,
}

impl<'a> SharedCall<'a> {
    /// Will run as `parts` say; without them there are no shared experts, or another thread has
    /// them.
    pub(super) fn new(parts: Option<Parts<'a>>) -> Self {
        Self(parts)
    }

    /// Runs them if this is their point.
    pub(super) fn reach(&mut self, point: Point, routing: &Routing) -> Result<()> {
        match &self.0 {
            Some(parts) if parts.order.runs_at(point) => self.run(routing),
            _ => Ok(()),
        }
    }

    /// Runs them if they have not run yet.
    pub(super) fn run(&mut self, routing: &Routing) -> Result<()> {
        let Some(Parts { experts, rows, out, slices, pool, work, .. }) = self.0.take() else {
            return Ok(());
        };
        let agree = slices.map(|slices| |max: &mut [f32]| slices.row_max(max));
        let row_max = agree.as_ref().map(|agree| agree as _);
        let router_weights = &routing.shared_weights;
        experts.forward(SharedRows { rows, router_weights, out, row_max }, pool, work)
    }
}
