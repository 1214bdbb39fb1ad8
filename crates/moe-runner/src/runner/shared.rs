//! The shared experts of one forward pass: run at one point, collected once.

use super::slices::Slices;
use crate::Result;
use crate::router::Routing;
use crate::shared_experts::{Point, SharedExperts, SharedOrder};

/// Owned by the forward pass that made it; nothing is kept between passes.
pub(super) struct SharedCall<'a> {
    experts: Option<&'a mut SharedExperts>,
    order: SharedOrder,
    rows: &'a [f32],
    out: Vec<f32>,
    slices: Option<&'a Slices>,
}

impl<'a> SharedCall<'a> {
    /// Will run `experts` on `rows` `[T, H]` where `order` says, into `out`.
    pub(super) fn new(
        experts: Option<&'a mut SharedExperts>,
        order: SharedOrder,
        rows: &'a [f32],
        out: Vec<f32>,
    ) -> Self {
        Self { experts, order, rows, out, slices: None }
    }

    /// The experts are slices, whose rows are quantised with one scale for a whole row.
    pub(super) fn with_slices(self, slices: Option<&'a Slices>) -> Self {
        Self { slices, ..self }
    }

    /// Nothing runs here: there are no shared experts, or another thread has them.
    pub(super) fn absent() -> Self {
        Self::new(None, SharedOrder::None, &[], Vec::new())
    }

    /// Runs them if this is their point.
    pub(super) fn reach(&mut self, point: Point, routing: &Routing) -> Result<()> {
        if self.order.runs_at(point) { self.run(routing) } else { Ok(()) }
    }

    /// Runs them if they have not run yet.
    pub(super) fn run(&mut self, routing: &Routing) -> Result<()> {
        let Some(experts) = self.experts.take() else { return Ok(()) };
        let weights = &routing.shared_weights;
        match self.slices {
            None => experts.forward(self.rows, weights, &mut self.out, None),
            Some(slices) => {
                let row_max = |max: &mut [f32]| slices.row_max(max);
                experts.forward(self.rows, weights, &mut self.out, Some(&row_max))
            }
        }
    }

    /// Their output `[T, H]`.
    pub(super) fn into_output(self) -> Vec<f32> {
        self.out
    }
}
