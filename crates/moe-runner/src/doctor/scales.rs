//! Weights that are far larger or smaller than those beside them: what a wrong scale does, in any
//! number format.

use std::collections::BTreeMap;

use super::finding::{About, FindingKind, Findings};
use super::weights::{Place, Role, Seen};

/// An expert's weights, by the median of its rows' largest magnitudes, beside the other experts'.
/// Between experts of published models lies a factor of less than ten.
const EXPERT: f32 = 32.0;

/// A row's largest magnitude beside the matrix's median. The largest outliers that published models
/// are known for are some twenty times the usual.
const ROW: f32 = 64.0;

/// Compares experts, and rows.
pub(super) fn compare(seen: &[Seen], findings: &mut Findings) {
    // by branch and role: only like is compared with like
    let mut medians = BTreeMap::<(bool, Role), Vec<(usize, f32)>>::new();
    for (index, seen) in seen.iter().enumerate().filter(|(_, seen)| seen.is_usable()) {
        let median = median(seen.maxima.iter().copied().filter(|max| *max > 0.0).collect());
        match seen.place {
            Place::Routed(_, role) => medians.entry((true, role)).or_default(),
            Place::Shared(_, role) => medians.entry((false, role)).or_default(),
            Place::Router | Place::Transform => {
                rows(seen, median, findings);
                continue;
            }
        }
        .push((index, median));
    }
    for group in medians.values() {
        let usual = median(group.iter().map(|(_, median)| *median).collect());
        for (index, own) in group {
            let seen = &seen[*index];
            // of two, nobody can say which is wrong; of few, a small one may be the rule
            let times = own / usual;
            if times > EXPERT {
                findings.add(FindingKind::OffScale, seen.about(), || {
                    let times = rounded(times);
                    format!("is {times} times as large as the other experts' ({})", seen.place)
                });
            } else if times < 1.0 / EXPERT && group.len() > 2 {
                findings.add(FindingKind::OffScale, seen.about(), || {
                    let times = rounded(1.0 / times);
                    format!("is {times} times smaller than the other experts' ({})", seen.place)
                });
            } else {
                rows(seen, *own, findings);
            }
        }
    }
}

/// Rows that are far larger than the `median` of their matrix.
fn rows(seen: &Seen, median: f32, findings: &mut Findings) {
    let far = |max: &f32| *max > ROW * median;
    let Some(first) = seen.maxima.iter().position(far) else { return };
    let times = seen.maxima.iter().fold(0.0, |a: f32, b| a.max(*b)) / median;
    let detail = || {
        let count = seen.maxima.iter().filter(|max| far(max)).count();
        let rows = if count == 1 { "a row" } else { "rows" };
        let times = rounded(times);
        format!(
            "has {rows} up to {times} times as large as its others, the first is row {first} ({})",
            seen.place
        )
    };
    let about = match seen.place {
        // a row of the gate is an expert's
        Place::Router => About { expert: Some(first), ..seen.about() },
        _ => seen.about(),
    };
    findings.add(FindingKind::OffScale, about, detail);
}

/// A ratio, without digits that say nothing.
fn rounded(times: f32) -> String {
    match times < 1e6 {
        true => format!("{times:.0}"),
        false => format!("{times:.0e}"),
    }
}

/// The lower median: of two, the smaller.
fn median(mut values: Vec<f32>) -> f32 {
    values.sort_unstable_by(f32::total_cmp);
    let middle = values.len().saturating_sub(1) / 2;
    values.get(middle).copied().unwrap_or(0.0)
}
