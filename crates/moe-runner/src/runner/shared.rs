//! The shared experts of one forward pass: run at one point, collected once.

use crate::Result;
use crate::router::Routing;
use crate::shared_experts::{Point, SharedExperts, SharedOrder};

/// Owned by the forward pass that made it; nothing is kept between passes.
pub(super) struct SharedCall<'a> {
    experts: Option<&'a mut SharedExperts>,
    order: SharedOrder,
    rows: &'a [f32],
    out: Vec<f32>,
}

impl<'a> SharedCall<'a> {
    /// Will run `experts` on `rows` `[T, H]` where `order` says, into `out`.
    pub(super) fn new(
        experts: Option<&'a mut SharedExperts>,
        order: SharedOrder,
        rows: &'a [f32],
        out: Vec<f32>,
    ) -> Self {
        Self { experts, order, rows, out }
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
        match self.experts.take() {
            Some(experts) => experts.forward(self.rows, &routing.shared_weights, &mut self.out),
            None => Ok(()),
        }
    }

    /// Their output `[T, H]`.
    pub(super) fn into_output(self) -> Vec<f32> {
        self.out
    }
}
