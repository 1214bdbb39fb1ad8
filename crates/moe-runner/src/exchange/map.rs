//! Where every expert lives: the one place where logical ids become ranks and local ids.

use crate::plan::NO_EXPERT;
use crate::router::{LocalId, LogicalId, PhysicalId};
use crate::{Error, Result};

/// One copy of an expert: the rank that holds it, and its place there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Home {
    /// A rank of the expert-parallel group.
    pub rank: usize,
    /// Row of the rank's weights.
    pub local: LocalId,
}

/// The copies of every expert. Physical experts are numbered rank by rank; a rank's local ids count
/// its physical experts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertMap {
    /// Physical experts of each rank, cumulated: `ranks + 1` entries.
    first: Vec<usize>,
    /// The expert that each physical one is a copy of.
    logical: Vec<LogicalId>,
    /// Copies of each expert, cumulated: `experts + 1` entries.
    offsets: Vec<usize>,
    /// The copies, expert by expert.
    copies: Vec<Home>,
}

impl ExpertMap {
    /// `by_rank[r]` are the experts that rank r holds, in the order of its weights.
    ///
    /// # Errors
    /// If an expert of `0..experts` has no copy, or an id lies outside.
    pub fn new(experts: usize, by_rank: &[Vec<LogicalId>]) -> Result<Self> {
        let mut first = vec![0];
        let mut logical = Vec::new();
        let mut homes = vec![Vec::new(); experts];
        for (rank, ids) in by_rank.iter().enumerate() {
            for (local, id) in ids.iter().enumerate() {
                let Some(copies) = homes.get_mut(id.index()) else {
                    return Err(Error::input(
                        "expert placement",
                        format!("rank {rank} is to hold expert {id}; there are {experts}"),
                    ));
                };
                copies.push(Home { rank, local: LocalId(local as u32) });
                logical.push(*id);
            }
            first.push(logical.len());
        }
        if let Some(missing) = homes.iter().position(Vec::is_empty) {
            return Err(Error::input(
                "expert placement",
                format!("no rank holds expert {missing}"),
            ));
        }
        let offsets = std::iter::once(0)
            .chain(homes.iter().scan(0, |end, copies| {
                *end += copies.len();
                Some(*end)
            }))
            .collect();
        Ok(Self { first, logical, offsets, copies: homes.concat() })
    }

    /// All experts on one rank.
    pub fn one_rank(experts: usize) -> Self {
        let ids: Vec<LogicalId> = (0..experts as u32).map(LogicalId).collect();
        Self {
            first: vec![0, experts],
            offsets: (0..=experts).collect(),
            copies: ids.iter().map(|id| Home { rank: 0, local: LocalId(id.0) }).collect(),
            logical: ids,
        }
    }

    /// Number of ranks.
    pub fn ranks(&self) -> usize {
        self.first.len() - 1
    }

    /// Number of logical experts.
    pub fn experts(&self) -> usize {
        self.offsets.len() - 1
    }

    /// The experts that `rank` holds, in the order of its weights.
    pub fn held_by(&self, rank: usize) -> &[LogicalId] {
        &self.logical[self.first[rank]..self.first[rank + 1]]
    }

    /// The expert that a physical one is a copy of.
    pub fn logical_of(&self, id: PhysicalId) -> LogicalId {
        self.logical[id.index()]
    }

    /// The number of `home` among all physical experts.
    pub fn physical(&self, home: Home) -> PhysicalId {
        PhysicalId((self.first[home.rank] + home.local.index()) as u32)
    }

    /// The copies of an expert; none for identity and skip experts.
    pub fn copies(&self, id: LogicalId) -> &[Home] {
        match id.index() < self.experts() {
            true => &self.copies[self.offsets[id.index()]..self.offsets[id.index() + 1]],
            false => &[],
        }
    }

    /// The copy that serves row `row` of a rank: chosen by a hash of the row's number (Knuth's
    /// multiplicative hash, as in vLLM), so that rows spread evenly and every rank agrees.
    pub fn home(&self, id: LogicalId, row: usize) -> Option<Home> {
        let copies = self.copies(id);
        match copies.len() {
            0 => None,
            1 => Some(copies[0]),
            n => Some(copies[(row as u32).wrapping_mul(2_654_435_769) as usize % n]),
        }
    }

    /// The local id of the copy that serves row `row`, if `rank` holds it.
    pub fn local(&self, id: LogicalId, row: usize, rank: usize) -> LocalId {
        match self.home(id, row) {
            Some(home) if home.rank == rank => home.local,
            _ => NO_EXPERT,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(ids: &[u32]) -> Vec<LogicalId> {
        ids.iter().copied().map(LogicalId).collect()
    }

    #[test]
    fn copies_are_found_and_rows_spread_over_them() {
        // expert 1 has two copies: first on rank 0, second on rank 1
        let map = ExpertMap::new(3, &[ids(&[0, 1]), ids(&[1, 2])]).unwrap();
        assert_eq!(map.copies(LogicalId(2)), [Home { rank: 1, local: LocalId(1) }]);
        assert_eq!(map.copies(LogicalId(7)), []);
        assert_eq!(map.held_by(1), ids(&[1, 2]));
        assert_eq!(map.physical(Home { rank: 1, local: LocalId(0) }), PhysicalId(2));
        assert_eq!(map.logical_of(PhysicalId(2)), LogicalId(1));
        // 2654435769 is odd: rows alternate between two copies
        let served: Vec<usize> =
            (0..4).map(|row| map.home(LogicalId(1), row).unwrap().rank).collect();
        assert_eq!(served, [0, 1, 0, 1]);
        assert_eq!(map.local(LogicalId(1), 1, 1), LocalId(0));
        assert_eq!(map.local(LogicalId(1), 0, 1), NO_EXPERT);
        assert_eq!(map.local(LogicalId(9), 0, 1), NO_EXPERT);
    }

    #[test]
    fn a_missing_or_unknown_expert_is_refused() {
        let error = ExpertMap::new(3, &[ids(&[0]), ids(&[2])]).unwrap_err().to_string();
        assert!(error.contains("no rank holds expert 1"), "{error}");
        let error = ExpertMap::new(2, &[ids(&[0, 1, 5])]).unwrap_err().to_string();
        assert!(error.contains("expert 5; there are 2"), "{error}");
    }
}
