//! Every kernel on every option of a layer, against the float64 reference.

mod layers;

use layers::{forward, kernels_for, nmse, options, rows, runner, truth, variants};
use moe_kernels::numerics::quantise::Qdq;
use moe_runner::hidden::ActivationDtype::{Bf16, F16, F32};
use moe_runner::weights::{ActivationQuant, FloatType, StepWeights, random_layer};

#[test]
fn every_kernel_equals_the_reference_on_every_option() {
    for (name, spec) in variants() {
        let layer = random_layer(&spec, FloatType::F32, 7).unwrap();
        for kernel in kernels_for(&layer) {
            let mut runner = runner(&layer, Some(kernel), F32);
            for tokens in [1, 7, 33] {
                let hidden = rows(F32, tokens, spec.dims.hidden, tokens as u64);
                let error = nmse(&forward(&mut runner, &hidden), &truth(&layer, &hidden));
                assert!(error <= 1e-11, "{name}, {kernel}, {tokens} tokens: NMSE {error:e}");
            }
        }
    }
}

#[test]
fn every_stored_float_type_is_read_exactly() {
    for float in [FloatType::F32, FloatType::F16, FloatType::Bf16] {
        let layer = random_layer(&layers::plain(), float, 3).unwrap();
        let hidden = rows(F32, 9, 48, 1);
        for kernel in kernels_for(&layer) {
            let error = nmse(
                &forward(&mut runner(&layer, Some(kernel), F32), &hidden),
                &truth(&layer, &hidden),
            );
            assert!(error <= 1e-11, "{float:?}, {kernel}: NMSE {error:e}");
        }
    }
}

/// Projections around the experts quantise the rows that they multiply, where their weights ask for it.
#[test]
fn projections_around_the_experts_quantise_their_rows() {
    let (_, spec) = variants().into_iter().find(|(name, _)| *name == "latent").unwrap();
    let plain = random_layer(&spec, FloatType::F32, 7).unwrap();
    let quantised = |steps: &mut Vec<StepWeights>| {
        let [StepWeights::Linear(matrix)] = &mut steps[..] else { panic!("one projection") };
        matrix.input = ActivationQuant::Quantised(Qdq::Int8Token);
    };
    let [mut before, mut after] = [plain.clone(), plain.clone()];
    quantised(&mut before.input_transform);
    quantised(&mut after.output_transform);
    let hidden = rows(F32, 9, 48, 1);
    let without = truth(&plain, &hidden);
    // what arrives at the second one differs by roundings, of which some decide a code
    for (layer, bound) in [(before, 1e-11), (after, 1e-6)] {
        let y = forward(&mut runner(&layer, None, F32), &hidden);
        assert!(nmse(&y, &truth(&layer, &hidden)) <= bound);
        assert!(nmse(&y, &without) > 1e-5, "quantised rows are other rows");
    }
}

/// The output in 16 bits: nothing is lost but its rounding.
#[test]
fn sixteen_bit_activations_stay_within_their_bounds() {
    use moe_runner::hidden::{Rows, RowsMut};
    use moe_runner::runner::{ForwardInput, MoeRunner, MoeRunnerInterface};
    for (name, spec) in variants() {
        for (dtype, bound) in [(Bf16, 1e-5), (F16, 1e-6)] {
            let layer = random_layer(&spec, FloatType::F32, 5).unwrap();
            let hidden = rows(dtype, 17, 48, 2);
            let mut runner = MoeRunner::new(layer.ready(&options(None, dtype)).unwrap());
            let truth = truth(&layer, &hidden);
            let (y, scale): (Vec<f32>, f32) = match dtype {
                Bf16 => {
                    let x: Vec<half::bf16> =
                        hidden.iter().map(|v| half::bf16::from_f32(*v)).collect();
                    let mut y = vec![half::bf16::NAN; x.len()];
                    let out =
                        runner.forward(&ForwardInput::new(Rows::Bf16(&x)), RowsMut::Bf16(&mut y));
                    let scale = out.unwrap().output_scale;
                    (y.iter().map(|v| v.to_f32()).collect(), scale)
                }
                _ => {
                    let x: Vec<half::f16> =
                        hidden.iter().map(|v| half::f16::from_f32(*v)).collect();
                    let mut y = vec![half::f16::NAN; x.len()];
                    let out =
                        runner.forward(&ForwardInput::new(Rows::F16(&x)), RowsMut::F16(&mut y));
                    let scale = out.unwrap().output_scale;
                    (y.iter().map(|v| v.to_f32()).collect(), scale)
                }
            };
            let y: Vec<f32> = y.iter().map(|v| v * scale).collect();
            let error = nmse(&y, &truth);
            assert!(error <= bound, "{name}, {dtype:?}: NMSE {error:e}");
            assert!(error > 0.0, "{name}, {dtype:?}: an exact 16-bit output is no 16-bit output");
        }
    }
}
