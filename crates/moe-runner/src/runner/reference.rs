//! The truth of a whole layer: gate, routing, experts, transforms and shared experts in float64,
//! straight from the loaded weights. It shares the router and the activation formulas with the
//! runner, and nothing else: no plan, no exchange, no scaling rule, no buffers.

use crate::experts::reference::{dot, expert, project, rms_norm};
use crate::router::{Router, RouterTensors, Routing};
use crate::spec::{
    IdleExperts, RmsNorm, SharedCombine, Transform, TransformStep, WeightOn, sigmoid,
};
use crate::weights::{LoadedLayer, StepWeights};
use crate::{Error, Result};

/// What the reference computed.
#[derive(Clone, Debug)]
pub struct ReferenceOutput {
    /// `[T, E_total]`.
    pub logits: Vec<f32>,
    /// Ids and weights `[T, k]`, the scaling factor not included.
    pub routing: Routing,
    /// `[T, H]`: what the shared experts add.
    pub shared: Option<Vec<f64>>,
    /// `[T, H]`: the true output.
    pub output: Vec<f64>,
}

/// Runs the whole layer on `hidden` `[T, H]`. `logits` `[T, E_total]` replace the gate's.
///
/// # Errors
/// As the router's; also without a gate and without logits.
pub fn layer(
    layer: &LoadedLayer,
    hidden: &[f32],
    logits: Option<&[f32]>,
    input_ids: Option<&[u32]>,
) -> Result<ReferenceOutput> {
    let spec = &layer.spec;
    let width = spec.dims.hidden;
    let tokens = hidden.len() / width;
    let rows: Vec<Vec<f64>> =
        hidden.chunks_exact(width).map(|row| row.iter().map(|v| f64::from(*v)).collect()).collect();

    let logits = match logits {
        Some(logits) => logits.to_vec(),
        None => gate(layer, &rows)?,
    };
    let routing = route(layer, &logits, input_ids, tokens)?;
    let inputs = transform(&spec.input_transform, &layer.input_transform, rows.clone());

    let mut shared_rows = shared(layer, &rows, &routing);
    let factor = f64::from(spec.routed_scale.factor);
    let mut output = Vec::with_capacity(hidden.len());
    let sums = routed(layer, &inputs, &routing, factor);
    let sums = transform(&spec.output_transform, &layer.output_transform, sums);
    for (t, mut y) in sums.into_iter().enumerate() {
        if let (Some(shared), Some(spec)) = (&mut shared_rows, &spec.shared) {
            y.iter_mut().zip(&shared[t]).for_each(|(y, s)| *y += s);
            if spec.combine == SharedCombine::Average {
                y.iter_mut().for_each(|y| *y /= 2.0);
            }
        }
        if let Some(bias) = &layer.output.bias {
            y.iter_mut().zip(bias).for_each(|(y, b)| *y += f64::from(*b));
        }
        if let (Some(norm), Some(weight)) = (spec.output.norm, &layer.output.norm) {
            rms_norm(norm, weight, &mut y);
        }
        output.extend(y.iter().map(|y| y * f64::from(spec.output.multiplier)));
    }
    Ok(ReferenceOutput { logits, routing, shared: shared_rows.map(|rows| rows.concat()), output })
}

/// The router logits `[T, E_total]` of `hidden` `[T, H]`, computed in float64.
///
/// # Errors
/// [`Error::Input`] for a layer without a gate.
pub fn router_logits(layer: &LoadedLayer, hidden: &[f32]) -> Result<Vec<f32>> {
    let rows = hidden.chunks_exact(layer.spec.dims.hidden);
    let rows: Vec<Vec<f64>> = rows.map(|row| row.iter().map(|v| f64::from(*v)).collect()).collect();
    gate(layer, &rows)
}

fn gate(layer: &LoadedLayer, rows: &[Vec<f64>]) -> Result<Vec<f32>> {
    let Some(gate) = &layer.gate else {
        return Err(Error::input("router_logits", "the layer has no gate; logits must be given"));
    };
    let mut rows = rows.to_vec();
    if let (Some(eps), Some(scale)) = (layer.spec.gate.scaled_rms_eps, &gate.input_scale) {
        let root = (layer.spec.dims.hidden as f64).sqrt();
        for row in &mut rows {
            rms_norm(RmsNorm { eps, unit_offset: false, scale_first: false }, scale, row);
            row.iter_mut().for_each(|v| *v /= root);
        }
    }
    let logits = project(&gate.weight, gate.bias.as_deref(), &rows);
    Ok(logits.concat().into_iter().map(|v| v as f32).collect())
}

/// The rows that the routed experts see of `hidden` `[T, H]`: after the transformation of the input.
pub fn expert_rows(layer: &LoadedLayer, hidden: &[f32]) -> Vec<Vec<f64>> {
    let rows = hidden.chunks_exact(layer.spec.dims.hidden);
    let rows = rows.map(|row| row.iter().map(|v| f64::from(*v)).collect()).collect();
    transform(&layer.spec.input_transform, &layer.input_transform, rows)
}

pub(crate) fn route(
    layer: &LoadedLayer,
    logits: &[f32],
    input_ids: Option<&[u32]>,
    tokens: usize,
) -> Result<Routing> {
    let tensors = layer.gate.as_ref().map_or_else(RouterTensors::default, |gate| RouterTensors {
        correction: gate.correction.clone(),
        per_expert_scale: gate.per_expert_scale.clone(),
        hash_table: gate.hash_table.clone(),
    });
    let mut routing = Routing::default();
    Router::new(layer.spec.router.clone(), 1.0, tensors)?.route(
        logits,
        input_ids,
        tokens,
        &mut routing,
    )?;
    Ok(routing)
}

/// `f · Σ_j w_j · expert(h)`, expert by expert, each token's terms added in order of expert id.
fn routed(
    layer: &LoadedLayer,
    inputs: &[Vec<f64>],
    routing: &Routing,
    factor: f64,
) -> Vec<Vec<f64>> {
    let spec = &layer.spec;
    let mut sums = vec![vec![0.0; spec.dims.routed_hidden]; inputs.len()];
    for (e, weights) in layer.experts.iter().enumerate() {
        let mut chosen = Vec::new();
        let mut rows = Vec::new();
        for (t, input) in inputs.iter().enumerate() {
            for (id, w) in routing.ids_of(t).iter().zip(routing.weights_of(t)) {
                if id.index() == e {
                    let w = f64::from(*w);
                    let on_input = spec.router.weight_on == WeightOn::Input;
                    let (on_row, on_sum) = if on_input { (w, 1.0) } else { (1.0, w) };
                    chosen.push((t, on_sum * factor));
                    rows.push(input.iter().map(|v| v * on_row).collect());
                }
            }
        }
        if rows.is_empty() {
            continue;
        }
        let outputs = expert(weights, spec.expert.activation, spec.expert.norm, &rows);
        for ((t, weight), y) in chosen.into_iter().zip(outputs) {
            sums[t].iter_mut().zip(y).for_each(|(sum, y)| *sum += weight * y);
        }
    }
    if let Some(IdleExperts::Identity { .. }) = spec.router.idle {
        for (t, sum) in sums.iter_mut().enumerate() {
            for (id, w) in routing.ids_of(t).iter().zip(routing.weights_of(t)) {
                if id.index() >= spec.router.experts {
                    let weight = factor * f64::from(*w);
                    sum.iter_mut().zip(&inputs[t]).for_each(|(sum, x)| *sum += weight * x);
                }
            }
        }
    }
    sums
}

fn shared(layer: &LoadedLayer, rows: &[Vec<f64>], routing: &Routing) -> Option<Vec<Vec<f64>>> {
    let (spec, weights) = (layer.spec.shared.as_ref()?, layer.shared.as_ref()?);
    let mut inputs = rows.to_vec();
    if let (Some(norm), Some(weight)) = (spec.input_norm, &weights.input_norm) {
        inputs.iter_mut().for_each(|row| rms_norm(norm, weight, row));
    }
    let mut sums = vec![vec![0.0; layer.spec.dims.hidden]; rows.len()];
    for (s, weights) in weights.experts.iter().enumerate() {
        for (t, y) in expert(weights, spec.activation, None, &inputs).into_iter().enumerate() {
            let weight = match spec.combine {
                SharedCombine::RouterWeighted => {
                    f64::from(routing.shared_weights[t * spec.count + s])
                        * f64::from(layer.spec.routed_scale.factor)
                }
                SharedCombine::Add | SharedCombine::Average => 1.0,
            };
            sums[t].iter_mut().zip(y).for_each(|(sum, y)| *sum += weight * y);
        }
    }
    for (sum, row) in sums.iter_mut().zip(rows) {
        if let Some(gate) = &weights.gate {
            let factor = sigmoid(dot(gate, row));
            sum.iter_mut().for_each(|v| *v *= factor);
        }
        if let (Some(norm), Some(weight)) = (spec.output_norm, &weights.output_norm) {
            rms_norm(norm, weight, sum);
        }
    }
    Some(sums)
}

fn transform(spec: &Transform, weights: &[StepWeights], rows: Vec<Vec<f64>>) -> Vec<Vec<f64>> {
    spec.steps.iter().zip(weights).fold(rows, |mut rows, (step, weights)| match (step, weights) {
        (TransformStep::Linear { .. }, StepWeights::Linear(matrix)) => project(matrix, None, &rows),
        (TransformStep::RmsNorm(norm), StepWeights::RmsNorm(weight)) => {
            rows.iter_mut().for_each(|row| rms_norm(*norm, weight, row));
            rows
        }
        // `validate` and the loader keep steps and weights of the same kind
        _ => rows,
    })
}
