//! Which ranks form which groups: tensor (TP), data (DP), expert (EP), prefill-context (PCP) and
//! sequence (SP) parallel, derived from the deployment's sizes.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::Communicator;
use crate::{Error, Result};

/// The sizes of a deployment. Ranks are numbered with TP innermost, then PCP, then DP:
/// `rank = dp_rank·pcp·tp + pcp_rank·tp + tp_rank`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sizes {
    /// Ranks that split each matrix.
    pub tp: usize,
    /// Ranks with tokens of their own.
    pub dp: usize,
    /// Ranks that split the tokens of a prefill.
    pub pcp: usize,
    /// Whole experts are dealt to all ranks, instead of a slice of each expert to every rank.
    pub expert_parallel: bool,
    /// Each TP rank has its own chunk of the rows; needs `expert_parallel`.
    pub sequence_parallel: bool,
}

impl Default for Sizes {
    fn default() -> Self {
        Self { tp: 1, dp: 1, pcp: 1, expert_parallel: false, sequence_parallel: false }
    }
}

impl Sizes {
    /// Errors if a size is zero, or sequence parallel lacks what it needs.
    pub fn validate(&self) -> Result<()> {
        let Self { tp, dp, pcp, .. } = *self;
        let ranks = tp.checked_mul(dp).and_then(|n| n.checked_mul(pcp));
        let reason = match ranks {
            None => format!("tp {tp} × dp {dp} × pcp {pcp} is too many"),
            Some(0) => format!("tp {tp}, dp {dp} and pcp {pcp} must be at least 1"),
            Some(_) if self.sequence_parallel && !self.expert_parallel => {
                "sequence parallel needs expert parallel: each rank has rows of its own".to_owned()
            }
            Some(_) => return Ok(()),
        };
        Err(Error::input("parallel sizes", reason))
    }

    /// The number of ranks: tp·dp·pcp.
    pub fn ranks(&self) -> usize {
        self.tp * self.dp * self.pcp
    }

    /// The flat rank of the given ranks.
    pub fn rank(&self, dp_rank: usize, pcp_rank: usize, tp_rank: usize) -> usize {
        (dp_rank * self.pcp + pcp_rank) * self.tp + tp_rank
    }

    /// The TP rank of a flat rank.
    pub fn tp_rank(&self, rank: usize) -> usize {
        rank % self.tp
    }

    /// The PCP rank of a flat rank.
    pub fn pcp_rank(&self, rank: usize) -> usize {
        rank / self.tp % self.pcp
    }

    /// The DP rank of a flat rank.
    pub fn dp_rank(&self, rank: usize) -> usize {
        rank / self.tp / self.pcp
    }

    /// Whole experts are dealt to ranks: expert parallel, and more than one rank.
    pub fn use_ep(&self) -> bool {
        self.ranks() > 1 && self.expert_parallel
    }

    /// Into how many slices each expert is cut: all ranks share them unless expert parallel is on.
    pub fn moe_tp(&self) -> usize {
        if self.use_ep() { 1 } else { self.ranks() }
    }

    /// Over how many ranks whole experts are dealt.
    pub fn ep(&self) -> usize {
        if self.use_ep() { self.ranks() } else { 1 }
    }

    /// Over how many ranks a token's rows are cut into chunks.
    pub fn sp(&self) -> usize {
        if self.sequence_parallel { self.tp } else { 1 }
    }

    /// Rows go only to the ranks that own their experts: expert parallel, and different ranks have
    /// different rows.
    pub fn use_all_to_all(&self) -> bool {
        self.use_ep() && (self.dp > 1 || self.pcp > 1 || self.sp() > 1)
    }
}

/// One rank's groups. All of size 1 for a single rank.
pub struct Groups {
    /// The sizes.
    pub sizes: Sizes,
    /// All ranks: those that share the experts, by slices (`moe_tp`) or whole (`ep`).
    pub world: Arc<dyn Communicator>,
    /// The ranks that differ in `tp_rank` only; under sequence parallel they hold chunks of the
    /// same rows.
    pub tp: Arc<dyn Communicator>,
    /// The ranks among which whole experts are dealt: all, or this one alone.
    pub ep: Arc<dyn Communicator>,
    /// The ranks with rows of their own, whose rows together are the whole batch: all that have this
    /// one's `tp_rank`, or all ranks under sequence parallel.
    pub rows: Arc<dyn Communicator>,
}

impl Groups {
    /// Splits `world` as `sizes` say; all its ranks call this together.
    pub fn new(world: Arc<dyn Communicator>, sizes: Sizes) -> Result<Self> {
        sizes.validate()?;
        if world.size() != sizes.ranks() {
            let Sizes { tp, dp, pcp, .. } = sizes;
            return Err(Error::input(
                "parallel sizes",
                format!(
                    "tp {tp} × dp {dp} × pcp {pcp} need {} ranks; there are {}",
                    sizes.ranks(),
                    world.size()
                ),
            ));
        }
        let rank = world.rank();
        let (tp_rank, pcp_rank, dp_rank) =
            (sizes.tp_rank(rank), sizes.pcp_rank(rank), sizes.dp_rank(rank));
        // The color is the lowest rank of the group.
        let group = |color: usize| world.split(color, rank);
        let tp = group(sizes.rank(dp_rank, pcp_rank, 0))?;
        let rows = group(if sizes.sp() > 1 { 0 } else { tp_rank })?;
        let ep = if sizes.use_ep() { group(0)? } else { super::single() };
        Ok(Self { sizes, world, tp, ep, rows })
    }
}

#[cfg(test)]
mod tests {
    use super::super::{At, Step, run_ranks};
    use super::*;

    fn sizes(tp: usize, dp: usize, pcp: usize, ep: bool) -> Sizes {
        Sizes { tp, dp, pcp, expert_parallel: ep, sequence_parallel: false }
    }

    #[test]
    fn derived_sizes_are_those_of_the_published_examples() {
        // (tp, dp, EP) → (moe tp, ep, all-to-all)
        for (tp, dp, ep, want) in [
            (1, 1, true, (1, 1, false)),
            (2, 1, false, (2, 1, false)),
            (1, 2, false, (2, 1, false)),
            (2, 2, false, (4, 1, false)),
            (2, 1, true, (1, 2, false)),
            (2, 2, true, (1, 4, true)),
        ] {
            let s = sizes(tp, dp, 1, ep);
            assert_eq!((s.moe_tp(), s.ep(), s.use_all_to_all()), want, "{s:?}");
        }
        let s = Sizes { sequence_parallel: true, ..sizes(2, 1, 1, true) };
        assert!(s.use_all_to_all() && s.sp() == 2);
    }

    #[test]
    fn bad_sizes_are_refused() {
        assert!(sizes(0, 1, 1, false).validate().is_err());
        assert!(sizes(usize::MAX, 2, 1, false).validate().is_err());
        let s = Sizes { sequence_parallel: true, ..sizes(2, 1, 1, false) };
        assert!(s.validate().unwrap_err().to_string().contains("expert parallel"));
        let error = Groups::new(super::super::single(), sizes(2, 3, 1, false)).err().unwrap();
        assert!(error.to_string().contains("need 6 ranks; there are 1"), "{error}");
    }

    #[test]
    fn groups_hold_the_ranks_that_differ_in_one_coordinate() {
        let sizes = Sizes { sequence_parallel: true, ..sizes(2, 3, 2, true) };
        run_ranks(12, |world| {
            let rank = world.rank() as u32;
            let groups = Groups::new(world.clone(), sizes)?;
            let members = |comm: &Arc<dyn Communicator>| {
                comm.all_gather(At::new("test", Step::Setup), vec![rank])
            };
            let (pcp, dp) = (rank / 2 % 2, rank / 4);
            assert_eq!(members(&groups.tp)?, [dp * 4 + pcp * 2, dp * 4 + pcp * 2 + 1]);
            assert_eq!(members(&groups.ep)?, (0..12).collect::<Vec<_>>());
            assert_eq!(members(&groups.rows)?, (0..12).collect::<Vec<_>>());
            Ok(())
        })
        .unwrap();
    }
}
