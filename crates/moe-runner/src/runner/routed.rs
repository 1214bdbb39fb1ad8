//! The routed branch of one forward pass: gate, route, dispatch, experts, combine.
//!
//! With several micro-batches ("lanes") the steps of one overlap with the rows of another on their
//! way. The schedule is fixed: every rank takes the same steps in the same order.
//!
//! ```text
//! start dispatch 0, 1, …
//! for each lane: finish its dispatch · experts · start its combine
//! for each lane: finish its combine
//! ```

use super::gate::Gate;
use super::ready::QuantMethod;
use super::shared::SharedCall;
use super::slices::Slices;
use super::timeline::Timeline;
use crate::exchange::{Completeness, LocalRows, SlotRows, Sum, share};
use crate::experts::{BuiltKernel, ExpertCall, MonolithicCall};
use crate::plan::Plan;
use crate::router::{LogicalId, Router, Routing, Simulator};
use crate::shared_experts::Point;
use crate::spec::{LayerSpec, WeightOn};
use crate::{Error, Result};

/// What one micro-batch keeps between its steps.
#[derive(Debug, Default)]
pub(super) struct Lane {
    plan: Plan,
    slots: Vec<f32>,
}

/// The parts that the branch uses, exclusively, during one pass.
pub(super) struct RoutedCall<'a> {
    pub(super) layer: &'a LayerSpec,
    pub(super) gate: Option<&'a mut Gate>,
    pub(super) router: &'a Router,
    pub(super) simulator: Option<&'a mut Simulator>,
    pub(super) expert_ids: Option<&'a [LogicalId]>,
    pub(super) method: &'a mut QuantMethod,
    pub(super) lanes: &'a mut Vec<Lane>,
    pub(super) micro_batches: usize,
    pub(super) slices: Option<&'a Slices>,
    pub(super) routing: &'a mut Routing,
    pub(super) logits: &'a mut Vec<f32>,
    pub(super) padded: &'a mut Vec<f32>,
    pub(super) tokens: usize,
    /// `[T, H]`: what the gate sees.
    pub(super) hidden: &'a [f32],
    /// `[T, routed_hidden]`.
    pub(super) rows: &'a [f32],
    pub(super) input_ids: Option<&'a [u32]>,
    pub(super) timeline: &'a mut Timeline,
}

/// The routed sum, and the bytes of weights that were read for it.
pub(super) type Routed = (Sum, usize);

impl RoutedCall<'_> {
    /// All of it. `out` is a buffer to use for the sum.
    pub(super) fn run(&mut self, out: Vec<f32>, shared: &mut SharedCall<'_>) -> Result<Routed> {
        self.route()?;
        match self.method.kernel {
            BuiltKernel::Monolithic(_) => self.monolithic(out, shared),
            BuiltKernel::Modular(_) => self.modular(out, shared),
        }
    }

    /// The gate, or the logits that the caller gave (already in place); then ids and weights.
    fn route(&mut self) -> Result<()> {
        let (tokens, hidden) = (self.tokens, self.hidden);
        if let Some(gate) = &mut self.gate {
            let logits = &mut *self.logits;
            self.timeline.span("gate", None, || gate.forward(hidden, tokens, logits));
        }
        let monolithic = matches!(self.method.kernel, BuiltKernel::Monolithic(_));
        if monolithic && (self.simulator.is_some() || self.expert_ids.is_some()) {
            return Err(Error::input(
                "routing",
                format!(
                    "'{}' routes by itself; simulated or given ids need a kernel that does not",
                    self.method.desc().name
                ),
            ));
        }
        let (router, routing) = (self.router, &mut *self.routing);
        match (&mut self.simulator, self.expert_ids) {
            _ if monolithic => Ok(()),
            (_, Some(ids)) => router.route_to(self.logits, ids, tokens, routing),
            (Some(simulator), None) => simulator.route(router.spec(), tokens, routing),
            (None, None) => {
                let (logits, input_ids) = (&*self.logits, self.input_ids);
                self.timeline
                    .span("route", None, || router.route(logits, input_ids, tokens, routing))
            }
        }
    }

    fn monolithic(&mut self, out: Vec<f32>, shared: &mut SharedCall<'_>) -> Result<Routed> {
        let BuiltKernel::Monolithic(kernel) = &mut self.method.kernel else {
            return Err(wrong_kind());
        };
        let mut out = resized(out, self.tokens * self.layer.dims.routed_hidden);
        kernel.forward(MonolithicCall {
            rows: self.rows,
            logits: self.logits,
            input_ids: self.input_ids,
            router: self.router,
            routing: self.routing,
            out: &mut out,
        })?;
        shared.run(self.routing)?;
        let bytes = kernel.weight_bytes(self.routing);
        Ok((Sum::new(out, Completeness::Complete), bytes))
    }

    fn modular(&mut self, out: Vec<f32>, shared: &mut SharedCall<'_>) -> Result<Routed> {
        let QuantMethod { kernel: BuiltKernel::Modular(kernel), exchange } = &mut *self.method
        else {
            return Err(wrong_kind());
        };
        let width = self.layer.dims.routed_hidden;
        let stride = kernel.padded_width(width);
        let hidden = match stride == width {
            true => self.rows,
            false => {
                pad(self.rows, width, stride, self.padded);
                &*self.padded
            }
        };
        let all = LocalRows::new(hidden, stride, width, self.routing);
        let lanes = self.micro_batches.max(1);
        let (tokens, timeline) = (self.tokens, &mut *self.timeline);
        let rows = |lane| all.slice(share(tokens, lane, lanes));
        self.lanes.resize_with(lanes.max(self.lanes.len()), Lane::default);
        let weighted = kernel.desc().weighs || self.layer.router.weight_on == WeightOn::Input;

        for lane in 0..lanes {
            timeline.span("dispatch", Some(lane), || exchange.start_dispatch(lane, rows(lane)))?;
        }
        shared.reach(Point::BeforeExperts, self.routing)?;
        let mut weight_bytes = 0;
        for (lane, Lane { plan, slots }) in self.lanes.iter_mut().enumerate().take(lanes) {
            let experts = exchange.local_experts();
            let dispatched = timeline.span("wait for dispatch", Some(lane), || {
                exchange.finish_dispatch(lane, rows(lane))
            })?;
            if dispatched.quantised && !kernel.desc().takes_quantised {
                return Err(Error::input(
                    "quant method",
                    format!(
                        "rows travel quantised, but '{}' quantises them itself",
                        kernel.desc().name
                    ),
                ));
            }
            plan.build(dispatched.ids, dispatched.top_k.max(1), experts);
            slots.resize(dispatched.ids.len() * stride, 0.0);
            let agree = self.slices.map(|slices| |max: &mut [f32]| slices.row_max(max));
            timeline.span("experts", Some(lane), || {
                kernel.forward(ExpertCall {
                    rows: dispatched.hidden,
                    stride,
                    plan,
                    weights: dispatched.weights,
                    out: slots,
                    quantised: dispatched.quantised,
                    row_max: agree.as_ref().map(|agree| agree as _),
                })
            })?;
            weight_bytes += kernel.weight_bytes(plan);
            let slots = SlotRows { values: slots, weighted };
            timeline.span("combine", Some(lane), || exchange.start_combine(lane, slots))?;
        }
        shared.reach(Point::DuringCombine, self.routing)?;
        let mut out = resized(out, tokens * width);
        let mut completeness = None;
        for (lane, Lane { slots, .. }) in self.lanes.iter().enumerate().take(lanes) {
            let range = share(tokens, lane, lanes);
            let out = &mut out[range.start * width..range.end * width];
            let slots = SlotRows { values: slots, weighted };
            let state = timeline.span("wait for combine", Some(lane), || {
                exchange.finish_combine(lane, rows(lane), slots, out)
            })?;
            debug_assert!(completeness.is_none_or(|known| known == state));
            completeness = Some(state);
        }
        let completeness = completeness.unwrap_or(Completeness::Complete);
        Ok((Sum::new(out, completeness), weight_bytes))
    }
}

/// The callers match on the kernel's kind first.
fn wrong_kind() -> Error {
    Error::input("quant method", "the kernel is of the other kind")
}

/// `buffer` with `len` elements, whatever they are.
pub(super) fn resized(mut buffer: Vec<f32>, len: usize) -> Vec<f32> {
    buffer.resize(len, 0.0);
    buffer
}

/// Copies rows of `width` columns to rows of `stride`, the rest zero.
fn pad(rows: &[f32], width: usize, stride: usize, out: &mut Vec<f32>) {
    out.clear();
    out.resize(rows.len() / width * stride, 0.0);
    for (to, from) in out.chunks_exact_mut(stride).zip(rows.chunks_exact(width)) {
        to[..width].copy_from_slice(from);
    }
}
