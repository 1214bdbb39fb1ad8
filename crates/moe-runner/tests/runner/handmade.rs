//! Layers that are put together by hand: what does not fit is refused when they are made ready, with
//! the expert's number; stacks of experts in foreign memory; experts whose rows somebody else routed.

use std::sync::Arc;

use moe_runner::Error;
use moe_runner::hidden::ActivationDtype::F32;
use moe_runner::hidden::{Rows, RowsMut};
use moe_runner::router::{LogicalId, Routing};
use moe_runner::runner::{
    ForwardInput, MoeRunner, MoeRunnerInterface, NonFinite, Options, RoutedExperts,
};
use moe_runner::spec::{SharedSpec, WeightOn};
use moe_runner::weights::{
    Bytes, Expert, FloatType, GateUp, LoadedLayer, Matrix, Stack, StackedExperts, random_layer,
};

use super::layers::{forward, nmse, options, plain, reported, rows, runner, shared, truth};

fn refusal(layer: &LoadedLayer) -> String {
    match layer.ready(&options(None, F32)) {
        Err(Error::Spec { layer, reason }) => format!("{layer}: {reason}"),
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let mut spec = plain();
    spec.expert.bias = true;
    spec.shared = Some(SharedSpec { count: 2, ..shared() });
    let good = random_layer(&spec, FloatType::F32, 1).unwrap();
    assert!(good.ready(&options(None, F32)).is_ok());
    let matrix =
        |shape: [usize; 2]| Matrix::from_f32(&vec![0.0; shape[0] * shape[1]], shape).unwrap();
    type Change = Box<dyn Fn(&mut LoadedLayer)>;
    let wide = matrix([40, 50]);
    let narrow = matrix([48, 39]);
    let cases: Vec<(Change, &str)> = vec![
        (Box::new(|l| l.experts[3].gate = None), "expert 3: no gate projection"),
        (
            Box::new(move |l| l.experts[5].up = wide.clone()),
            "expert 5: the up projection is [40, 50], [40, 48] is needed",
        ),
        (
            Box::new(move |l| l.experts[7].down = narrow.clone()),
            "expert 7: the down projection is [48, 39], [48, 40] is needed",
        ),
        (
            Box::new(|l| l.experts[2].down_bias = Some(vec![0.0; 47])),
            "expert 2: the down bias has 47 values, 48 are needed",
        ),
        (Box::new(|l| l.experts[0].up_bias = None), "expert 0: the up bias is described, but not"),
        (Box::new(|l| l.spec.expert.bias = false), "expert 0: the gate bias is given, but not"),
        (Box::new(|l| l.experts[1].norm = Some(vec![1.0; 48])), "expert 1: the norm is given"),
        (Box::new(|l| l.spec.dims.intermediate = 41), "expert 0: the gate projection is [40, 48]"),
        (Box::new(|l| drop(l.experts.pop())), "7 experts are given, the router chooses among 8"),
        (
            Box::new(|l| drop(l.shared.as_mut().unwrap().experts.pop())),
            "shared experts: 1 are given, 2 are described",
        ),
        (Box::new(|l| l.spec.shared = None), "shared experts are given, but not described"),
        (Box::new(|l| l.output.bias = Some(vec![])), "the output bias is given, but not described"),
    ];
    for (change, says) in cases {
        let mut layer = good.clone();
        change(&mut layer);
        let reason = refusal(&layer);
        assert!(reason.starts_with("model.layers.0.mlp: ") && reason.contains(says), "{reason}");
    }
}

/// Routing that was finished elsewhere is taken as it is: with the router's own results the bits are
/// the router's, and slots that are not here add nothing.
#[test]
fn finished_routing_is_taken_as_it_is() {
    let mut spec = plain();
    spec.shared = Some(shared());
    let layer = random_layer(&spec, FloatType::F32, 5).unwrap();
    let hidden = rows(F32, 9, 48, 2);
    let mut runner = runner(&layer, None, F32);
    let (mut by_router, mut given) = (vec![0.0; hidden.len()], vec![0.0; hidden.len()]);
    let input = ForwardInput::new(Rows::F32(&hidden));
    let (_, report) = reported(&mut runner, &input, &mut by_router);
    let Routing { ids, weights, .. } = &report.routing;
    let ids: Vec<i32> = ids.iter().map(|id| id.0 as i32).collect();
    let input = ForwardInput::routed(Rows::F32(&hidden), &ids, weights);
    let (_, report) = reported(&mut runner, &input, &mut given);
    assert_eq!(given, by_router);
    assert!(report.router_logits.is_empty());

    // a third slot that is not here, of either kind, changes nothing
    for absent in [-1, 8, i32::MAX] {
        let wide = |slot: &dyn Fn(usize) -> i32| -> Vec<i32> {
            (0..9).flat_map(|t| [slot(2 * t), absent, slot(2 * t + 1)]).collect()
        };
        let ids = wide(&|slot| ids[slot]);
        let weights: Vec<f32> =
            weights.chunks(2).flat_map(|pair| [pair[0], 0.5, pair[1]]).collect();
        let input = ForwardInput::routed(Rows::F32(&hidden), &ids, &weights);
        let (_, report) = reported(&mut runner, &input, &mut given);
        assert_eq!(given, by_router, "{absent}");
        assert_eq!(report.routing.ids.len(), 27);
        assert!(report.routing.ids[1].0 == absent as u32 || absent < 0);
    }

    let wrong = |ids: &[i32], weights: &[f32]| {
        let input = ForwardInput::routed(Rows::F32(&hidden), ids, weights);
        let mut out = vec![0.0; hidden.len()];
        let mut runner = self::runner(&layer, None, F32);
        runner.forward(&input, RowsMut::F32(&mut out)).unwrap_err().to_string()
    };
    assert!(wrong(&[0; 10], &[1.0; 10]).contains("10 ids and 10 weights for 9 tokens"));
    assert!(wrong(&[0; 9], &[1.0; 8]).contains("9 ids and 8 weights for 9 tokens"));
    assert!(wrong(&[0; 9], &[f32::NAN; 9]).contains("the weight of slot 0 is NaN"));
    let twice = ForwardInput { expert_ids: Some(&[LogicalId(0); 18]), ..input };
    let mut out = vec![0.0; hidden.len()];
    assert!(runner.forward(&twice, RowsMut::F32(&mut out)).is_err());
}

/// Memory of somebody else's.
struct Foreign(Vec<u8>);

impl AsRef<[u8]> for Foreign {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// Experts from stacks in every layout equal the experts that they were stacked from, bit by bit.
#[test]
fn stacks_of_experts_are_read_where_they_lie() {
    let mut spec = plain();
    spec.expert.bias = true;
    let layer = random_layer(&spec, FloatType::F32, 3).unwrap();
    let hidden = rows(F32, 7, 48, 4);
    let want = forward(&mut runner(&layer, None, F32), &hidden);
    let row = |matrix: &Matrix, i: usize| {
        let mut row = vec![0.0; matrix.cols()];
        matrix.decode_row(i, &mut row);
        row
    };
    // [out, in] of one expert, in memory order
    let stored = |rows: Vec<Vec<f32>>, transposed: bool| -> Vec<f32> {
        let cols = rows[0].len();
        match transposed {
            false => rows.concat(),
            true => (0..cols).flat_map(|k| rows.iter().map(move |row| row[k])).collect(),
        }
    };
    for transposed in [false, true] {
        for layout in [GateUp::Halves, GateUp::HalvesUpFirst, GateUp::Interleaved] {
            let order = |i: usize| match layout {
                GateUp::Halves => (i >= 40, i % 40),
                GateUp::HalvesUpFirst => (i < 40, i % 40),
                _ => (i % 2 == 1, i / 2),
            };
            let (mut gate_up, mut down) = (Vec::new(), Vec::new());
            let (mut gate_up_bias, mut down_bias) = (Vec::new(), Vec::new());
            for e in &layer.experts {
                let both = (0..80).map(|i| match order(i) {
                    (true, i) => row(&e.up, i),
                    (false, i) => row(e.gate.as_ref().unwrap(), i),
                });
                gate_up.extend(stored(both.collect(), transposed));
                down.extend(stored((0..48).map(|i| row(&e.down, i)).collect(), transposed));
                gate_up_bias.extend((0..80).map(|i| match order(i) {
                    (true, i) => e.up_bias.as_ref().unwrap()[i],
                    (false, i) => e.gate_bias.as_ref().unwrap()[i],
                }));
                down_bias.extend(e.down_bias.as_ref().unwrap());
            }
            let stack = |values: &[f32], shape| {
                let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                let bytes = Bytes::new(Arc::new(Foreign(bytes)));
                Stack { bytes, float: FloatType::F32, shape, transposed }
            };
            let stacked = StackedExperts {
                gate_up: stack(&gate_up, [8, 80, 48]),
                layout,
                down: stack(&down, [8, 48, 40]),
                gate_up_bias: Some(&gate_up_bias),
                down_bias: Some(&down_bias),
            };
            let experts = stacked.experts().unwrap();
            let y =
                forward(&mut runner(&LoadedLayer { experts, ..layer.clone() }, None, F32), &hidden);
            assert_eq!(y, want, "{layout:?}, transposed {transposed}");

            let short = StackedExperts { down: stack(&down[1..], [8, 48, 40]), ..stacked.clone() };
            let error = short.experts().unwrap_err().to_string();
            assert!(error.contains("down: 61436 bytes are not [8, 48, 40] of f32"), "{error}");
            let narrow = StackedExperts { down: stack(&down, [8, 40, 48]), ..stacked };
            assert!(narrow.experts().unwrap_err().to_string().contains("[8, 48, 40] is needed"));
        }
    }
}

#[test]
fn experts_alone_give_the_routed_sum() {
    let layer = random_layer(&plain(), FloatType::Bf16, 3).unwrap();
    let hidden = rows(F32, 7, 48, 4);
    let truth = truth(&layer, &hidden);
    let mut whole = runner(&layer, None, F32);
    let mut y = vec![0.0; hidden.len()];
    let (_, report) = reported(&mut whole, &ForwardInput::new(Rows::F32(&hidden)), &mut y);
    let ids: Vec<i32> = report.routing.ids.iter().map(|id| id.0 as i32).collect();
    let (spec, experts) = (layer.spec.expert, layer.experts.clone());
    let mut alone =
        RoutedExperts::new(spec, WeightOn::Output, experts, &options(None, F32)).unwrap();
    let mut out = vec![f32::NAN; hidden.len()];
    let weights = &report.routing.weights;
    alone.forward(Rows::F32(&hidden), &ids, weights, RowsMut::F32(&mut out)).unwrap();
    assert_eq!(out, y);
    assert!(nmse(&out, &truth) <= 1e-11);
    assert!(!alone.choice().rejected.is_empty() || !alone.choice().able.is_empty());

    let up = Matrix::from_f32(&[0.0; 41 * 48], [41, 48]).unwrap();
    let odd = Expert { up, ..layer.experts[1].clone() };
    let experts = vec![layer.experts[0].clone(), odd];
    let error = RoutedExperts::new(spec, WeightOn::Output, experts, &options(None, F32));
    let error = error.unwrap_err().to_string();
    assert!(error.contains("expert 1: the up projection is [41, 48]"), "{error}");
    let none = RoutedExperts::new(spec, WeightOn::Output, vec![], &options(None, F32));
    assert!(matches!(none, Err(Error::Spec { .. })));
}

/// Rows that hold anything go through where that is asked for; the others are as without them.
#[test]
fn rows_that_are_not_finite_go_through_where_asked() {
    let layer = random_layer(&plain(), FloatType::F32, 3).unwrap();
    let mut hidden = rows(F32, 5, 48, 4);
    let want = forward(&mut runner(&layer, None, F32), &hidden);
    hidden[48 + 7] = f32::NAN;
    hidden[3 * 48] = f32::INFINITY;
    let options = Options { non_finite: NonFinite::LetThrough, ..options(None, F32) };
    let mut runner = MoeRunner::new(layer.ready(&options).unwrap());
    let mut out = vec![0.0; hidden.len()];
    runner.forward(&ForwardInput::new(Rows::F32(&hidden)), RowsMut::F32(&mut out)).unwrap();
    for t in [0, 2, 4] {
        assert_eq!(out[t * 48..(t + 1) * 48], want[t * 48..(t + 1) * 48], "row {t}");
    }
    // so do weights of a finished routing, which somebody computed from such rows
    let ids = [0, 1, 1, 2, 0, 2, 1, 0, 2, 1];
    let mut weights = [0.5; 10];
    let mut run = |weights: &[f32]| {
        let input = ForwardInput::routed(Rows::F32(&hidden), &ids, weights);
        runner.forward(&input, RowsMut::F32(&mut out)).map(|_| out.clone())
    };
    let want = run(&weights).unwrap();
    (weights[2], weights[6]) = (f32::NAN, f32::INFINITY);
    let out = run(&weights).unwrap();
    for t in [0, 2, 4] {
        assert_eq!(out[t * 48..(t + 1) * 48], want[t * 48..(t + 1) * 48], "row {t}");
    }
}
