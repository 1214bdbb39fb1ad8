//! Every option of a layer against the float64 reference, in every dtype; the promises about bits.

use moe_runner::hidden::ActivationDtype::{Bf16, F16, F32};
use moe_runner::hidden::{Rows, RowsMut};
use moe_runner::router::Simulator;
use moe_runner::router::Strategy;
use moe_runner::runner::{ForwardInput, MoeRunnerInterface, Report, reference};
use moe_runner::spec::{
    Correction, GroupFill, GroupScore, Groups, LayerSpec, Renormalise, RouterSpec, Score,
    Selection, WeightFrom,
};
use moe_runner::weights::{FloatType, random_layer};

use crate::layers::{forward, nmse, plain, reported, rows, variants};
use crate::{gpu, runner};

/// Layers that differ in their routing.
fn routings() -> Vec<(&'static str, LayerSpec)> {
    let mut all = Vec::new();
    let mut add = |name, change: &dyn Fn(&mut RouterSpec)| {
        let mut spec = plain();
        spec.router = RouterSpec::softmax(16, 4, true);
        change(&mut spec.router);
        all.push((name, spec));
    };
    add("multiplier and cap", &|r| (r.logit_multiplier, r.soft_cap) = (0.7, Some(2.0)));
    add("sqrt softplus", &|r| r.score = Score::SqrtSoftplus);
    add("sigmoid, bias on logits", &|r| {
        (r.score, r.correction) = (Score::Sigmoid, Correction::OnLogits);
    });
    for score in [GroupScore::Max, GroupScore::TopTwoSum] {
        for fill in [GroupFill::Zero, GroupFill::NegativeInfinity] {
            add("groups", &move |r| {
                r.score = Score::Sigmoid;
                r.correction = Correction::OnScore;
                r.groups = Some(Groups { count: 4, keep: 2, score, fill });
            });
        }
    }
    add("per group", &|r| r.selection = Selection::TopKPerGroup { groups: 2 });
    add("sparse mixer", &|r| {
        *r = RouterSpec {
            selection: Selection::SparseMixer { eps: 0.2 },
            ..RouterSpec::softmax(16, 2, false)
        };
    });
    add("softmax of the chosen", &|r| {
        (r.score, r.weight_from) = (Score::Logits, WeightFrom::SoftmaxChosen);
        r.renormalise = Renormalise::None;
    });
    add("sigmoid of the chosen", &|r| r.weight_from = WeightFrom::SigmoidChosen);
    add("floor", &|r| r.renormalise = Renormalise::SumFloor { floor: 0.5 });
    add("norm", &|r| r.renormalise = Renormalise::PNorm { p: 1.5 });
    add("scale by id", &|r| r.per_expert_scale = true);
    all
}

/// The reference routes by the kernel's own logits, so that ids must be equal even where the last bit of
/// a logit would decide; the logits are compared by themselves.
#[test]
fn every_option_holds_the_bound_in_every_dtype() {
    let _alone = crate::alone();
    if gpu(F32).is_none() {
        return;
    }
    let mut worst = 0.0f64;
    for (dtype, float) in [(F32, FloatType::F32), (Bf16, FloatType::Bf16), (F16, FloatType::F16)] {
        let Some(options) = gpu(dtype) else { return };
        for (name, spec) in variants().into_iter().chain(routings()) {
            let layer = random_layer(&spec, float, 11).unwrap();
            let mut runner = runner(&layer, &options);
            for tokens in [1, 7, 300] {
                let hidden = rows(dtype, tokens, spec.dims.hidden, tokens as u64);
                let mut y = vec![f32::NAN; hidden.len()];
                let input = ForwardInput::new(Rows::F32(&hidden));
                let (done, report) = reported(&mut runner, &input, &mut y);
                let place = format!("{name}, {dtype:?}, T={tokens}");
                let logits: Vec<f64> = reference::router_logits(&layer, &hidden)
                    .unwrap()
                    .into_iter()
                    .map(f64::from)
                    .collect();
                let error = nmse(&report.router_logits, &logits);
                assert!(error <= 1e-11, "{place}: logits, NMSE {error:e}");
                let logits = Some(&report.router_logits[..]);
                let truth = reference::layer(&layer, &hidden, logits, None).unwrap();
                assert_eq!(report.routing.ids, truth.routing.ids, "{place}");
                let scale = done.output_scale;
                y.iter_mut().for_each(|v| *v = dtype.round(*v) * scale);
                let error = nmse(&y, &truth.output);
                let bound = runner.choice().kernel.bound(dtype, false);
                assert!(error <= bound, "{place}: NMSE {error:e}");
                if dtype == F32 {
                    worst = worst.max(error);
                }
            }
        }
    }
    println!("worst NMSE in f32: {worst:e}");
}

/// Routing by token id: the table's experts, weighed by the gate.
#[test]
fn token_ids_choose_by_the_table() {
    let _alone = crate::alone();
    let Some(options) = gpu(F32) else { return };
    let mut spec = plain();
    spec.router.selection = Selection::HashTable { vocabulary: 10 };
    let layer = random_layer(&spec, FloatType::F32, 3).unwrap();
    let mut runner = runner(&layer, &options);
    let hidden = rows(F32, 5, 48, 1);
    let ids = [0, 9, 3, 3, 7];
    let input = ForwardInput { input_ids: Some(&ids), ..ForwardInput::new(Rows::F32(&hidden)) };
    let mut y = vec![0.0; hidden.len()];
    let (_, report) = reported(&mut runner, &input, &mut y);
    let logits = Some(&report.router_logits[..]);
    let truth = reference::layer(&layer, &hidden, logits, Some(&ids)).unwrap();
    assert_eq!(report.routing.ids, truth.routing.ids);
    assert!(nmse(&y, &truth.output) <= 1e-11);
    let outside = [0, 10, 3, 3, 7];
    let input = ForwardInput { input_ids: Some(&outside), ..input };
    let error = runner.forward(&input, RowsMut::F32(&mut y)).unwrap_err().to_string();
    assert!(error.contains("token 1: id 10 is outside the vocabulary"), "{error}");
}

/// Two runs, and any other rows in the batch, change no bit.
#[test]
fn a_row_does_not_depend_on_the_others() {
    let _alone = crate::alone();
    let Some(options) = gpu(Bf16) else { return };
    for (name, spec) in variants() {
        let layer = random_layer(&spec, FloatType::Bf16, 4).unwrap();
        let mut runner = runner(&layer, &options);
        let width = spec.dims.hidden;
        let hidden = rows(Bf16, 200, width, 8);
        let all = forward(&mut runner, &hidden);
        assert_eq!(forward(&mut runner, &hidden), all, "{name}: again");
        for range in [0..1, 13..14, 150..200] {
            let range = range.start * width..range.end * width;
            assert_eq!(forward(&mut runner, &hidden[range.clone()]), all[range], "{name}");
        }
    }
}

/// What a pass tells about itself is what the processor tells.
#[test]
fn reports_are_those_of_the_processor() {
    let _alone = crate::alone();
    let Some(options) = gpu(F32) else { return };
    for (name, spec) in variants() {
        let layer = random_layer(&spec, FloatType::F32, 6).unwrap();
        let hidden = rows(F32, 9, spec.dims.hidden, 2);
        let input = ForwardInput::new(Rows::F32(&hidden));
        let mut y = vec![0.0; hidden.len()];
        let (done, ours) = reported(&mut runner(&layer, &options), &input, &mut y);
        let mut host = crate::layers::runner(&layer, Some("cpu_portable"), F32);
        let (expected, theirs) = reported(&mut host, &input, &mut y);
        assert_eq!(done, expected, "{name}");
        assert_eq!(ours.routing.ids, theirs.routing.ids, "{name}");
        assert_eq!((ours.weight_bytes, ours.flops), (theirs.weight_bytes, theirs.flops), "{name}");
        assert_eq!(ours.shared_complete, theirs.shared_complete, "{name}");
        assert_eq!(ours.shared.is_some(), theirs.shared.is_some(), "{name}");
        assert_eq!(
            ours.routing.shared_weights.len(),
            theirs.routing.shared_weights.len(),
            "{name}"
        );
    }
}

/// A simulated routing takes the place of the router's, and the gate runs all the same.
#[test]
fn simulated_routing() {
    let _alone = crate::alone();
    let Some(options) = gpu(F32) else { return };
    let layer = random_layer(&plain(), FloatType::F32, 6).unwrap();
    let hidden = rows(F32, 9, 48, 2);
    let simulator = || Some(Simulator::new(Strategy::UniformRandom, 5));
    let mut ours = runner(&layer, &options).with_simulator(simulator());
    let mut host =
        crate::layers::runner(&layer, Some("cpu_portable"), F32).with_simulator(simulator());
    let (mut y, mut want) = (vec![0.0; hidden.len()], vec![0.0; hidden.len()]);
    let input = ForwardInput::new(Rows::F32(&hidden));
    let (_, a) = reported(&mut ours, &input, &mut y);
    let (_, b) = reported(&mut host, &input, &mut want);
    assert_eq!((a.routing.ids, a.routing.weights), (b.routing.ids, b.routing.weights));
    assert_eq!(a.router_logits.len(), b.router_logits.len());
    let want: Vec<f64> = want.into_iter().map(f64::from).collect();
    assert!(nmse(&y, &want) <= 1e-11);
    let mut empty = Report::default();
    let none = ForwardInput::new(Rows::F32(&[]));
    let done = ours.forward_reporting(&none, RowsMut::F32(&mut []), Some(&mut empty)).unwrap();
    assert_eq!((done.tokens, empty.routing.tokens), (0, 0));
}
