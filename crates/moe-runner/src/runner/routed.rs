//! The routed branch of one forward pass: route, dispatch, experts, combine.
//!
//! With several micro-batches ("lanes") the steps of one overlap with the rows of another on their
//! way. The schedule is fixed: every rank takes the same steps in the same order.
//!
//! ```text
//! start dispatch 0, 1, …
//! for each lane: finish its dispatch · experts · start its combine
//! for each lane: finish its combine
//! ```

use moe_kernels::arena::{Arena, room};
use moe_kernels::pool::ThreadPool;

use super::ForwardInput;
use super::input::take_routing;
use super::ready::{NonFinite, QuantMethod};
use super::shared::SharedCall;
use super::slices::Slices;
use super::timeline::Timeline;
use super::workspace::{Lane, Workspace};
use crate::exchange::{Completeness, LocalRows, SlotRows, Sum, share};
use crate::experts::{BuiltKernel, Caps, ExpertCall, MonolithicCall};
use crate::router::{OnBadLogits, Router, Routing, Simulator};
use crate::shared_experts::Point;
use crate::spec::{LayerSpec, WeightOn};
use crate::{Error, Result};

/// The parts that the branch uses, exclusively, during one pass.
pub(super) struct RoutedCall<'a> {
    pub(super) layer: &'a LayerSpec,
    pub(super) router: &'a Router,
    pub(super) non_finite: NonFinite,
    pub(super) simulator: Option<&'a mut Simulator>,
    /// Whose ids and routing count here.
    pub(super) given: &'a ForwardInput<'a>,
    pub(super) method: &'a mut QuantMethod,
    pub(super) lanes: &'a mut Vec<Lane>,
    pub(super) micro_batches: usize,
    pub(super) slices: Option<&'a Slices>,
    pub(super) routing: &'a mut Routing,
    /// `[T, E_total]`, unless the routing is given.
    pub(super) logits: &'a [f32],
    pub(super) tokens: usize,
    /// `[T, routed_hidden]`.
    pub(super) rows: &'a [f32],
    pub(super) timeline: &'a mut Timeline,
    pub(super) pool: &'a dyn ThreadPool,
    pub(super) scratch: &'a mut Arena,
}

impl RoutedCall<'_> {
    /// All of it: the routed sum, in `out` `[T, routed_hidden]`.
    pub(super) fn run<'a>(
        mut self,
        out: &'a mut [f32],
        shared: &mut SharedCall<'_>,
    ) -> Result<Sum<'a>> {
        self.route()?;
        match self.method.kernel {
            BuiltKernel::Monolithic(_) => self.monolithic(out, shared),
            BuiltKernel::Modular(_) => self.modular(out, shared),
            BuiltKernel::Layer(_) => Err(wrong_kind()),
        }
    }

    /// From logits to ids and weights.
    fn route(&mut self) -> Result<()> {
        let ForwardInput { expert_ids, routing: finished, input_ids, .. } = *self.given;
        let monolithic = matches!(self.method.kernel, BuiltKernel::Monolithic(_));
        if monolithic && (self.simulator.is_some() || expert_ids.is_some() || finished.is_some()) {
            return Err(Error::input(
                "routing",
                format!(
                    "'{}' routes by itself; simulated or given ids need a kernel that does not",
                    self.method.desc().name
                ),
            ));
        }
        let bad = match self.non_finite {
            NonFinite::Refuse => OnBadLogits::Refuse,
            NonFinite::LetThrough => OnBadLogits::Nowhere,
        };
        let (router, routing, tokens) = (self.router, &mut *self.routing, self.tokens);
        let (logits, pool) = (self.logits, self.pool);
        self.timeline.span("route", None, || match (&mut self.simulator, expert_ids, finished) {
            _ if monolithic => Ok(()),
            (_, _, Some(finished)) => {
                take_routing(finished, tokens, routing);
                Ok(())
            }
            (_, Some(ids), None) => router.route_to_on(pool, bad, logits, ids, tokens, routing),
            (Some(simulator), None, None) => simulator.route(router.spec(), tokens, routing),
            (None, None, None) => router.route_on(pool, bad, logits, input_ids, tokens, routing),
        })
    }

    fn monolithic<'a>(self, out: &'a mut [f32], shared: &mut SharedCall<'_>) -> Result<Sum<'a>> {
        let BuiltKernel::Monolithic(kernel) = &self.method.kernel else {
            return Err(wrong_kind());
        };
        kernel.forward(MonolithicCall {
            rows: self.rows,
            logits: self.logits,
            input_ids: self.given.input_ids,
            router: self.router,
            routing: self.routing,
            out: &mut *out,
        })?;
        shared.run(self.routing)?;
        Ok(Sum::new(out, Completeness::Complete))
    }

    fn modular<'a>(self, out: &'a mut [f32], shared: &mut SharedCall<'_>) -> Result<Sum<'a>> {
        let QuantMethod { kernel: BuiltKernel::Modular(kernel), exchange, .. } = self.method else {
            return Err(wrong_kind());
        };
        let (tokens, width) = (self.tokens, self.layer.dims.routed_hidden);
        let (timeline, pool, scratch) = (self.timeline, self.pool, self.scratch);
        let routing = &*self.routing;
        let all = LocalRows::new(self.rows, width, routing);
        let count = self.micro_batches.max(1);
        let rows = |lane| all.slice(share(tokens, lane, count));
        let lanes = Workspace::lanes(self.lanes, count);
        let weighted =
            kernel.desc().caps.has(Caps::WEIGHS) || self.layer.router.weight_on == WeightOn::Input;

        for lane in 0..count {
            let rows = rows(lane);
            timeline.span("dispatch", Some(lane), || exchange.start_dispatch(lane, rows, pool))?;
        }
        shared.reach(Point::BeforeExperts, routing)?;
        for (lane, Lane { plan, slots }) in lanes.iter_mut().enumerate() {
            let experts = exchange.local_experts();
            let dispatched = timeline.span("wait for dispatch", Some(lane), || {
                exchange.finish_dispatch(lane, rows(lane), pool)
            })?;
            if dispatched.quantised && !kernel.desc().caps.has(Caps::QUANTISED_ROWS) {
                return Err(Error::input(
                    "quant method",
                    format!(
                        "rows travel quantised, but '{}' quantises them itself",
                        kernel.desc().name
                    ),
                ));
            }
            plan.build(dispatched.ids, dispatched.top_k.max(1), experts)?;
            let len = plan.slots_planned() * width;
            slots.reserve(room::<f32>(len));
            let values = slots.cut().floats(len);
            let agree = self.slices.map(|slices| |max: &mut [f32]| slices.row_max(max));
            timeline.span("experts", Some(lane), || {
                kernel.forward(ExpertCall {
                    rows: dispatched.hidden,
                    plan,
                    weights: dispatched.weights,
                    out: values,
                    quantised: dispatched.quantised,
                    row_max: agree.as_ref().map(|agree| agree as _),
                    pool,
                    arena: scratch,
                })
            })?;
            let slots = SlotRows { values, width, places: plan.places(), weighted };
            timeline.span("combine", Some(lane), || exchange.start_combine(lane, slots, pool))?;
        }
        shared.reach(Point::DuringCombine, routing)?;
        let mut completeness = None;
        for (lane, Lane { plan, slots }) in lanes.iter_mut().enumerate() {
            let range = share(tokens, lane, count);
            let out = &mut out[range.start * width..range.end * width];
            let values = &*slots.cut().floats(plan.slots_planned() * width);
            let slots = SlotRows { values, width, places: plan.places(), weighted };
            let state = timeline.span("wait for combine", Some(lane), || {
                exchange.finish_combine(lane, rows(lane), slots, out, pool)
            })?;
            debug_assert!(completeness.is_none_or(|known| known == state));
            completeness = Some(state);
        }
        Ok(Sum::new(out, completeness.unwrap_or(Completeness::Complete)))
    }
}

/// The callers match on the kernel's kind first.
fn wrong_kind() -> Error {
    Error::input("quant method", "the kernel is of the other kind")
}
