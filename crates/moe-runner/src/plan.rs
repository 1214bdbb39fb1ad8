//! The order of work: the T·k slots of a batch, sorted by expert.
//!
//! Slot `t·k + j` is the j-th choice of row t. Kernels walk experts and, for each, its slots; every
//! kernel, device and exchange shares this one layout. The sort is stable, so an expert meets its
//! rows in row order.

use std::ops::Range;

use crate::router::LocalId;

/// No expert of this rank: the slot is an idle (identity, skip) choice, or another rank's.
pub const NO_EXPERT: LocalId = LocalId(u32::MAX);

/// Slots sorted by expert. The buffers are reused from batch to batch.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    top_k: usize,
    slots_total: usize,
    offsets: Vec<u32>,
    slots: Vec<u32>,
}

impl Plan {
    /// Sorts the slots of `ids` [rows, k] by expert, for experts `0..experts`. Other ids, such as
    /// [`NO_EXPERT`], have no place in the plan.
    pub fn build(&mut self, ids: &[LocalId], top_k: usize, experts: usize) {
        debug_assert!(top_k > 0 && ids.len().is_multiple_of(top_k));
        self.top_k = top_k;
        self.slots_total = ids.len();
        self.offsets.clear();
        self.offsets.resize(experts + 1, 0);
        for id in ids {
            if let Some(count) = self.offsets[1..].get_mut(id.index()) {
                *count += 1;
            }
        }
        for e in 0..experts {
            self.offsets[e + 1] += self.offsets[e];
        }
        self.slots.clear();
        self.slots.resize(self.offsets[experts] as usize, 0);
        // offsets[e] walks to offsets[e + 1] while expert e's slots are placed; then move back
        for (slot, id) in ids.iter().enumerate() {
            if id.index() < experts {
                let at = &mut self.offsets[id.index()];
                self.slots[*at as usize] = slot as u32;
                *at += 1;
            }
        }
        for e in (1..=experts).rev() {
            self.offsets[e] = self.offsets[e - 1];
        }
        self.offsets[0] = 0;
    }

    /// Number of experts.
    pub fn experts(&self) -> usize {
        self.offsets.len().saturating_sub(1)
    }

    /// Slots for each row, k.
    pub fn top_k(&self) -> usize {
        self.top_k
    }

    /// All slots, planned or not: rows · k.
    pub fn slots_total(&self) -> usize {
        self.slots_total
    }

    /// Slots that have an expert here.
    pub fn slots_planned(&self) -> usize {
        self.slots.len()
    }

    /// Where `expert`'s slots stand among the planned ones.
    pub fn range(&self, expert: usize) -> Range<usize> {
        self.offsets[expert] as usize..self.offsets[expert + 1] as usize
    }

    /// `expert`'s slots, in row order.
    pub fn slots(&self, expert: usize) -> &[u32] {
        &self.slots[self.range(expert)]
    }

    /// The row of a slot.
    pub fn row(&self, slot: u32) -> usize {
        slot as usize / self.top_k
    }

    /// Experts that have at least one slot: whose weights will be read.
    pub fn active(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.experts()).filter(|e| !self.range(*e).is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sorts_stably_and_leaves_out_the_rest() {
        let mut plan = Plan::default();
        // rows of two: (2,0) (0,9) (none,2) — expert 1 has nothing, 9 is no expert here
        let ids = [2, 0, 0, 9, NO_EXPERT.0, 2].map(LocalId);
        plan.build(&ids, 2, 3);
        assert_eq!(plan.slots(0), [1, 2]);
        assert_eq!(plan.slots(1), [] as [u32; 0]);
        assert_eq!(plan.slots(2), [0, 5]);
        assert_eq!(plan.active().collect::<Vec<_>>(), [0, 2]);
        assert_eq!((plan.slots_total(), plan.slots_planned()), (6, 4));
        assert_eq!(plan.row(5), 2);
        plan.build(&[], 2, 3);
        assert_eq!((plan.slots_planned(), plan.active().count()), (0, 0));
    }
}
