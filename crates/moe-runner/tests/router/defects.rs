//! What other routers got wrong, one test each; every test fails when the defect is put back.

use moe_runner::router::RouterTensors;
use moe_runner::spec::{
    Correction, GroupFill, GroupScore, Groups, IdleExperts, Renormalise, RouterSpec, Score,
    Selection, WeightFrom,
};

use super::{assert_weights, correction, ids, route, route_with_ids, scored};

/// Grouped routing that falls back to ungrouped because there is one group, or one expert in each,
/// forgot the score function and the factor.
#[test]
fn r1_degenerate_groups_keep_score_and_factor() {
    for (count, keep) in [(1, 1), (3, 3)] {
        let groups =
            Groups { count, keep, score: GroupScore::Max, fill: GroupFill::NegativeInfinity };
        let spec = RouterSpec { groups: Some(groups), ..scored(Score::Sigmoid, 3, 2) };
        let routing = route(&spec, 3.0, RouterTensors::default(), &[0.0, -5.0, -9.0]);
        assert_eq!(ids(&routing), [0, 1]);
        assert_weights(&routing.weights, &[1.5, 3.0 / (1.0 + 5.0_f64.exp())]);
    }
}

/// Softmax with a correction bias and without groups ignored the bias, and the factor.
#[test]
fn r2_softmax_heeds_bias_and_factor() {
    let spec = RouterSpec { correction: Correction::OnScore, ..RouterSpec::softmax(4, 1, false) };
    let routing = route(&spec, 4.0, correction(&[0.0, 0.0, 1.0, 0.0]), &[0.0; 4]);
    assert_eq!(ids(&routing), [2]);
    assert_weights(&routing.weights, &[1.0]);
}

/// Plain top-k and custom routing functions dropped the factor: no source of weights may.
#[test]
fn r3_the_factor_reaches_every_kind_of_weight() {
    let mut specs = Vec::new();
    for score in [Score::Softmax, Score::Sigmoid, Score::SqrtSoftplus, Score::Logits] {
        specs.push(scored(score, 4, 2));
    }
    for weight_from in [
        WeightFrom::SoftmaxChosen,
        WeightFrom::SigmoidChosen,
        WeightFrom::JointSoftmax { shared: 1 },
    ] {
        specs.push(RouterSpec { weight_from, ..scored(Score::Logits, 4, 2) });
    }
    for selection in [
        Selection::TopKPerGroup { groups: 2 },
        Selection::SparseMixer { eps: 0.01 },
        Selection::HashTable { vocabulary: 1 },
    ] {
        specs.push(RouterSpec { selection, ..scored(Score::Softmax, 4, 2) });
    }
    for renormalise in [
        Renormalise::Sum { eps: 1e-20 },
        Renormalise::SumFloor { floor: 1e-12 },
        Renormalise::PNorm { p: 1.0 },
    ] {
        specs.push(RouterSpec { renormalise, ..scored(Score::Softmax, 4, 2) });
    }
    for spec in specs {
        let hash_table = matches!(spec.selection, Selection::HashTable { .. }).then(|| vec![1, 3]);
        let tensors = RouterTensors { hash_table, ..RouterTensors::default() };
        let logits = [0.3, 0.2, 0.9, 0.1, 0.4];
        let logits = &logits[..spec.logits()];
        let once = route_with_ids(&spec, 1.0, tensors.clone(), logits, Some(&[0]));
        let twice = route_with_ids(&spec, 2.0, tensors, logits, Some(&[0]));
        let double = |weights: &[f32]| weights.iter().map(|w| w * 2.0).collect::<Vec<_>>();
        assert!(once.weights.iter().all(|&w| w > 0.0));
        assert_eq!(twice.weights, double(&once.weights), "{spec:?}");
        assert_eq!(twice.shared_weights, double(&once.shared_weights), "{spec:?}");
    }
}

/// Identity experts worked on one kind of device only, and were masked to expert 0, whose load
/// they then counted for.
#[test]
fn r4_identity_experts_are_ids_of_their_own() {
    let idle = Some(IdleExperts::Identity { count: 2 });
    let spec =
        RouterSpec { idle, correction: Correction::OnScore, ..RouterSpec::softmax(2, 2, false) };
    let routing = route(&spec, 1.0, correction(&[0.0, 0.0, 1.0, 2.0]), &[0.0; 4]);
    assert_eq!(ids(&routing), [3, 2]);
    assert_eq!(routing.load(4), [0, 0, 1, 1]);
}

/// A search seeded with −1 returned expert 0 again and again where all biases were below −1.
#[test]
fn r6_very_negative_choices_are_distinct_experts() {
    let spec = RouterSpec { correction: Correction::OnScore, ..scored(Score::Sigmoid, 5, 3) };
    let bias = [-30_000.0, -20_000.0, -50_000.0, -10_000.0, -40_000.0];
    let routing = route(&spec, 1.0, correction(&bias), &[0.0; 5]);
    assert_eq!(ids(&routing), [3, 1, 0]);
}

/// Weights recovered as (score + bias) − bias lost their low bits.
#[test]
fn r6_a_large_bias_costs_no_bits_of_the_weight() {
    let spec = RouterSpec { correction: Correction::OnScore, ..scored(Score::SqrtSoftplus, 2, 1) };
    let routing = route(&spec, 1.0, correction(&[10.0, 0.0]), &[-14.0, 0.0]);
    assert_eq!(ids(&routing), [0]);
    assert_weights(&routing.weights, &[(-14.0_f64).exp().ln_1p().sqrt()]);
}
