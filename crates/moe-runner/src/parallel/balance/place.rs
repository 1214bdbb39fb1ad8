//! Where the copies of experts go, for a given load: the published algorithm.
//!
//! ```text
//! 1. pack the router's groups of experts onto nodes        (hierarchical: groups divide over nodes)
//! 2. in each node, copies for the busiest experts
//! 3. in each node, pack copies onto its ranks
//! ```
//! Where the groups do not divide over the nodes, the same with one group and one node: "global".

use super::Topology;
use super::pack::{balanced_packing, replicate};

/// What is done about several copies of one expert on one rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copies {
    /// Nothing: exactly the published algorithm. An expert far busier than all others gets more
    /// copies than there are ranks, and the lightest rank may get the same expert again.
    AsPublished,
    /// They are avoided: a second copy on a rank serves nobody. An expert gets at most one copy for
    /// each rank of its node, and copies go to ranks that do not have the expert. Equal to the
    /// published placement where that one has no such copies.
    Apart,
}

/// The experts of each rank, for experts of the given loads. `topology` fits the number of loads.
pub(super) fn place(load: &[f64], topology: Topology, copies: Copies) -> Vec<Vec<usize>> {
    let Topology { ranks, slots, groups, nodes } = match topology.is_hierarchical() {
        true => topology,
        false => Topology { groups: 1, nodes: 1, ..topology },
    };
    let experts = load.len();
    let (group_size, node_ranks) = (experts / groups, ranks / nodes);
    let group_loads: Vec<f64> =
        load.chunks_exact(group_size).map(|group| group.iter().sum()).collect();
    let mut by_rank = Vec::with_capacity(ranks);
    for node in balanced_packing(&group_loads, nodes, None) {
        let experts: Vec<usize> =
            node.iter().flat_map(|group| group * group_size..(group + 1) * group_size).collect();
        by_rank.extend(place_in_node(load, &experts, node_ranks, slots, copies));
    }
    by_rank
}

/// Steps 2 and 3 for the experts of one node.
fn place_in_node(
    load: &[f64],
    experts: &[usize],
    ranks: usize,
    slots: usize,
    copies: Copies,
) -> Vec<Vec<usize>> {
    let loads: Vec<f64> = experts.iter().map(|expert| load[*expert]).collect();
    let most = match copies {
        // with more slots than experts, every rank must hold some expert twice
        Copies::Apart if slots <= experts.len() => ranks,
        _ => usize::MAX,
    };
    let (item_of, counts) = replicate(&loads, ranks * slots, most);
    let copy_loads: Vec<f64> =
        item_of.iter().map(|item| loads[*item] / counts[*item] as f64).collect();
    let kind = (copies == Copies::Apart).then_some(item_of.as_slice());
    let mut packs: Vec<Vec<usize>> = balanced_packing(&copy_loads, ranks, kind)
        .into_iter()
        .map(|pack| pack.into_iter().map(|copy| item_of[copy]).collect())
        .collect();
    if copies == Copies::Apart {
        let weight: Vec<f64> = loads.iter().zip(&counts).map(|(w, n)| w / *n as f64).collect();
        separate(&mut packs, &weight);
    }
    for item in packs.iter_mut().flatten() {
        *item = experts[*item];
    }
    packs
}

/// Packing in one pass may leave an expert twice on the last ranks with room. Each such copy changes
/// places with an expert of another rank, so that neither rank then has an expert twice; of all such
/// exchanges, the one that leaves the heavier of the two ranks lightest.
fn separate(packs: &mut [Vec<usize>], weight: &[f64]) {
    let sum = |pack: &[usize]| pack.iter().map(|item| weight[*item]).sum::<f64>();
    for here in 0..packs.len() {
        for slot in 0..packs[here].len() {
            let item = packs[here][slot];
            if !packs[here][..slot].contains(&item) {
                continue;
            }
            let mut best: Option<(f64, usize, usize)> = None;
            for there in (0..packs.len()).filter(|there| !packs[*there].contains(&item)) {
                for (other_slot, other) in packs[there].iter().enumerate() {
                    if packs[here].contains(other) {
                        continue;
                    }
                    let change = weight[item] - weight[*other];
                    let heavier = (sum(&packs[here]) - change).max(sum(&packs[there]) + change);
                    if best.is_none_or(|(least, ..)| heavier < least) {
                        best = Some((heavier, there, other_slot));
                    }
                }
            }
            if let Some((_, there, other_slot)) = best {
                packs[here][slot] = packs[there][other_slot];
                packs[there][other_slot] = item;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_that_packing_left_twice_changes_places() {
        // rank 1 has expert 0 twice; ranks 0 and 2 do not have it. 5 + 5 | 4 + 1 | 3 + 2
        let weight = [5.0, 4.0, 1.0, 3.0, 2.0];
        let mut packs = vec![vec![1, 2], vec![0, 0], vec![3, 4]];
        separate(&mut packs, &weight);
        // with 4: 9 and 6; with 1: 6 and 9; with 3: 8 and 7; with 2: 7 and 8: the lightest is 8,
        // first met with expert 3
        assert_eq!(packs, [vec![1, 2], vec![0, 3], vec![0, 4]]);
        // where every other rank has it already, it stays
        let mut packs = vec![vec![0, 1], vec![0, 0]];
        separate(&mut packs, &weight);
        assert_eq!(packs, [[0, 1], [0, 0]]);
    }
}
