//! Balancing of experts: the published algorithm on hand-made examples, and what every rebalance
//! must keep to.

use moe_runner::exchange::ExpertMap;
use moe_runner::parallel::balance::{
    Copies, Topology, balance, copies_beside, initial, place, published, rank_loads, rebalance,
    rebalance_worth,
};
use moe_runner::random::Random;
use moe_runner::router::LogicalId;
use proptest::prelude::*;

/// Physical to logical, rank by rank.
fn by_rank(map: &ExpertMap) -> Vec<Vec<u32>> {
    let ids = |rank| map.held_by(rank).iter().map(|id| id.0).collect();
    (0..map.ranks()).map(ids).collect()
}

fn flat(map: &ExpertMap) -> Vec<u32> {
    by_rank(map).concat()
}

fn copies(map: &ExpertMap) -> Vec<usize> {
    (0..map.experts()).map(|e| map.copies(LogicalId(e as u32)).len()).collect()
}

fn map(experts: usize, by_rank: &[&[u32]]) -> ExpertMap {
    let ids: Vec<Vec<LogicalId>> =
        by_rank.iter().map(|rank| rank.iter().copied().map(LogicalId).collect()).collect();
    ExpertMap::new(experts, &ids).unwrap()
}

/// Some rank holds an expert twice.
fn has_twice(map: &ExpertMap) -> bool {
    by_rank(map).iter().any(|rank| rank.iter().enumerate().any(|(i, e)| rank[..i].contains(e)))
}

fn topology(ranks: usize, slots: usize, groups: usize, nodes: usize) -> Topology {
    Topology { ranks, slots, groups, nodes }
}

/// The example that was published with the algorithm: two layers of 12 experts in 4 groups, 16
/// physical ones on 8 ranks of 2 nodes.
#[test]
fn the_published_example() {
    let shape = topology(8, 2, 4, 2);
    let first = [90., 132., 40., 61., 104., 165., 39., 4., 73., 56., 183., 86.];
    let second = [20., 107., 104., 64., 19., 197., 187., 157., 172., 86., 16., 27.];
    let placed = published(&first, shape).unwrap();
    assert_eq!(flat(&placed), [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1]);
    assert_eq!(copies(&placed), [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1]);
    let placed = published(&second, shape).unwrap();
    assert_eq!(flat(&placed), [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]);
    // no rank has an expert twice there: keeping copies apart changes nothing
    for load in [first, second] {
        let [a, b] = [Copies::Apart, Copies::AsPublished].map(|c| place(&load, shape, c).unwrap());
        assert_eq!(a, b);
    }
}

/// Expert 0 alone is two thirds of the load, but groups stay on their node.
#[test]
fn small_hierarchical() {
    let (load, shape) = ([8., 1., 1., 1.], topology(4, 2, 2, 2));
    // node 0: copies 3 and 1, of 8/3, 1, 8/3, 8/3: the third one of expert 0 meets the first
    // node 1: copies 2 and 2, all of 1/2: dealt in turn, experts 2, 3, 2, 3
    let placed = published(&load, shape).unwrap();
    assert_eq!(by_rank(&placed), [[0, 0], [0, 1], [2, 2], [3, 3]]);
    // apart: at most 2 copies on 2 ranks
    let apart = place(&load, shape, Copies::Apart).unwrap();
    assert_eq!(by_rank(&apart), [[0, 1], [0, 1], [2, 3], [3, 2]]);
}

#[test]
fn equal_weights() {
    // groups go to nodes in turn; so do experts to ranks
    let placed = published(&[50.; 8], topology(4, 2, 4, 2)).unwrap();
    assert_eq!(by_rank(&placed), [[0, 4], [1, 5], [2, 6], [3, 7]]);
}

#[test]
fn one_expert_has_nearly_all_the_load() {
    let (load, shape) = ([1000., 1., 1., 1., 1., 1., 1., 1.], topology(4, 3, 4, 2));
    // groups 1001, 2, 2, 2: node 0 gets the first and (node 1 being full) the last. Its six
    // copies: expert 0 three times, at 333 each; the others once
    let placed = published(&load, shape).unwrap();
    assert_eq!(by_rank(&placed), [[0, 0, 7], [0, 1, 6], [4, 2, 2], [5, 3, 3]]);
    let apart = place(&load, shape, Copies::Apart).unwrap();
    assert_eq!(by_rank(&apart), [[0, 6, 1], [0, 7, 1], [4, 2, 3], [5, 3, 2]]);
    // the largest rank: 2/3 of expert 0 and one more, or half of it and 1.5 more
    assert!((balance(&load, &placed) - 1007. / 4. / (2000. / 3. + 1.)).abs() < 1e-12);
    assert!((balance(&load, &apart) - 1007. / 4. / 501.5).abs() < 1e-12);
    let start = initial(8, shape).unwrap();
    let rebalanced = rebalance(&load, &start, 4, 2).unwrap();
    assert_eq!(rebalanced.after, balance(&load, &apart));
    assert!(!has_twice(&rebalanced.map));
}

#[test]
fn one_rank_holds_everything_in_order_of_weight() {
    let load = [10., 20., 30., 40.];
    assert_eq!(flat(&published(&load, topology(1, 4, 1, 1)).unwrap()), [3, 2, 1, 0]);
    // redundant copies on one rank serve nobody, but are placed all the same
    let placed = published(&load, topology(1, 5, 1, 1)).unwrap();
    assert_eq!(copies(&placed), [1, 1, 1, 2]);
    // there is nothing to balance
    let here = initial(4, topology(1, 4, 1, 1)).unwrap();
    assert_eq!(rebalance(&load, &here, 1, 1).unwrap().map, here);
}

#[test]
fn without_redundant_experts() {
    let one_each = published(&[5., 1., 9., 3.], topology(4, 1, 1, 1)).unwrap();
    assert_eq!(by_rank(&one_each), [[0], [1], [2], [3]]);
    // 4 → 0; 3 → 1; 2 → 1, which is then full; 1 → 0
    let two_each = published(&[1., 2., 3., 4.], topology(2, 2, 1, 1)).unwrap();
    assert_eq!(by_rank(&two_each), [[3, 0], [2, 1]]);
}

#[test]
fn groups_that_do_not_divide_over_nodes_are_ignored() {
    let load = [10., 20., 30., 40.];
    // copies 1, 1, 2, 2, of 10, 20, 15, 20, 20, 15
    let want = [[1, 3, 0], [3, 2, 2]];
    for (groups, nodes) in [(1, 1), (1, 2), (3, 2), (2, 4)] {
        let placed = published(&load, topology(2, 3, groups, nodes)).unwrap();
        assert_eq!(by_rank(&placed), want, "{groups} groups on {nodes} nodes");
    }
    // both ranks have 50; apart it would be 55 and 45: the second copy of expert 2 is put up with
    let start = map(4, &[&[0, 1, 2], &[3, 0, 1]]);
    let rebalanced = rebalance(&load, &start, 1, 1).unwrap();
    assert_eq!((rebalanced.after, copies(&rebalanced.map)), (1.0, vec![1, 1, 2, 2]));
}

#[test]
fn what_stays_on_a_rank_keeps_its_slot() {
    let start = map(4, &[&[0, 1], &[3, 2]]);
    let rebalanced = rebalance(&[10., 9., 1., 2.], &start, 1, 1).unwrap();
    assert_eq!(by_rank(&rebalanced.map), [[0, 2], [3, 1]]);
    assert_eq!((rebalanced.before, rebalanced.after), (11. / 19., 1.0));
    assert_eq!(rank_loads(&[10., 9., 1., 2.], &rebalanced.map), [11., 11.]);
}

/// Dealing leaves expert 3 twice on the rank that has room last; the second copy changes places with what leaves the
/// heavier rank lightest.
#[test]
fn copies_are_parted_where_it_costs_least() {
    // copies of 4, 3, 5, 3, 3, 3: the ranks have 5 + 3 + 3 and 4 + 3 + 3; for expert 0 it would be 12 and 9
    let load = [4., 3., 5., 6., 3.];
    let apart = place(&load, topology(2, 3, 1, 1), Copies::Apart).unwrap();
    assert_eq!(by_rank(&apart), [[2, 3, 1], [0, 3, 4]]);
    assert_eq!(rank_loads(&load, &apart), [11., 10.]);
}

/// Copies that stand beside others already cost no more memory than they did.
#[test]
fn as_many_copies_beside_others_as_before_need_no_gain() {
    let start = map(3, &[&[0, 1], &[2, 2]]);
    // 15 and 9 become 12 and 12, with a copy of expert 1 beside another in place of one of expert 2
    let rebalanced = rebalance_worth(&[3., 12., 9.], &start, 1, 1, 1.0).unwrap();
    assert_eq!(by_rank(&rebalanced.map), [[0, 2], [1, 1]]);
    assert_eq!((rebalanced.before, rebalanced.after), (0.8, 1.0));
}

/// Weights move for a gain alone.
#[test]
fn what_is_as_good_stays() {
    let start = map(4, &[&[0, 3], &[1, 2]]);
    let rebalanced = rebalance(&[5.; 4], &start, 1, 1).unwrap();
    assert_eq!((rebalanced.map, rebalanced.before, rebalanced.after), (start, 1.0, 1.0));
}

#[test]
fn the_first_placement_repeats_the_first_experts() {
    let start = initial(5, topology(4, 2, 1, 1)).unwrap();
    assert_eq!(flat(&start), [0, 1, 2, 3, 4, 0, 1, 2]);
    let shape = Topology::flat(250, 6, 64).unwrap();
    assert_eq!((shape.slots, shape.physical()), (4, 256));
}

#[test]
fn what_cannot_be_placed_is_refused() {
    let refused = |result: moe_runner::Result<ExpertMap>, what: &str| {
        let message = result.unwrap_err().to_string();
        assert!(message.contains(what), "{message}");
    };
    refused(published(&[1.; 4], topology(3, 1, 1, 1)), "cannot hold 4 experts");
    refused(published(&[1.; 4], topology(3, 2, 2, 2)), "3 ranks do not divide over 2 nodes");
    refused(published(&[1.; 5], topology(2, 3, 2, 2)), "5 experts do not divide into 2 groups");
    refused(published(&[1.; 4], topology(0, 1, 1, 1)), "none may be zero");
    refused(published(&[1.; 4], topology(usize::MAX, 2, 1, 1)), "cannot hold");
    refused(published(&[1., f64::NAN], topology(2, 1, 1, 1)), "the load of expert 1 is NaN");
    let uneven = map(3, &[&[0, 1], &[2]]);
    refused(rebalance(&[1.; 3], &uneven, 1, 1).map(|r| r.map), "rank 1 1: all must hold");
    let even = map(2, &[&[0], &[1]]);
    refused(rebalance(&[1.; 3], &even, 1, 1).map(|r| r.map), "3 loads for 2 experts");
    let message = Topology::flat(256, 30, 64).unwrap_err().to_string();
    assert!(message.contains("64 redundant ones would"), "{message}");
}

/// A valid placement at random: every expert once, the other slots anything.
fn random_map(random: &mut Random, experts: usize, ranks: usize, slots: usize) -> ExpertMap {
    let mut all: Vec<u32> = (0..ranks * slots)
        .map(|i| if i < experts { i } else { random.bits() as usize % experts } as u32)
        .collect();
    for i in (1..all.len()).rev() {
        all.swap(i, random.bits() as usize % (i + 1));
    }
    let by_rank: Vec<&[u32]> = all.chunks(slots).collect();
    map(experts, &by_rank)
}

proptest! {
    /// For any load and any current placement: every expert has a copy, every rank as many as
    /// before; the balance is never worse than it was, nor than the published algorithm's; copies
    /// kept apart are apart; and the same again changes nothing.
    #[test]
    fn never_worse(
        group_size in 1..6_usize, groups in 1..5_usize, nodes in 1..4_usize,
        node_ranks in 1..5_usize, more in 0..4_usize, skew in 0..4_i32, seed: u64,
    ) {
        let (experts, ranks) = (group_size * groups, nodes * node_ranks);
        let slots = experts.div_ceil(ranks) + more;
        let shape = topology(ranks, slots, groups, nodes);
        let random = &mut Random::new(seed);
        let load: Vec<f64> =
            (0..experts).map(|_| (random.unit().powi(1 << skew) * 1000.).floor()).collect();
        let current = random_map(random, experts, ranks, slots);
        let new = rebalance(&load, &current, groups, nodes).unwrap();

        prop_assert_eq!(new.before, balance(&load, &current));
        prop_assert_eq!(new.after, balance(&load, &new.map));
        prop_assert!(new.after >= new.before);
        let theirs = published(&load, shape).unwrap();
        prop_assert!(new.after >= balance(&load, &theirs) - 1e-8);
        prop_assert!(copies(&new.map).iter().all(|n| *n >= 1));
        prop_assert!(by_rank(&new.map).iter().all(|rank| rank.len() == slots));
        let total: f64 = rank_loads(&load, &new.map).iter().sum();
        prop_assert!((total - load.iter().sum::<f64>()).abs() < 1e-6);

        let apart = place(&load, shape, Copies::Apart).unwrap();
        let node_experts = if shape.is_hierarchical() { experts / nodes } else { experts };
        if slots <= node_experts {
            prop_assert!(!has_twice(&apart), "{:?}", by_rank(&apart));
        }
        let again = rebalance(&load, &new.map, groups, nodes).unwrap();
        prop_assert_eq!(again.map, new.map);
    }
}

/// 58 layers of 256 experts in 8 groups with 32 redundant ones on 32 ranks of 4 nodes: loads as
/// uneven as measured ones come out nearly even.
#[test]
fn many_layers() {
    let shape = topology(32, 9, 8, 4);
    let start = initial(256, shape).unwrap();
    let random = &mut Random::new(3);
    for _ in 0..58 {
        let load: Vec<f64> =
            (0..256).map(|_| random.normal().exp().mul_add(1000., 1.).floor()).collect();
        let new = rebalance(&load, &start, 8, 4).unwrap();
        assert!(new.after > 0.8 && new.after > new.before, "{} to {}", new.before, new.after);
        assert!(!has_twice(&place(&load, shape, Copies::Apart).unwrap()));
    }
}

/// A second copy on a rank serves nobody: where memory counts, it must buy as much time as it takes
/// room. Several hot experts among 256 with 64 more copies, as in wide deployments.
#[test]
fn copies_beside_each_other_must_be_worth_their_memory() {
    let (experts, ranks) = (256, 16);
    let shape = topology(ranks, 20, 1, 1);
    let start = initial(experts, shape).unwrap();
    let mut declined = 0;
    for seed in 0..40 {
        let random = &mut Random::new(seed);
        let mut load: Vec<f64> = (0..experts).map(|_| 500. + 2500. * random.unit()).collect();
        for _ in 0..4 + 4 * (seed % 2) {
            load[(random.unit() * 256.) as usize] = 20000. + 70000. * random.unit();
        }
        let any = rebalance(&load, &start, 1, 1).unwrap();
        let new = rebalance_worth(&load, &start, 1, 1, 1.0).unwrap();
        let more = copies_beside(&any.map).saturating_sub(copies_beside(&new.map));
        let room = more as f64 / (20 * ranks) as f64;
        assert!(new.after >= any.after - room - 1e-9, "seed {seed}: {} {}", new.after, any.after);
        declined += usize::from(more > 0);
        assert!(new.after > new.before);
    }
    assert!(declined > 3, "{declined}: these loads tempt nobody");
}
