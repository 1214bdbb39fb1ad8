//! Which rank holds which experts.

use serde::{Deserialize, Serialize};

use crate::Result;
use crate::exchange::ExpertMap;
use crate::router::LogicalId;

/// A rule that deals whole experts to ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Placement {
    /// Runs of consecutive experts; the first ranks hold one more where they do not divide.
    Linear,
    /// Expert e on rank e mod ranks.
    RoundRobin,
}

impl Placement {
    /// The map of `experts` over `ranks`. With more ranks than experts the last ranks hold none.
    ///
    /// # Errors
    /// None for at least one expert and one rank.
    pub fn map(self, experts: usize, ranks: usize) -> Result<ExpertMap> {
        let ids = 0..experts as u32;
        let by_rank: Vec<Vec<LogicalId>> = match self {
            Self::Linear => {
                let (base, more) = (experts / ranks, experts % ranks);
                (0..ranks)
                    .map(|rank| {
                        let start = rank * base + rank.min(more);
                        let end = start + base + usize::from(rank < more);
                        (start as u32..end as u32).map(LogicalId).collect()
                    })
                    .collect()
            }
            Self::RoundRobin => (0..ranks)
                .map(|rank| {
                    ids.clone().filter(|e| *e as usize % ranks == rank).map(LogicalId).collect()
                })
                .collect(),
        };
        ExpertMap::new(experts, &by_rank)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(map: &ExpertMap) -> Vec<Vec<u32>> {
        let ids = |rank| map.held_by(rank).iter().map(|id| id.0).collect();
        (0..map.ranks()).map(ids).collect()
    }

    #[test]
    fn uneven_experts_go_to_the_first_ranks() {
        let map = Placement::Linear.map(8, 3).unwrap();
        assert_eq!(held(&map), [vec![0, 1, 2], vec![3, 4, 5], vec![6, 7]]);
        let map = Placement::RoundRobin.map(8, 3).unwrap();
        assert_eq!(held(&map), [vec![0, 3, 6], vec![1, 4, 7], vec![2, 5]]);
        let map = Placement::Linear.map(2, 4).unwrap();
        assert_eq!(held(&map), [vec![0], vec![1], vec![], vec![]]);
    }
}
