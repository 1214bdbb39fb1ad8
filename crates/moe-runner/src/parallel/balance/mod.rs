//! Balancing experts over ranks: which experts get more copies, and where the copies go.
//!
//! A [`LoadWindow`] counts what the router chose; [`rebalance`] turns the sums into a placement, an
//! [`ExpertMap`], that spreads the work over the ranks; `parallel::rebalance` moves the weights.
//! The algorithm is the published one (hierarchical and global expert-parallel load balancing,
//! DeepSeek 2025, as in vLLM): [`published`] gives its result to the letter. That may put an expert
//! twice on one rank, where the second copy serves nobody; [`rebalance`] also tries to keep copies
//! apart, takes whichever is better balanced, and keeps the current placement unless the new one is
//! better still. [`rebalance_worth`] takes copies beside each other only where the gain is worth their
//! memory.
//!
//! **Balance** is the mean load of the ranks divided by the largest: 1 is perfect, 1/ranks the
//! worst. The load of a rank is the sum over its experts of load / copies.
//!
//! All arithmetic is in float64 in one order: every rank that has the same loads finds the same
//! placement.

mod pack;
mod place;
mod window;

pub use place::Copies;
pub use window::{LoadWindow, Loads};

use crate::exchange::ExpertMap;
use crate::router::LogicalId;
use crate::{Error, Result};

/// What physical experts there are, and which of them are close to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    /// Ranks of the expert-parallel group, node by node.
    pub ranks: usize,
    /// Physical experts of each rank.
    pub slots: usize,
    /// Groups of experts that tokens choose among first; 1 without.
    pub groups: usize,
    /// Machines; the ranks of one are closer to each other than to others.
    pub nodes: usize,
}

impl Topology {
    /// `experts` experts and `redundant` more copies over `ranks` ranks, without groups or nodes.
    ///
    /// # Errors
    /// [`Error::Input`] if the physical experts do not divide over the ranks.
    pub fn flat(experts: usize, redundant: usize, ranks: usize) -> Result<Self> {
        let physical = experts.saturating_add(redundant);
        if ranks == 0 || !physical.is_multiple_of(ranks) {
            let more = physical.next_multiple_of(ranks.max(1)).saturating_sub(experts);
            return Err(refuse(format!(
                "{experts} experts and {redundant} redundant ones do not divide over {ranks} \
                 ranks; {more} redundant ones would"
            )));
        }
        Ok(Self { ranks, slots: physical / ranks, groups: 1, nodes: 1 })
    }

    /// Groups stay together on a node: they divide over the nodes. Otherwise groups and nodes are
    /// ignored.
    pub fn is_hierarchical(&self) -> bool {
        self.groups.is_multiple_of(self.nodes)
    }

    /// All physical experts.
    pub fn physical(&self) -> usize {
        self.ranks * self.slots
    }

    /// Checks that `experts` experts can be placed so.
    ///
    /// # Errors
    /// [`Error::Input`] naming what does not divide, or is missing.
    pub fn validate(&self, experts: usize) -> Result<()> {
        let Self { ranks, slots, groups, nodes } = *self;
        if experts == 0 || ranks == 0 || slots == 0 || groups == 0 || nodes == 0 {
            return Err(refuse(format!(
                "{experts} experts, {ranks} ranks of {slots}, {groups} groups, {nodes} nodes: none \
                 may be zero"
            )));
        }
        match ranks.checked_mul(slots) {
            Some(physical) if physical >= experts => {}
            _ => {
                return Err(refuse(format!(
                    "{ranks} ranks of {slots} physical experts cannot hold {experts} experts"
                )));
            }
        }
        if self.is_hierarchical() && !ranks.is_multiple_of(nodes) {
            return Err(refuse(format!("{ranks} ranks do not divide over {nodes} nodes")));
        }
        if self.is_hierarchical() && !experts.is_multiple_of(groups) {
            return Err(refuse(format!("{experts} experts do not divide into {groups} groups")));
        }
        Ok(())
    }
}

fn refuse(reason: String) -> Error {
    Error::input("expert balancing", reason)
}

/// Where the experts are before any load is known: physical expert i is expert i, the redundant
/// ones are experts 0, 1, 2, … again.
///
/// # Errors
/// As [`Topology::validate`].
pub fn initial(experts: usize, topology: Topology) -> Result<ExpertMap> {
    topology.validate(experts)?;
    let all: Vec<LogicalId> =
        (0..topology.physical()).map(|i| LogicalId((i % experts) as u32)).collect();
    let by_rank: Vec<Vec<LogicalId>> = all.chunks(topology.slots).map(<[_]>::to_vec).collect();
    ExpertMap::new(experts, &by_rank)
}

/// The published placement for `load`: [`place`] with [`Copies::AsPublished`].
///
/// # Errors
/// As [`Topology::validate`]; loads that are negative or not numbers.
pub fn published(load: &[f64], topology: Topology) -> Result<ExpertMap> {
    place(load, topology, Copies::AsPublished)
}

/// The placement for `load` (one entry for each expert), whatever is there now, with the copies of
/// one expert apart or as published.
///
/// # Errors
/// As [`published`].
pub fn place(load: &[f64], topology: Topology, copies: Copies) -> Result<ExpertMap> {
    check(load, topology)?;
    map_of(load.len(), &place::place(load, topology, copies))
}

fn check(load: &[f64], topology: Topology) -> Result<()> {
    topology.validate(load.len())?;
    match load.iter().position(|w| !w.is_finite() || *w < 0.0) {
        None => Ok(()),
        Some(expert) => Err(refuse(format!("the load of expert {expert} is {}", load[expert]))),
    }
}

fn map_of(experts: usize, by_rank: &[Vec<usize>]) -> Result<ExpertMap> {
    let ids: Vec<Vec<LogicalId>> = by_rank
        .iter()
        .map(|rank| rank.iter().map(|expert| LogicalId(*expert as u32)).collect())
        .collect();
    ExpertMap::new(experts, &ids)
}

/// What a rebalance of one layer decided.
#[derive(Clone, Debug, PartialEq)]
pub struct Rebalanced {
    /// Where the experts are to be. The current map where no better one was found.
    pub map: ExpertMap,
    /// Balance of this load over the current map.
    pub before: f64,
    /// Balance of this load over `map`; at least `before`.
    pub after: f64,
}

/// Balances that differ by less are the same, summed in another order.
const ROUNDING: f64 = 1e-9;

/// Copies that stand beside another copy of their expert on the same rank: memory that serves nobody.
pub fn copies_beside(map: &ExpertMap) -> usize {
    let on = |rank: usize| {
        let mut held: Vec<LogicalId> = map.held_by(rank).to_vec();
        held.sort_unstable();
        held.windows(2).filter(|pair| pair[0] == pair[1]).count()
    };
    (0..map.ranks()).map(on).sum()
}

/// A better placement for `load` (one entry for each expert) than `current`, where there is one.
/// Experts that stay on their rank keep their slot there. `groups` and `nodes` are those of
/// [`Topology`]; ranks and physical experts are those of `current`.
///
/// # Errors
/// As [`published`]; if the ranks of `current` do not hold equally many experts.
pub fn rebalance(
    load: &[f64],
    current: &ExpertMap,
    groups: usize,
    nodes: usize,
) -> Result<Rebalanced> {
    rebalance_worth(load, current, groups, nodes, 0.0)
}

/// [`rebalance`], where a placement with more copies beside another of their expert than the best one
/// so far must gain `worth` times as much balance as those copies are a share of all: 0 takes any
/// gain, 1 weighs time against memory one for one.
///
/// # Errors
/// As [`rebalance`].
pub fn rebalance_worth(
    load: &[f64],
    current: &ExpertMap,
    groups: usize,
    nodes: usize,
    worth: f64,
) -> Result<Rebalanced> {
    let ranks = current.ranks();
    let slots = current.held_by(0).len();
    if let Some(rank) = (0..ranks).find(|rank| current.held_by(*rank).len() != slots) {
        let other = current.held_by(rank).len();
        return Err(refuse(format!(
            "rank 0 holds {slots} experts, rank {rank} {other}: all must hold equally many; add \
             redundant experts until they divide"
        )));
    }
    if load.len() != current.experts() {
        let (loads, experts) = (load.len(), current.experts());
        return Err(refuse(format!("{loads} loads for {experts} experts")));
    }
    let topology = Topology { ranks, slots, groups, nodes };
    check(load, topology)?;
    let before = balance(load, current);
    let mut best = Rebalanced { map: current.clone(), before, after: before };
    for copies in [Copies::Apart, Copies::AsPublished] {
        let mut placed = place::place(load, topology, copies);
        for (rank, experts) in placed.iter_mut().enumerate() {
            let old: Vec<usize> = current.held_by(rank).iter().map(|id| id.index()).collect();
            *experts = pack::preserve_slots(experts, &old);
        }
        let map = map_of(load.len(), &placed)?;
        let after = balance(load, &map);
        let more = copies_beside(&map).saturating_sub(copies_beside(&best.map));
        let room = worth * more as f64 / topology.physical() as f64;
        if after > best.after + room + ROUNDING {
            best = Rebalanced { map, before, after };
        }
    }
    Ok(best)
}

/// The load of each rank: an expert's load is shared by its copies.
pub fn rank_loads(load: &[f64], map: &ExpertMap) -> Vec<f64> {
    let of = |id: &LogicalId| load[id.index()] / map.copies(*id).len() as f64;
    (0..map.ranks()).map(|rank| map.held_by(rank).iter().map(of).sum()).collect()
}

/// Mean load of the ranks divided by the largest; 1 where there is no load at all.
pub fn balance(load: &[f64], map: &ExpertMap) -> f64 {
    let loads = rank_loads(load, map);
    let largest = loads.iter().copied().fold(0.0, f64::max);
    match largest > 0.0 {
        true => loads.iter().sum::<f64>() / loads.len() as f64 / largest,
        false => 1.0,
    }
}
