//! Cases computed by hand, and inputs that must be refused.

use moe_runner::router::{Router, RouterTensors, Routing};
use moe_runner::spec::{
    Correction, GroupFill, GroupScore, Groups, IdleExperts, Renormalise, RouterSpec, Score,
    Selection, WeightFrom,
};

use super::{assert_weights, correction, ids, logical, route, route_with_ids, scored};

const LN_3: f32 = 1.098_612_3;
const MASKED: f32 = f32::NEG_INFINITY;

fn none() -> RouterTensors {
    RouterTensors::default()
}

#[test]
fn softmax() {
    // Shares 1 : 3 : 1 : 3 of 8.
    let logits = [0.0, LN_3, 0.0, LN_3];
    let plain = route(&RouterSpec::softmax(4, 2, false), 1.0, none(), &logits);
    assert_eq!(ids(&plain), [1, 3]);
    assert_weights(&plain.weights, &[0.375, 0.375]);
    let plain = route(&RouterSpec::softmax(4, 3, true), 2.5, none(), &logits);
    assert_eq!(ids(&plain), [1, 3, 0]);
    assert_weights(&plain.weights, &[7.5 / 7.0, 7.5 / 7.0, 2.5 / 7.0]);
}

#[test]
fn ties_go_to_the_lowest_id() {
    let routing = route(&RouterSpec::softmax(5, 3, true), 1.0, none(), &[1.0; 5]);
    assert_eq!(ids(&routing), [0, 1, 2]);
    // Sigmoids that are 1 in f32 tie, although their logits differ.
    let routing = route(&scored(Score::Sigmoid, 3, 2), 1.0, none(), &[40.0, 50.0, 60.0]);
    assert_eq!(ids(&routing), [0, 1]);
    assert_weights(&routing.weights, &[1.0, 1.0]);
    // Groups tie to the lowest index.
    let groups =
        Groups { count: 2, keep: 1, score: GroupScore::Max, fill: GroupFill::NegativeInfinity };
    let spec = RouterSpec { groups: Some(groups), ..scored(Score::Sigmoid, 4, 2) };
    assert_eq!(ids(&route(&spec, 1.0, none(), &[0.0, 1.0, 1.0, 0.5])), [1, 0]);
}

/// As many experts as no byte counts and no block has threads: the best are the last, the first and one
/// between, beyond every power of two that a kernel might stop at.
#[test]
fn experts_of_any_number_are_chosen() {
    for experts in [257, 384, 512, 1000] {
        let mut logits: Vec<f32> = (0..experts).map(|e| -((e % 7) as f32)).collect();
        let best = [experts - 1, experts / 2, 1];
        for (place, expert) in best.iter().enumerate() {
            logits[*expert] = 9.0 - place as f32;
        }
        let routing = route(&scored(Score::Sigmoid, experts, 3), 1.0, none(), &logits);
        assert_eq!(ids(&routing), best.map(|expert| expert as u32), "{experts}");
    }
}

/// The ninth and tenth of ten experts weigh what they score.
#[test]
fn more_experts_a_token_than_eight() {
    let logits: Vec<f32> = (0..12).map(|e| e as f32 - 20.0).collect();
    let routing = route(&RouterSpec::softmax(12, 10, true), 1.0, none(), &logits);
    assert_eq!(ids(&routing), [11, 10, 9, 8, 7, 6, 5, 4, 3, 2]);
    let shares = (0..10).map(|slot| f64::from(-slot).exp());
    let sum: f64 = shares.clone().sum();
    assert_weights(&routing.weights, &shares.map(|share| share / sum).collect::<Vec<_>>());
}

/// Published biases are an offset near 7 with small differences, which 16 bits do not hold.
#[test]
fn biases_are_compared_in_32_bits() {
    let spec = RouterSpec { correction: Correction::OnScore, ..scored(Score::Sigmoid, 4, 2) };
    let bias = [7.0, 7.0 + 1.0 / 128.0, 7.0, 7.0 + 1.0 / 64.0];
    let routing = route(&spec, 1.0, correction(&bias), &[0.0; 4]);
    assert_eq!(ids(&routing), [3, 1]);
}

#[test]
fn sqrt_softplus() {
    let routing = route(&scored(Score::SqrtSoftplus, 3, 3), 1.0, none(), &[0.0, 100.0, -100.0]);
    assert_eq!(ids(&routing), [1, 0, 2]);
    // √100, √ln 2, √e⁻¹⁰⁰ = e⁻⁵⁰
    assert_weights(&routing.weights, &[10.0, 0.832_554_611_157_697_7, (-50.0_f64).exp()]);
}

#[test]
fn soft_cap_and_multiplier() {
    let spec = RouterSpec { soft_cap: Some(2.0), ..scored(Score::Logits, 2, 1) };
    // 2·tanh(2/2)
    assert_weights(&route(&spec, 1.0, none(), &[2.0, -9.0]).weights, &[1.523_188_311_911_53]);
    let spec = RouterSpec { logit_multiplier: -0.5, ..scored(Score::Logits, 2, 1) };
    let routing = route(&spec, 1.0, none(), &[2.0, -9.0]);
    assert_eq!(ids(&routing), [1]);
    assert_weights(&routing.weights, &[4.5]);
}

#[test]
fn the_bias_chooses_but_does_not_weigh() {
    // Scores ½, ¾; choices 1.5, ¾.
    let spec = RouterSpec { correction: Correction::OnScore, ..scored(Score::Sigmoid, 2, 1) };
    let routing = route(&spec, 1.0, correction(&[1.0, 0.0]), &[0.0, LN_3]);
    assert_eq!(ids(&routing), [0]);
    assert_weights(&routing.weights, &[0.5]);
    // Logits 0, −ln 3: 0.5 more of a sigmoid would not be enough, 1.2 more of a logit is.
    let spec = RouterSpec {
        correction: Correction::OnLogits,
        weight_from: WeightFrom::SigmoidChosen,
        ..scored(Score::Logits, 2, 1)
    };
    let routing = route(&spec, 1.0, correction(&[0.0, 1.2]), &[0.0, -LN_3]);
    assert_eq!(ids(&routing), [1]);
    assert_weights(&routing.weights, &[0.25]);
}

#[test]
fn negative_choices_lose_to_a_fill_of_zero() {
    let groups = |fill| Some(Groups { count: 2, keep: 1, score: GroupScore::TopTwoSum, fill });
    let spec = |fill| RouterSpec {
        groups: groups(fill),
        correction: Correction::OnScore,
        ..scored(Score::Sigmoid, 4, 2)
    };
    // Scores ½; choices −½, −1½ | −2½, −3½: the first group stays.
    let bias = correction(&[-1.0, -2.0, -3.0, -4.0]);
    let strict = route(&spec(GroupFill::NegativeInfinity), 1.0, bias.clone(), &[0.0; 4]);
    assert_eq!(ids(&strict), [0, 1]);
    let zero = route(&spec(GroupFill::Zero), 1.0, bias, &[0.0; 4]);
    assert_eq!(ids(&zero), [2, 3]);
    assert_weights(&zero.weights, &[0.5, 0.5]);
}

#[test]
fn groups_by_their_best_or_their_best_two() {
    // Group 0 has the single best (9), group 1 the best pair (8 + 7).
    let logits = [9.0, 1.0, 8.0, 7.0];
    for (score, expected) in [(GroupScore::Max, [0, 1]), (GroupScore::TopTwoSum, [2, 3])] {
        let groups = Groups { count: 2, keep: 1, score, fill: GroupFill::NegativeInfinity };
        let spec = RouterSpec { groups: Some(groups), ..scored(Score::Logits, 4, 2) };
        assert_eq!(ids(&route(&spec, 1.0, none(), &logits)), expected);
    }
}

#[test]
fn top_k_per_group() {
    let selection = Selection::TopKPerGroup { groups: 2 };
    let spec = RouterSpec { selection, ..scored(Score::Logits, 4, 2) };
    let routing = route(&spec, 1.0, none(), &[8.0, 7.0, 1.0, 2.0]);
    assert_eq!(ids(&routing), [0, 3]);
    // Best first, over the groups.
    assert_eq!(ids(&route(&spec, 1.0, none(), &[2.0, 1.0, 7.0, 8.0])), [3, 0]);
    assert_eq!(ids(&route(&spec, 1.0, none(), &[5.0; 4])), [0, 2]);
}

#[test]
fn sparsemixer() {
    let selection = Selection::SparseMixer { eps: 0.01 };
    let spec = RouterSpec { selection, ..scored(Score::Logits, 4, 2) };
    // Within 2 % of 1: .99 and .985; then without the first, within 2 % of .99: .985.
    let routing = route(&spec, 1.0, none(), &[1.0, 0.99, 0.5, 0.985]);
    assert_eq!(ids(&routing), [0, 1]);
    let exact = |value: f64| value as f32 as f64;
    let (second, third) = (exact(0.99), exact(0.985));
    let first = 1.0 / (1.0 + (second - 1.0).exp() + (third - 1.0).exp());
    assert!((first - 0.336_116_18).abs() < 1e-7);
    assert_weights(&routing.weights, &[first, 1.0 / (1.0 + (third - second).exp())]);
    // Negative logits are compared with their own size: 0.02 of −1 is near, 0.03 is not.
    let routing = route(&spec, 1.0, none(), &[-1.0, -1.02, -1.03, -9.0]);
    assert_eq!(ids(&routing), [0, 1]);
    let gap = |a: f32, b: f32| f64::from(b) - f64::from(a);
    assert_weights(
        &routing.weights,
        &[1.0 / (1.0 + gap(-1.0, -1.02).exp()), 1.0 / (1.0 + gap(-1.02, -1.03).exp())],
    );
    // The second round has no first expert in it, even where the caller insists.
    let router = Router::new(spec.clone(), 1.0, none()).unwrap();
    let mut twice = Routing::new();
    router.route_to(&[1.0, 0.99, 0.5, 0.2], &logical(&[0, 0]), 1, &mut twice).unwrap();
    assert!(twice.weights[0] > 0.5 && twice.weights[1] == 0.0);
    // The largest logit is 0: 0/0 is near.
    assert_weights(&route(&spec, 1.0, none(), &[0.0, 0.0, -1.0, -2.0]).weights, &[0.5, 1.0]);
}

#[test]
fn hash_table() {
    let selection = Selection::HashTable { vocabulary: 2 };
    let spec = RouterSpec { selection, ..scored(Score::Sigmoid, 4, 2) };
    let tensors = RouterTensors { hash_table: Some(vec![0, 2, 3, 1]), ..none() };
    // The table chooses, in its order; the gate weighs.
    let logits = [0.0, LN_3, 9.0, -LN_3, LN_3, 0.0, -LN_3, 9.0];
    let routing = route_with_ids(&spec, 2.0, tensors, &logits, Some(&[1, 0]));
    assert_eq!(ids(&routing), [3, 1, 0, 2]);
    assert_weights(&routing.weights, &[0.5, 1.5, 1.5, 0.5]);
}

#[test]
fn joint_softmax() {
    let weight_from = WeightFrom::JointSoftmax { shared: 1 };
    let spec = RouterSpec { weight_from, ..scored(Score::Sigmoid, 2, 1) };
    // Sigmoids ½, ¾ | ½: shares of ¾ + ½, doubled. The shared logit is never chosen.
    let routing = route(&spec, 2.0, none(), &[0.0, LN_3, 0.0, 0.0, -9.0, 0.0]);
    assert_eq!(ids(&routing), [1, 0]);
    assert_weights(&routing.weights, &[1.2, 1.0]);
    assert_weights(&routing.shared_weights, &[0.8, 1.0]);
}

#[test]
fn weights_over_the_chosen() {
    let softmax =
        RouterSpec { weight_from: WeightFrom::SoftmaxChosen, ..scored(Score::Logits, 3, 2) };
    assert_weights(&route(&softmax, 1.0, none(), &[0.0, LN_3, -9.0]).weights, &[0.75, 0.25]);
    let sigmoid =
        RouterSpec { weight_from: WeightFrom::SigmoidChosen, ..scored(Score::Logits, 3, 2) };
    assert_weights(&route(&sigmoid, 1.0, none(), &[0.0, LN_3, -9.0]).weights, &[0.75, 0.5]);
}

#[test]
fn renormalisation() {
    // Two scores of ½.
    let cases = [
        (Renormalise::None, 0.5),
        (Renormalise::Sum { eps: 0.0 }, 0.5),
        (Renormalise::Sum { eps: 0.5 }, 1.0 / 3.0),
        (Renormalise::SumFloor { floor: 0.5 }, 0.5),
        (Renormalise::SumFloor { floor: 2.0 }, 0.25),
        (Renormalise::PNorm { p: 1.0 }, 0.5),
        (Renormalise::PNorm { p: 2.0 }, std::f64::consts::FRAC_1_SQRT_2),
    ];
    for (renormalise, weight) in cases {
        let spec = RouterSpec { renormalise, ..scored(Score::Sigmoid, 2, 2) };
        assert_weights(&route(&spec, 1.0, none(), &[0.0, 0.0]).weights, &[weight; 2]);
        assert_weights(&route(&spec, 3.0, none(), &[0.0, 0.0]).weights, &[3.0 * weight; 2]);
    }
    // A sum that is not positive divides by one.
    let spec =
        RouterSpec { renormalise: Renormalise::Sum { eps: 0.0 }, ..scored(Score::Logits, 2, 2) };
    assert_weights(&route(&spec, 1.0, none(), &[1.0, -2.0]).weights, &[1.0, -2.0]);
    assert_weights(&route(&spec, 1.0, none(), &[1.0, -1.0]).weights, &[1.0, -1.0]);
    assert_weights(&route(&spec, 1.0, none(), &[0.0, 0.0]).weights, &[0.0, 0.0]);
}

#[test]
fn per_expert_scale() {
    let spec = RouterSpec {
        idle: Some(IdleExperts::Skip { count: 1 }),
        per_expert_scale: true,
        ..scored(Score::Sigmoid, 2, 3)
    };
    let tensors = RouterTensors { per_expert_scale: Some(vec![3.0, 5.0]), ..none() };
    let routing = route(&spec, 2.0, tensors, &[0.0, LN_3, -LN_3]);
    assert_eq!(ids(&routing), [1, 0, 2]);
    assert_weights(&routing.weights, &[0.75 * 2.0 * 5.0, 0.5 * 2.0 * 3.0, 0.25 * 2.0]);
}

#[test]
fn idle_experts_keep_their_ids_and_weights() {
    let idle = Some(IdleExperts::Identity { count: 2 });
    let spec = RouterSpec { idle, ..RouterSpec::softmax(2, 2, false) };
    let routing = route(&spec, 6.0, none(), &[0.0, 0.0, LN_3, LN_3]);
    assert_eq!(ids(&routing), [2, 3]);
    assert_weights(&routing.weights, &[2.25, 2.25]);
}

#[test]
fn masked_experts_are_last_and_weigh_nothing() {
    for score in [Score::Softmax, Score::Sigmoid, Score::SqrtSoftplus, Score::Logits] {
        for weight_from in [WeightFrom::Score, WeightFrom::SoftmaxChosen, WeightFrom::SigmoidChosen]
        {
            let spec =
                RouterSpec { correction: Correction::OnScore, weight_from, ..scored(score, 4, 3) };
            // Neither a bias nor being the first brings a masked expert before the others.
            let bias = correction(&[9.0, 0.0, 0.0, 0.0]);
            let routing = route(&spec, 1.0, bias, &[MASKED, MASKED, -3.0, 1.0]);
            assert_eq!(ids(&routing), [3, 2, 0], "{score:?}");
            assert_eq!(routing.weights[2], 0.0, "{score:?} {weight_from:?}");
        }
    }
    // A fill of zero does not either.
    let groups = Groups { count: 2, keep: 1, score: GroupScore::Max, fill: GroupFill::Zero };
    let spec = RouterSpec { groups: Some(groups), ..scored(Score::Logits, 4, 3) };
    assert_eq!(ids(&route(&spec, 1.0, none(), &[3.0, -1.0, MASKED, 2.0])), [0, 3, 1]);
    // A multiplier that would turn −∞ around, and a cap that would make it finite.
    let spec = RouterSpec {
        logit_multiplier: -1.0,
        soft_cap: Some(1.0),
        ..RouterSpec::softmax(2, 1, false)
    };
    assert_eq!(ids(&route(&spec, 1.0, none(), &[MASKED, 5.0])), [1]);
}

#[test]
fn choices_beyond_f32_stay_comparable() {
    // The bias takes expert 1 past the largest f32; with a masked neighbour its group is rated −∞,
    // not NaN, and group 1 wins.
    let groups = Groups {
        count: 2,
        keep: 1,
        score: GroupScore::TopTwoSum,
        fill: GroupFill::NegativeInfinity,
    };
    let spec = RouterSpec {
        groups: Some(groups),
        correction: Correction::OnScore,
        ..scored(Score::Logits, 4, 2)
    };
    let bias = correction(&[0.0, 3e38, 0.0, 3e38]);
    assert_eq!(ids(&route(&spec, 1.0, bias.clone(), &[MASKED, 3e38, 1.0, 2.0])), [3, 2]);
    // −∞ is for masked experts only: one pushed below the smallest f32 comes before them.
    let spec = RouterSpec { groups: None, top_k: 1, ..spec };
    let bias = correction(&[0.0, -3e38, 0.0, 0.0]);
    assert_eq!(ids(&route(&spec, 1.0, bias, &[MASKED, -3e38, MASKED, MASKED])), [1]);
}

#[test]
fn a_row_of_masked_experts_weighs_nothing() {
    for weight_from in [
        WeightFrom::Score,
        WeightFrom::SoftmaxChosen,
        WeightFrom::SigmoidChosen,
        WeightFrom::JointSoftmax { shared: 1 },
    ] {
        let spec = RouterSpec { weight_from, ..RouterSpec::softmax(3, 2, true) };
        let routing = route(&spec, 2.5, none(), &vec![MASKED; spec.logits()]);
        assert_eq!(ids(&routing), [0, 1]);
        assert_eq!(routing.weights, [0.0, 0.0], "{weight_from:?}");
    }
    let selection = Selection::SparseMixer { eps: 0.01 };
    let spec = RouterSpec { selection, ..scored(Score::Logits, 3, 2) };
    assert_eq!(route(&spec, 1.0, none(), &[MASKED; 3]).weights, [0.0, 0.0]);
    let routing = route(&spec, 1.0, none(), &[MASKED, 1.0, MASKED]);
    assert_eq!((ids(&routing), routing.weights), (vec![1, 0], vec![1.0, 0.0]));
}

#[test]
fn no_tokens() {
    let routing = route(&RouterSpec::softmax(4, 2, true), 1.0, none(), &[]);
    assert_eq!((routing.tokens, routing.ids.len(), routing.weights.len()), (0, 0, 0));
}

/// The error's text; the buffers must be left without tokens.
#[track_caller]
fn refused(
    spec: &RouterSpec,
    tensors: RouterTensors,
    logits: &[f32],
    ids: Option<&[u32]>,
) -> String {
    let router = Router::new(spec.clone(), 1.0, tensors).unwrap();
    let mut out = Routing::from_parts(1, logical(&[7]), vec![1.0]).unwrap();
    let error = router.route(logits, ids, 2, &mut out).unwrap_err().to_string();
    assert!(out.tokens == 0 && out.ids.is_empty() && out.weights.is_empty());
    error
}

#[test]
fn bad_logits_name_token_and_expert() {
    let spec = RouterSpec::softmax(3, 1, false);
    for (bad, shown) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf")] {
        let error = refused(&spec, none(), &[0.0, 0.0, 0.0, 0.0, bad, 0.0], None);
        assert!(error.contains(&format!("token 1, expert 1: {shown}")), "{error}");
    }
    let doubled = RouterSpec { logit_multiplier: 2.0, ..spec.clone() };
    let error = refused(&doubled, none(), &[0.0, 0.0, 0.0, 0.0, 0.0, 3e38], None);
    assert!(error.contains("token 1, expert 2: inf"), "{error}");
    // A cap would make +∞ finite.
    let capped = RouterSpec { soft_cap: Some(1.0), ..spec.clone() };
    let error = refused(&capped, none(), &[f32::INFINITY, 0.0, 0.0, 0.0, 0.0, 0.0], None);
    assert!(error.contains("token 0, expert 0: inf"), "{error}");
    let joint = WeightFrom::JointSoftmax { shared: 1 };
    let joint = RouterSpec { weight_from: joint, ..RouterSpec::softmax(2, 1, false) };
    let error = refused(&joint, none(), &[0.0, 0.0, f32::NAN, 0.0, 0.0, 0.0], None);
    assert!(error.contains("token 0, expert 2: NaN"), "{error}");
    let error = refused(&spec, none(), &[0.0; 5], None);
    assert!(error.contains("5 values; 2 tokens of 3"), "{error}");
}

#[test]
fn bad_token_ids() {
    let selection = Selection::HashTable { vocabulary: 4 };
    let spec = RouterSpec { selection, ..RouterSpec::softmax(3, 1, false) };
    let tensors = || RouterTensors { hash_table: Some(vec![0, 1, 2, 0]), ..none() };
    let error = refused(&spec, tensors(), &[0.0; 6], None);
    assert!(error.contains("pass the ids"), "{error}");
    let error = refused(&spec, tensors(), &[0.0; 6], Some(&[3, 4]));
    assert!(error.contains("token 1: id 4 is outside the vocabulary of 4"), "{error}");
    let error = refused(&spec, tensors(), &[0.0; 6], Some(&[3]));
    assert!(error.contains("1 ids for 2 tokens"), "{error}");
}

#[test]
fn bad_tensors_name_the_expert() {
    let new = |spec: &RouterSpec, scale, tensors| {
        Router::new(spec.clone(), scale, tensors).unwrap_err().to_string()
    };
    let biased = RouterSpec { correction: Correction::OnScore, ..RouterSpec::softmax(3, 1, false) };
    let error = new(&biased, 1.0, correction(&[0.0, 0.0, f32::NAN]));
    assert_eq!(error, "correction bias: expert 2: NaN");
    assert_eq!(new(&biased, 1.0, correction(&[0.0])), "correction bias: 1 values; 3 were expected");
    assert!(new(&biased, 1.0, none()).contains("correction bias: missing"));
    assert!(new(&biased, f32::NAN, correction(&[0.0; 3])).contains("scaling factor is NaN"));
    let plain = RouterSpec::softmax(3, 1, false);
    assert!(new(&plain, 1.0, correction(&[0.0; 3])).contains("correction bias: given"));
    let hash = Selection::HashTable { vocabulary: 2 };
    let hash = RouterSpec { selection: hash, ..RouterSpec::softmax(3, 2, false) };
    let tensors = RouterTensors { hash_table: Some(vec![0, 1, 2, 3]), ..none() };
    assert_eq!(new(&hash, 1.0, tensors), "hash table: token id 1: expert 3 of 3");
    let scaled = RouterSpec { per_expert_scale: true, ..plain };
    let tensors = RouterTensors { per_expert_scale: Some(vec![1.0, f32::INFINITY, 1.0]), ..none() };
    assert_eq!(new(&scaled, 1.0, tensors), "per-expert scale: expert 1: inf");
}

#[test]
fn contradictory_options_are_refused() {
    let plain = RouterSpec::softmax(4, 2, true);
    let groups = Groups { count: 2, keep: 1, score: GroupScore::Max, fill: GroupFill::Zero };
    let with_groups = |groups| RouterSpec { groups: Some(groups), ..plain.clone() };
    let with = |selection| RouterSpec { selection, ..plain.clone() };
    let mixer = Selection::SparseMixer { eps: 0.01 };
    let hash = Selection::HashTable { vocabulary: 9 };
    let huge = usize::MAX;
    let specs = [
        RouterSpec { top_k: 5, ..plain.clone() },
        RouterSpec { top_k: 0, ..plain.clone() },
        RouterSpec { experts: 0, ..plain.clone() },
        RouterSpec { experts: huge, ..plain.clone() },
        RouterSpec { idle: Some(IdleExperts::Skip { count: huge }), ..plain.clone() },
        RouterSpec { weight_from: WeightFrom::JointSoftmax { shared: huge }, ..plain.clone() },
        RouterSpec { logit_multiplier: f32::NAN, ..plain.clone() },
        RouterSpec { soft_cap: Some(0.0), ..plain.clone() },
        with_groups(Groups { count: 3, ..groups }),
        with_groups(Groups { count: 0, ..groups }),
        with_groups(Groups { keep: 3, ..groups }),
        with_groups(Groups { count: 4, keep: 2, score: GroupScore::TopTwoSum, ..groups }),
        with_groups(Groups { count: 4, keep: 1, fill: GroupFill::NegativeInfinity, ..groups }),
        with(Selection::TopKPerGroup { groups: 4 }),
        with(Selection::TopKPerGroup { groups: 0 }),
        RouterSpec { selection: Selection::TopKPerGroup { groups: 2 }, ..with_groups(groups) },
        with(Selection::SparseMixer { eps: f32::NAN }),
        RouterSpec { top_k: 3, ..with(mixer) },
        RouterSpec { weight_from: WeightFrom::SoftmaxChosen, ..with(mixer) },
        with(Selection::HashTable { vocabulary: 0 }),
        with(Selection::HashTable { vocabulary: huge }),
        RouterSpec { correction: Correction::OnScore, ..with(hash) },
        RouterSpec { groups: Some(groups), ..with(hash) },
        RouterSpec { renormalise: Renormalise::Sum { eps: f32::NAN }, ..plain.clone() },
        RouterSpec { renormalise: Renormalise::Sum { eps: -1.0 }, ..plain.clone() },
        RouterSpec { renormalise: Renormalise::SumFloor { floor: -1.0 }, ..plain.clone() },
        RouterSpec { renormalise: Renormalise::PNorm { p: 0.0 }, ..plain.clone() },
    ];
    for spec in specs {
        assert!(spec.validate().is_err(), "{spec:?}");
        assert!(Router::new(spec, 1.0, none()).is_err());
    }
}
