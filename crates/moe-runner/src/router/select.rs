//! Which experts: the choice values of one token, groups, and the k largest.

use super::scratch::{Candidate, Scratch};
use crate::spec::{Correction, GroupFill, GroupScore, Groups, RouterSpec, Selection};

/// Fills `scratch.chosen` from scores and logits; best first, ties to the lowest id.
pub(super) fn select(spec: &RouterSpec, correction: Option<&[f32]>, scratch: &mut Scratch) {
    choices(spec.correction, correction, scratch);
    if let Some(groups) = spec.groups {
        limit_to_groups(groups, scratch);
    }
    let Scratch { choice, chosen, .. } = scratch;
    chosen.resize(spec.top_k, Candidate::default());
    match spec.selection {
        Selection::TopKPerGroup { groups } => {
            let size = choice.len() / groups;
            let share = spec.top_k / groups;
            for (group, chosen) in chosen.chunks_exact_mut(share).enumerate() {
                top_k(&choice[group * size..][..size], chosen);
                for candidate in chosen {
                    candidate.id += (group * size) as u32;
                }
            }
            // Stable order: groups come by ascending id, so ties stay with the lowest.
            insertion_sort(chosen);
        }
        // A hash table's ids never come here; sparsemixer's two are the best two.
        Selection::TopK | Selection::SparseMixer { .. } | Selection::HashTable { .. } => {
            top_k(choice, chosen);
        }
    }
}

/// `choice = score + bias`, or `logit + bias`, in f32.
///
/// Finite but for masked experts (logit −∞), which no bias may bring back: so a sum of two never
/// is NaN.
fn choices(kind: Correction, correction: Option<&[f32]>, scratch: &mut Scratch) {
    let Scratch { logits, scores, choice, .. } = scratch;
    choice.clear();
    let base = match kind {
        Correction::OnLogits => &logits[..scores.len()],
        Correction::None | Correction::OnScore => scores,
    };
    let masked = |expert: usize| logits[expert] == f64::NEG_INFINITY;
    choice.extend(base.iter().enumerate().map(|(expert, &value)| {
        if masked(expert) {
            f32::NEG_INFINITY
        } else {
            let bias = correction.map_or(0.0, |correction| correction[expert]);
            (value as f32 + bias).clamp(f32::MIN, f32::MAX)
        }
    }));
}

/// Keeps the best-rated groups' choices; the others' become the fill (masked experts stay masked).
fn limit_to_groups(groups: Groups, scratch: &mut Scratch) {
    let Scratch { choice, ratings, kept, .. } = scratch;
    let size = choice.len() / groups.count;
    ratings.clear();
    ratings.extend(choice.chunks_exact(size).map(|group| rate(groups.score, group)));
    kept.resize(groups.keep, Candidate::default());
    top_k(ratings, kept);
    for (index, group) in choice.chunks_exact_mut(size).enumerate() {
        if kept.iter().any(|kept| kept.id as usize == index) {
            continue;
        }
        match groups.fill {
            GroupFill::NegativeInfinity => group.fill(f32::NEG_INFINITY),
            GroupFill::Zero => {
                group.iter_mut().filter(|c| **c != f32::NEG_INFINITY).for_each(|c| *c = 0.0);
            }
        }
    }
}

fn rate(score: GroupScore, group: &[f32]) -> f32 {
    let mut best = [f32::NEG_INFINITY; 2];
    for &value in group {
        if value > best[0] {
            best = [value, best[0]];
        } else if value > best[1] {
            best[1] = value;
        }
    }
    match score {
        GroupScore::Max => best[0],
        GroupScore::TopTwoSum => best[0] + best[1],
    }
}

/// The `chosen.len()` largest values with their indices, best first, ties to the lowest index.
///
/// Inserts into a sorted list: for the few that are chosen of a few hundred, nearly every value
/// costs one comparison. Values must not be NaN, and be at least as many as are chosen.
pub(super) fn top_k(values: &[f32], chosen: &mut [Candidate]) {
    let mut held = 0;
    for (id, &choice) in values.iter().enumerate() {
        if held < chosen.len() {
            held += 1;
        } else if choice <= chosen[held - 1].choice {
            continue;
        }
        let mut slot = held - 1;
        while slot > 0 && chosen[slot - 1].choice < choice {
            chosen[slot] = chosen[slot - 1];
            slot -= 1;
        }
        chosen[slot] = Candidate { choice, id: id as u32 };
    }
}

/// Descending and stable, without the allocation of `sort_by`.
fn insertion_sort(candidates: &mut [Candidate]) {
    for end in 1..candidates.len() {
        let mut slot = end;
        while slot > 0 && candidates[slot - 1].choice < candidates[slot].choice {
            candidates.swap(slot - 1, slot);
            slot -= 1;
        }
    }
}
