//! Hopper's kernels in the layer: chosen by themselves where they can run, within the bounds, for few and
//! for many tokens, with the same bits from run to run.

use moe_kernels::numerics::quantise::{GroupScale, Qdq};
use moe_runner::hidden::ActivationDtype::Bf16;
use moe_runner::hidden::Rows;
use moe_runner::runner::{ForwardInput, MoeRunner, MoeRunnerInterface, Options, reference};
use moe_runner::spec::{
    Activation, Dims, Granularity, LayerSpec, RoutedScale, RouterSpec, ScaleOn, SharedCombine,
    SharedSpec,
};
use moe_runner::weights::{Element, FloatType, RandomFormat, ScaleType, random_layer};

use crate::layers::{forward, nmse, plain, reported, rows, shared};
use crate::on_device::OnDevice;
use crate::{gpu, scaled};

/// Formats, and the kernels that they get.
pub(crate) fn formats() -> [(&'static str, RandomFormat); 4] {
    let group = Some(Qdq::Fp8Group { size: 128, scale: GroupScale::F32 });
    let fp8 = scaled(Element::E4m3, ScaleType::F32, Granularity::Block, [128, 128], group);
    let mxfp4 = scaled(Element::E2m1, ScaleType::E8m0, Granularity::Group, [1, 32], None);
    let int4 = scaled(Element::Uint4, ScaleType::Bf16, Granularity::Group, [1, 128], None);
    [
        ("cuda_sm90_bf16", RandomFormat::Float(FloatType::Bf16)),
        ("cuda_sm90_fp8", fp8),
        ("cuda_sm90_mxfp4", mxfp4),
        ("cuda_sm90_int4", int4),
    ]
}

/// Layers of sizes that these kernels take.
fn specs() -> Vec<(&'static str, LayerSpec)> {
    let base = || LayerSpec {
        dims: Dims { hidden: 512, routed_hidden: 512, intermediate: 256 },
        router: RouterSpec::softmax(8, 2, true),
        ..plain()
    };
    let mut all = vec![("plain", base())];
    let mut add = |name, change: &dyn Fn(&mut LayerSpec)| {
        let mut spec = base();
        change(&mut spec);
        all.push((name, spec));
    };
    let wide = SharedSpec { intermediate: 256, ..shared() };
    add("shared, scale on output", &|s| {
        s.shared = Some(wide.clone());
        s.routed_scale = RoutedScale { factor: 2.5, on: ScaleOn::Output };
    });
    add("two shared, averaged", &|s| {
        let combine = SharedCombine::Average;
        s.shared = Some(SharedSpec { count: 2, combine, ..wide.clone() });
    });
    add("shared of another size", &|s| s.shared = Some(shared()));
    add("biases", &|s| s.expert.bias = true);
    add("clamped", &|s| {
        s.expert.activation = Activation::ClampedSwiglu { alpha: 1.702, beta: 1.0, limit: 0.7 };
    });
    all
}

fn hopper() -> Option<Options> {
    let options = Options { kernel: None, ..gpu(Bf16)? };
    match options.machine.compute_capability {
        Some(90) => Some(options),
        other => {
            println!("skipped, no Hopper here but {other:?}");
            None
        }
    }
}

#[test]
fn hoppers_kernels_are_chosen_and_hold_their_bounds() {
    let _alone = crate::alone();
    let Some(options) = hopper() else { return };
    for (kernel, format) in formats() {
        let mut worst = 0.0f64;
        for (name, spec) in specs() {
            if name == "shared of another size" && format != RandomFormat::Float(FloatType::Bf16) {
                continue;
            }
            let layer = random_layer(&spec, format, 21).unwrap();
            let ready = layer.ready(&options);
            let mut runner = MoeRunner::new(ready.unwrap_or_else(|error| panic!("{error}")));
            assert_eq!(runner.choice().kernel.name, kernel, "{name}");
            let quantised = kernel == "cuda_sm90_fp8";
            for tokens in [1, 5, 16, 64, 300, 1500] {
                let hidden = rows(Bf16, tokens, 512, tokens as u64);
                let mut y = vec![f32::NAN; hidden.len()];
                let input = ForwardInput::new(Rows::F32(&hidden));
                let (done, report) = reported(&mut runner, &input, &mut y);
                let logits = Some(&report.router_logits[..]);
                let truth = reference::layer(&layer, &hidden, logits, None).unwrap();
                let place = format!("{kernel}, {name}, T={tokens}");
                assert_eq!(report.routing.ids, truth.routing.ids, "{place}");
                y.iter_mut().for_each(|v| *v = Bf16.round(*v) * done.output_scale);
                let error = nmse(&y, &truth.output);
                let bound = runner.choice().kernel.bound(Bf16, quantised);
                println!("{place}: NMSE {error:.2e}, at most {bound:.0e}");
                worst = worst.max(error / bound);
                let again = forward(&mut runner, &hidden);
                assert_eq!(again, forward(&mut runner, &hidden), "{place}: again");
            }
        }
        assert!(worst <= 1.0, "{kernel}: {worst} times the bound");
    }
}

/// Rows of the GPU are read where they lie, gate and routing come in the experts' launch, and the output is
/// written where it is to be: with the bits of rows that come from the host, as a graph too, and what is wrong
/// with the rows is told. A gap between rows that keeps no alignment makes a copy.
#[test]
fn rows_of_the_gpu_in_place() {
    let _alone = crate::alone();
    let Some(options) = hopper() else { return };
    for (kernel, format) in formats() {
        for (name, spec) in
            specs().into_iter().filter(|(name, _)| *name != "shared of another size")
        {
            let layer = random_layer(&spec, format, 23).unwrap();
            let ready = layer.ready(&options).unwrap();
            let mut runner = MoeRunner::new(ready);
            for (tokens, stride) in
                [(1, 512), (5, 520), (16, 512), (16, 517), (40, 512), (1000, 512)]
            {
                let hidden = rows(Bf16, tokens, 512, tokens as u64);
                let want: Vec<f32> =
                    forward(&mut runner, &hidden).iter().map(|v| Bf16.round(*v)).collect();
                let mut x = OnDevice::new(&runner, [tokens, 512], stride);
                let mut y = OnDevice::new(&runner, [tokens, 512], stride);
                x.write(&hidden);
                let stream = &x.stream;
                let graph = stream
                    .capture(|| {
                        runner.forward(&ForwardInput::new(x.rows()), y.rows_mut()).unwrap();
                        Ok(())
                    })
                    .unwrap();
                for _ in 0..3 {
                    // SAFETY: rows, weights and working memory are as they were captured.
                    unsafe { stream.replay(&graph) }.unwrap();
                }
                runner.synchronize().unwrap();
                assert_eq!(y.read(), want, "{kernel}, {name}, T={tokens}, stride {stride}");
                let mut bad = hidden.clone();
                bad[tokens / 2 * 512 + 77] = f32::INFINITY;
                x.write(&bad);
                runner.forward(&ForwardInput::new(x.rows()), y.rows_mut()).unwrap();
                let error = runner.synchronize().unwrap_err().to_string();
                let place = format!("hidden_states: row {}, column 77:", tokens / 2);
                assert!(error.starts_with(&place), "{error}");
            }
        }
    }
}

/// What these kernels cannot do is left to the one in f32, with the reasons.
#[test]
fn other_layers_are_left_to_f32() {
    let _alone = crate::alone();
    let Some(options) = hopper() else { return };
    let (_, mut spec) = specs().swap_remove(0);
    spec.expert.gated = false;
    let layer = random_layer(&spec, FloatType::Bf16, 2).unwrap();
    let choice = layer.choose(&options).unwrap();
    assert_eq!(choice.kernel.name, "cuda_f32");
    let why = choice.rejected.iter().find(|r| r.kernel.name == "cuda_sm90_bf16").unwrap();
    assert!(why.to_string().contains("no experts without a gate projection"), "{why}");
}
