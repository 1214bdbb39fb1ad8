//! An independent router, naive and in float64: sorts everything, shares no code with the library.
//! It follows the published pseudo-code line by line, and the library must agree with it.

use moe_runner::router::{Router, RouterTensors, Routing};
use moe_runner::spec::{
    Correction, GroupFill, GroupScore, Groups, IdleExperts, Renormalise, RouterSpec, Score,
    Selection, WeightFrom,
};
use proptest::prelude::*;

use super::ulps;

pub(crate) struct Row {
    pub(crate) ids: Vec<usize>,
    pub(crate) weights: Vec<f64>,
    pub(crate) shared: Vec<f64>,
}

pub(crate) fn row(
    spec: &RouterSpec,
    scale: f32,
    tensors: &RouterTensors,
    raw: &[f32],
    input_id: Option<u32>,
) -> Row {
    let n = spec.choices();
    let logits: Vec<f64> = raw
        .iter()
        .map(|&l| {
            let l = l as f64 * spec.logit_multiplier as f64;
            match spec.soft_cap {
                Some(c) => (l / c as f64).tanh() * c as f64,
                None => l,
            }
        })
        .collect();
    let exp_sum: f64 = logits[..n].iter().map(|l| l.exp()).sum();
    let score: Vec<f64> = logits[..n]
        .iter()
        .map(|l| match spec.score {
            Score::Softmax => l.exp() / exp_sum,
            Score::Sigmoid => l.exp() / (1.0 + l.exp()),
            Score::SqrtSoftplus => l.exp().ln_1p().sqrt(),
            Score::Logits => *l,
        })
        .collect();

    let mut selection: Vec<f32> = (0..n)
        .map(|e| match spec.correction {
            Correction::None => score[e] as f32,
            Correction::OnScore => score[e] as f32 + tensors.correction.as_ref().unwrap()[e],
            Correction::OnLogits => logits[e] as f32 + tensors.correction.as_ref().unwrap()[e],
        })
        .collect();
    if let Some(Groups { count, keep, score, fill }) = spec.groups {
        let size = n / count;
        let rating: Vec<f32> = (0..count)
            .map(|g| {
                let mut members = selection[g * size..(g + 1) * size].to_vec();
                members.sort_by(|a, b| b.total_cmp(a));
                match score {
                    GroupScore::Max => members[0],
                    GroupScore::TopTwoSum => members[0] + members[1],
                }
            })
            .collect();
        let kept = best(&rating, &(0..count).collect::<Vec<_>>(), keep);
        for (e, value) in selection.iter_mut().enumerate() {
            if !kept.contains(&(e / size)) {
                *value = match fill {
                    GroupFill::NegativeInfinity => f32::NEG_INFINITY,
                    GroupFill::Zero => 0.0,
                };
            }
        }
    }

    let all: Vec<usize> = (0..n).collect();
    let ids = match spec.selection {
        Selection::TopK => best(&selection, &all, spec.top_k),
        Selection::TopKPerGroup { groups } => {
            let picks: Vec<usize> = all
                .chunks(n / groups)
                .flat_map(|group| best(&selection, group, spec.top_k / groups))
                .collect();
            best(&selection, &picks, spec.top_k)
        }
        Selection::SparseMixer { .. } => {
            let first = best(&selection, &all, 1)[0];
            let others: Vec<usize> = all.iter().copied().filter(|&e| e != first).collect();
            vec![first, best(&selection, &others, 1)[0]]
        }
        Selection::HashTable { .. } => {
            let row = input_id.unwrap() as usize * spec.top_k;
            let table = tensors.hash_table.as_ref().unwrap();
            table[row..row + spec.top_k].iter().map(|&id| id as usize).collect()
        }
    };

    let mut shared = Vec::new();
    let mut weights: Vec<f64> = match (spec.selection, spec.weight_from) {
        (Selection::SparseMixer { eps }, _) => {
            let eps = eps as f64;
            let mut masked = logits[..n].to_vec();
            let first = sparsemixer_round(&masked, &logits, eps, ids[0]);
            masked[ids[0]] = f64::NEG_INFINITY;
            vec![first, sparsemixer_round(&masked, &logits, eps, ids[1])]
        }
        (_, WeightFrom::Score) => ids.iter().map(|&id| score[id]).collect(),
        (_, WeightFrom::SigmoidChosen) => {
            ids.iter().map(|&id| 1.0 / (1.0 + (-logits[id]).exp())).collect()
        }
        (_, WeightFrom::SoftmaxChosen) => {
            let sum: f64 = ids.iter().map(|&id| logits[id].exp()).sum();
            ids.iter().map(|&id| logits[id].exp() / sum).collect()
        }
        (_, WeightFrom::JointSoftmax { .. }) => {
            // softmax of log-sigmoids = shares of the sigmoids
            let sigmoid = |l: f64| 1.0 / (1.0 + (-l).exp());
            let chosen: Vec<f64> = ids.iter().map(|&id| sigmoid(logits[id])).collect();
            let others: Vec<f64> = logits[n..].iter().map(|&l| sigmoid(l)).collect();
            let sum: f64 = chosen.iter().sum::<f64>() + others.iter().sum::<f64>();
            shared = others.iter().map(|w| w / sum * scale as f64).collect();
            chosen.iter().map(|w| w / sum).collect()
        }
    };
    let sum: f64 = weights.iter().sum();
    let divisor = match spec.renormalise {
        Renormalise::None => 1.0,
        Renormalise::Sum { eps } => sum + eps as f64,
        Renormalise::SumFloor { floor } => sum.max(floor as f64),
        Renormalise::PNorm { p } => {
            let p = p as f64;
            weights.iter().map(|w| w.abs().powf(p)).sum::<f64>().powf(1.0 / p)
        }
    };
    let divisor = if divisor > 0.0 { divisor } else { 1.0 };
    for (weight, &id) in weights.iter_mut().zip(&ids) {
        *weight = *weight / divisor * scale as f64;
        if let Some(scales) = &tensors.per_expert_scale
            && id < spec.experts
        {
            *weight *= scales[id] as f64;
        }
    }
    Row { ids, weights, shared }
}

/// Sorts all candidates: larger value first, then lower id.
fn best(values: &[f32], candidates: &[usize], count: usize) -> Vec<usize> {
    let mut sorted = candidates.to_vec();
    sorted.sort_by(|&a, &b| values[b].partial_cmp(&values[a]).unwrap().then(a.cmp(&b)));
    sorted.truncate(count);
    sorted
}

fn sparsemixer_round(masked: &[f64], logits: &[f64], eps: f64, id: usize) -> f64 {
    let max = masked.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let kept: Vec<f64> = masked
        .iter()
        .zip(logits)
        .map(|(&masked, &logit)| {
            let factor = f64::max(logit.abs(), max);
            if (max - logit) / factor > 2.0 * eps { f64::NEG_INFINITY } else { masked }
        })
        .collect();
    kept[id].exp() / kept.iter().map(|l| l.exp()).sum::<f64>()
}

/// Compares every row of a batch; returns what the library made of it.
#[track_caller]
pub(crate) fn compare(
    spec: &RouterSpec,
    scale: f32,
    tensors: &RouterTensors,
    logits: &[f32],
    input_ids: Option<&[u32]>,
) -> Routing {
    let router = Router::new(spec.clone(), scale, tensors.clone()).unwrap();
    let tokens = logits.len() / spec.logits();
    let mut out = Routing::new();
    router.route(logits, input_ids, tokens, &mut out).unwrap();
    for token in 0..tokens {
        let logits = &logits[token * spec.logits()..][..spec.logits()];
        let expected = row(spec, scale, tensors, logits, input_ids.map(|ids| ids[token]));
        let ids: Vec<usize> = out.ids_of(token).iter().map(|id| id.index()).collect();
        assert_eq!(ids, expected.ids, "token {token}, {spec:?}");
        let shared = expected.shared.len();
        let weights = out.weights_of(token).iter().zip(&expected.weights);
        let shared = out.shared_weights[token * shared..][..shared].iter().zip(&expected.shared);
        for (&weight, &expected) in weights.chain(shared) {
            assert!(
                ulps(weight, expected as f32) <= 4,
                "token {token}: {weight}, reference {expected}, {spec:?}"
            );
        }
    }
    out
}

/// Any options that fit each other.
fn any_spec() -> impl Strategy<Value = RouterSpec> {
    // Experts stand in up to four groups of up to six.
    let sizes = (1..=4_usize, 1..=6_usize, 0..=2_usize, 1..=8_usize);
    let logits = (
        prop_oneof![Just(1.0_f32), Just(0.7), Just(-1.3)],
        proptest::option::of(prop_oneof![Just(1.0_f32), Just(2.5)]),
    );
    let score = prop_oneof![
        Just(Score::Softmax),
        Just(Score::Sigmoid),
        Just(Score::SqrtSoftplus),
        Just(Score::Logits)
    ];
    let correction =
        prop_oneof![Just(Correction::None), Just(Correction::OnScore), Just(Correction::OnLogits)];
    let groups = proptest::option::of((
        1..=4_usize,
        prop_oneof![Just(GroupScore::Max), Just(GroupScore::TopTwoSum)],
        prop_oneof![Just(GroupFill::NegativeInfinity), Just(GroupFill::Zero)],
    ));
    let selection = prop_oneof![
        4 => Just(Selection::TopK),
        1 => (1..=4_usize).prop_map(|groups| Selection::TopKPerGroup { groups }),
        1 => prop_oneof![Just(0.01_f32), Just(0.3)].prop_map(|eps| Selection::SparseMixer { eps }),
        1 => Just(Selection::HashTable { vocabulary: 5 }),
    ];
    let weight_from = prop_oneof![
        3 => Just(WeightFrom::Score),
        1 => Just(WeightFrom::SoftmaxChosen),
        1 => Just(WeightFrom::SigmoidChosen),
        1 => (0..=2_usize).prop_map(|shared| WeightFrom::JointSoftmax { shared }),
    ];
    let renormalise = prop_oneof![
        Just(Renormalise::None),
        prop_oneof![Just(0.0_f32), Just(1e-20), Just(0.01)]
            .prop_map(|eps| Renormalise::Sum { eps }),
        prop_oneof![Just(1e-12_f32), Just(0.8)].prop_map(|floor| Renormalise::SumFloor { floor }),
        prop_oneof![Just(1.0_f32), Just(2.0), Just(3.5)].prop_map(|p| Renormalise::PNorm { p }),
    ];
    let spec = (
        (sizes, logits, score, correction),
        (groups, selection, weight_from, renormalise, any::<bool>()),
    )
        .prop_map(
            |((sizes, logits, score, correction), (groups, selection, from, norm, scale))| {
                let (count, size, idle, top_k) = sizes;
                let choices = count * size;
                let top_k = match selection {
                    Selection::SparseMixer { .. } => 2,
                    Selection::TopKPerGroup { groups } => top_k.div_ceil(groups) * groups,
                    _ => top_k.min(choices),
                };
                // Hash tables leave no choice to a bias or to groups.
                let chooses = !matches!(selection, Selection::HashTable { .. });
                RouterSpec {
                    experts: choices.saturating_sub(idle),
                    idle: (idle > 0).then_some(IdleExperts::Identity { count: idle }),
                    logit_multiplier: logits.0,
                    soft_cap: logits.1,
                    score,
                    correction: if chooses { correction } else { Correction::None },
                    groups: groups
                        .filter(|_| chooses && !matches!(selection, Selection::TopKPerGroup { .. }))
                        .map(|(keep, score, fill)| Groups {
                            count,
                            keep: keep.min(count),
                            score: if size == 1 { GroupScore::Max } else { score },
                            fill,
                        }),
                    selection,
                    weight_from: if matches!(selection, Selection::SparseMixer { .. }) {
                        WeightFrom::Score
                    } else {
                        from
                    },
                    renormalise: norm,
                    per_expert_scale: scale,
                    ..RouterSpec::softmax(1, top_k, false)
                }
            },
        );
    spec.prop_filter("options exclude each other", |spec| spec.validate().is_ok())
}

/// Half of the values on a coarse grid, so that there are ties.
fn any_number(range: f32) -> impl Strategy<Value = f32> {
    prop_oneof![-range..range, (-4..=4_i8).prop_map(move |step| f32::from(step) * range / 4.0)]
}

fn any_case() -> impl Strategy<Value = (RouterSpec, f32, RouterTensors, Vec<f32>, Vec<u32>)> {
    any_spec().prop_flat_map(|spec| {
        let tokens = 4;
        let (choices, width) = (spec.choices(), spec.logits());
        let table = match spec.selection {
            Selection::HashTable { vocabulary } => vocabulary * spec.top_k,
            _ => 0,
        };
        let tensors = (
            proptest::collection::vec(any_number(1.5), choices),
            proptest::collection::vec(0.1_f32..2.0, spec.experts),
            proptest::collection::vec(0..choices as u32, table),
        );
        let inputs = (
            proptest::collection::vec(any_number(6.0), tokens * width),
            proptest::collection::vec(0..5_u32, tokens),
        );
        (Just(spec), prop_oneof![Just(1.0_f32), Just(2.5)], tensors, inputs).prop_map(
            |(spec, scale, (bias, scales, table), (logits, input_ids))| {
                let tensors = RouterTensors {
                    correction: (spec.correction != Correction::None).then_some(bias),
                    per_expert_scale: spec.per_expert_scale.then_some(scales),
                    hash_table: (!table.is_empty()).then_some(table),
                };
                (spec, scale, tensors, logits, input_ids)
            },
        )
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn all_options_equal_the_reference((spec, scale, tensors, logits, input_ids) in any_case()) {
        compare(&spec, scale, &tensors, &logits, Some(&input_ids));
    }
}
