//! Layers with random weights: for benchmarks of shapes without a checkpoint, and for tests.

mod format;

pub use format::{RandomFormat, RandomScaled};

use super::{
    Expert, FloatType, GateWeights, LoadedLayer, Matrix, OutputWeights, SharedWeights, StepWeights,
};
use crate::random::Random;
use crate::spec::{Correction, LayerSpec, Selection, Transform, TransformStep};
use crate::{Error, Result};

/// A matrix whose products with rows of unit variance have unit variance.
pub fn random_matrix(random: &mut Random, float: FloatType, rows: usize, cols: usize) -> Matrix {
    let matrix = RandomFormat::Float(float).matrix(random, rows, cols);
    matrix.expect("floats hold any shape that fits memory")
}

/// Random weights for everything that `spec` describes; the same for the same seed. Experts, routed
/// and shared, are stored in `format`, the gate and transforms in the floats that go with it.
///
/// # Errors
/// [`Error::Spec`] if the description contradicts itself, or `format` cannot hold its matrices.
pub fn random_layer(
    spec: &LayerSpec,
    format: impl Into<RandomFormat>,
    seed: u64,
) -> Result<LoadedLayer> {
    spec.validate()?;
    let format = format.into();
    let float = format.float();
    let stored = |random: &mut Random, rows: usize, cols: usize| {
        format.matrix(random, rows, cols).ok_or_else(|| Error::Spec {
            layer: spec.name.clone(),
            reason: format!("the format of its weights cannot hold a matrix [{rows}, {cols}]"),
        })
    };
    let random = &mut Random::new(seed);
    let dims = spec.dims;
    let router = &spec.router;
    let hash_table = match router.selection {
        Selection::HashTable { vocabulary } => {
            let entries = vocabulary.checked_mul(router.top_k).ok_or_else(|| Error::Spec {
                layer: spec.name.clone(),
                reason: "the hash table is too large".into(),
            })?;
            Some((0..entries).map(|_| (random.bits() % router.choices() as u64) as u32).collect())
        }
        _ => None,
    };
    let gate = GateWeights {
        weight: random_matrix(random, float, router.logits(), dims.hidden),
        bias: spec.gate.bias.then(|| random.values(router.logits(), 0.5)),
        correction: (router.correction != Correction::None)
            .then(|| random.values(router.choices(), 0.5)),
        per_expert_scale: router.per_expert_scale.then(|| positive(random, router.experts)),
        input_scale: spec.gate.scaled_rms_eps.map(|_| positive(random, dims.hidden)),
        hash_table,
    };
    let expert = |random: &mut Random, hidden: usize, intermediate: usize, gated, bias, norm| {
        let vector =
            |len, wanted: bool, random: &mut Random| wanted.then(|| random.values(len, 0.5));
        Ok(Expert {
            gate_bias: vector(intermediate, bias && gated, random),
            up_bias: vector(intermediate, bias, random),
            down_bias: vector(hidden, bias, random),
            gate: gated.then(|| stored(random, intermediate, hidden)).transpose()?,
            up: stored(random, intermediate, hidden)?,
            down: stored(random, hidden, intermediate)?,
            norm: if norm { Some(positive(random, hidden)) } else { None },
        })
    };
    let e = spec.expert;
    let experts = (0..router.experts)
        .map(|_| {
            expert(random, dims.routed_hidden, dims.intermediate, e.gated, e.bias, e.norm.is_some())
        })
        .collect::<Result<_>>()?;
    let shared = match &spec.shared {
        None => None,
        Some(s) => Some(SharedWeights {
            experts: (0..s.count)
                .map(|_| expert(random, dims.hidden, s.intermediate, s.gated, s.bias, false))
                .collect::<Result<_>>()?,
            gate: s.sigmoid_gate.then(|| random.values(dims.hidden, 0.2)),
            input_norm: s.input_norm.map(|_| positive(random, dims.hidden)),
            output_norm: s.output_norm.map(|_| positive(random, dims.hidden)),
        }),
    };
    Ok(LoadedLayer {
        gate: Some(gate),
        experts,
        input_transform: steps(random, float, &spec.input_transform, dims.hidden),
        output_transform: steps(random, float, &spec.output_transform, dims.routed_hidden),
        shared,
        output: OutputWeights {
            bias: spec.output.bias.then(|| random.values(dims.hidden, 0.5)),
            norm: spec.output.norm.map(|_| positive(random, dims.hidden)),
        },
        spec: spec.clone(),
    })
}

/// Values between 0.5 and 1.5: weights of norms, scales.
fn positive(random: &mut Random, len: usize) -> Vec<f32> {
    random.values(len, 0.5).into_iter().map(|v| 1.0 + v).collect()
}

fn steps(
    random: &mut Random,
    float: FloatType,
    transform: &Transform,
    mut width: usize,
) -> Vec<StepWeights> {
    let weights = transform.steps.iter().map(|step| match step {
        TransformStep::Linear { width: to } => {
            let matrix = random_matrix(random, float, *to, width);
            width = *to;
            StepWeights::Linear(matrix)
        }
        TransformStep::RmsNorm(_) => StepWeights::RmsNorm(positive(random, width)),
    });
    weights.collect()
}
