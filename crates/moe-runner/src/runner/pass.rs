//! One forward pass, from rows to rows.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use moe_kernels::pool::ThreadPool;

use super::finish::Branches;
use super::input::{Given, Lengths};
use super::routed::RoutedCall;
use super::shared::{Parts, SharedCall};
use super::workspace::{Lane, Workspace};
use super::{ForwardInput, ForwardOutput, MoeRunner, ReadyLayer, Report};
use crate::exchange::Sum;
use crate::experts::BuiltKernel;
use crate::hidden::RowsMut;
use crate::router::Routing;
use crate::shared_experts::{SharedExperts, SharedOrder};
use crate::spec::{LayerSpec, SharedCombine, Transform, TransformStep};
use crate::{Error, Result};

impl MoeRunner {
    /// The pass over `tokens` rows; `input` and `output` fit the layer.
    pub(super) fn pass(
        &mut self,
        tokens: usize,
        input: &ForwardInput<'_>,
        output: RowsMut<'_>,
        mut report: Option<&mut Report>,
        workspace: &mut Workspace,
    ) -> Result<ForwardOutput> {
        let spec = self.layer.spec.clone();
        let pool = self.layer.pool.clone();
        let lengths = Lengths::of(&self.layer, tokens, &Given::of(input));
        let companion = match self.uses_second_thread() {
            true => Some(workspace.take_companion()?),
            false => None,
        };
        let Workspace {
            rows: arena, experts: scratch, lanes, routing, shared: shared_work, ..
        } = &mut *workspace;
        arena.reserve(lengths.bytes());
        let mut cut = arena.cut();

        let (hidden, transformed) = lengths.rows(&self.layer, input, &mut cut)?;
        let buffers = lengths.transformed(&mut cut);
        let rows = match transformed {
            Some(rows) => rows,
            None => {
                let transform = &self.layer.input_transform;
                let done = transform.apply(hidden, tokens, buffers, &*pool, scratch);
                done.map_or(hidden, |rows| &*rows)
            }
        };
        let normed = cut.floats(lengths.normed);
        let own_logits = cut.floats(lengths.logits);
        let routed_out = cut.floats(lengths.routed);
        let finished = lengths.finished.map(|len| cut.floats(len));
        let shared_out = cut.floats(lengths.shared);

        let ReadyLayer { gate, router, method, shared, non_finite, .. } = &mut self.layer;
        let mut shared_call = SharedCall::new(shared.as_ref().map(|experts| Parts {
            experts,
            order: self.order,
            rows: hidden,
            out: &mut *shared_out,
            slices: self.shared_slices.as_ref(),
            pool: &*pool,
            work: shared_work,
        }));
        let logits = match (input.router_logits, gate) {
            _ if input.routing.is_some() => &[],
            (Some(logits), _) => logits,
            (None, Some(gate)) => {
                self.timeline.span("gate", None, || {
                    gate.forward(hidden, normed, own_logits, &*pool, scratch);
                });
                &*own_logits
            }
            (None, None) => return Err(Error::input("router_logits", "the layer has no gate")),
        };
        let call = RoutedCall {
            layer: &spec,
            router,
            non_finite: *non_finite,
            simulator: self.simulator.as_mut(),
            given: input,
            method,
            lanes: &mut *lanes,
            micro_batches: self.micro_batches,
            slices: self.routed_slices.as_ref(),
            routing: &mut *routing,
            logits,
            tokens,
            rows,
            timeline: &mut self.timeline,
            pool: &*pool,
            scratch: &mut *scratch,
        };
        let sum = match &companion {
            None => {
                let sum = call.run(routed_out, &mut shared_call)?;
                shared_call.run(routing)?;
                sum
            }
            Some(companion) => {
                let (sum, ran) = beside(&companion.0, (call, routed_out), shared_call);
                ran?;
                sum?
            }
        };
        if let Some(load) = &mut self.load {
            // idle experts, which come after those with weights, are nobody's work
            for id in &routing.ids {
                if let Some(count) = load.get_mut(id.index()) {
                    *count += 1;
                }
            }
        }
        if let Some(report) = &mut report {
            report.router_logits.clear();
            report.router_logits.extend_from_slice(logits);
            report.routing.clone_from(routing);
            report.flops = flops(&spec, tokens, input.routing.is_none(), routing);
            let lanes = &lanes[..self.micro_batches.min(lanes.len())];
            report.weight_bytes = weight_bytes(&self.layer, lanes, tokens, routing);
        }
        let branches = Branches {
            tokens,
            rows,
            routing,
            routed: sum,
            shared: self.layer.shared.is_some().then_some(shared_out),
            finished,
            scratch,
        };
        let result = self.finish(&spec, branches, output, report);
        if let Some(companion) = companion {
            workspace.keep(companion);
        }
        result
    }

    /// Where rows leave this rank, the shared experts can run while they are on their way; where none
    /// do, both branches want all threads, and gain nothing from running at once. A second thread
    /// cannot know the router's weights before the router has run, and two threads cannot take part
    /// in one group's collectives.
    fn uses_second_thread(&self) -> bool {
        let combine = self.layer.spec.shared.as_ref().map(|shared| shared.combine);
        self.order == SharedOrder::SecondThread
            && self.layer.method.exchange.moves_rows()
            && self.shared_slices.is_none()
            && combine.is_some_and(|combine| combine != SharedCombine::RouterWeighted)
    }
}

/// Runs the routed branch on this thread, with all the others, and the shared one on the second of
/// `pair` or, if that one does not come, after it.
fn beside<'a>(
    pair: &dyn ThreadPool,
    (routed, out): (RoutedCall<'_>, &'a mut [f32]),
    mut shared: SharedCall<'_>,
) -> (Result<Sum<'a>>, Result<()>) {
    let caller = thread::current().id();
    let routed = Mutex::new(Some(move || routed.run(out, &mut SharedCall::new(None))));
    let shared = Mutex::new(Some(move || shared.run(&Routing::default())));
    let (sum, ran) = (Mutex::new(None), Mutex::new(None));
    let run_routed = || once(&routed, &sum);
    let run_shared = || once(&shared, &ran);
    pair.run(2, &|_, _| {
        if thread::current().id() == caller && run_routed() {
            return;
        }
        run_shared();
    });
    run_routed();
    run_shared();
    let taken = |what: &str| Error::input("second thread", format!("{what} did not run"));
    (
        locked(&sum).take().unwrap_or_else(|| Err(taken("the routed experts"))),
        locked(&ran).take().unwrap_or_else(|| Err(taken("the shared experts"))),
    )
}

/// Runs what `work` holds, unless it has run, into `result`. True if it ran now.
fn once<R>(work: &Mutex<Option<impl FnOnce() -> R>>, result: &Mutex<Option<R>>) -> bool {
    let Some(work) = locked(work).take() else { return false };
    let done = work();
    *locked(result) = Some(done);
    true
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bytes of weights that a pass read.
fn weight_bytes(layer: &ReadyLayer, lanes: &[Lane], tokens: usize, routing: &Routing) -> usize {
    let routed = match &layer.method.kernel {
        BuiltKernel::Modular(kernel) => {
            lanes.iter().map(|lane| kernel.weight_bytes(&lane.plan)).sum()
        }
        BuiltKernel::Monolithic(kernel) => kernel.weight_bytes(routing),
        BuiltKernel::Layer(kernel) => kernel.weight_bytes(routing),
    };
    let shared = layer.shared.as_ref().filter(|_| tokens > 0);
    routed + shared.map_or(0, SharedExperts::weight_bytes)
}

/// Two operations for each multiplication with a weight: gate, routed slots, shared experts,
/// linear transforms.
pub(super) fn flops(spec: &LayerSpec, tokens: usize, gated: bool, routing: &Routing) -> f64 {
    let expert = |gated: bool, hidden: usize, intermediate: usize| {
        2.0 * (if gated { 3.0 } else { 2.0 }) * hidden as f64 * intermediate as f64
    };
    let dims = spec.dims;
    let slots = routing.ids.iter().filter(|id| id.index() < spec.router.experts).count() as f64;
    let routed = slots * expert(spec.expert.gated, dims.routed_hidden, dims.intermediate);
    let shared = spec.shared.as_ref().map_or(0.0, |shared| {
        shared.count as f64 * expert(shared.gated, dims.hidden, shared.intermediate)
    });
    let linear = |transform: &Transform, mut width: usize| {
        let mut sum = 0.0;
        for step in &transform.steps {
            if let TransformStep::Linear { width: to } = step {
                sum += 2.0 * width as f64 * *to as f64;
                width = *to;
            }
        }
        sum
    };
    let gate = if gated { 2.0 * dims.hidden as f64 * spec.router.logits() as f64 } else { 0.0 };
    let transforms = linear(&spec.input_transform, dims.hidden)
        + linear(&spec.output_transform, dims.routed_hidden);
    routed + tokens as f64 * (shared + gate + transforms)
}

#[cfg(test)]
mod tests {
    use moe_kernels::numerics::quantise::Qdq;

    use super::*;
    use crate::comm::{Groups, Sizes, run_ranks};
    use crate::hidden::ActivationDtype;
    use crate::parallel::Parallel;
    use crate::runner::Options;
    use crate::spec::{
        Activation, Dims, ExpertSpec, GateSpec, OutputSpec, RoutedScale, RouterSpec, ScaleOn,
        SharedSpec,
    };
    use crate::weights::{ActivationQuant, FloatType, random_layer};

    /// Slices of shared experts whose rows have one scale agree on it with the other ranks of the group that the
    /// routed branch's sum is shared in: that is one thread's work.
    #[test]
    fn two_threads_take_no_part_in_the_collectives_of_one_group() {
        let shared = SharedSpec {
            count: 1,
            intermediate: 32,
            gated: true,
            activation: Activation::Silu,
            bias: false,
            sigmoid_gate: false,
            combine: SharedCombine::Add,
            input_norm: None,
            output_norm: None,
        };
        let spec = LayerSpec {
            name: "layer".into(),
            index: 0,
            dims: Dims { hidden: 32, routed_hidden: 32, intermediate: 32 },
            gate: GateSpec::default(),
            router: RouterSpec::softmax(4, 2, true),
            expert: ExpertSpec {
                gated: true,
                activation: Activation::Silu,
                bias: false,
                norm: None,
            },
            input_transform: Transform::default(),
            output_transform: Transform::default(),
            routed_scale: RoutedScale { factor: 1.0, on: ScaleOn::Weights },
            shared: Some(shared),
            output: OutputSpec::default(),
        };
        let plain = random_layer(&spec, FloatType::F32, 1).unwrap();
        let mut row_wide = plain.clone();
        for expert in &mut row_wide.shared.as_mut().unwrap().experts {
            expert.down.input = ActivationQuant::Quantised(Qdq::Int8Token);
        }
        let options = Options::new(ActivationDtype::F32, 1).unwrap();
        let (order, expert_parallel) = (SharedOrder::SecondThread, true);
        for (tp, layer, uses) in [(2, &plain, true), (1, &row_wide, true), (2, &row_wide, false)] {
            let sizes = Sizes { tp, dp: 2, expert_parallel, ..Sizes::default() };
            let parallel = Parallel { sizes, order, ..Parallel::default() };
            let threads = run_ranks(sizes.ranks(), |world| {
                let groups = Groups::new(world.clone(), sizes)?;
                Ok(MoeRunner::on_rank(layer, &options, &groups, &parallel)?.uses_second_thread())
            });
            assert_eq!(threads.unwrap(), vec![uses; sizes.ranks()], "tensor parallel {tp}");
        }
    }
}
