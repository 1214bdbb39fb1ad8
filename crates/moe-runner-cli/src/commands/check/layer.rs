//! One layer, checked.

use std::time::Duration;

use anyhow::Result;
use moe_runner::checkpoint::architecture::LayerEntry;
use moe_runner::hidden::{ActivationDtype, Rows, RowsMut};
use moe_runner::random::Random;
use moe_runner::router::Routing;
use moe_runner::runner::{ForwardInput, MoeRunner, MoeRunnerInterface, reference};
use moe_runner::spec::{ActivationFormat, LayerSpec, Selection};
use moe_runner::weights::{LoadedLayer, account, scan_finite};
use serde::Serialize;

use super::recorded::{Comparison, Recorded};
use crate::args::Common;
use crate::checkpoints::Opened;
use crate::commands::run::weight_factor;
use crate::input::{Input, LayerInput};
use crate::measure::{MachineLimits, Times, times};

/// Bound of the logits' NMSE: they are f32, whatever the activations.
const LOGITS_BOUND: f64 = 1e-11;

/// Bound of a weight's difference: the float64 formula is rounded once.
const WEIGHTS_BOUND: f64 = 1e-6;

/// How long each timing takes.
const TIMING_BUDGET: Duration = Duration::from_millis(150);

/// What was found out about a layer.
#[derive(Default, Serialize)]
pub(crate) struct LayerCheck {
    pub(super) layer: usize,
    pub(super) name: String,
    pub(super) ok: bool,
    /// What is wrong, in sentences; empty for a layer that is right.
    pub(super) problems: Vec<String>,
    /// Tensors of the block that have no role; not wrong by themselves.
    pub(super) unexpected: Vec<String>,
    pub(super) experts: usize,
    pub(super) top_k: usize,
    /// Bytes of the layer's tensors.
    pub(super) bytes: usize,
    pub(super) kernel: Option<&'static str>,
    pub(super) why: String,
    pub(super) dtype: &'static str,
    pub(super) tokens: usize,
    /// Of the kernel's output, against the float64 reference on the same inputs and logits.
    pub(super) nmse: Option<f64>,
    pub(super) bound: Option<f64>,
    pub(super) worst_token: Option<Worst>,
    /// The expert whose tokens have the largest error.
    pub(super) worst_expert: Option<Worst>,
    pub(super) router_logits_nmse: Option<f64>,
    pub(super) ids_equal: Option<bool>,
    pub(super) weights_max_difference: Option<f64>,
    pub(super) speed: Vec<Speed>,
    /// Slots that went to each expert, for the tokens of the comparison.
    pub(super) load: Vec<usize>,
    pub(super) recorded: Vec<Comparison>,
    /// Of the output, against the same layer of another checkpoint, on the same hidden states.
    pub(super) original_nmse: Option<f64>,
}

/// Where the error is largest.
#[derive(Clone, Copy, Serialize)]
pub(crate) struct Worst {
    pub(super) index: usize,
    pub(super) nmse: f64,
}

/// The time of one batch size.
#[derive(Serialize)]
pub(crate) struct Speed {
    pub(super) tokens: usize,
    pub(super) median_s: f64,
    pub(super) min_s: f64,
    pub(super) max_s: f64,
    pub(super) runs: usize,
    pub(super) bytes_weights_read: usize,
    pub(super) flops: f64,
    pub(super) gbps: f64,
    pub(super) gflops: f64,
    /// The least time that the machine needs for these bytes and operations, over the median.
    pub(super) limit_share: f64,
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
            bytes: accounting.bytes,
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
        let path = self.opened.checkpoint.path();
        let unusable = scan_finite(path, self.entry, &layer);
        if !unusable.is_empty() {
            check.problems.extend(unusable.iter().map(ToString::to_string));
            return Ok(check);
        }
        let dtype = self.opened.dtype(self.common, &layer);
        check.dtype = dtype.name();
        let mut runner = MoeRunner::new(layer.ready(&self.common.options(dtype))?);
        check.kernel = Some(runner.choice().kernel.name);
        check.why = runner.choice().why.clone();
        let input = self.layer_input(&layer, dtype)?;
        self.compare(&mut check, &layer, &mut runner, &input)?;
        if let Some(recorded) = self.recorded {
            check.recorded = recorded.compare(&layer, &mut runner, self.input, self.common)?;
            let off = check.recorded.iter().filter(|comparison| !comparison.ok);
            check.problems.extend(off.map(Comparison::problem));
        }
        if let Some(original) = self.original {
            self.compare_with(original, &mut check, &mut runner, &input)?;
        }
        if let Some(machine) = self.machine {
            let batches = if input.tokens > 1 { vec![1, input.tokens] } else { vec![input.tokens] };
            for tokens in batches {
                check.speed.push(speed(&mut runner, machine, &input, tokens)?);
            }
        }
        check.ok = check.problems.is_empty();
        Ok(check)
    }

    /// The output against that of the same layer of another checkpoint. Nobody can say how much
    /// they may differ, so only that there is such a layer is judged.
    fn compare_with(
        &self,
        original: &Opened,
        check: &mut LayerCheck,
        runner: &mut MoeRunner,
        input: &LayerInput,
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
        let ready = layer.ready(&self.common.options(runner.dtype()))?;
        let theirs = forward(&mut MoeRunner::new(ready), input)?.output;
        let ours = forward(runner, input)?.output;
        check.original_nmse = Some(nmse(ours.into_iter().zip(theirs)));
        Ok(())
    }

    /// The given hidden states, or random ones: N(0, 1), rounded to the activations' dtype.
    fn layer_input(&self, layer: &LoadedLayer, dtype: ActivationDtype) -> Result<LayerInput> {
        let spec = &layer.spec;
        if let Some(input) = self.input {
            let mut input = input.layer(spec)?;
            input.hidden.iter_mut().for_each(|v| *v = dtype.round(*v));
            return Ok(input);
        }
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
        Ok(LayerInput { tokens: self.tokens, hidden, router_logits, input_ids })
    }

    /// The kernel's output and routing against the reference.
    fn compare(
        &self,
        check: &mut LayerCheck,
        layer: &LoadedLayer,
        runner: &mut MoeRunner,
        input: &LayerInput,
    ) -> Result<()> {
        let spec = &layer.spec;
        let result = forward(runner, input)?;
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
        let difference = differences.fold(0.0, f64::max);
        check.weights_max_difference = Some(difference);
        if !equal {
            check.problems.push("routing: other experts than the reference's".into());
        } else if !within(difference, WEIGHTS_BOUND) {
            check.problems.push(format!("routing: weights differ by {difference:.1e}"));
        }

        let bound = bound(layer, runner);
        let width = spec.dims.hidden;
        let tokens: Vec<(f64, f64)> = result
            .output
            .chunks_exact(width)
            .zip(truth.output.chunks_exact(width))
            .map(|(y, r)| squares(y.iter().copied().zip(r.iter().copied())))
            .collect();
        let total = ratio(tokens.iter().fold((0.0, 0.0), |sum, t| (sum.0 + t.0, sum.1 + t.1)));
        check.nmse = Some(total);
        check.bound = Some(bound);
        check.worst_token = worst(tokens.iter().copied());
        let of_expert = |e: usize| {
            let taken = (0..input.tokens)
                .filter(|t| result.routing.ids_of(*t).iter().any(|id| id.index() == e));
            taken.fold((0.0, 0.0), |sum, t| (sum.0 + tokens[t].0, sum.1 + tokens[t].1))
        };
        check.worst_expert = worst((0..spec.router.experts).map(of_expert));
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

/// The time of the first `tokens` tokens.
fn speed(
    runner: &mut MoeRunner,
    machine: &MachineLimits,
    input: &LayerInput,
    tokens: usize,
) -> Result<Speed> {
    let input = input.first(tokens, runner.spec());
    let mut output = vec![0.0f32; tokens * runner.spec().dims.hidden];
    let (mut bytes, mut flops) = (0, 0.0);
    let Times { median, min, max, runs } = times(TIMING_BUDGET, 5, || {
        let done = runner.forward(&input.forward(), RowsMut::F32(&mut output))?;
        (bytes, flops) = (done.weight_bytes, done.flops);
        Ok::<(), moe_runner::Error>(())
    })?;
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
        limit_share: machine.least_seconds(bytes as f64, flops) / median,
    })
}

/// What one forward pass returned: the true output, as the layer's dtype holds it.
pub(super) struct Forward {
    pub(super) output: Vec<f64>,
    pub(super) logits: Vec<f32>,
    pub(super) routing: Routing,
}

/// Runs the layer, with its output in the activations' dtype, as an engine would have it.
pub(super) fn forward(runner: &mut MoeRunner, input: &LayerInput) -> Result<Forward> {
    let dtype = runner.dtype();
    let mut output = vec![0.0f32; input.tokens * runner.spec().dims.hidden];
    let done = runner.forward(&input.forward(), RowsMut::F32(&mut output))?;
    let scale = f64::from(done.output_scale);
    Ok(Forward {
        logits: done.router_logits.to_vec(),
        routing: done.routing.clone(),
        output: output.iter().map(|v| f64::from(dtype.round(*v)) * scale).collect(),
    })
}

impl LayerInput {
    /// As the library takes it.
    pub(crate) fn forward(&self) -> ForwardInput<'_> {
        ForwardInput {
            router_logits: self.router_logits.as_deref(),
            input_ids: self.input_ids.as_deref(),
            ..ForwardInput::new(Rows::F32(&self.hidden))
        }
    }

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
pub(super) fn bound(layer: &LoadedLayer, runner: &MoeRunner) -> f64 {
    let mut matrices = layer.experts.iter().flat_map(|e| e.gate.iter().chain([&e.up, &e.down]));
    let quantised = matrices.any(|m| m.input.format() != ActivationFormat::Unquantised);
    runner.choice().kernel.bound(runner.dtype(), quantised)
}

/// `value ≤ bound`; NaN is not.
pub(super) fn within(value: f64, bound: f64) -> bool {
    value <= bound
}

/// `‖y−r‖²` and `‖r‖²`
fn squares(pairs: impl Iterator<Item = (f64, f64)>) -> (f64, f64) {
    pairs.fold((0.0, 0.0), |(error, norm), (y, r)| (error + (y - r).powi(2), norm + r * r))
}

fn ratio((error, norm): (f64, f64)) -> f64 {
    match norm {
        // exactly nothing, and nothing was asked for
        0.0 if error == 0.0 => 0.0,
        _ => error / norm,
    }
}

/// `‖y−r‖² / ‖r‖²`
pub(super) fn nmse(pairs: impl Iterator<Item = (f64, f64)>) -> f64 {
    ratio(squares(pairs))
}

fn worst(squares: impl Iterator<Item = (f64, f64)>) -> Option<Worst> {
    let all = squares.enumerate().map(|(index, pair)| Worst { index, nmse: ratio(pair) });
    // NaN is the worst of all
    let key = |w: &Worst| if w.nmse.is_nan() { f64::INFINITY } else { w.nmse };
    all.max_by(|a, b| key(a).total_cmp(&key(b)).then(b.index.cmp(&a.index)))
}
