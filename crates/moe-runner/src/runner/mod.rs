//! The runner: one forward pass of the layer, its steps in one order.
//!
//! ```text
//! hidden [T,H] ─ input transform ─ gate ─ route ─ dispatch ─ experts ─ combine ─┐
//!       └──────────── shared experts (order decided once) ──────────────────────┴ scale · transform · add · reduce ─ out [T,H]
//! ```
//!
//! What a forward pass decides (order of the shared experts, who reduces) it decides once, from the
//! parts that execute this very call; nothing is remembered between calls.

mod batch;
mod finish;
mod gate;
mod model;
mod ranks;
mod ready;
pub mod reference;
mod routed;
pub mod scale;
mod shared;
mod slices;
mod timeline;
mod transform;

use std::sync::Arc;

pub use batch::{Batch, BatchOutput, Pass, RankedRunner, forward_batch};
pub use model::Model;
pub use ready::{Options, QuantMethod, ReadyLayer};
pub use timeline::{Span, Timeline};

use crate::comm::Communicator;
use crate::exchange::{Sum, Wire};
use crate::experts::BuiltKernel;
use crate::hidden::{ActivationDtype, Rows, RowsMut};
use crate::oracle::Choice;
use crate::router::{LogicalId, Routing, Simulator};
use crate::shared_experts::{SharedExperts, SharedOrder};
use crate::spec::{LayerSpec, SharedCombine};
use crate::{Error, Result};
use routed::{Lane, RoutedCall, resized};
use shared::SharedCall;
use slices::Slices;

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
    /// [`Error::Spec`] if the new one has another width or number of experts, or cannot be run so;
    /// the old one then stays.
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
    /// `[T, H]`: what the shared experts add, before scaling.
    pub shared: Option<&'a [f32]>,
    /// `shared` is the complete sum, not this rank's part of it.
    pub shared_complete: bool,
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
    /// How rows travel between ranks.
    wire: Wire,
    routed_slices: Option<Slices>,
    shared_slices: Option<Slices>,
    simulator: Option<Simulator>,
    micro_batches: usize,
    lanes: Vec<Lane>,
    routing: Routing,
    buffers: Buffers,
    timeline: Timeline,
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
    routed: Vec<f32>,
    shared: Vec<f32>,
    shared_seen: Vec<f32>,
}

impl MoeRunner {
    /// A runner of one rank.
    pub fn new(layer: ReadyLayer) -> Self {
        let wire = Wire::exact(layer.dtype, true);
        let order = match layer.shared {
            None => SharedOrder::None,
            Some(_) => SharedOrder::NoOverlap,
        };
        Self {
            layer,
            order,
            group: crate::comm::single(),
            reduce_results: true,
            wire,
            routed_slices: None,
            shared_slices: None,
            simulator: None,
            micro_batches: 1,
            lanes: Vec::new(),
            routing: Routing::default(),
            buffers: Buffers::default(),
            timeline: Timeline::off(),
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

    /// Cuts every batch into `n` micro-batches whose dispatch, experts and combine overlap. All
    /// ranks of a group must agree on the number. The output does not depend on it.
    pub fn with_micro_batches(self, n: usize) -> Self {
        Self { micro_batches: n.max(1), ..self }
    }

    /// Records what each forward pass does when.
    pub fn with_timeline(self, timeline: Timeline) -> Self {
        Self { timeline, ..self }
    }

    /// What was recorded.
    pub fn timeline(&self) -> &Timeline {
        &self.timeline
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

    /// Bytes of working memory for `tokens` tokens, known before anything runs: what the buffers of
    /// a new runner grow to in one pass, and stay at. (Exchanges that move rows hold theirs besides;
    /// so do threads a tile each, which all layers share.)
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
        // rows before and after the input transform, padded rows; the routed sum, transformed
        let (input, output) = (&spec.input_transform, &spec.output_transform);
        let columns = 2 * dims.hidden
            + input.widest(dims.hidden) * if input.is_identity() { 1 } else { 2 }
            + if stride == dims.routed_hidden { 0 } else { stride }
            + output.widest(dims.routed_hidden) * if output.is_identity() { 1 } else { 2 }
            + if self.layer.shared.is_some() { 2 * dims.hidden } else { 0 }
            + if spec.gate.scaled_rms_eps.is_some() { dims.hidden } else { 0 }
            + spec.router.logits();
        // ids and weights by slot, local ids, the plan; what grows with the experts alone
        let routing = slots * (8 + 4 + 4) + spec.router.logits() * (64 + 4 * self.micro_batches);
        experts + shared + tokens * columns * 4 + routing
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
        let shared_dtype = input.shared_input.map(|shared| shared.dtype());
        for (what, dtype) in [
            ("hidden_states", Some(input.hidden.dtype())),
            ("shared_input", shared_dtype),
            ("output", Some(output.dtype())),
        ] {
            // f32 carries every dtype's values; the layer's own dtype is the only other one
            if let Some(dtype) = dtype
                && dtype != self.layer.dtype
                && dtype != ActivationDtype::F32
            {
                let (rows, own) = (dtype.name(), self.layer.dtype.name());
                return Err(Error::input(
                    what,
                    format!("{rows} rows for a layer made ready for {own}"),
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
        round(self.layer.dtype, &mut buffers.hidden);
        check_finite("hidden_states", &buffers.hidden, hidden_width)?;
        if let Some(shared) = input.shared_input {
            expect("shared_input", shared.len(), tokens * dims.hidden)?;
            shared.widen_into(&mut buffers.shared_input);
            round(self.layer.dtype, &mut buffers.shared_input);
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

impl MoeRunnerInterface for MoeRunner {
    fn forward(
        &mut self,
        input: &ForwardInput<'_>,
        mut output: RowsMut<'_>,
    ) -> Result<ForwardOutput<'_>> {
        let tokens = self.accept(input, &output)?;
        let spec = self.layer.spec.clone();
        let (routed, shared, weight_bytes) = self.branches(&spec, tokens, input)?;
        let finished = self.finish(&spec, tokens, routed, shared, &mut output)?;
        Ok(ForwardOutput {
            tokens,
            output_scale: finished.output_scale,
            complete: finished.complete,
            shared_complete: finished.shared_complete,
            router_logits: &self.buffers.logits,
            routing: &self.routing,
            shared: self.layer.shared.as_ref().map(|_| self.buffers.shared_seen.as_slice()),
            weight_bytes,
            flops: flops(&spec, tokens, &self.routing),
        })
    }

    fn is_internal_router(&self) -> bool {
        self.layer.gate.is_some()
    }

    fn shared_experts(&self) -> Option<&SharedExperts> {
        self.layer.shared.as_ref()
    }

    fn replace_quant_method(&mut self, method: QuantMethod) -> Result<QuantMethod> {
        method.check(&self.layer.spec)?;
        Ok(std::mem::replace(&mut self.layer.method, method))
    }
}

impl MoeRunner {
    /// Both branches: the routed sum, the shared experts' output (empty without), and the bytes of
    /// weights read. The shared experts run where their order says, once.
    fn branches(
        &mut self,
        spec: &LayerSpec,
        tokens: usize,
        input: &ForwardInput<'_>,
    ) -> Result<(Sum, Vec<f32>, usize)> {
        let layer = &mut self.layer;
        let buffers = &mut self.buffers;
        if let Some(logits) = input.router_logits {
            buffers.logits.clear();
            buffers.logits.extend_from_slice(logits);
        }
        let shared_len = layer.shared.as_ref().map_or(0, |_| tokens * spec.dims.hidden);
        let shared_out = resized(std::mem::take(&mut buffers.shared), shared_len);
        let mut shared =
            SharedCall::new(layer.shared.as_mut(), self.order, &buffers.hidden, shared_out)
                .with_slices(self.shared_slices.as_ref());
        let mut routed = RoutedCall {
            layer: spec,
            gate: layer.gate.as_mut().filter(|_| input.router_logits.is_none()),
            router: &layer.router,
            simulator: self.simulator.as_mut(),
            expert_ids: input.expert_ids,
            method: &mut layer.method,
            lanes: &mut self.lanes,
            micro_batches: self.micro_batches,
            slices: self.routed_slices.as_ref(),
            routing: &mut self.routing,
            logits: &mut buffers.logits,
            padded: &mut buffers.padded,
            tokens,
            hidden: &buffers.hidden,
            rows: &buffers.rows,
            input_ids: input.input_ids,
            timeline: &mut self.timeline,
        };
        let out = std::mem::take(&mut buffers.routed);
        // A second thread cannot know the router's weights before the router has run, and two
        // threads cannot take part in one group's collectives.
        let second_thread = self.order == SharedOrder::SecondThread
            && self.shared_slices.is_none()
            && spec.shared.as_ref().is_some_and(|s| s.combine != SharedCombine::RouterWeighted);
        let (result, shared) = if second_thread {
            std::thread::scope(|scope| {
                let handle = scope.spawn(|| {
                    let result = shared.run(&Routing::default());
                    (result, shared)
                });
                let routed = routed.run(out, &mut SharedCall::absent());
                let joined = handle.join();
                let (ran, shared) = joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                (ran.and(routed), shared)
            })
        } else {
            let result = routed.run(out, &mut shared);
            let ran = shared.run(routed.routing);
            (result.and_then(|result| ran.map(|()| result)), shared)
        };
        let (sum, mut weight_bytes) = result?;
        let shared_rows = shared.into_output();
        if tokens > 0 {
            weight_bytes += layer.shared.as_ref().map_or(0, SharedExperts::weight_bytes);
        }
        Ok((sum, shared_rows, weight_bytes))
    }
}

fn round(dtype: ActivationDtype, rows: &mut [f32]) {
    if dtype != ActivationDtype::F32 {
        rows.iter_mut().for_each(|v| *v = dtype.round(*v));
    }
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
