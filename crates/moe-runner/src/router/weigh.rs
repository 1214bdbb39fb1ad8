//! The weights of one token's chosen experts, in float64.

use super::score::{log_sigmoid, sigmoid, softmax};
use super::scratch::Scratch;
use crate::spec::{Renormalise, RouterSpec, Selection, WeightFrom};

/// Fills `scratch.weights` for `scratch.chosen`: k weights, then those of jointly weighted shared
/// experts. Renormalised, not yet scaled. A masked expert (logit −∞) weighs 0.
pub(super) fn weigh(spec: &RouterSpec, scratch: &mut Scratch) {
    let Scratch { logits, scores, chosen, weights, .. } = scratch;
    let chosen = chosen.iter().map(|candidate| candidate.id as usize);
    weights.clear();
    match (spec.selection, spec.weight_from) {
        (Selection::SparseMixer { eps }, _) => {
            let mut excluded = None;
            for id in chosen {
                weights.push(sparsemixer(logits, id, excluded, f64::from(eps)));
                excluded = Some(id);
            }
        }
        (_, WeightFrom::Score) => weights.extend(chosen.map(|id| scores[id])),
        (_, WeightFrom::SigmoidChosen) => weights.extend(chosen.map(|id| sigmoid(logits[id]))),
        (_, WeightFrom::SoftmaxChosen) => {
            weights.extend(chosen.map(|id| logits[id]));
            softmax(weights);
        }
        (_, WeightFrom::JointSoftmax { .. }) => {
            weights.extend(chosen.map(|id| log_sigmoid(logits[id])));
            weights.extend(logits[scores.len()..].iter().map(|&logit| log_sigmoid(logit)));
            softmax(weights);
        }
    }
    renormalise(spec.renormalise, &mut weights[..spec.top_k]);
}

/// Softmax at `id` over the logits that are within `2·eps` of the largest, relative to
/// `max(|logit|, largest)`. An expert excluded (the first round's) takes no part.
fn sparsemixer(logits: &[f64], id: usize, excluded: Option<usize>, eps: f64) -> f64 {
    let eligible =
        || logits.iter().enumerate().filter(|&(other, _)| Some(other) != excluded).map(|(_, &l)| l);
    let max = eligible().fold(f64::NEG_INFINITY, f64::max);
    // 0/0 (the largest logit is 0) and ∞/∞ (a masked expert) are NaN, and count as near: the
    // first because it is the largest, the second because it adds nothing.
    let far = |logit: f64| (max - logit) / logit.abs().max(max) > 2.0 * eps;
    if max == f64::NEG_INFINITY || far(logits[id]) || excluded == Some(id) {
        return 0.0;
    }
    let sum: f64 = eligible().filter(|&logit| !far(logit)).map(|logit| (logit - max).exp()).sum();
    (logits[id] - max).exp() / sum
}

/// A divisor that is not positive divides by one instead.
fn renormalise(kind: Renormalise, weights: &mut [f64]) {
    let sum = || weights.iter().sum::<f64>();
    let divisor = match kind {
        Renormalise::None => return,
        Renormalise::Sum { eps } => sum() + f64::from(eps),
        Renormalise::SumFloor { floor } => sum().max(f64::from(floor)),
        Renormalise::PNorm { p } => {
            let p = f64::from(p);
            weights.iter().map(|w| w.abs().powf(p)).sum::<f64>().powf(1.0 / p)
        }
    };
    if divisor > 0.0 {
        weights.iter_mut().for_each(|weight| *weight /= divisor);
    }
}
