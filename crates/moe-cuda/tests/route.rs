//! Routing against a float64 model that shares no code with it: ids exactly, weights within 4 ulp.

mod common;

use common::{Numbers, Setup, setup};
use moe_cuda::fault::FaultKind;
use moe_cuda::router::{
    Correction, Groups, Renormalise, Router, RouterOptions, RouterTensors, RoutingMut, Score,
    Selection, WeightFrom,
};
use moe_cuda::{Error, FaultWord, Float, Rows};

/// One layer's options with host copies of its tensors.
struct Case {
    name: String,
    options: RouterOptions,
    bias: Option<Vec<f32>>,
    per_expert: Option<Vec<f32>>,
    table: Option<Vec<u32>>,
}

fn plain(experts: usize, top_k: usize) -> RouterOptions {
    RouterOptions::softmax(experts, top_k, Renormalise::None)
}

fn cases(n: &mut Numbers) -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |name: &str, options: RouterOptions| {
        let choices = options.experts + options.idle;
        let bias = (options.correction != Correction::None).then(|| n.units(choices));
        let table = match options.selection {
            Selection::HashTable { vocabulary } => {
                Some((0..vocabulary).flat_map(|_| n.distinct(options.top_k, choices)).collect())
            }
            _ => None,
        };
        cases.push(Case { name: name.into(), options, bias, per_expert: None, table });
    };
    let base = plain(128, 8);
    add("softmax", base);
    add("one of one", plain(1, 1));
    add("all of seven", plain(7, 7));
    add("more than a warp", plain(300, 40));
    add("sum", RouterOptions { renormalise: Renormalise::Sum(1e-20), scale: 2.5, ..base });
    add("floor", RouterOptions { renormalise: Renormalise::SumFloor(0.5), ..base });
    add("norm", RouterOptions { renormalise: Renormalise::PNorm(1.5), ..base });
    add("multiplier and cap", RouterOptions { logit_multiplier: 0.7, soft_cap: Some(2.0), ..base });
    for score in [Score::Sigmoid, Score::SqrtSoftplus, Score::Logits, Score::Softmax] {
        for correction in [Correction::OnScore, Correction::OnLogits] {
            let renormalise = Renormalise::Sum(0.0);
            let options = RouterOptions { score, correction, renormalise, ..base };
            add(&format!("{score:?} {correction:?}"), options);
        }
    }
    for top_two_sum in [false, true] {
        for fill_zero in [false, true] {
            let groups = Some(Groups { count: 8, keep: 3, top_two_sum, fill_zero });
            let correction = Correction::OnScore;
            let options = RouterOptions { score: Score::Sigmoid, groups, correction, ..base };
            add(&format!("groups {top_two_sum} {fill_zero}"), options);
        }
    }
    let per_group = Selection::TopKPerGroup { groups: 4 };
    add("per group", RouterOptions { selection: per_group, ..base });
    for weight_from in [WeightFrom::SoftmaxChosen, WeightFrom::SigmoidChosen] {
        add(&format!("{weight_from:?}"), RouterOptions { weight_from, ..base });
    }
    let joint = WeightFrom::JointSoftmax;
    add("joint", RouterOptions { shared: 2, weight_from: joint, scale: 1.5, ..base });
    add("idle", RouterOptions { idle: 16, ..base });
    let selection = Selection::SparseMixer { eps: 0.01 };
    add("sparsemixer", RouterOptions { selection, ..plain(16, 2) });
    let selection = Selection::HashTable { vocabulary: 50 };
    let score = Score::SqrtSoftplus;
    add("table", RouterOptions { selection, score, renormalise: Renormalise::Sum(0.0), ..base });
    let mut scaled = RouterOptions { idle: 4, ..base };
    scaled.renormalise = Renormalise::Sum(0.0);
    cases.push(Case {
        name: "scale by expert".into(),
        options: scaled,
        bias: None,
        per_expert: Some(n.units(128)),
        table: None,
    });
    cases
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn softmax(v: &[f64]) -> Vec<f64> {
    let max = v.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = v.iter().map(|x| (x - max).exp()).sum();
    v.iter().map(|x| if sum > 0.0 { (x - max).exp() / sum } else { 0.0 }).collect()
}

/// Ids, weights, weights of shared experts of one token. `given`: ids that are taken as they are.
fn model(case: &Case, row: &[f32], given: Option<&[u32]>) -> (Vec<u32>, Vec<f64>, Vec<f64>) {
    let o = &case.options;
    let choices = o.experts + o.idle;
    let logits: Vec<f64> = row
        .iter()
        .map(|&l| {
            let l = f64::from(l) * f64::from(o.logit_multiplier);
            match o.soft_cap.map(f64::from) {
                Some(cap) if l != f64::NEG_INFINITY => (l / cap).tanh() * cap,
                _ => l,
            }
        })
        .collect();
    let scores: Vec<f64> = match o.score {
        Score::Softmax => softmax(&logits[..choices]),
        Score::Sigmoid => logits[..choices].iter().map(|&l| sigmoid(l)).collect(),
        Score::SqrtSoftplus => logits[..choices].iter().map(|&l| l.exp().ln_1p().sqrt()).collect(),
        Score::Logits => {
            logits[..choices].iter().map(|&l| if l.is_finite() { l } else { 0.0 }).collect()
        }
    };
    let mut choice: Vec<f32> = (0..choices)
        .map(|e| {
            let base = if o.correction == Correction::OnLogits { logits[e] } else { scores[e] };
            let bias = case.bias.as_ref().map_or(0.0, |b| b[e]);
            if logits[e] == f64::NEG_INFINITY { f32::NEG_INFINITY } else { base as f32 + bias }
        })
        .collect();
    // Larger first, ties to the lowest id: what a stable sort by falling value gives.
    let best = |ids: Vec<u32>, choice: &[f32], k: usize| {
        let mut ids = ids;
        ids.sort_by(|&a, &b| choice[b as usize].total_cmp(&choice[a as usize]));
        ids.truncate(k);
        ids
    };
    if let Some(groups) = o.groups {
        let size = choices / groups.count;
        let ratings: Vec<f32> = choice
            .chunks(size)
            .map(|group| {
                let mut sorted = group.to_vec();
                sorted.sort_by(|a, b| b.total_cmp(a));
                if groups.top_two_sum { sorted[0] + sorted[1] } else { sorted[0] }
            })
            .collect();
        let kept = best((0..groups.count as u32).collect(), &ratings, groups.keep);
        for (e, choice) in choice.iter_mut().enumerate() {
            if !kept.contains(&((e / size) as u32)) {
                *choice = match groups.fill_zero && choice.is_finite() {
                    true => 0.0,
                    false => f32::NEG_INFINITY,
                };
            }
        }
    }
    let all = |from: usize, to: usize| (from as u32..to as u32).collect::<Vec<_>>();
    let ids = match (given, o.selection) {
        (Some(ids), _) => ids.to_vec(),
        (None, Selection::TopKPerGroup { groups }) => {
            let size = choices / groups;
            let per = o.top_k / groups;
            let chosen = (0..groups)
                .flat_map(|g| best(all(g * size, (g + 1) * size), &choice, per))
                .collect();
            best(chosen, &choice, o.top_k)
        }
        _ => best(all(0, choices), &choice, o.top_k),
    };
    let of = |f: &dyn Fn(usize) -> f64| ids.iter().map(|&id| f(id as usize)).collect::<Vec<_>>();
    let mut shared = Vec::new();
    let mut weights = match (o.selection, o.weight_from) {
        (Selection::SparseMixer { eps }, _) if given.is_none() => {
            let band = |id: u32, without: Option<u32>| {
                let others: Vec<usize> =
                    (0..choices).filter(|&e| Some(e as u32) != without).collect();
                let max = others.iter().map(|&e| logits[e]).fold(f64::NEG_INFINITY, f64::max);
                let near =
                    |l: f64| (max - l) / l.abs().max(max) <= 2.0 * f64::from(eps) || l == max;
                let sum: f64 = others
                    .iter()
                    .filter(|&&e| near(logits[e]))
                    .map(|&e| (logits[e] - max).exp())
                    .sum();
                (logits[id as usize] - max).exp() / sum
            };
            vec![band(ids[0], None), band(ids[1], Some(ids[0]))]
        }
        (_, WeightFrom::Score) => of(&|e| scores[e]),
        (_, WeightFrom::SigmoidChosen) => of(&|e| sigmoid(logits[e])),
        (_, WeightFrom::SoftmaxChosen) => softmax(&of(&|e| logits[e])),
        (_, WeightFrom::JointSoftmax) => {
            let mut joint = of(&|e| sigmoid(logits[e]).ln());
            joint.extend(logits[choices..].iter().map(|&l| sigmoid(l).ln()));
            let mut joint = softmax(&joint);
            shared = joint.split_off(o.top_k);
            joint
        }
    };
    let sum: f64 = weights.iter().sum();
    let divisor = match o.renormalise {
        Renormalise::None => 0.0,
        Renormalise::Sum(eps) => sum + f64::from(eps),
        Renormalise::SumFloor(floor) => sum.max(f64::from(floor)),
        Renormalise::PNorm(p) => {
            let p = f64::from(p);
            weights.iter().map(|w| w.powf(p)).sum::<f64>().powf(1.0 / p)
        }
    };
    for (w, &id) in weights.iter_mut().zip(&ids) {
        let by_expert = case.per_expert.as_ref().and_then(|s| s.get(id as usize));
        *w /= if divisor > 0.0 { divisor } else { 1.0 };
        *w *= f64::from(o.scale) * by_expert.map_or(1.0, |&s| f64::from(s));
    }
    shared.iter_mut().for_each(|w| *w *= f64::from(o.scale));
    (ids, weights, shared)
}

fn router(s: &Setup, case: &Case) -> Router {
    let tensors = RouterTensors {
        bias: case.bias.as_ref().map(|b| s.upload(b)),
        per_expert_scale: case.per_expert.as_ref().map(|b| s.upload(b)),
        table: case.table.as_ref().map(|b| s.upload(b)),
    };
    Router::new(&s.modules, case.options, tensors).unwrap()
}

fn within_ulps(got: f32, want: f64) -> bool {
    let want = want as f32;
    got == want || (i64::from(got.to_bits()) - i64::from(want.to_bits())).abs() <= 4
}

#[test]
fn every_option_gives_the_models_ids_and_weights() {
    let Some(s) = setup() else { return };
    let mut n = Numbers(10);
    let mut fault = FaultWord::new(s.gpu(), &s.stream).unwrap();
    for case in cases(&mut n) {
        let o = case.options;
        let width = o.experts + o.idle + o.shared;
        let tokens = 65;
        let mut logits: Vec<f32> = n.units(tokens * width).iter().map(|x| x * 4.0).collect();
        // coarse logits in half of the rows: ties; in some a masked expert
        logits[..tokens / 2 * width].iter_mut().for_each(|l| *l = (*l * 2.0).round() / 2.0);
        if width > o.top_k + 3 && o.groups.is_none() {
            (0..tokens)
                .step_by(3)
                .for_each(|t| logits[t * width + t % o.experts] = f32::NEG_INFINITY);
        }
        let vocabulary = case.table.as_ref().map_or(1, |t| t.len() / o.top_k);
        let input: Vec<u32> = (0..tokens).map(|_| n.below(vocabulary) as u32).collect();
        let router = router(&s, &case);
        let (logits_d, input_d) = (s.upload(&logits), s.upload(&input));
        let given: Vec<u32> =
            (0..tokens).flat_map(|_| n.distinct(o.top_k, o.experts + o.idle)).collect();
        let given_d = s.upload(&given);
        let mut ids = s.buffer::<u32>(tokens * o.top_k);
        let mut weights = s.buffer::<f32>(tokens * o.top_k);
        let mut shared = s.buffer::<f32>(tokens * o.shared);
        let rows = Rows::new(logits_d.view(), Float::F32, tokens, width).unwrap();
        for chosen_outside in [false, true] {
            if chosen_outside && matches!(o.selection, Selection::SparseMixer { .. }) {
                continue;
            }
            let mut out = RoutingMut {
                ids: ids.view_mut(),
                weights: weights.view_mut(),
                shared_weights: shared.view_mut(),
            };
            match chosen_outside {
                true => router.route_to(&s.stream, rows, given_d.view(), &mut out, &fault),
                false => router.route(&s.stream, rows, Some(input_d.view()), &mut out, &fault),
            }
            .unwrap();
            fault.check(&s.stream).unwrap();
            let (ids, weights) = (s.download(ids.view()), s.download(weights.view()));
            let shared = s.download(shared.view());
            for t in 0..tokens {
                let slots = t * o.top_k..(t + 1) * o.top_k;
                let fixed = match (&case.table, chosen_outside) {
                    (_, true) => Some(&given[slots.clone()]),
                    (Some(table), _) => Some(&table[input[t] as usize * o.top_k..][..o.top_k]),
                    _ => None,
                };
                let row = &logits[t * width..][..width];
                let (want_ids, want, want_shared) = model(&case, row, fixed);
                let name = format!("{}, token {t}", case.name);
                assert_eq!(ids[slots.clone()], want_ids, "{name}");
                for (got, want) in weights[slots].iter().zip(&want) {
                    assert!(within_ulps(*got, *want), "{name}: {got} for {want}");
                }
                let got = &shared[t * o.shared..][..o.shared];
                assert!(got.iter().zip(&want_shared).all(|(g, w)| within_ulps(*g, *w)), "{name}");
            }
        }
    }
}

#[test]
fn bad_logits_and_ids_are_faults_and_take_no_expert() {
    let Some(s) = setup() else { return };
    let options = plain(8, 2);
    let case = Case { name: String::new(), options, bias: None, per_expert: None, table: None };
    let router = router(&s, &case);
    let mut fault = FaultWord::new(s.gpu(), &s.stream).unwrap();
    let mut logits = vec![0.25f32; 3 * 8];
    let mut run = |logits: &[f32], given: Option<&[u32]>| {
        let device = s.upload(logits);
        let rows = Rows::new(device.view(), Float::F32, 3, 8).unwrap();
        let (mut ids, mut weights) = (s.buffer::<u32>(6), s.buffer::<f32>(6));
        let mut none = s.buffer::<f32>(0);
        let mut out = RoutingMut {
            ids: ids.view_mut(),
            weights: weights.view_mut(),
            shared_weights: none.view_mut(),
        };
        let given = given.map(|given| s.upload(given));
        match &given {
            Some(given) => router.route_to(&s.stream, rows, given.view(), &mut out, &fault),
            None => router.route(&s.stream, rows, None, &mut out, &fault),
        }
        .unwrap();
        let found = match fault.check(&s.stream) {
            Err(Error::Fault(fault)) => Some((fault.kind(), fault.row())),
            other => {
                other.unwrap();
                None
            }
        };
        (found, s.download(ids.view()), s.download(weights.view()))
    };
    assert_eq!(run(&logits, None).0, None);
    let (found, ids, _) = run(&logits, Some(&[1, 2, 3, 4, 5, 8]));
    assert_eq!(
        (found, &ids[..]),
        (Some((FaultKind::ExpertId, 2)), &[1, 2, 3, 4, u32::MAX, u32::MAX][..])
    );
    for bad in [f32::NAN, f32::INFINITY] {
        logits[8 + 3] = bad;
        let (found, ids, weights) = run(&logits, None);
        assert_eq!(found, Some((FaultKind::Logit, 1)));
        assert_eq!(ids, [0, 1, u32::MAX, u32::MAX, 0, 1]);
        assert_eq!(weights[2..4], [0.0, 0.0]);
    }
}
