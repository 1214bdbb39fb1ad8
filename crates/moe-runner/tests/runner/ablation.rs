//! Every option of a layer matters, and the tests' bounds see it: the reference without the option,
//! on the same weights, is far from the layer. So are a few plausible mistakes.

use moe_runner::hidden::ActivationDtype::F32;
use moe_runner::hidden::{Rows, RowsMut};
use moe_runner::router::LogicalId;
use moe_runner::runner::{ForwardInput, MoeRunnerInterface};
use moe_runner::spec::{
    Activation, Correction, RoutedScale, ScaleOn, SharedCombine, WeightFrom, WeightOn,
};
use moe_runner::weights::{FloatType, LoadedLayer, StepWeights, random_layer};

use super::layers::{forward, nmse, plain, reported, rows, runner, shared, truth, variants};

/// The least NMSE between a layer and itself with one option changed: a thousand times the bound.
/// (The two forms of GELU are no further apart than 4e-8.)
const FAR: f64 = 1e-8;

type Change = fn(&mut LoadedLayer);

fn reverse_columns(steps: &mut [StepWeights]) {
    for step in steps {
        if let StepWeights::RmsNorm(weight) = step {
            weight.reverse();
        }
    }
}

/// The same layer without the option that gives `name` its name.
fn changes(name: &str) -> Vec<Change> {
    let silu: Change = |l| l.spec.expert.activation = Activation::Silu;
    match name {
        "plain" => vec![
            |l| l.spec.router.top_k = 1,
            |l| l.experts.swap(0, 1),
            |l| {
                l.experts
                    .iter_mut()
                    .for_each(|e| std::mem::swap(e.gate.as_mut().unwrap(), &mut e.up))
            },
            |l| l.spec.router.renormalise = moe_runner::spec::Renormalise::None,
            |l| l.spec.router.logit_multiplier = 0.5,
            |l| l.spec.router.soft_cap = Some(0.5),
        ],
        "gate bias" => vec![|l| l.gate.as_mut().unwrap().bias = None],
        "gate norm" => vec![|l| l.spec.gate.scaled_rms_eps = None],
        "not gated" => {
            vec![silu, |l| l.experts.iter_mut().for_each(|e| e.gate = Some(e.up.clone()))]
        }
        "gelu" => vec![silu, |l| l.spec.expert.activation = Activation::GeluTanh],
        "gelu_tanh" => vec![silu, |l| l.spec.expert.activation = Activation::Gelu],
        "relu" | "relu2" | "step" => vec![silu],
        "clamped" => vec![
            silu,
            |l| l.spec.expert.activation = clamped(1.0, 1.0, 0.7),
            |l| l.spec.expert.activation = clamped(1.702, 0.0, 0.7),
            |l| l.spec.expert.activation = clamped(1.702, 1.0, 7.0),
        ],
        "situ" => vec![silu, |l| {
            l.spec.expert.activation = Activation::Situ { beta: 0.5, lambda: None };
        }],
        "expert bias" => vec![
            |l| l.experts.iter_mut().for_each(|e| e.gate_bias = None),
            |l| l.experts.iter_mut().for_each(|e| e.up_bias = None),
            |l| l.experts.iter_mut().for_each(|e| e.down_bias = None),
        ],
        "expert norm" => vec![
            |l| l.spec.expert.norm = None,
            |l| l.spec.expert.norm.as_mut().unwrap().unit_offset = false,
            |l| l.experts.iter_mut().for_each(|e| e.norm.as_mut().unwrap().reverse()),
        ],
        "expert norm, scaled first" => {
            vec![|l| l.spec.expert.norm.as_mut().unwrap().scale_first = false]
        }
        "latent" => vec![|l| {
            let StepWeights::Linear(matrix) = &mut l.input_transform[0] else { panic!() };
            // rows in pairs the same: half of the latent columns are lost
            *matrix = matrix.rows_of(0, 1, 12).unwrap();
            let StepWeights::Linear(out) = &mut l.output_transform[0] else { panic!() };
            *out = out.cols_of(0..12).unwrap();
            for e in &mut l.experts {
                e.gate = e.gate.as_ref().unwrap().cols_of(0..12);
                e.up = e.up.cols_of(0..12).unwrap();
                e.down = e.down.rows_of(0, 1, 12).unwrap();
            }
            l.spec.dims.routed_hidden = 12;
        }],
        "latent with norm" => vec![
            |l| {
                l.spec.input_transform.steps.pop();
                l.input_transform.pop();
            },
            |l| reverse_columns(&mut l.input_transform),
        ],
        "output transform that is no sum" => vec![
            |l| {
                l.spec.output_transform.steps.pop();
                l.output_transform.pop();
            },
            |l| reverse_columns(&mut l.output_transform),
        ],
        "weight on input" => vec![|l| l.spec.router.weight_on = WeightOn::Output, |l| {
            l.spec.router.weight_from = WeightFrom::SoftmaxChosen
        }],
        "correction and groups" => vec![
            |l| {
                l.spec.router.correction = Correction::None;
                l.gate.as_mut().unwrap().correction = None;
            },
            |l| l.spec.router.correction = Correction::OnLogits,
            |l| l.spec.router.groups = None,
            |l| l.spec.router.score = moe_runner::spec::Score::Softmax,
        ],
        "identity experts" | "skip experts" => vec![|l| {
            l.spec.router.idle = match l.spec.router.idle {
                Some(moe_runner::spec::IdleExperts::Identity { count }) => {
                    Some(moe_runner::spec::IdleExperts::Skip { count })
                }
                _ => Some(moe_runner::spec::IdleExperts::Identity { count: 3 }),
            }
        }],
        "scale on weights" | "scale on output" | "shared, scale on output" => {
            vec![|l| l.spec.routed_scale.factor = 1.0]
        }
        "shared" => vec![
            |l| l.spec.shared = None,
            |l| l.spec.shared.as_mut().unwrap().activation = Activation::Gelu,
            |l| l.spec.shared.as_mut().unwrap().combine = SharedCombine::Average,
        ],
        "shared with gate" => vec![|l| l.shared.as_mut().unwrap().gate = None],
        "two shared with biases" => vec![
            |l| drop(l.shared.as_mut().unwrap().experts.pop()),
            |l| l.shared.as_mut().unwrap().experts[1].down_bias = None,
            |l| l.shared.as_mut().unwrap().experts[0].up_bias = None,
        ],
        "shared averaged" => {
            vec![|l| l.spec.shared.as_mut().unwrap().combine = SharedCombine::Add]
        }
        "shared weighted by the router" => {
            vec![|l| l.spec.shared.as_mut().unwrap().combine = SharedCombine::Add, |l| {
                l.shared.as_mut().unwrap().experts.swap(0, 1)
            }]
        }
        "shared with norms" => vec![|l| l.spec.shared.as_mut().unwrap().input_norm = None, |l| {
            l.spec.shared.as_mut().unwrap().output_norm = None
        }],
        "output bias" => vec![|l| l.output.bias = None],
        "output norm" => vec![|l| l.spec.output.norm = None],
        "output multiplier" => vec![|l| l.spec.output.multiplier = 1.0],
        _ => panic!("'{name}' has no ablation: add what changes without it"),
    }
}

fn clamped(alpha: f32, beta: f32, limit: f32) -> Activation {
    Activation::ClampedSwiglu { alpha, beta, limit }
}

#[test]
fn a_layer_without_one_of_its_options_is_another_layer() {
    let hidden = rows(F32, 33, 48, 4);
    for (name, spec) in variants() {
        let layer = random_layer(&spec, FloatType::F32, 7).unwrap();
        let y = forward(&mut runner(&layer, None, F32), &hidden);
        assert!(nmse(&y, &truth(&layer, &hidden)) <= 1e-11, "{name}");
        for (i, change) in changes(name).iter().enumerate() {
            let mut other = layer.clone();
            change(&mut other);
            let error = nmse(&y, &truth(&other, &hidden));
            assert!(error > FAR, "{name}, change {i}: NMSE {error:e}");
        }
    }
}

/// What a test that passes must not let pass: a shared expert times 0.9, one token's weights in
/// another order, the factor dropped or applied twice, an expert's output of another token.
#[test]
fn plausible_mistakes_are_far_beyond_the_bounds() {
    let mut spec = plain();
    spec.shared = Some(shared());
    spec.routed_scale = RoutedScale { factor: 2.5, on: ScaleOn::Output };
    let layer = random_layer(&spec, FloatType::F32, 7).unwrap();
    let hidden = rows(F32, 33, 48, 4);
    let truth = truth(&layer, &hidden);
    let mut runner = runner(&layer, None, F32);
    let mut y = vec![0.0; hidden.len()];
    let (_, report) = reported(&mut runner, &ForwardInput::new(Rows::F32(&hidden)), &mut y);
    let shared = report.shared.unwrap();
    let ids = report.routing.ids;
    assert!(nmse(&y, &truth) <= 1e-11);

    let with = |change: &dyn Fn(usize, f32) -> f32| -> Vec<f32> {
        y.iter().enumerate().map(|(i, v)| change(i, *v)).collect()
    };
    let less_shared = with(&|i, v| v - 0.1 * shared[i]);
    let no_factor = with(&|i, v| (v - shared[i]) / 2.5 + shared[i]);
    let twice = with(&|i, v| (v - shared[i]) * 2.5 + shared[i]);
    let mut swapped_rows = y.clone();
    let (a, b) = swapped_rows.split_at_mut(48);
    a.swap_with_slice(&mut b[..48]);
    // one token of 33 whose two weights are exchanged: its experts, in the other order of weights
    let mut one = ids.clone();
    one[10..12].copy_from_slice(&[ids[11], ids[10]]);
    let swapped_weights = exchanged_weights(&layer, &hidden, &one, 5);
    for (what, wrong) in [
        ("shared · 0.9", less_shared),
        ("factor dropped", no_factor),
        ("factor twice", twice),
        ("rows of two tokens exchanged", swapped_rows),
        ("weights of one token exchanged", swapped_weights),
    ] {
        let error = nmse(&wrong, &truth);
        assert!(error > 1e-4, "{what}: NMSE {error:e}");
    }
}

/// The layer's output where token `t` has its weights the other way round: its logits exchanged.
fn exchanged_weights(layer: &LoadedLayer, hidden: &[f32], ids: &[LogicalId], t: usize) -> Vec<f32> {
    let mut runner = runner(layer, None, F32);
    let mut y = vec![0.0; hidden.len()];
    let input = ForwardInput::new(Rows::F32(hidden));
    let mut logits = reported(&mut runner, &input, &mut y).1.router_logits;
    logits.swap(t * 8 + ids[2 * t].index(), t * 8 + ids[2 * t + 1].index());
    let input = ForwardInput { router_logits: Some(&logits), expert_ids: Some(ids), ..input };
    runner.forward(&input, RowsMut::F32(&mut y)).unwrap();
    y
}
