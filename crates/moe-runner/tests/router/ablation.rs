//! Every option matters: changing it alone changes the routing, and both results are the
//! reference's. An option that the router ignored, or a value that it mixed up, fails here.
//! (`weight_on` and the kind of idle expert do not change routing; they are the runner's.)

use moe_runner::router::{RouterTensors, Routing};
use moe_runner::spec::{
    Correction, GroupFill, GroupScore, Groups, IdleExperts, Renormalise, RouterSpec, Score,
    Selection, WeightFrom,
};

use super::{numbers, reference, scored};

const EXPERTS: usize = 12;
const TOKENS: usize = 40;

/// A router's options, factor and tensors; tensors are kept only as far as the options use them.
#[derive(Clone)]
struct Setup {
    spec: RouterSpec,
    scale: f32,
    correction: Vec<f32>,
    per_expert_scale: Vec<f32>,
    hash_table: Vec<u32>,
}

fn setup(spec: RouterSpec) -> Setup {
    Setup {
        spec,
        scale: 1.0,
        // Mostly negative, so that fills of groups differ.
        correction: numbers(2, EXPERTS).iter().map(|bias| bias - 0.8).collect(),
        per_expert_scale: numbers(3, EXPERTS).iter().map(|scale| scale + 1.5).collect(),
        hash_table: (0..TOKENS as u32 * 4).map(|entry| entry * 7 % EXPERTS as u32).collect(),
    }
}

fn route(setup: &Setup) -> Routing {
    let spec = &setup.spec;
    let table = match spec.selection {
        Selection::HashTable { vocabulary } => Some(vocabulary * spec.top_k),
        _ => None,
    };
    let tensors = RouterTensors {
        correction: (spec.correction != Correction::None).then(|| setup.correction.clone()),
        per_expert_scale: spec
            .per_expert_scale
            .then(|| setup.per_expert_scale[..spec.experts].to_vec()),
        hash_table: table.map(|entries| setup.hash_table[..entries].to_vec()),
    };
    let mut logits = Vec::new();
    for token in 0..TOKENS {
        logits.extend(numbers(100 + token as u64, spec.logits()).iter().map(|l| l * 3.0));
    }
    let input_ids: Vec<u32> = (0..TOKENS as u32).map(|token| token % 5).collect();
    reference::compare(spec, setup.scale, &tensors, &logits, Some(&input_ids))
}

#[track_caller]
fn matters(base: &Setup, change: impl FnOnce(&mut Setup)) {
    let mut changed = base.clone();
    change(&mut changed);
    let (a, b) = (route(base), route(&changed));
    let same_weights = a.weights.len() == b.weights.len()
        && a.weights.iter().zip(&b.weights).all(|(a, b)| (a - b).abs() <= 1e-4 * a.abs());
    assert!(a.ids != b.ids || !same_weights, "no difference: {:?}", changed.spec);
}

#[test]
fn sizes() {
    let base = setup(RouterSpec { per_expert_scale: true, ..scored(Score::Sigmoid, EXPERTS, 4) });
    matters(&base, |s| s.spec.top_k = 3);
    matters(&base, |s| s.spec.experts = 11);
    // Idle experts have no scale of their own.
    matters(&base, |s| {
        s.spec.experts = 8;
        s.spec.idle = Some(IdleExperts::Identity { count: 4 });
    });
}

#[test]
fn logits() {
    let base = setup(scored(Score::Sigmoid, EXPERTS, 4));
    matters(&base, |s| s.spec.logit_multiplier = 0.5);
    matters(&base, |s| s.spec.soft_cap = Some(2.0));
    let capped = setup(RouterSpec { soft_cap: Some(2.0), ..base.spec });
    matters(&capped, |s| s.spec.soft_cap = Some(1.0));
    // The multiplier comes before the cap.
    matters(&capped, |s| s.spec.logit_multiplier = 0.5);
}

#[test]
fn score() {
    let scores = [Score::Softmax, Score::Sigmoid, Score::SqrtSoftplus, Score::Logits];
    for score in scores {
        for other in scores.into_iter().filter(|&other| other != score) {
            matters(&setup(scored(score, EXPERTS, 4)), |s| s.spec.score = other);
        }
    }
}

#[test]
fn correction() {
    let base = setup(scored(Score::Sigmoid, EXPERTS, 4));
    matters(&base, |s| s.spec.correction = Correction::OnScore);
    matters(&base, |s| s.spec.correction = Correction::OnLogits);
    let on_score = setup(RouterSpec { correction: Correction::OnScore, ..base.spec });
    matters(&on_score, |s| s.spec.correction = Correction::OnLogits);
    matters(&on_score, |s| s.correction.reverse());
}

#[test]
fn groups() {
    let groups = Groups { count: 4, keep: 2, score: GroupScore::Max, fill: GroupFill::Zero };
    let free =
        setup(RouterSpec { correction: Correction::OnScore, ..scored(Score::Sigmoid, EXPERTS, 4) });
    let base = setup(RouterSpec { groups: Some(groups), ..free.spec.clone() });
    matters(&base, |s| s.spec.groups = None);
    matters(&base, |s| s.spec.groups = Some(Groups { count: 3, ..groups }));
    matters(&base, |s| s.spec.groups = Some(Groups { keep: 3, ..groups }));
    matters(&base, |s| s.spec.groups = Some(Groups { score: GroupScore::TopTwoSum, ..groups }));
    matters(&base, |s| {
        s.spec.groups = Some(Groups { fill: GroupFill::NegativeInfinity, ..groups });
    });
    let strict = Groups { fill: GroupFill::NegativeInfinity, ..groups };
    let strict = setup(RouterSpec { groups: Some(strict), ..free.spec });
    matters(&strict, |s| s.spec.groups = None);
    // Groups are rated with the bias.
    matters(&strict, |s| s.spec.correction = Correction::None);
}

#[test]
fn selection() {
    let base = setup(scored(Score::Softmax, EXPERTS, 4));
    matters(&base, |s| s.spec.selection = Selection::TopKPerGroup { groups: 2 });
    matters(&base, |s| s.spec.selection = Selection::HashTable { vocabulary: 5 });
    let per_group = Selection::TopKPerGroup { groups: 2 };
    let per_group = setup(RouterSpec { selection: per_group, ..base.spec.clone() });
    matters(&per_group, |s| s.spec.selection = Selection::TopKPerGroup { groups: 4 });
    let hash = Selection::HashTable { vocabulary: 5 };
    let hash = setup(RouterSpec { selection: hash, ..base.spec });
    matters(&hash, |s| s.hash_table.reverse());
    matters(&hash, |s| s.spec.score = Score::Sigmoid);

    let two = setup(scored(Score::Logits, EXPERTS, 2));
    matters(&two, |s| s.spec.selection = Selection::SparseMixer { eps: 0.1 });
    let mixer = Selection::SparseMixer { eps: 0.1 };
    let mixer = setup(RouterSpec { selection: mixer, ..two.spec });
    matters(&mixer, |s| s.spec.selection = Selection::SparseMixer { eps: 0.2 });
}

#[test]
fn weight_from() {
    let joint = WeightFrom::JointSoftmax { shared: 2 };
    let sources = [WeightFrom::Score, WeightFrom::SoftmaxChosen, WeightFrom::SigmoidChosen, joint];
    for source in sources {
        for other in sources.into_iter().filter(|&other| other != source) {
            let spec = RouterSpec { weight_from: source, ..scored(Score::Softmax, EXPERTS, 4) };
            matters(&setup(spec), |s| s.spec.weight_from = other);
        }
    }
    let joint = setup(RouterSpec { weight_from: joint, ..scored(Score::Sigmoid, EXPERTS, 4) });
    matters(&joint, |s| s.spec.weight_from = WeightFrom::JointSoftmax { shared: 1 });
}

#[test]
fn renormalise() {
    let kinds = [
        Renormalise::None,
        Renormalise::Sum { eps: 0.0 },
        Renormalise::Sum { eps: 0.1 },
        Renormalise::SumFloor { floor: 3.2 },
        Renormalise::SumFloor { floor: 3.9 },
        Renormalise::PNorm { p: 2.0 },
        Renormalise::PNorm { p: 3.0 },
    ];
    for (index, kind) in kinds.into_iter().enumerate() {
        for other in kinds.into_iter().skip(index + 1) {
            let spec = RouterSpec { renormalise: kind, ..scored(Score::Sigmoid, EXPERTS, 4) };
            matters(&setup(spec), |s| s.spec.renormalise = other);
        }
    }
}

#[test]
fn scales() {
    let base = setup(RouterSpec::softmax(EXPERTS, 4, true));
    matters(&base, |s| s.scale = 2.5);
    matters(&base, |s| s.spec.per_expert_scale = true);
    let scaled = setup(RouterSpec { per_expert_scale: true, ..base.spec });
    matters(&scaled, |s| s.scale = 2.5);
    matters(&scaled, |s| s.per_expert_scale.reverse());
}
