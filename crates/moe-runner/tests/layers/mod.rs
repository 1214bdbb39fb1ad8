//! Layers for the tests: a plain one, and one for each option that differs from it.
#![allow(dead_code, unreachable_pub)] // each test file uses its own part

use moe_runner::Result;
use moe_runner::comm::{self, Sizes, run_ranks};
use moe_runner::experts::RowFormat;
use moe_runner::experts::{KERNELS, KernelDesc};
use moe_runner::hidden::{ActivationDtype, Rows, RowsMut};
use moe_runner::oracle::{Machine, Request, failing_conditions};
use moe_runner::parallel::{ExchangeKind, Parallel, Placement};
use moe_runner::random::Random;
use moe_runner::runner::{
    Batch, BatchOutput, ForwardInput, ForwardOutput, MoeRunner, MoeRunnerInterface, Options,
    Report, forward_batch, reference,
};
use moe_runner::spec::{
    Activation, Correction, Dims, ExpertSpec, GateSpec, GroupFill, GroupScore, Groups, IdleExperts,
    LayerSpec, OutputSpec, Renormalise, RmsNorm, RoutedScale, RouterSpec, ScaleOn, Score,
    SharedCombine, SharedSpec, Transform, TransformStep, WeightFrom, WeightOn,
};
use moe_runner::weights::{FloatType, LoadedLayer, random_layer};

/// Eight experts, two chosen, gated SiLU, nothing else.
pub fn plain() -> LayerSpec {
    LayerSpec {
        name: "model.layers.0.mlp".into(),
        index: 0,
        dims: Dims { hidden: 48, routed_hidden: 48, intermediate: 40 },
        gate: GateSpec::default(),
        router: RouterSpec::softmax(8, 2, true),
        expert: ExpertSpec { gated: true, activation: Activation::Silu, bias: false, norm: None },
        input_transform: Transform::default(),
        output_transform: Transform::default(),
        routed_scale: RoutedScale { factor: 1.0, on: ScaleOn::Weights },
        shared: None,
        output: OutputSpec::default(),
    }
}

/// One plain shared expert.
pub fn shared() -> SharedSpec {
    SharedSpec {
        count: 1,
        intermediate: 56,
        gated: true,
        activation: Activation::Silu,
        bias: false,
        sigmoid_gate: false,
        combine: SharedCombine::Add,
        input_norm: None,
        output_norm: None,
    }
}

const NORM: RmsNorm = RmsNorm { eps: 1e-6, unit_offset: false, scale_first: false };

/// The plain layer with one option changed, by name: every option of [`LayerSpec`].
pub fn variants() -> Vec<(&'static str, LayerSpec)> {
    let mut all = vec![("plain", plain())];
    let mut add = |name, change: &dyn Fn(&mut LayerSpec)| {
        let mut spec = plain();
        change(&mut spec);
        all.push((name, spec));
    };
    add("gate bias", &|s| s.gate.bias = true);
    add("gate norm", &|s| s.gate.scaled_rms_eps = Some(1e-6));
    add("not gated", &|s| {
        s.expert.gated = false;
        s.expert.activation = Activation::Relu2;
    });
    for (name, activation) in [
        ("gelu", Activation::Gelu),
        ("gelu_tanh", Activation::GeluTanh),
        ("relu", Activation::Relu),
        ("relu2", Activation::Relu2),
        ("clamped", Activation::ClampedSwiglu { alpha: 1.702, beta: 1.0, limit: 0.7 }),
        ("step", Activation::SwigluStep { limit: 0.3 }),
        ("situ", Activation::Situ { beta: 0.5, lambda: Some(0.4) }),
    ] {
        add(name, &move |s| s.expert.activation = activation);
    }
    add("expert bias", &|s| s.expert.bias = true);
    add("expert norm", &|s| s.expert.norm = Some(RmsNorm { unit_offset: true, ..NORM }));
    add("expert norm, scaled first", &|s| {
        s.expert.norm = Some(RmsNorm { scale_first: true, ..NORM });
    });
    let latent = |s: &mut LayerSpec| {
        s.dims.routed_hidden = 24;
        s.input_transform.steps = vec![TransformStep::Linear { width: 24 }];
        s.output_transform.steps = vec![TransformStep::Linear { width: 48 }];
    };
    add("latent", &latent);
    add("latent with norm", &move |s| {
        latent(s);
        s.input_transform.steps.push(TransformStep::RmsNorm(NORM));
    });
    add("output transform that is no sum", &|s| {
        s.output_transform.steps = vec![TransformStep::RmsNorm(NORM)];
    });
    add("weight on input", &|s| {
        s.router = RouterSpec {
            weight_on: WeightOn::Input,
            weight_from: WeightFrom::SigmoidChosen,
            score: Score::Logits,
            renormalise: Renormalise::None,
            ..RouterSpec::softmax(8, 1, false)
        };
    });
    add("correction and groups", &|s| {
        s.router.score = Score::Sigmoid;
        s.router.correction = Correction::OnScore;
        s.router.groups = Some(Groups {
            count: 4,
            keep: 2,
            score: GroupScore::TopTwoSum,
            fill: GroupFill::NegativeInfinity,
        });
    });
    add("identity experts", &|s| s.router.idle = Some(IdleExperts::Identity { count: 3 }));
    add("skip experts", &|s| s.router.idle = Some(IdleExperts::Skip { count: 3 }));
    add("scale on weights", &|s| s.routed_scale.factor = 2.5);
    add("scale on output", &|s| s.routed_scale = RoutedScale { factor: 2.5, on: ScaleOn::Output });
    add("shared", &|s| s.shared = Some(shared()));
    add("shared, scale on output", &|s| {
        s.shared = Some(shared());
        s.routed_scale = RoutedScale { factor: 16.0, on: ScaleOn::Output };
    });
    add("shared with gate", &|s| {
        s.shared = Some(SharedSpec { sigmoid_gate: true, ..shared() });
    });
    add("two shared with biases", &|s| {
        s.shared = Some(SharedSpec { count: 2, bias: true, ..shared() });
    });
    add("shared averaged", &|s| {
        s.shared = Some(SharedSpec { combine: SharedCombine::Average, ..shared() });
    });
    add("shared weighted by the router", &|s| {
        s.shared =
            Some(SharedSpec { count: 2, combine: SharedCombine::RouterWeighted, ..shared() });
        s.router.weight_from = WeightFrom::JointSoftmax { shared: 2 };
        s.router.renormalise = Renormalise::None;
    });
    add("shared with norms", &|s| {
        s.shared = Some(SharedSpec { input_norm: Some(NORM), output_norm: Some(NORM), ..shared() });
    });
    add("output bias", &|s| s.output.bias = true);
    add("output norm", &|s| s.output.norm = Some(NORM));
    add("output multiplier", &|s| s.output.multiplier = 0.22);
    all
}

/// Kernels that can run `layer` on this machine.
pub fn kernels_for(layer: &LoadedLayer) -> Vec<&'static str> {
    let (request, machine) = (Request::of(layer, ActivationDtype::F32), Machine::detect());
    let able = |kernel: &KernelDesc| failing_conditions(kernel, &request, &machine).is_empty();
    KERNELS.iter().filter(|kernel| able(kernel)).map(|kernel| kernel.name).collect()
}

/// Kernels that can run layers of floats on this machine.
pub fn kernels() -> Vec<&'static str> {
    kernels_for(&random_layer(&plain(), FloatType::F32, 0).expect("the layer is plain"))
}

/// Hidden states of unit variance, rounded to `dtype`.
pub fn rows(dtype: ActivationDtype, tokens: usize, width: usize, seed: u64) -> Vec<f32> {
    let random = &mut Random::new(seed);
    (0..tokens * width).map(|_| dtype.round(random.normal() as f32)).collect()
}

/// ‖y − r‖² / ‖r‖².
pub fn nmse(y: &[f32], r: &[f64]) -> f64 {
    assert_eq!(y.len(), r.len());
    let error: f64 = y.iter().zip(r).map(|(y, r)| (f64::from(*y) - r).powi(2)).sum();
    let norm: f64 = r.iter().map(|r| r * r).sum();
    if norm == 0.0 { error } else { error / norm }
}

/// Options for a named kernel on two threads.
pub fn options(kernel: Option<&str>, dtype: ActivationDtype) -> Options {
    let options = Options::new(dtype, 2).expect("two threads can be started");
    Options { kernel: kernel.map(str::to_owned), ..options }
}

/// A runner of one rank.
pub fn runner(layer: &LoadedLayer, kernel: Option<&str>, dtype: ActivationDtype) -> MoeRunner {
    MoeRunner::new(layer.ready(&options(kernel, dtype)).expect("the kernel can run the layer"))
}

/// The layer's true output on `hidden`, in f32 and in the layer's dtype (with its scale undone).
pub fn forward(runner: &mut MoeRunner, hidden: &[f32]) -> Vec<f32> {
    let mut out = vec![f32::NAN; hidden.len()];
    let result = runner
        .forward(&ForwardInput::new(Rows::F32(hidden)), RowsMut::F32(&mut out))
        .expect("the input fits the layer");
    let scale = result.output_scale;
    out.iter_mut().for_each(|v| *v *= scale);
    out
}

/// A pass, with what it did.
pub fn reported(
    runner: &mut MoeRunner,
    input: &ForwardInput<'_>,
    out: &mut [f32],
) -> (ForwardOutput, Report) {
    let mut report = Report::default();
    let done = runner
        .forward_reporting(input, RowsMut::F32(out), Some(&mut report))
        .expect("the input fits the layer");
    (done, report)
}

/// The reference's output on `hidden`.
pub fn truth(layer: &LoadedLayer, hidden: &[f32]) -> Vec<f64> {
    reference::layer(layer, hidden, None, None).expect("the input fits the layer").output
}

/// Sizes without sequence parallelism.
pub fn sizes(tp: usize, dp: usize, pcp: usize, expert_parallel: bool) -> Sizes {
    Sizes { tp, dp, pcp, expert_parallel, sequence_parallel: false }
}

/// Every way of splitting that is promised, with every exchange that can serve it.
pub fn splits() -> Vec<(String, Parallel)> {
    let sequence = |s: Sizes| Sizes { sequence_parallel: true, ..s };
    let mut all = Vec::new();
    for (sizes, micro_batches) in [
        (sizes(2, 1, 1, false), 1),
        (sizes(4, 1, 1, false), 1),
        (sizes(2, 1, 1, true), 1),
        (sizes(1, 2, 1, false), 1),
        (sizes(1, 2, 1, true), 1),
        (sizes(1, 3, 1, true), 1),
        (sizes(1, 8, 1, true), 1),
        (sizes(2, 2, 1, false), 1),
        (sizes(2, 2, 1, true), 1),
        (sizes(1, 1, 2, false), 1),
        (sizes(1, 1, 2, true), 1),
        (sequence(sizes(2, 1, 1, true)), 1),
        (sequence(sizes(2, 2, 1, true)), 1),
        (sizes(1, 2, 1, true), 2),
        (sizes(2, 1, 1, true), 3),
    ] {
        for exchange in [ExchangeKind::Auto, ExchangeKind::Naive] {
            // the placement and the row format have nothing to do with each other: one loop for both
            for (placement, row_format) in [
                (Placement::Linear, RowFormat::Standard),
                (Placement::RoundRobin, RowFormat::Batched),
            ] {
                let parallel = Parallel {
                    sizes,
                    placement,
                    exchange,
                    row_format,
                    micro_batches,
                    ..Parallel::default()
                };
                all.push((
                    format!("{sizes:?} {exchange:?} {placement:?} {row_format:?} ×{micro_batches}"),
                    parallel,
                ));
            }
        }
    }
    all
}

/// The results of a batch through a layer that is split as `parallel` says, over threads.
pub fn split(
    layer: &LoadedLayer,
    options: &Options,
    parallel: &Parallel,
    hidden: &[f32],
) -> Result<BatchOutput> {
    let outputs = run_ranks(parallel.sizes.ranks(), |world| {
        let groups = comm::Groups::new(world.clone(), parallel.sizes)?;
        let batch = Batch { hidden, router_logits: None, input_ids: None };
        forward_batch(layer, options, &groups, parallel, &batch, None)
    })?;
    // every rank gets all results; where ranks have the same rows, they agree bit by bit
    for other in &outputs[1..] {
        assert_eq!(other.output, outputs[0].output);
    }
    Ok(outputs.into_iter().next().expect("one rank at least"))
}
