//! What stands around rows and weights changes no bit: memory that holds anything, weights padded in
//! the checkpoint.

use moe_runner::experts::Caps;
use moe_runner::hidden::ActivationDtype::F32;
use moe_runner::spec::{Transform, TransformStep};
use moe_runner::weights::{Expert, FloatType, LoadedLayer, Matrix, StepWeights, random_layer};

use super::doubles::{Soiled, change_kernel, desc};
use super::layers::{forward, kernels, options, plain, rows, runner, variants};

/// A kernel whose memory holds NaN before it runs: with transforms that narrow and widen, shared
/// experts, identity experts, whatever there is. Micro-batches too.
#[test]
fn what_memory_held_before_changes_no_bit() {
    for (name, spec) in variants() {
        let layer = random_layer(&spec, FloatType::F32, 7).unwrap();
        let options = options(None, F32);
        for kernel in kernels().into_iter().filter(|kernel| !desc(kernel).caps.has(Caps::ROUTES)) {
            for tokens in [0, 1, 7] {
                let hidden = rows(F32, tokens, 48, 3);
                let plain = forward(&mut runner(&layer, Some(kernel), F32), &hidden);
                for micro_batches in [1, 3] {
                    let mut padded =
                        runner(&layer, Some(kernel), F32).with_micro_batches(micro_batches);
                    let spare = layer.quant_method(desc(kernel), &options).unwrap();
                    change_kernel(&mut padded, spare, |kernel| Box::new(Soiled(kernel)));
                    let y = forward(&mut padded, &hidden);
                    assert_eq!(y, plain, "{name}, {kernel}, {tokens} tokens");
                }
            }
        }
    }
}

/// An output transform that widens a narrow, padded routed sum: what it yields is never cut back to
/// the routed width.
#[test]
fn a_widened_output_is_not_cut_to_the_routed_width() {
    let mut spec = plain();
    spec.dims.routed_hidden = 24;
    spec.input_transform = Transform { steps: vec![TransformStep::Linear { width: 24 }] };
    spec.output_transform = Transform { steps: vec![TransformStep::Linear { width: 48 }] };
    let layer = random_layer(&spec, FloatType::F32, 7).unwrap();
    let hidden = rows(F32, 7, 48, 3);
    let mut padded = runner(&layer, Some("cpu_portable"), F32);
    let spare = layer.quant_method(desc("cpu_portable"), &options(None, F32)).unwrap();
    change_kernel(&mut padded, spare, |kernel| Box::new(Soiled(kernel)));
    let y = forward(&mut padded, &hidden);
    assert!(y.chunks(48).all(|row| row[24..].iter().all(|v| *v != 0.0 && v.is_finite())));
    assert_eq!(y, forward(&mut runner(&layer, Some("cpu_portable"), F32), &hidden));
}

/// `matrix` with zeros below and to the right.
fn grow(matrix: &Matrix, rows: usize, cols: usize) -> Matrix {
    let mut values = vec![0.0; rows * cols];
    for n in 0..matrix.rows() {
        matrix.decode_row(n, &mut values[n * cols..][..matrix.cols()]);
    }
    Matrix::from_f32(&values, [rows, cols]).unwrap()
}

fn grow_vector(values: &Option<Vec<f32>>, len: usize) -> Option<Vec<f32>> {
    values.as_ref().map(|values| {
        let mut values = values.clone();
        values.resize(len, 0.0);
        values
    })
}

fn grow_expert(expert: &Expert, hidden: usize, intermediate: usize) -> Expert {
    Expert {
        gate: expert.gate.as_ref().map(|gate| grow(gate, intermediate, hidden)),
        up: grow(&expert.up, intermediate, hidden),
        down: grow(&expert.down, hidden, intermediate),
        gate_bias: grow_vector(&expert.gate_bias, intermediate),
        up_bias: grow_vector(&expert.up_bias, intermediate),
        down_bias: grow_vector(&expert.down_bias, hidden),
        norm: expert.norm.clone(),
    }
}

/// Experts padded between their products: 40 columns become 64, the shared experts' 56 too.
#[test]
fn intermediate_columns_of_zeros_change_no_bit() {
    for (name, spec) in variants() {
        let layer = random_layer(&spec, FloatType::F32, 7).unwrap();
        let mut padded = layer.clone();
        padded.spec.dims.intermediate = 64;
        for expert in &mut padded.experts {
            *expert = grow_expert(expert, spec.dims.routed_hidden, 64);
        }
        for expert in padded.shared.iter_mut().flat_map(|shared| &mut shared.experts) {
            *expert = grow_expert(expert, 48, 64);
        }
        if let Some(shared) = &mut padded.spec.shared {
            shared.intermediate = 64;
        }
        let hidden = rows(F32, 5, 48, 3);
        for kernel in kernels() {
            let y = forward(&mut runner(&padded, Some(kernel), F32), &hidden);
            let want = forward(&mut runner(&layer, Some(kernel), F32), &hidden);
            assert_eq!(y, want, "{name}, {kernel}");
        }
    }
}

/// The whole layer padded from 48 to 64 columns: the new ones are zero, the others as before. (Not
/// with norms: their mean counts columns.)
#[test]
fn hidden_columns_of_zeros_change_no_bit() {
    let mut compared = 0;
    for (name, spec) in variants() {
        let norms = name.contains("norm") || name.contains("no sum");
        if norms {
            continue;
        }
        compared += 1;
        let layer = random_layer(&spec, FloatType::F32, 7).unwrap();
        let latent = spec.dims.routed_hidden != spec.dims.hidden;
        let routed = if latent { spec.dims.routed_hidden } else { 64 };
        let mut padded: LoadedLayer = layer.clone();
        padded.spec.dims.hidden = 64;
        padded.spec.dims.routed_hidden = routed;
        for expert in &mut padded.experts {
            *expert = grow_expert(expert, routed, spec.dims.intermediate);
        }
        if let Some(shared) = &mut padded.shared {
            for expert in &mut shared.experts {
                *expert = grow_expert(expert, 64, expert.up.rows());
            }
            shared.gate = grow_vector(&shared.gate, 64);
        }
        if let Some(gate) = &mut padded.gate {
            gate.weight = grow(&gate.weight, gate.weight.rows(), 64);
        }
        for step in &mut padded.input_transform {
            if let StepWeights::Linear(matrix) = step {
                *matrix = grow(matrix, matrix.rows(), 64);
            }
        }
        for (spec, step) in
            padded.spec.output_transform.steps.iter_mut().zip(&mut padded.output_transform)
        {
            if let StepWeights::Linear(matrix) = step {
                *matrix = grow(matrix, 64, matrix.cols());
                *spec = TransformStep::Linear { width: 64 };
            }
        }
        padded.output.bias = grow_vector(&padded.output.bias, 64);
        let hidden = rows(F32, 5, 48, 3);
        let wide: Vec<f32> = hidden.chunks(48).flat_map(|row| [row, &[0.0; 16]].concat()).collect();
        for kernel in kernels() {
            let want = forward(&mut runner(&layer, Some(kernel), F32), &hidden);
            let y = forward(&mut runner(&padded, Some(kernel), F32), &wide);
            for (y, want) in y.chunks(64).zip(want.chunks(48)) {
                assert_eq!(&y[..48], want, "{name}, {kernel}");
                assert_eq!(&y[48..], [0.0; 16], "{name}, {kernel}");
            }
        }
    }
    assert!(compared > 15, "{compared} layers compared");
}
