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
mod device;
mod experts;
mod finish;
mod gate;
mod input;
mod model;
mod pass;
mod ranks;
mod ready;
pub mod reference;
mod routed;
pub mod scale;
mod shared;
mod slices;
mod timeline;
mod transform;
mod workspace;

use std::sync::Arc;

use moe_kernels::arena::room;

pub use batch::{Batch, BatchOutput, Pass, RankedRunner, forward_batch};
pub use experts::RoutedExperts;
pub use model::Model;
pub use ready::{NonFinite, Options, QuantMethod, ReadyLayer, SharedPool};
pub use timeline::{Span, Timeline};
pub use workspace::Workspaces;

use crate::comm::Communicator;
use crate::exchange::Wire;
use crate::experts::{BuiltKernel, ExchangeTime, LayerKernel, StreamOrder};
use crate::hidden::{ActivationDtype, DeviceRouting, Rows, RowsMut};
use crate::oracle::Choice;
use crate::plan::Plan;
use crate::router::{LogicalId, Routing, Simulator};
use crate::shared_experts::{SharedExperts, SharedOrder};
use crate::spec::LayerSpec;
use crate::{Error, Result};
use input::{Given, Lengths};
use slices::Slices;
use workspace::Workspace;

/// What engines program against.
pub trait MoeRunnerInterface {
    /// Runs the layer on `input`, and writes its output `[T, H]`.
    ///
    /// # Errors
    /// [`Error::Input`] where an input does not fit the layer, or holds NaN or an infinity and the
    /// layer [refuses](NonFinite) such rows; [`Error::Communication`]
    /// where another rank does not arrive. `output` is then unspecified.
    fn forward(&mut self, input: &ForwardInput<'_>, output: RowsMut<'_>) -> Result<ForwardOutput> {
        self.forward_reporting(input, output, None)
    }

    /// The same, and tells what was done.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    fn forward_reporting(
        &mut self,
        input: &ForwardInput<'_>,
        output: RowsMut<'_>,
        report: Option<&mut Report>,
    ) -> Result<ForwardOutput>;

    /// The runner holds the gate: logits need not be given.
    fn is_internal_router(&self) -> bool;

    /// The dense branch, where there is one that is not inside the kernel.
    fn shared_experts(&self) -> Option<&SharedExperts>;

    /// Replaces the way the experts execute, and returns the old one: the routed ones, and the shared
    /// ones where the new method brings them.
    ///
    /// # Errors
    /// [`Error::Spec`] if the new one has another width or number of experts, or
    /// cannot be run so; the old one then stays.
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
    /// Experts and weights that were decided elsewhere: neither gate nor router runs.
    pub routing: Option<FinishedRouting<'a>>,
    /// The same, in the memory of the GPU that the layer runs on.
    pub device_routing: Option<DeviceRouting<'a>>,
}

/// Routing that was finished elsewhere: the experts of each token, and their weights.
#[derive(Clone, Copy, Debug)]
pub struct FinishedRouting<'a> {
    /// `[T, k]`, for any k. An id that is negative or no expert's means: not here; the slot adds
    /// nothing.
    pub ids: &'a [i32],
    /// `[T, k]`: as the experts' rows are multiplied by them. A factor that
    /// [the router applies](crate::spec::ScaleOn::Weights) must be in them.
    pub weights: &'a [f32],
}

impl<'a> ForwardInput<'a> {
    /// Hidden states alone.
    pub fn new(hidden: Rows<'a>) -> Self {
        Self {
            hidden,
            router_logits: None,
            input_ids: None,
            shared_input: None,
            expert_ids: None,
            routing: None,
            device_routing: None,
        }
    }

    /// Hidden states whose experts `[T, k]` and weights `[T, k]` were decided elsewhere.
    pub fn routed(hidden: Rows<'a>, ids: &'a [i32], weights: &'a [f32]) -> Self {
        Self { routing: Some(FinishedRouting { ids, weights }), ..Self::new(hidden) }
    }
}

/// What is to be known about a written output.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ForwardOutput {
    /// T.
    pub tokens: usize,
    /// The true output is the written one times this (1 but for f16, where the caller
    /// multiplies: [`Options::caller_scales`]).
    pub output_scale: f32,
    /// The written output is the complete sum over the tensor-parallel group.
    pub complete: bool,
}

/// What one forward pass did, for those who ask. The buffers keep their memory.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// `[T, E_total]`; empty where the routing was given.
    pub router_logits: Vec<f32>,
    /// Ids and weights `[T, k]`.
    pub routing: Routing,
    /// `[T, H]`: what the shared experts add, before scaling.
    pub shared: Option<Vec<f32>>,
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
    timeline: Timeline,
    /// Slots that each expert was chosen for, where the processor routes and somebody asks.
    load: Option<Vec<u64>>,
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
            timeline: Timeline::off(),
            load: None,
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

    /// Which kernel runs the routed experts, and why no other: what was chosen when the layer was made
    /// ready, or what was given since.
    pub fn choice(&self) -> &Choice {
        &self.layer.choice
    }

    /// How the routed experts execute now.
    pub fn method(&self) -> &QuantMethod {
        &self.layer.method
    }

    /// Waits until every pass is done: what follows passes on rows of a GPU, which return before their
    /// work is done. Others are done when they return.
    ///
    /// # Errors
    /// What was wrong with the rows of a pass since the last call, or what the GPU refused.
    pub fn synchronize(&mut self) -> Result<()> {
        match &mut self.layer.method.kernel {
            BuiltKernel::Layer(kernel) => kernel.synchronize(),
            BuiltKernel::Modular(_) | BuiltKernel::Monolithic(_) => Ok(()),
        }
    }

    /// Orders passes of a GPU and the work of another `stream` of it, such as an engine's, without a wait of the
    /// host: both before a pass and after it where rows are written and read there. A capture of `stream` takes the
    /// passes between along. Does nothing on the processor.
    ///
    /// # Safety
    /// `stream` is a `CUstream` of the GPU that the runner is on.
    ///
    /// # Errors
    /// [`Error::Device`]: what the driver refuses.
    pub unsafe fn order(&self, stream: usize, order: StreamOrder) -> Result<()> {
        match &self.layer.method.kernel {
            // SAFETY: as the caller promises.
            BuiltKernel::Layer(kernel) => unsafe { kernel.order(stream, order) },
            BuiltKernel::Modular(_) | BuiltKernel::Monolithic(_) => Ok(()),
        }
    }

    /// The stream of a GPU that passes are put on, as its driver knows it (`CUstream`), for an engine
    /// that orders its own work before and after them, or captures them as a graph. All layers of this
    /// process on one GPU share it. None on the processor.
    pub fn stream(&self) -> Option<usize> {
        match &self.layer.method.kernel {
            BuiltKernel::Layer(kernel) => Some(kernel.stream()),
            BuiltKernel::Modular(_) | BuiltKernel::Monolithic(_) => None,
        }
    }

    /// Rows stay on the ranks' GPUs and go from one to the other there: all ranks make every pass together, also
    /// those without rows.
    pub fn is_spread(&self) -> bool {
        matches!(&self.layer.method.kernel, BuiltKernel::Layer(kernel) if kernel.is_spread())
    }

    /// Passes with rows of the GPU can be captured as a graph, once one of the size has been made. False on the
    /// processor, and where the host must learn how many rows come from other ranks.
    pub fn can_be_captured(&self) -> bool {
        matches!(&self.layer.method.kernel, BuiltKernel::Layer(kernel) if kernel.can_be_captured())
    }

    /// The time of the last pass's exchange alone, the median of `runs`; see
    /// [`exchange_time`](crate::experts::LayerKernel::exchange_time). `None` where no rows go between GPUs.
    ///
    /// # Errors
    /// What the GPUs or the other ranks refuse.
    pub fn exchange_time(&mut self, tokens: usize, runs: usize) -> Result<Option<ExchangeTime>> {
        let top_k = self.layer.spec.router.top_k;
        match &mut self.layer.method.kernel {
            BuiltKernel::Layer(kernel) => kernel.exchange_time(tokens, top_k, runs),
            BuiltKernel::Modular(_) | BuiltKernel::Monolithic(_) => Ok(None),
        }
    }

    /// Counts, from here on, how many slots of this rank's rows chose each expert: what
    /// [balancing](crate::parallel::balance) goes by. No pass waits for it, also on GPUs. Counts begin from zero.
    ///
    /// # Errors
    /// [`Error::Input`] of a GPU that holds all experts, where there is nothing to balance.
    pub fn count_load(&mut self, on: bool) -> Result<()> {
        if let BuiltKernel::Layer(kernel) = &mut self.layer.method.kernel {
            return kernel.count_load(on);
        }
        self.load = on.then(|| vec![0; self.layer.spec.router.experts]);
        Ok(())
    }

    /// The counts, of the experts with weights, which begin again from zero. Ranks' own: their sum is the layer's
    /// ([`Loads::all_reduce`](crate::parallel::balance::Loads::all_reduce)). Waits for a GPU's passes.
    ///
    /// # Errors
    /// [`Error::Input`] if nobody counts.
    pub fn take_load(&mut self) -> Result<Vec<u64>> {
        if let BuiltKernel::Layer(kernel) = &mut self.layer.method.kernel {
            return kernel.take_load();
        }
        let Some(load) = &mut self.load else {
            return Err(Error::input("expert load", "nobody counts it"));
        };
        let zeros = vec![0; load.len()];
        Ok(std::mem::replace(load, zeros))
    }

    /// The kernel, where it is the whole layer.
    fn whole_layer(&mut self, what: &'static str) -> Result<&mut dyn LayerKernel> {
        match &mut self.layer.method.kernel {
            BuiltKernel::Layer(kernel) => Ok(&mut **kernel),
            BuiltKernel::Modular(_) | BuiltKernel::Monolithic(_) => {
                Err(Error::input(what, "the layer's rows do not stay on GPUs"))
            }
        }
    }

    /// Makes sure of a GPU's working memory for passes of up to `tokens` tokens of `top_k` slots: none of
    /// them then allocates. On the processor there is nothing to do.
    ///
    /// # Errors
    /// If the GPU has not that much.
    pub fn reserve(&mut self, tokens: usize, top_k: usize) -> Result<()> {
        match &mut self.layer.method.kernel {
            BuiltKernel::Layer(kernel) => kernel.reserve(tokens, top_k),
            BuiltKernel::Modular(_) | BuiltKernel::Monolithic(_) => Ok(()),
        }
    }

    /// Bytes of working memory for a pass of `tokens` tokens, known before anything runs (on a GPU: of
    /// its memory). Layers that
    /// share [`Workspaces`] and run one after another share it: what all of them need is no more
    /// than the largest need of each part; what exchanges hold is each layer's own. (Given
    /// [`shared_input`](ForwardInput::shared_input) takes one more row of H a token, and so do f32 rows
    /// with gaps. How many rows
    /// other ranks send is known when they come: slots are taken to be spread evenly.)
    pub fn workspace_bytes(&self, tokens: usize) -> usize {
        self.workspace_bytes_of(tokens, self.layer.spec.router.top_k)
    }

    /// The same for routing of `top_k` slots a token.
    fn workspace_bytes_of(&self, tokens: usize, top_k: usize) -> usize {
        let threads = self.layer.pool.threads();
        let router = &self.layer.spec.router;
        let most = tokens.div_ceil(self.micro_batches) * top_k;
        let lengths = Lengths::of(&self.layer, tokens, &Given::default());
        let lanes = match &self.layer.method.kernel {
            BuiltKernel::Modular(kernel) => {
                let plan = Plan::bytes(most, kernel.shape().experts);
                let width = kernel.shape().hidden;
                let exchange = &self.layer.method.exchange;
                let exchange = exchange.workspace_bytes(
                    tokens.div_ceil(self.micro_batches),
                    router.top_k,
                    width,
                );
                self.micro_batches * (room::<f32>(most * width) + plan + exchange)
            }
            BuiltKernel::Monolithic(_) => 0,
            BuiltKernel::Layer(kernel) => return kernel.workspace_bytes(tokens, top_k),
        };
        let shared = self.layer.shared.as_ref().map_or(0, |s| s.workspace_bytes(tokens, threads));
        lengths.bytes()
            + self.scratch_bytes(tokens, most)
            + lanes
            + shared
            + Routing::bytes(router, (tokens, top_k), threads)
            + Workspace::own_bytes(self.micro_batches)
    }

    /// Scratch of the experts and of the projections around them, of which one runs at a time.
    fn scratch_bytes(&self, tokens: usize, slots: usize) -> usize {
        let ReadyLayer { gate, input_transform, output_transform, method, pool, .. } = &self.layer;
        let threads = pool.threads();
        let experts = match &method.kernel {
            BuiltKernel::Modular(kernel) => kernel.scratch_bytes(slots, threads),
            BuiltKernel::Monolithic(_) | BuiltKernel::Layer(_) => 0,
        };
        let transforms =
            [input_transform, output_transform].map(|t| t.scratch_bytes(tokens, threads));
        let gate = gate.as_ref().map_or(0, |gate| gate.scratch_bytes(tokens, threads));
        experts.max(gate).max(transforms[0]).max(transforms[1])
    }
}

impl MoeRunnerInterface for MoeRunner {
    fn forward_reporting(
        &mut self,
        input: &ForwardInput<'_>,
        output: RowsMut<'_>,
        report: Option<&mut Report>,
    ) -> Result<ForwardOutput> {
        let tokens = input::check(&self.layer, input, &output)?;
        if let BuiltKernel::Layer(_) = &self.layer.method.kernel {
            return self.device_pass(tokens, input, output, report);
        }
        let workspaces = self.layer.workspaces.clone();
        let top_k = input.routing.and_then(|routing| routing.ids.len().checked_div(tokens));
        let top_k = top_k.unwrap_or(self.layer.spec.router.top_k);
        let mut workspace = workspaces.take(self.workspace_bytes_of(tokens, top_k));
        let result = self.pass(tokens, input, output, report, &mut workspace);
        workspaces.give(workspace);
        result
    }

    fn is_internal_router(&self) -> bool {
        self.layer.has_gate
    }

    fn shared_experts(&self) -> Option<&SharedExperts> {
        self.layer.shared.as_ref()
    }

    fn replace_quant_method(&mut self, method: QuantMethod) -> Result<QuantMethod> {
        method.check(&self.layer.spec, self.layer.dtype)?;
        let whole = |method: &QuantMethod| matches!(method.kernel, BuiltKernel::Layer(_));
        if whole(&self.layer.method) && !whole(&method) {
            let name = self.layer.method.desc().name;
            return Err(Error::Spec {
                layer: self.layer.spec.name.clone(),
                reason: format!(
                    "'{name}' is the whole layer, and nothing was made ready to stand beside another \
                     kernel; make the layer ready for that one"
                ),
            });
        }
        self.layer.choice = Choice {
            kernel: method.desc(),
            why: "given in place of another".into(),
            able: Vec::new(),
            rejected: Vec::new(),
        };
        let mut method = method;
        let mut old_shared = None;
        if let (Some(shared), Some(experts)) = (&mut self.layer.shared, method.shared.take()) {
            old_shared = Some(shared.replace_kernel(experts));
        }
        let old = std::mem::replace(&mut self.layer.method, method);
        Ok(QuantMethod { shared: old_shared, ..old })
    }
}
