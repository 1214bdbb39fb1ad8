//! The runner: one forward pass of the layer, its steps in one order.
//!
//! ```text
//! hidden [T,H] ─ input transform ─ gate ─ route ─ dispatch ─ experts ─ combine ─┐
//!       └──────────── shared experts (order decided once) ──────────────────────┴ scale · transform · add · reduce ─ out [T,H]
//! ```
//!
//! What a forward pass decides (order of the shared experts, who reduces) it decides once, from the
//! parts that execute this very call; nothing is remembered between calls.

mod gate;
mod model;
mod ready;
pub mod reference;
pub mod scale;
mod transform;

use std::sync::Arc;

pub use model::Model;
pub use ready::{Options, QuantMethod, ReadyLayer};

use crate::comm::{At, Communicator, Step};
use crate::exchange::{LocalRows, Partial, Reduced, Sum};
use crate::experts::{BuiltKernel, ExpertCall, MonolithicCall};
use crate::hidden::{ActivationDtype, Rows, RowsMut};
use crate::oracle::Choice;
use crate::plan::Plan;
use crate::router::{LogicalId, Router, Routing, Simulator};
use crate::shared_experts::{Point, SharedExperts, SharedOrder, rms_norm};
use crate::spec::{IdleExperts, LayerSpec, SharedCombine};
use crate::{Error, Result};
use scale::scaling;

/// What engines program against.
pub trait MoeRunnerInterface {
    /// Runs the layer on `input`, and writes its output `[T, H]`.
    ///
    /// # Errors
    /// [`Error::Input`] where an input does not fit the layer or holds NaN or an infinity;
    /// [`Error::Communication`] where another rank does not arrive. `output` is then unspecified.
    fn forward(
        &mut self,
        input: &ForwardInput<'_>,
        output: RowsMut<'_>,
    ) -> Result<ForwardOutput<'_>>;

    /// The runner holds the gate: logits need not be given.
    fn is_internal_router(&self) -> bool;

    /// The dense branch, where there is one.
    fn shared_experts(&self) -> Option<&SharedExperts>;

    /// Replaces the way the routed experts execute, and returns the old one.
    ///
    /// # Errors
    /// [`Error::Spec`] if the new one has another width.
    fn replace_quant_method(&mut self, method: QuantMethod) -> Result<QuantMethod>;
}

/// The inputs of one forward pass. All have the same number of rows.
#[derive(Clone, Copy, Debug)]
pub struct ForwardInput<'a> {
    /// `[T, H]`. With `shared_input`: `[T, routed_hidden]`, already transformed by the caller.
    pub hidden: Rows<'a>,
    /// `[T, E_total]`, in place of the gate.
    pub router_logits: Option<&'a [f32]>,
    /// `[T]`: token ids, for layers that route by them.
    pub input_ids: Option<&'a [u32]>,
    /// `[T, H]`: the caller has applied the input transform itself; this is what the shared experts
    /// (and the gate) see.
    pub shared_input: Option<Rows<'a>>,
    /// `[T, k]`: experts that were chosen elsewhere (a replayed routing); they are weighed by this
    /// layer's own rules.
    pub expert_ids: Option<&'a [LogicalId]>,
}

impl<'a> ForwardInput<'a> {
    /// Hidden states alone.
    pub fn new(hidden: Rows<'a>) -> Self {
        Self { hidden, router_logits: None, input_ids: None, shared_input: None, expert_ids: None }
    }
}

/// What one forward pass did, beside the output. Borrowed from the runner until the next pass.
#[derive(Clone, Copy, Debug)]
pub struct ForwardOutput<'a> {
    /// T.
    pub tokens: usize,
    /// The true output is the written one times this (1 but for the fp16 rule: [`scale`]).
    pub output_scale: f32,
    /// The written output is the complete sum over the tensor-parallel group.
    pub complete: bool,
    /// `[T, E_total]`.
    pub router_logits: &'a [f32],
    /// Ids and weights `[T, k]`.
    pub routing: &'a Routing,
    /// `[T, H]`: what the shared experts add, before scaling; this rank's part where the sum was
    /// not complete when it was added.
    pub shared: Option<&'a [f32]>,
    /// Bytes of weights that were read, as they are stored.
    pub weight_bytes: usize,
    /// Floating-point operations: two for each multiplication with a weight.
    pub flops: f64,
}

/// The one concrete runner.
pub struct MoeRunner {
    layer: ReadyLayer,
    order: SharedOrder,
    group: Arc<dyn Communicator>,
    reduce_results: bool,
    simulator: Option<Simulator>,
    plan: Plan,
    routing: Routing,
    buffers: Buffers,
}

impl std::fmt::Debug for MoeRunner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MoeRunner")
            .field("layer", &self.layer.spec.name)
            .field("method", &self.layer.method)
            .field("order", &self.order)
            .field("group", &self.group.name())
            .finish_non_exhaustive()
    }
}

/// Buffers that keep their memory from pass to pass.
#[derive(Debug, Default)]
struct Buffers {
    hidden: Vec<f32>,
    shared_input: Vec<f32>,
    rows: Vec<f32>,
    padded: Vec<f32>,
    logits: Vec<f32>,
    slots: Vec<f32>,
    routed: Vec<f32>,
    shared: Vec<f32>,
    shared_seen: Vec<f32>,
}

impl MoeRunner {
    /// A runner of one rank.
    pub fn new(layer: ReadyLayer) -> Self {
        let order = match layer.shared {
            None => SharedOrder::None,
            Some(_) => SharedOrder::NoOverlap,
        };
        Self {
            layer,
            order,
            group: crate::comm::single(),
            reduce_results: true,
            simulator: None,
            plan: Plan::default(),
            routing: Routing::default(),
            buffers: Buffers::default(),
        }
    }

    /// The tensor-parallel group, over which partial sums are reduced.
    pub fn with_group(self, group: Arc<dyn Communicator>) -> Self {
        Self { group, ..self }
    }

    /// `false`: hand partial sums to the caller, who reduces them elsewhere. The output says
    /// whether it is complete; where a step of this layer needs the complete sum, it is.
    pub fn reduce_results(self, reduce_results: bool) -> Self {
        Self { reduce_results, ..self }
    }

    /// When the shared experts run. Without shared experts this has no effect.
    pub fn with_order(self, order: SharedOrder) -> Self {
        let order = if self.layer.shared.is_some() { order } else { SharedOrder::None };
        Self { order, ..self }
    }

    /// Replaces the router's choice by a simulated one, for benchmarks.
    pub fn with_simulator(self, simulator: Option<Simulator>) -> Self {
        Self { simulator, ..self }
    }

    /// What the layer is.
    pub fn spec(&self) -> &LayerSpec {
        &self.layer.spec
    }

    /// Dtype of the hidden states and of the output.
    pub fn dtype(&self) -> ActivationDtype {
        self.layer.dtype
    }

    /// Which kernel was chosen when the layer was made ready, and why no other.
    pub fn choice(&self) -> &Choice {
        &self.layer.choice
    }

    /// How the routed experts execute now.
    pub fn method(&self) -> &QuantMethod {
        &self.layer.method
    }

    /// Bytes of working memory for `tokens` tokens, known before anything runs.
    pub fn workspace_bytes(&self, tokens: usize) -> usize {
        let spec = &self.layer.spec;
        let dims = spec.dims;
        let slots = tokens * spec.router.top_k;
        let stride = self.padded_width();
        let shared = self.layer.shared.as_ref().map_or(0, |s| s.workspace_bytes(tokens));
        let experts = match &self.layer.method.kernel {
            BuiltKernel::Modular(kernel) => kernel.workspace_bytes(slots) + slots * stride * 4,
            BuiltKernel::Monolithic(_) => 0,
        };
        let rows = tokens * (4 * dims.hidden + 2 * stride + dims.routed_hidden) * 4;
        experts + shared + rows + tokens * spec.router.logits() * 4 + slots * 8
    }

    fn padded_width(&self) -> usize {
        let width = self.layer.spec.dims.routed_hidden;
        match &self.layer.method.kernel {
            BuiltKernel::Modular(kernel) => kernel.padded_width(width),
            BuiltKernel::Monolithic(_) => width,
        }
    }

    /// Checks all inputs, and widens them to f32 in the runner's buffers. Returns T.
    fn accept(&mut self, input: &ForwardInput<'_>, output: &RowsMut<'_>) -> Result<usize> {
        let dims = self.layer.spec.dims;
        let hidden_width =
            if input.shared_input.is_some() { dims.routed_hidden } else { dims.hidden };
        let tokens = input.hidden.tokens("hidden_states", hidden_width)?;
        let expect = |what, len: usize, want: usize| match len == want {
            true => Ok(()),
            false => Err(Error::input(what, format!("{len} elements, {want} are needed"))),
        };
        expect("output", output.len(), tokens * dims.hidden)?;
        for dtype in [input.hidden.dtype(), output.dtype()] {
            // f32 carries every dtype's values; the layer's own dtype is the only other one
            if dtype != self.layer.dtype && dtype != ActivationDtype::F32 {
                return Err(Error::input(
                    "hidden_states",
                    format!(
                        "{} rows for a layer made ready for {}",
                        dtype.name(),
                        self.layer.dtype.name()
                    ),
                ));
            }
        }
        if let Some(logits) = input.router_logits {
            expect("router_logits", logits.len(), tokens * self.layer.spec.router.logits())?;
        } else if self.layer.gate.is_none() {
            return Err(Error::input(
                "router_logits",
                "the layer has no gate; logits must be given",
            ));
        }
        if let Some(ids) = input.input_ids {
            expect("input_ids", ids.len(), tokens)?;
        }
        let buffers = &mut self.buffers;
        input.hidden.widen_into(&mut buffers.hidden);
        check_finite("hidden_states", &buffers.hidden, hidden_width)?;
        if let Some(shared) = input.shared_input {
            expect("shared_input", shared.len(), tokens * dims.hidden)?;
            shared.widen_into(&mut buffers.shared_input);
            check_finite("shared_input", &buffers.shared_input, dims.hidden)?;
            // what follows reads the original rows from `hidden` and the transformed from `rows`
            std::mem::swap(&mut buffers.hidden, &mut buffers.shared_input);
            std::mem::swap(&mut buffers.rows, &mut buffers.shared_input);
        } else {
            buffers.rows.clear();
            buffers.rows.extend_from_slice(&buffers.hidden);
            self.layer.input_transform.apply(&mut buffers.rows, tokens);
        }
        Ok(tokens)
    }
}

/// The shared experts of one forward pass: run at one point, collected once.
struct SharedCall<'a> {
    experts: Option<&'a mut SharedExperts>,
    order: SharedOrder,
    rows: &'a [f32],
    out: Vec<f32>,
    done: bool,
}

impl SharedCall<'_> {
    /// Nothing runs here: there are no shared experts, or another thread has them.
    fn absent() -> Self {
        Self { experts: None, order: SharedOrder::None, rows: &[], out: Vec::new(), done: true }
    }

    fn reach(&mut self, point: Point, routing: &Routing) -> Result<()> {
        if self.order.runs_at(point) {
            self.run(routing)?;
        }
        Ok(())
    }

    fn run(&mut self, routing: &Routing) -> Result<()> {
        if let Some(experts) = &mut self.experts
            && !self.done
        {
            experts.forward(self.rows, &routing.shared_weights, &mut self.out)?;
            self.done = true;
        }
        Ok(())
    }
}

/// The routed branch of one forward pass, with exclusive use of its parts.
struct RoutedCall<'a> {
    layer: &'a LayerSpec,
    gate: Option<&'a mut gate::Gate>,
    router: &'a Router,
    simulator: Option<&'a mut Simulator>,
    expert_ids: Option<&'a [LogicalId]>,
    method: &'a mut QuantMethod,
    plan: &'a mut Plan,
    routing: &'a mut Routing,
    logits: &'a mut Vec<f32>,
    padded: &'a mut Vec<f32>,
    slots: &'a mut Vec<f32>,
    tokens: usize,
    /// `[T, H]`: what the gate sees.
    hidden: &'a [f32],
    /// `[T, routed_hidden]`.
    rows: &'a [f32],
    input_ids: Option<&'a [u32]>,
}

impl RoutedCall<'_> {
    /// The gate, or the logits that the caller gave (already in place); then ids and weights.
    fn route(&mut self) -> Result<()> {
        if let Some(gate) = &mut self.gate {
            gate.forward(self.hidden, self.tokens, self.logits);
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
        let (tokens, routing) = (self.tokens, &mut *self.routing);
        match (&mut self.simulator, self.expert_ids) {
            _ if monolithic => Ok(()),
            (_, Some(ids)) => self.router.route_to(self.logits, ids, tokens, routing),
            (Some(simulator), None) => simulator.route(self.router.spec(), tokens, routing),
            (None, None) => self.router.route(self.logits, self.input_ids, tokens, routing),
        }
    }

    /// Dispatch, experts, combine: the routed sum `[T, routed_hidden]`, and the bytes of weights
    /// that were read.
    fn experts(&mut self, out: Vec<f32>, shared: &mut SharedCall<'_>) -> Result<(Sum, usize)> {
        let width = self.layer.dims.routed_hidden;
        match &mut self.method.kernel {
            BuiltKernel::Monolithic(kernel) => {
                let mut out = resized(out, self.tokens * width);
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
                Ok((Sum::Reduced(Reduced::new(out)), bytes))
            }
            BuiltKernel::Modular(kernel) => {
                let stride = kernel.padded_width(width);
                let hidden = match stride == width {
                    true => self.rows,
                    false => {
                        pad(self.rows, width, stride, self.padded);
                        &*self.padded
                    }
                };
                let rows = LocalRows { tokens: self.tokens, hidden, stride, routing: self.routing };
                let dispatched = self.method.exchange.dispatch(rows)?;
                shared.reach(Point::BeforeExperts, self.routing)?;
                let (top_k, experts) = (self.routing.top_k, self.layer.router.experts);
                self.plan.build(dispatched.ids, top_k.max(1), experts);
                self.slots.resize(dispatched.ids.len() * stride, 0.0);
                kernel.forward(ExpertCall {
                    rows: dispatched.hidden,
                    stride,
                    plan: self.plan,
                    weights: dispatched.weights,
                    out: self.slots,
                })?;
                let out = resized(out, self.tokens * stride);
                let weight_on = self.layer.router.weight_on;
                shared.reach(Point::DuringCombine, self.routing)?;
                let mut sum = self.method.exchange.combine(rows, weight_on, self.slots, out)?;
                truncate(sum.values_mut(), stride, width);
                Ok((sum, kernel.weight_bytes(self.plan)))
            }
        }
    }
}

impl MoeRunnerInterface for MoeRunner {
    fn forward(
        &mut self,
        input: &ForwardInput<'_>,
        mut output: RowsMut<'_>,
    ) -> Result<ForwardOutput<'_>> {
        let tokens = self.accept(input, &output)?;
        let layer = &mut self.layer;
        let spec = layer.spec.clone();
        let buffers = &mut self.buffers;
        if let Some(logits) = input.router_logits {
            buffers.logits.clear();
            buffers.logits.extend_from_slice(logits);
        }
        let mut shared = SharedCall {
            experts: layer.shared.as_mut(),
            order: self.order,
            rows: &buffers.hidden,
            out: resized(std::mem::take(&mut buffers.shared), tokens * spec.dims.hidden),
            done: false,
        };
        let mut routed = RoutedCall {
            layer: &spec,
            gate: layer.gate.as_mut().filter(|_| input.router_logits.is_none()),
            router: &layer.router,
            simulator: self.simulator.as_mut(),
            expert_ids: input.expert_ids,
            method: &mut layer.method,
            plan: &mut self.plan,
            routing: &mut self.routing,
            logits: &mut buffers.logits,
            padded: &mut buffers.padded,
            slots: &mut buffers.slots,
            tokens,
            hidden: &buffers.hidden,
            rows: &buffers.rows,
            input_ids: input.input_ids,
        };
        let out = std::mem::take(&mut buffers.routed);
        // A second thread cannot know the router's weights before the router has run.
        let second_thread = self.order == SharedOrder::SecondThread
            && spec.shared.as_ref().is_some_and(|s| s.combine != SharedCombine::RouterWeighted);
        let (result, shared) = if second_thread {
            std::thread::scope(|scope| {
                let handle = scope.spawn(|| {
                    let result = shared.run(&Routing::default());
                    (result, shared)
                });
                let mut absent = SharedCall::absent();
                let routed = routed.route().and_then(|()| routed.experts(out, &mut absent));
                let joined = handle.join();
                let (ran, shared) = joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                (ran.and(routed), shared)
            })
        } else {
            let result = routed.route().and_then(|()| routed.experts(out, &mut shared));
            let ran = shared.run(routed.routing);
            (result.and_then(|result| ran.map(|()| result)), shared)
        };
        let (sum, mut weight_bytes) = result?;
        let shared_rows = shared.out;
        if layer.shared.is_some() && tokens > 0 {
            weight_bytes += layer.shared.as_ref().map_or(0, SharedExperts::weight_bytes);
        }
        let flops = flops(&spec, tokens, &self.routing);
        self.finish(&spec, tokens, sum, shared_rows, &mut output).map(
            |(output_scale, complete, this)| ForwardOutput {
                tokens,
                output_scale,
                complete,
                router_logits: &this.buffers.logits,
                routing: &this.routing,
                shared: this.layer.shared.as_ref().map(|_| this.buffers.shared_seen.as_slice()),
                weight_bytes,
                flops,
            },
        )
    }

    fn is_internal_router(&self) -> bool {
        self.layer.gate.is_some()
    }

    fn shared_experts(&self) -> Option<&SharedExperts> {
        self.layer.shared.as_ref()
    }

    fn replace_quant_method(&mut self, method: QuantMethod) -> Result<QuantMethod> {
        Ok(std::mem::replace(&mut self.layer.method, method))
    }
}

impl MoeRunner {
    /// Everything after the experts: reductions, scaling, output transform, the sum of the
    /// branches, output steps, identity experts.
    fn finish(
        &mut self,
        spec: &LayerSpec,
        tokens: usize,
        routed: Sum,
        shared: Vec<f32>,
        output: &mut RowsMut<'_>,
    ) -> Result<(f32, bool, &Self)> {
        let group = self.group.clone();
        let at = |step| At { layer: &spec.name, step };
        let layer = &mut self.layer;
        let reduces = group.size() > 1;

        // 1. a transform that does not commute with the sum over ranks needs the complete sum
        let mut routed = match layer.output_transform.is_linear() {
            true => routed,
            false => Sum::Reduced(routed.reduce(&*group, at(Step::ReduceRouted))?),
        };
        // 2. the shared branch: a part of the sum on every rank, as the routed one would be
        let mut shared = match &layer.shared {
            None => None,
            Some(experts) => {
                let part = Partial::new(shared);
                let mut sum = match routed.is_reduced() || experts.finishes() || !reduces {
                    true => Sum::Reduced(part.reduce(&*group, at(Step::ReduceShared))?),
                    false => Sum::Partial(part),
                };
                experts.finish(sum.values_mut());
                Some(sum)
            }
        };
        self.buffers.shared_seen.clear();
        if let Some(shared) = &mut shared {
            self.buffers.shared_seen.extend_from_slice(shared.values_mut());
        }
        // 3. the scaling factor, once
        let linear_output = !spec.output.bias && spec.output.norm.is_none();
        let scaling = scaling(spec.routed_scale, layer.dtype, shared.is_some(), linear_output);
        multiply(routed.values_mut(), scaling.routed);
        // 4. the output transform
        routed = routed.try_map(|mut values| {
            layer.output_transform.apply(&mut values, tokens);
            Ok(values)
        })?;
        // 5. the branches become one; only sums of the same state can be added
        let mut sum = match shared {
            None => routed,
            Some(mut shared) => {
                multiply(shared.values_mut(), scaling.shared);
                if routed.is_reduced() != shared.is_reduced() {
                    routed = Sum::Reduced(routed.reduce(&*group, at(Step::ReduceRouted))?);
                    shared = Sum::Reduced(shared.reduce(&*group, at(Step::ReduceShared))?);
                }
                let values = routed.values_mut();
                values.iter_mut().zip(shared.values_mut()).for_each(|(y, s)| *y += *s);
                if spec.shared.as_ref().is_some_and(|s| s.combine == SharedCombine::Average) {
                    multiply(values, 0.5);
                }
                self.buffers.shared = std::mem::take(shared.values_mut());
                routed
            }
        };
        // 6. the final reduction, unless the caller does it and nothing here needs it
        let identity = matches!(spec.router.idle, Some(IdleExperts::Identity { .. }));
        if self.reduce_results || identity || !linear_output || !reduces {
            sum = Sum::Reduced(sum.reduce(&*group, at(Step::ReduceOutput))?);
        }
        // 7. what is done to the sum of both branches
        let values = sum.values_mut();
        if let Some(bias) = &layer.output.bias {
            for row in values.chunks_exact_mut(bias.len()) {
                row.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
            }
        }
        if let Some((norm, weight)) = spec.output.norm.zip(layer.output.norm.as_ref()) {
            values.chunks_exact_mut(weight.len()).for_each(|row| rms_norm(norm, weight, row));
        }
        multiply(values, spec.output.multiplier);
        // 8. identity experts: from this rank's own rows, after every reduction
        if identity {
            add_identity(&self.routing, spec.router.experts, &self.buffers.rows, values);
        }
        output.write(values);
        let complete = sum.is_reduced();
        self.buffers.routed = std::mem::take(sum.values_mut());
        Ok((scaling.output, complete, self))
    }
}

/// `y[t] += x[t] · Σ w` over the token's choices of identity experts.
fn add_identity(routing: &Routing, experts: usize, rows: &[f32], out: &mut [f32]) {
    let Some(width) = rows.len().checked_div(routing.tokens) else { return };
    for (t, (x, y)) in rows.chunks_exact(width).zip(out.chunks_exact_mut(width)).enumerate() {
        let chosen = routing.ids_of(t).iter().zip(routing.weights_of(t));
        let weight: f32 = chosen.filter(|(id, _)| id.index() >= experts).map(|(_, w)| *w).sum();
        y.iter_mut().zip(x).for_each(|(y, x)| *y += weight * x);
    }
}

fn multiply(values: &mut [f32], factor: f32) {
    if factor != 1.0 {
        values.iter_mut().for_each(|v| *v *= factor);
    }
}

fn resized(mut buffer: Vec<f32>, len: usize) -> Vec<f32> {
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

/// Drops the columns beyond `width` of rows `stride` apart, in place.
fn truncate(rows: &mut Vec<f32>, stride: usize, width: usize) {
    if stride == width {
        return;
    }
    let tokens = rows.len() / stride;
    for t in 1..tokens {
        rows.copy_within(t * stride..t * stride + width, t * width);
    }
    rows.truncate(tokens * width);
}

fn check_finite(what: &'static str, rows: &[f32], width: usize) -> Result<()> {
    match rows.iter().position(|v| !v.is_finite()) {
        None => Ok(()),
        Some(at) => Err(Error::input(
            what,
            format!(
                "row {}, column {}: {} is not a finite number",
                at / width,
                at % width,
                rows[at]
            ),
        )),
    }
}

/// Two operations for each multiplication with a weight: gate, routed slots, shared experts,
/// linear transforms.
fn flops(spec: &LayerSpec, tokens: usize, routing: &Routing) -> f64 {
    let expert = |gated: bool, hidden: usize, intermediate: usize| {
        2.0 * (if gated { 3.0 } else { 2.0 }) * hidden as f64 * intermediate as f64
    };
    let dims = spec.dims;
    let slots = routing.ids.iter().filter(|id| id.index() < spec.router.experts).count() as f64;
    let routed = slots * expert(spec.expert.gated, dims.routed_hidden, dims.intermediate);
    let shared = spec.shared.as_ref().map_or(0.0, |shared| {
        shared.count as f64 * expert(shared.gated, dims.hidden, shared.intermediate)
    });
    let linear = |transform: &crate::spec::Transform, mut width: usize| {
        let mut sum = 0.0;
        for step in &transform.steps {
            if let crate::spec::TransformStep::Linear { width: to } = step {
                sum += 2.0 * width as f64 * *to as f64;
                width = *to;
            }
        }
        sum
    };
    let gate = 2.0 * dims.hidden as f64 * spec.router.logits() as f64;
    let transforms = linear(&spec.input_transform, dims.hidden)
        + linear(&spec.output_transform, dims.routed_hidden);
    routed + tokens as f64 * (shared + gate + transforms)
}
