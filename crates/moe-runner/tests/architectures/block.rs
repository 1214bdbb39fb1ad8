//! One MoE block in float64, straight from the formulas, given the routing: whether the loaded
//! weights are the right ones.

use moe_runner::spec::{Activation, LayerSpec, RmsNorm, SharedSpec, TransformStep, WeightOn};
use moe_runner::weights::{Expert, LoadedLayer, Matrix, StepWeights};

/// `matrix · x`.
pub(crate) fn product(matrix: &Matrix, x: &[f64]) -> Vec<f64> {
    assert_eq!(matrix.cols(), x.len());
    let mut row = vec![0.0; matrix.cols()];
    (0..matrix.rows())
        .map(|index| {
            matrix.decode_row(index, &mut row);
            row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum()
        })
        .collect()
}

fn add_bias(mut values: Vec<f64>, bias: &Option<Vec<f32>>) -> Vec<f64> {
    if let Some(bias) = bias {
        assert_eq!(values.len(), bias.len());
        values.iter_mut().zip(bias).for_each(|(v, b)| *v += f64::from(*b));
    }
    values
}

fn expert(weights: &Expert, activation: Activation, x: &[f64]) -> Vec<f64> {
    let up = add_bias(product(&weights.up, x), &weights.up_bias);
    let inner: Vec<f64> = match &weights.gate {
        Some(gate) => {
            let gate = add_bias(product(gate, x), &weights.gate_bias);
            gate.iter().zip(&up).map(|(g, u)| activation.gated(*g, *u)).collect()
        }
        None => up.iter().map(|u| activation.plain(*u)).collect(),
    };
    add_bias(product(&weights.down, &inner), &weights.down_bias)
}

fn rms_norm(norm: RmsNorm, weight: &[f32], x: &[f64]) -> Vec<f64> {
    assert!(!norm.scale_first && !norm.unit_offset);
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let factor = 1.0 / (mean + f64::from(norm.eps)).sqrt();
    x.iter().zip(weight).map(|(x, w)| x * factor * f64::from(*w)).collect()
}

fn transform(steps: &[TransformStep], weights: &[StepWeights], x: &[f64]) -> Vec<f64> {
    assert_eq!(steps.len(), weights.len());
    steps.iter().zip(weights).fold(x.to_vec(), |x, (step, weights)| match (step, weights) {
        (_, StepWeights::Linear(matrix)) => product(matrix, &x),
        (TransformStep::RmsNorm(norm), StepWeights::RmsNorm(weight)) => rms_norm(*norm, weight, &x),
        _ => panic!("weights of another step"),
    })
}

/// The router's logits of one row.
pub(crate) fn logits(layer: &LoadedLayer, x: &[f64]) -> Vec<f64> {
    let gate = layer.gate.as_ref().unwrap();
    add_bias(product(&gate.weight, x), &gate.bias)
}

/// What the shared branch adds.
pub(crate) fn shared(spec: &SharedSpec, layer: &LoadedLayer, x: &[f64]) -> Vec<f64> {
    let weights = layer.shared.as_ref().unwrap();
    let mut sum = vec![0.0; x.len()];
    for one in &weights.experts {
        let out = expert(one, spec.activation, x);
        sum.iter_mut().zip(out).for_each(|(sum, out)| *sum += out);
    }
    if let Some(gate) = &weights.gate {
        let logit: f64 = gate.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum();
        sum.iter_mut().for_each(|sum| *sum /= 1.0 + (-logit).exp());
    }
    sum
}

/// The block's output for one row whose experts and weights are known.
pub(crate) fn output(
    spec: &LayerSpec,
    layer: &LoadedLayer,
    x: &[f64],
    routes: &[(usize, f64)],
) -> Vec<f64> {
    let routed = transform(&spec.input_transform.steps, &layer.input_transform, x);
    let mut sum = vec![0.0; spec.dims.routed_hidden];
    for (id, weight) in routes {
        let on_input = spec.router.weight_on == WeightOn::Input;
        let scaled: Vec<f64> =
            routed.iter().map(|x| if on_input { x * weight } else { *x }).collect();
        let out = match layer.experts.get(*id) {
            Some(weights) => expert(weights, spec.expert.activation, &scaled),
            None => scaled,
        };
        let weight = if on_input { 1.0 } else { *weight };
        sum.iter_mut().zip(out).for_each(|(sum, out)| *sum += weight * out);
    }
    let mut sum = transform(&spec.output_transform.steps, &layer.output_transform, &sum);
    if let Some(spec) = &spec.shared {
        sum.iter_mut().zip(shared(spec, layer, x)).for_each(|(sum, out)| *sum += out);
    }
    sum
}
