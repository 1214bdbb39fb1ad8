//! Weights that stand in several places: whole experts, one projection of several, or gate and up
//! projection of one.

use std::collections::BTreeMap;

use super::finding::{FindingKind, Findings};
use super::weights::{Place, Role, Seen};

/// Looks for copies among the experts of each branch.
pub(super) fn find(seen: &[Seen], findings: &mut Findings) {
    let routed = |place| match place {
        Place::Routed(index, role) => Some((index, role)),
        _ => None,
    };
    let shared = |place| match place {
        Place::Shared(index, role) => Some((index, role)),
        _ => None,
    };
    branch(seen, routed, findings);
    branch(seen, shared, findings);
}

/// Which expert and projection of the branch something is.
type Of = fn(Place) -> Option<(usize, Role)>;

fn branch(seen: &[Seen], of: Of, findings: &mut Findings) {
    let mut experts: BTreeMap<usize, BTreeMap<Role, &Seen>> = BTreeMap::new();
    for seen in seen.iter().filter(|seen| seen.is_usable()) {
        if let Some((index, role)) = of(seen.place) {
            experts.entry(index).or_default().insert(role, seen);
        }
    }
    // whole experts, then what only a projection of them has in common
    let mut whole: BTreeMap<Vec<(Role, u128)>, Vec<usize>> = BTreeMap::new();
    let mut parts: BTreeMap<(Role, u128), Vec<usize>> = BTreeMap::new();
    for (index, expert) in &experts {
        let hashes = expert.iter().map(|(role, seen)| (*role, seen.hash));
        whole.entry(hashes.clone().collect()).or_default().push(*index);
        hashes.for_each(|part| parts.entry(part).or_default().push(*index));
    }
    let copies = whole.values().filter(|same| same.len() > 1);
    for same in copies.clone() {
        for index in same {
            let Some(seen) = experts[index].values().next() else { continue };
            findings.add(FindingKind::Copies, seen.about(), || {
                let (first, second) = (same[0], same[1]);
                format!(
                    "is the same for experts {first} and {second}, and so are all of their weights"
                )
            });
        }
    }
    let told: Vec<&Vec<usize>> = copies.collect();
    for ((role, _), same) in parts.iter().filter(|(_, same)| same.len() > 1) {
        if told.contains(&same) {
            continue;
        }
        for index in same {
            findings.add(FindingKind::Copies, experts[index][role].about(), || {
                format!("is the same for experts {} and {}: the {role}", same[0], same[1])
            });
        }
    }
    for (index, expert) in &experts {
        if let (Some(gate), Some(up)) = (expert.get(&Role::Gate), expert.get(&Role::Up))
            && gate.hash == up.hash
        {
            findings.add(FindingKind::Copies, gate.about(), || {
                format!("and '{}' are the same: gate and up of expert {index}", up.name)
            });
        }
    }
}
