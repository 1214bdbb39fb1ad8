//! One layer, checked.

use std::time::Duration;

use anyhow::Result;
use moe_runner::checkpoint::architecture::LayerEntry;
use moe_runner::doctor::{self, Finding, FindingKind, Severity};
use moe_runner::hidden::ActivationDtype;
use moe_runner::parallel::Parallel;
use moe_runner::random::Random;
use moe_runner::router::{LogicalId, Routing};
use moe_runner::runner::{ForwardInput, MoeRunner, MoeRunnerInterface, RankedRunner, reference};
use moe_runner::spec::{ActivationFormat, LayerSpec, Selection};
use moe_runner::weights::{LoadedLayer, account};
use serde::Serialize;

use super::compare::{Errors, Forward, Worst, largest, nmse, within};
use super::recorded::{Comparison, Recorded, Recording};
use crate::args::Common;
use crate::checkpoints::Opened;
use crate::gpu;
use crate::input::{Input, LayerInput};
use crate::measure::MachineLimits;
use crate::memory;
use crate::report::findings::{self, FindingJson};
use crate::report::units::plural;
use crate::routing::weight_factor;
use crate::splitting::Ranks;
use crate::times::{Times, times};

/// Bound of the logits' NMSE: they are f32, whatever the activations.
pub(super) const LOGITS_BOUND: f64 = 1e-11;

/// Bound of a weight's difference: the float64 formula is rounded once.
const WEIGHTS_BOUND: f64 = 1e-6;

/// How long each timing takes.
const TIMING_BUDGET: Duration = Duration::from_millis(150);

/// What was found out about a layer.
#[derive(Default, Serialize)]
pub(crate) struct LayerCheck {
    pub(crate) layer: usize,
    pub(crate) name: String,
    pub(crate) ok: bool,
    /// What is wrong, in sentences; empty for a layer that is right.
    pub(crate) problems: Vec<String>,
    /// What the doctor found; what counts is among the problems, too.
    pub(crate) findings: Vec<FindingJson>,
    /// Tensors of the block that have no role; not wrong by themselves.
    pub(crate) unexpected: Vec<String>,
    pub(crate) experts: usize,
    pub(crate) top_k: usize,
    /// Bytes of the layer's tensors.
    pub(crate) bytes_weights: usize,
    pub(crate) kernel: Option<&'static str>,
    pub(crate) why: String,
    pub(crate) dtype: &'static str,
    /// Where the hidden states come from that all but the recordings is measured on.
    pub(crate) inputs: String,
    pub(crate) tokens: usize,
    /// Of the kernel's output, against the float64 reference on the same inputs and logits.
    pub(crate) nmse: Option<f64>,
    pub(crate) bound: Option<f64>,
    pub(crate) worst_token: Option<Worst>,
    /// The expert that has the largest part in the errors of its tokens.
    pub(crate) worst_expert: Option<Worst>,
    /// What each expert has in the errors of its tokens; `None` for those without tokens.
    pub(crate) expert_nmse: Vec<Option<f64>>,
    pub(crate) router_logits_nmse: Option<f64>,
    pub(crate) ids_equal: Option<bool>,
    pub(crate) weights_max_difference: Option<f64>,
    pub(crate) speed: Vec<Speed>,
    /// Slots that went to each expert, for the tokens of the comparison.
    pub(crate) load: Vec<usize>,
    pub(crate) recorded: Vec<Comparison>,
    /// Of the output, against the same layer of another checkpoint, on the same hidden states.
    pub(crate) original_nmse: Option<f64>,
    /// The expert that has the largest part in that.
    pub(crate) original_worst_expert: Option<Worst>,
    /// What each expert has in it; `None` for those without tokens.
    pub(crate) original_expert_nmse: Vec<Option<f64>>,
}

/// The time of one batch size.
#[derive(Serialize)]
pub(crate) struct Speed {
    pub(crate) tokens: usize,
    pub(crate) median_s: f64,
    pub(crate) min_s: f64,
    pub(crate) max_s: f64,
    pub(crate) runs: usize,
    pub(crate) bytes_weights_read: usize,
    pub(crate) flops: f64,
    pub(crate) gbps: f64,
    pub(crate) gflops: f64,
    /// The least time that the machine needs for these bytes and operations, over the median.
    pub(crate) limit_share: f64,
    /// Payload that ranks sent to other ranks, over all ranks, where there are several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) bytes_moved_per_token: Option<f64>,
}

/// Everything that checking a layer needs.
pub(super) struct Checker<'a> {
    pub(super) opened: &'a Opened,
    pub(super) entry: &'a LayerEntry,
    pub(super) common: &'a Common,
    /// `None`: no timing.
    pub(super) machine: Option<&'a MachineLimits>,
    pub(super) input: Option<&'a Input>,
    pub(super) recorded: Option<&'a Recorded>,
    /// Another checkpoint of the same model.
    pub(super) original: Option<&'a Opened>,
    pub(super) tokens: usize,
    /// Warnings count as problems.
    pub(super) strict: bool,
    pub(super) ranks: &'a Ranks,
    pub(super) parallel: &'a Parallel,
}

impl Checker<'_> {
    /// Checks the layer. What is wrong with it is part of the result; errors are for what is wrong
    /// with the request or the other files.
    pub(super) fn run(&self) -> Result<LayerCheck> {
        let spec = &self.entry.spec;
        let accounting = account(&self.opened.checkpoint, self.entry);
        let mut check = LayerCheck {
            layer: spec.index,
            name: spec.name.clone(),
            experts: spec.router.experts,
            top_k: spec.router.top_k,
            bytes_weights: accounting.bytes,
            unexpected: accounting.unexpected.clone(),
            ..LayerCheck::default()
        };
        let layer = match self.opened.load(self.entry) {
            Ok(layer) => layer,
            Err(error) => {
                check.problems.push(error.to_string());
                return Ok(check);
            }
        };
        let checkpoint = &self.opened.checkpoint;
        let found = doctor::examine(checkpoint, self.entry, &layer, &*self.common.pool);
        let unusable = found.iter().any(|finding| finding.kind == FindingKind::NonFinite);
        check.add_findings(found, self.strict);
        if unusable {
            return Ok(check);
        }
        let layer = self.common.quantising(layer)?;
        let dtype = self.opened.dtype(self.common.dtype, &layer);
        check.dtype = dtype.name();
        let recordings = match self.recorded {
            Some(recorded) => recorded.of_layer(&layer, dtype, self.input)?,
            None => Vec::new(),
        };
        let (input, inputs) = self.layer_input(&layer, dtype, &recordings)?;
        check.inputs = inputs;
        // beside another checkpoint, recordings lend their hidden states: their outputs may be of either
        let judged = self.original.is_none();
        let inputs = |exact: bool| recordings.iter().filter(move |r| judged && r.exact == exact);
        let mut all = vec![&input];
        all.extend(inputs(false).map(|recording| &recording.input));
        let executed = self.execute(&layer, dtype, &all, Some(&input))?;
        check.kernel = Some(executed.kernel);
        check.why = executed.why;
        check.speed = executed.speed;
        let mut results = executed.results.into_iter();
        if let Some(result) = results.next() {
            self.compare(&mut check, &layer, executed.bound, &input, &result)?;
            if check.inputs != "random" {
                check.add_findings(self.collapsed(&check).into_iter().collect(), self.strict);
            }
            if let Some(original) = self.original {
                self.compare_with(original, &mut check, dtype, &input, &result)?;
            }
        }
        for (recording, result) in inputs(false).zip(results) {
            check.recorded.push(recording.judge(spec, executed.bound, &result)?);
        }
        let exact: Vec<&LayerInput> = inputs(true).map(|recording| &recording.input).collect();
        if !exact.is_empty() {
            let f32 = ActivationDtype::F32;
            let executed = self.execute(&layer, f32, &exact, None)?;
            for (recording, result) in inputs(true).zip(&executed.results) {
                check.recorded.push(recording.judge(spec, executed.bound, result)?);
            }
        }
        check.recorded.sort_by_key(|comparison| comparison.tokens);
        let off = check.recorded.iter().filter(|comparison| !comparison.ok);
        check.problems.extend(off.map(Comparison::problem));
        check.ok = check.problems.is_empty();
        Ok(check)
    }

    /// Whether hidden states that somebody meant all go to the same experts.
    fn collapsed(&self, check: &LayerCheck) -> Option<Finding> {
        if !doctor::is_collapsed(&check.load, check.top_k) {
            return None;
        }
        let used = check.load.iter().enumerate().filter(|(_, slots)| **slots > 0);
        Some(Finding {
            kind: FindingKind::CollapsedRouting,
            severity: Severity::Warning,
            layer: Some(check.layer),
            experts: used.map(|(expert, _)| expert).collect(),
            file: self.opened.checkpoint.path().to_owned(),
            names: vec![self.entry.tensors.gate.module.clone()],
            detail: format!(
                "sends all {} ({}) to the same experts",
                plural(check.tokens, "token"),
                check.inputs
            ),
        })
    }

    /// The output against that of the same layer of another checkpoint, run in the same way. Nobody
    /// can say how much they may differ, so only that there is such a layer is judged.
    fn compare_with(
        &self,
        original: &Opened,
        check: &mut LayerCheck,
        dtype: ActivationDtype,
        input: &LayerInput,
        ours: &Forward,
    ) -> Result<()> {
        let spec = &self.entry.spec;
        let path = original.checkpoint.path().display();
        let entry = original.layers.iter().find(|entry| entry.spec.index == spec.index);
        let alike = |other: &LayerSpec| {
            other.dims.hidden == spec.dims.hidden && other.router.logits() == spec.router.logits()
        };
        let Some(entry) = entry.filter(|entry| alike(&entry.spec)) else {
            check.problems.push(format!("{path}: has no layer {} of this shape", spec.index));
            return Ok(());
        };
        let layer = match original.load(entry) {
            Ok(layer) => layer,
            Err(error) => {
                check.problems.push(error.to_string());
                return Ok(());
            }
        };
        let theirs = self.execute(&layer, dtype, &[input], None)?.results;
        for theirs in theirs {
            let errors = Errors::of(spec.dims.hidden, &ours.output, &theirs.output);
            check.original_nmse = Some(errors.nmse());
            let parts = errors.by_expert(&ours.routing, spec.router.experts);
            check.original_worst_expert = parts.worst();
            check.original_expert_nmse = parts.nmse();
        }
        Ok(())
    }

    /// Runs the layer on `inputs`, on all ranks, and takes the time of `timed` and of its first
    /// token.
    fn execute(
        &self,
        layer: &LoadedLayer,
        dtype: ActivationDtype,
        inputs: &[&LayerInput],
        timed: Option<&LayerInput>,
    ) -> Result<Executed> {
        let most = inputs.iter().map(|input| input.tokens).max().unwrap_or(0);
        let executed = self.ranks.run(|groups| {
            let options = self.ranks.options(self.common, dtype, groups)?;
            let mut runner = self.ranks.runner(layer, &options, groups, self.parallel)?;
            memory::ensure(
                self.ranks.in_this_process() * runner.workspace_bytes(most),
                &plural(most, "token"),
                "give fewer",
            )?;
            let results = inputs.iter().map(|input| forward(&mut runner, input));
            let results = results.collect::<moe_runner::Result<Vec<_>>>()?;
            let mut speed = Vec::new();
            if let (Some(machine), Some(input)) = (self.machine, timed) {
                if input.tokens > 1 {
                    let first = input.first(1, &layer.spec);
                    speed.push(self.speed(&mut runner, machine, &first)?);
                }
                speed.push(self.speed(&mut runner, machine, input)?);
            }
            let choice = runner.runner().choice();
            let (kernel, why) = (choice.kernel.name, choice.why.clone());
            let bound = bound(layer, runner.runner());
            Ok(Executed { kernel, why, bound, results, speed })
        })?;
        Ok(executed)
    }

    /// The given hidden states, else recorded ones, else random ones, N(0, 1): rounded to the
    /// activations' dtype. With them, what they are.
    fn layer_input(
        &self,
        layer: &LoadedLayer,
        dtype: ActivationDtype,
        recordings: &[Recording],
    ) -> Result<(LayerInput, String)> {
        let spec = &layer.spec;
        let round = |mut input: LayerInput| {
            input.hidden.iter_mut().for_each(|v| *v = dtype.round(*v));
            input
        };
        if let Some(input) = self.input
            && (recordings.is_empty() || input.has_hidden(spec)?)
        {
            return Ok((round(input.layer(spec, dtype)?), "given".into()));
        }
        if let Some(most) = recordings.iter().max_by_key(|recording| recording.input.tokens)
            && most.input.tokens > 0
        {
            let tokens = self.tokens.min(most.input.tokens);
            return Ok((
                round(most.input.first(tokens, spec)),
                format!("recorded as {}", most.name),
            ));
        }
        memory::ensure(
            self.tokens.saturating_mul(spec.dims.hidden).saturating_mul(4),
            &plural(self.tokens, "token"),
            "give --tokens fewer",
        )?;
        let mut random = Random::new(self.common.seed ^ (spec.index as u64) << 32);
        let mut normal = |count: usize| -> Vec<f32> {
            (0..count).map(|_| dtype.round(random.normal() as f32)).collect()
        };
        let hidden = normal(self.tokens * spec.dims.hidden);
        let router_logits =
            layer.gate.is_none().then(|| normal(self.tokens * spec.router.logits()));
        let input_ids = match spec.router.selection {
            Selection::HashTable { vocabulary } => Some(
                (0..self.tokens)
                    .map(|_| (random.bits() % vocabulary.max(1) as u64) as u32)
                    .collect(),
            ),
            _ => None,
        };
        let input = LayerInput { tokens: self.tokens, hidden, router_logits, input_ids };
        Ok((input, "random".into()))
    }

    /// The time of `input`.
    fn speed(
        &self,
        runner: &mut RankedRunner<'_>,
        machine: &MachineLimits,
        input: &LayerInput,
    ) -> moe_runner::Result<Speed> {
        let tokens = input.tokens;
        let (mut bytes, mut flops, mut moved) = (0, 0.0, 0);
        let mut pass = |runner: &mut RankedRunner<'_>| {
            let pass = runner.pass(&input.batch())?;
            (bytes, flops, moved) = (pass.weight_bytes, pass.flops, pass.moved);
            Ok::<_, moe_runner::Error>(pass.time)
        };
        let of_host = input.router_logits.is_some() || input.input_ids.is_some();
        let Times { median, min, max, runs, .. } = match runner.runner().stream() {
            Some(stream) if !of_host => {
                pass(runner)?;
                let runner = runner.runner_mut();
                let of = (runner.dtype(), runner.spec().dims.hidden);
                gpu::time((self.common.gpu, stream), of, &[&input.hidden], |_, rows, out| {
                    runner.forward(&ForwardInput::new(rows), out).map(drop)
                })?
            }
            _ => times(TIMING_BUDGET, 5, || pass(runner))?,
        };
        Ok(Speed {
            tokens,
            median_s: median,
            min_s: min,
            max_s: max,
            runs,
            bytes_weights_read: bytes,
            flops,
            gbps: bytes as f64 / median / 1e9,
            gflops: flops / median / 1e9,
            limit_share: machine.least_seconds(
                runner.runner().choice().kernel,
                bytes as f64,
                flops,
            ) / median,
            bytes_moved_per_token: self.ranks.split().map(|_| moved as f64 / tokens.max(1) as f64),
        })
    }

    /// The kernel's output and routing against the reference.
    fn compare(
        &self,
        check: &mut LayerCheck,
        layer: &LoadedLayer,
        bound: f64,
        input: &LayerInput,
        result: &Forward,
    ) -> Result<()> {
        let spec = &layer.spec;
        check.tokens = input.tokens;
        check.load = result.routing.load(spec.router.choices());
        // The reference routes by the runner's own logits, so that ids must be equal even where
        // the last bit of a logit would decide; the logits are compared by themselves.
        let truth = reference::layer(
            layer,
            &input.hidden,
            Some(&result.logits),
            input.input_ids.as_deref(),
        )?;
        if layer.gate.is_some() && input.router_logits.is_none() {
            let logits = reference::router_logits(layer, &input.hidden)?;
            let logits: Vec<f64> = logits.into_iter().map(f64::from).collect();
            let error = nmse(result.logits.iter().map(|v| f64::from(*v)).zip(logits));
            check.router_logits_nmse = Some(error);
            if !within(error, LOGITS_BOUND) {
                check
                    .problems
                    .push(format!("router logits: NMSE {error:.1e}, at most {LOGITS_BOUND:.0e}"));
            }
        }
        let equal = result.routing.ids == truth.routing.ids;
        check.ids_equal = Some(equal);
        // both with the routed scaling factor, and relative to it
        let (ours, factor) = (f64::from(weight_factor(spec)), f64::from(spec.routed_scale.factor));
        let weights = result.routing.weights.iter().zip(&truth.routing.weights);
        let weights = weights.map(|(a, b)| (f64::from(*a) * ours, f64::from(*b) * factor));
        let differences = weights.map(|(a, b)| (a - b).abs() / factor.abs().max(1.0));
        let difference = largest(differences);
        check.weights_max_difference = Some(difference);
        if !equal {
            check.problems.push("routing: other experts than the reference's".into());
        } else if !within(difference, WEIGHTS_BOUND) {
            check.problems.push(format!("routing: weights differ by {difference:.1e}"));
        }

        let width = spec.dims.hidden;
        let errors = Errors::of(width, &result.output, &truth.output);
        let total = errors.nmse();
        check.nmse = Some(total);
        check.bound = Some(bound);
        check.worst_token = errors.worst_token();
        let parts = errors.by_expert(&result.routing, spec.router.experts);
        check.worst_expert = parts.worst();
        check.expert_nmse = parts.nmse();
        if !within(total, bound) {
            let place = match (check.worst_token, check.worst_expert) {
                (Some(token), Some(expert)) => {
                    format!("; worst: token {}, expert {}", token.index, expert.index)
                }
                _ => String::new(),
            };
            check.problems.push(format!("output: NMSE {total:.1e}, at most {bound:.0e}{place}"));
        }
        Ok(())
    }
}

impl LayerCheck {
    /// Findings of the doctor; what counts is a problem.
    fn add_findings(&mut self, found: Vec<Finding>, strict: bool) {
        let found = findings::all(found);
        let counting = found.iter().filter(|finding| finding.counts(strict));
        self.problems.extend(counting.map(|finding| finding.message.clone()));
        self.findings.extend(found);
    }

    /// Findings that are no problems.
    pub(super) fn asides(&self) -> impl Iterator<Item = &FindingJson> {
        let told = |finding: &&FindingJson| !self.problems.contains(&finding.message);
        self.findings.iter().filter(told)
    }
}

/// What running a layer yielded.
struct Executed {
    kernel: &'static str,
    why: String,
    /// The largest NMSE that is right.
    bound: f64,
    /// One for each input.
    results: Vec<Forward>,
    speed: Vec<Speed>,
}

/// Runs the layer, with its output in the activations' dtype, as an engine would have it.
fn forward(runner: &mut RankedRunner<'_>, input: &LayerInput) -> moe_runner::Result<Forward> {
    let dtype = runner.runner().dtype();
    let top_k = runner.runner().spec().router.top_k;
    let done = runner.forward(&input.batch())?;
    // what was written, rounded, and then its true value
    let scale = done.output_scale;
    let written = done.output.iter().map(|v| f64::from(dtype.round(*v / scale)));
    let ids = done.topk_ids.into_iter().map(LogicalId).collect();
    Ok(Forward {
        logits: done.router_logits,
        routing: Routing::from_parts(top_k, ids, done.topk_weights)?,
        output: written.map(|v| v * f64::from(scale)).collect(),
    })
}

impl LayerInput {
    /// The first tokens alone.
    fn first(&self, tokens: usize, spec: &LayerSpec) -> Self {
        let logits = self.router_logits.as_ref();
        Self {
            tokens,
            hidden: self.hidden[..tokens * spec.dims.hidden].to_vec(),
            router_logits: logits.map(|l| l[..tokens * spec.router.logits()].to_vec()),
            input_ids: self.input_ids.as_ref().map(|ids| ids[..tokens].to_vec()),
        }
    }
}

/// The largest NMSE that is right, by the kernel, the activations' dtype and the layer's formats.
fn bound(layer: &LoadedLayer, runner: &MoeRunner) -> f64 {
    let mut matrices = layer.experts.iter().flat_map(|e| e.gate.iter().chain([&e.up, &e.down]));
    let quantised = matrices.any(|m| m.input.format() != ActivationFormat::Unquantised);
    runner.choice().kernel.bound(runner.dtype(), quantised)
}
