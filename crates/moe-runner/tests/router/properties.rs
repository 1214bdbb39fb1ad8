//! Invariances.

use moe_runner::router::{Router, RouterTensors, Routing};
use moe_runner::spec::{Correction, GroupFill, GroupScore, Groups, RouterSpec, Score};
use proptest::prelude::*;

use super::{correction, numbers, route, scored, ulps};

const EXPERTS: usize = 16;

/// The options of a V3-like router: bias, groups, renormalisation, factor.
fn v3() -> RouterSpec {
    let groups = Groups {
        count: 4,
        keep: 2,
        score: GroupScore::TopTwoSum,
        fill: GroupFill::NegativeInfinity,
    };
    RouterSpec {
        correction: Correction::OnScore,
        groups: Some(groups),
        renormalise: RouterSpec::softmax(1, 1, true).renormalise,
        ..scored(Score::Sigmoid, EXPERTS, 4)
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// Experts in another order: the same experts under their new ids, with the same weights.
    #[test]
    fn permuted_experts(
        seed in any::<u64>(),
        order in Just((0..EXPERTS).collect::<Vec<_>>()).prop_shuffle(),
    ) {
        let spec = RouterSpec { groups: None, ..v3() };
        let (logits, bias) = (numbers(seed, EXPERTS), numbers(seed ^ 1, EXPERTS));
        // New expert `at` is old expert `order[at]`.
        let permuted = |values: &[f32]| order.iter().map(|&old| values[old]).collect::<Vec<_>>();
        let plain = route(&spec, 2.5, correction(&bias), &logits);
        let moved = route(&spec, 2.5, correction(&permuted(&bias)), &permuted(&logits));
        let renamed: Vec<usize> = moved.ids.iter().map(|id| order[id.index()]).collect();
        prop_assert_eq!(renamed, plain.ids.iter().map(|id| id.index()).collect::<Vec<_>>());
        prop_assert_eq!(moved.weights, plain.weights);
    }

    /// The factor changes no ids, and weights in proportion.
    #[test]
    fn linear_in_the_factor(seed in any::<u64>(), factor in 0.01_f32..50.0) {
        let (logits, bias) = (numbers(seed, EXPERTS * 3), numbers(seed ^ 1, EXPERTS));
        let one = route(&v3(), 1.0, correction(&bias), &logits);
        let scaled = route(&v3(), factor, correction(&bias), &logits);
        prop_assert_eq!(&one.ids, &scaled.ids);
        for (one, scaled) in one.weights.iter().zip(&scaled.weights) {
            prop_assert!(ulps(*scaled, one * factor) <= 2);
        }
    }

    /// A token's routing is the same, bit by bit, alone and in any company.
    #[test]
    fn independent_of_the_batch(seed in any::<u64>(), tokens in 1..12_usize, at in 0..12_usize) {
        let at = at % tokens;
        let (logits, bias) = (numbers(seed, EXPERTS * tokens), numbers(seed ^ 1, EXPERTS));
        let batch = route(&v3(), 2.5, correction(&bias), &logits);
        let alone = route(&v3(), 2.5, correction(&bias), &logits[at * EXPERTS..][..EXPERTS]);
        prop_assert_eq!(batch.ids_of(at), alone.ids_of(0));
        prop_assert_eq!(batch.weights_of(at), alone.weights_of(0));
    }

    /// Different experts in every row, best first, whatever the logits.
    #[test]
    fn distinct_and_ordered(
        logits in proptest::collection::vec((-1e30_f32..1e30).prop_union(-2.0_f32..2.0), EXPERTS),
    ) {
        let routing = route(&scored(Score::Logits, EXPERTS, 6), 1.0, RouterTensors::default(), &logits);
        let mut ids = routing.ids.clone();
        ids.sort();
        ids.dedup();
        prop_assert_eq!(ids.len(), 6);
        prop_assert!(routing.weights.is_sorted_by(|a, b| a >= b));
        prop_assert!(routing.weights.iter().all(|weight| weight.is_finite()));
    }
}

/// Buffers of an earlier, larger call leave nothing behind.
#[test]
fn buffers_are_used_again() {
    let router = Router::new(v3(), 1.0, correction(&numbers(1, EXPERTS))).unwrap();
    let (large, small) = (numbers(2, EXPERTS * 9), numbers(3, EXPERTS * 2));
    let (mut reused, mut fresh) = (Routing::new(), Routing::new());
    router.route(&large, None, 9, &mut reused).unwrap();
    let (ids, weights) = (reused.ids.as_ptr(), reused.weights.as_ptr());
    router.route(&small, None, 2, &mut reused).unwrap();
    router.route(&small, None, 2, &mut fresh).unwrap();
    assert_eq!((&reused.ids, &reused.weights), (&fresh.ids, &fresh.weights));
    router.route(&large, None, 9, &mut reused).unwrap();
    assert_eq!((reused.ids.as_ptr(), reused.weights.as_ptr()), (ids, weights));
}

/// Routing to given experts is what `route` does, had it chosen them.
#[test]
fn routing_to_the_chosen_experts_changes_nothing() {
    let specs = [
        v3(),
        RouterSpec::softmax(EXPERTS, 4, true),
        RouterSpec {
            selection: moe_runner::spec::Selection::SparseMixer { eps: 0.1 },
            ..scored(Score::Logits, EXPERTS, 2)
        },
        RouterSpec {
            weight_from: moe_runner::spec::WeightFrom::JointSoftmax { shared: 2 },
            ..scored(Score::Sigmoid, EXPERTS, 3)
        },
    ];
    for spec in specs {
        let bias = (spec.correction != Correction::None).then(|| numbers(1, EXPERTS));
        let tensors = RouterTensors { correction: bias, ..RouterTensors::default() };
        let router = Router::new(spec.clone(), 2.5, tensors).unwrap();
        let logits = numbers(2, spec.logits() * 5);
        let (mut chosen, mut given) = (Routing::new(), Routing::new());
        router.route(&logits, None, 5, &mut chosen).unwrap();
        router.route_to(&logits, &chosen.ids, 5, &mut given).unwrap();
        assert_eq!(given.ids, chosen.ids);
        assert_eq!(given.weights, chosen.weights, "{spec:?}");
        assert_eq!(given.shared_weights, chosen.shared_weights);
    }
}
