//! The order of work: the T·k slots of a batch, sorted by expert.
//!
//! Slot `t·k + j` is the j-th choice of row t. Kernels walk experts and, for each, its slots; every
//! kernel, device and exchange shares this one layout. The sort is stable, so an expert meets its
//! rows in row order. A slot's *place* is its position in the sorted order: there its row stands
//! from the first product to the combine, which looks the place up instead of moving the row.
#![deny(clippy::cast_possible_truncation)]

use std::ops::Range;

use crate::router::LocalId;
use crate::{Error, Result};

/// No expert of this rank: the slot is an idle (identity, skip) choice, or another rank's.
pub const NO_EXPERT: LocalId = LocalId(u32::MAX);

/// In [`Plan::places`]: the slot has no place.
pub const NO_PLACE: u32 = u32::MAX;

/// The most rows of one expert that are computed together: enough to share what their weights cost,
/// few enough that an expert with very many rows keeps all threads busy.
pub const TOGETHER: usize = 256;

/// Slots sorted by expert. The buffers are reused from batch to batch.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    top_k: usize,
    offsets: Vec<u32>,
    slots: Vec<u32>,
    places: Vec<u32>,
    blocks: Vec<Range<usize>>,
}

impl Plan {
    /// Sorts the slots of `ids` [rows, k] by expert, for experts `0..experts`. Other ids, such as
    /// [`NO_EXPERT`], have no place in the plan.
    ///
    /// # Errors
    /// [`Error::Input`] beyond 2³² − 2 slots.
    pub fn build(&mut self, ids: &[LocalId], top_k: usize, experts: usize) -> Result<()> {
        debug_assert!(top_k > 0 && ids.len().is_multiple_of(top_k));
        let slots = 0..number(ids.len())?;
        self.top_k = top_k;
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
        self.places.clear();
        self.places.reserve_exact(ids.len());
        // offsets[e] walks to offsets[e + 1] while expert e's slots are placed; then move back
        for (slot, id) in slots.zip(ids) {
            let mut place = NO_PLACE;
            if id.index() < experts {
                let at = &mut self.offsets[id.index()];
                self.slots[*at as usize] = slot;
                place = *at;
                *at += 1;
            }
            self.places.push(place);
        }
        for e in (1..=experts).rev() {
            self.offsets[e] = self.offsets[e - 1];
        }
        self.offsets[0] = 0;
        self.cut();
        Ok(())
    }

    /// Every row has a slot for each of `experts` experts, in their order.
    ///
    /// # Errors
    /// As [`build`](Self::build).
    pub fn build_dense(&mut self, rows: usize, experts: usize) -> Result<()> {
        number(rows.saturating_mul(experts))?;
        self.top_k = experts;
        // no expert, or no row: no slot
        let (rows, experts) = match rows.min(experts) {
            0 => (0, number(experts)?),
            _ => (number(rows)?, number(experts)?),
        };
        self.offsets.clear();
        self.offsets.extend((0..=experts).map(|e| e * rows));
        self.slots.clear();
        let of = |e: u32| (0..rows).map(move |row| row * experts + e);
        self.slots.extend((0..experts).flat_map(of));
        self.places.clear();
        let at = |row: u32| (0..experts).map(move |e| e * rows + row);
        self.places.extend((0..rows).flat_map(at));
        self.cut();
        Ok(())
    }

    /// Cuts the experts' rows into blocks.
    fn cut(&mut self) {
        self.blocks.clear();
        self.blocks.reserve_exact(most_blocks(self.slots.len(), self.experts()));
        for e in 0..self.experts() {
            let Range { mut start, end } = self.range(e);
            while start < end {
                let next = end.min(start + TOGETHER);
                self.blocks.push(start..next);
                start = next;
            }
        }
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
        self.places.len()
    }

    /// Slots that have an expert here, and so a place.
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

    /// The slots of all places.
    pub fn planned(&self) -> &[u32] {
        &self.slots
    }

    /// The place of every slot; [`NO_PLACE`] for those without an expert here.
    pub fn places(&self) -> &[u32] {
        &self.places
    }

    /// The expert at a place.
    pub fn expert(&self, place: usize) -> usize {
        self.offsets.partition_point(|offset| *offset as usize <= place) - 1
    }

    /// Places that are computed together: all of one expert, in ascending order.
    pub fn blocks(&self) -> &[Range<usize>] {
        &self.blocks
    }

    /// The row of a slot.
    pub fn row(&self, slot: u32) -> usize {
        slot as usize / self.top_k
    }

    /// Experts that have at least one slot: whose weights will be read.
    pub fn active(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.experts()).filter(|e| !self.range(*e).is_empty())
    }

    /// Bytes that the plan of a batch of `slots` slots for `experts` experts takes at most.
    pub fn bytes(slots: usize, experts: usize) -> usize {
        let blocks = most_blocks(slots, experts);
        2 * slots * size_of::<u32>()
            + (experts + 1) * size_of::<u32>()
            + blocks * size_of::<Range<usize>>()
    }
}

/// Blocks of `slots` slots at most: one for each expert with any, and those that are full.
fn most_blocks(slots: usize, experts: usize) -> usize {
    experts.min(slots) + slots / TOGETHER
}

/// So many slots as a number of a slot or place.
fn number(slots: usize) -> Result<u32> {
    u32::try_from(slots).ok().filter(|slots| *slots < NO_PLACE).ok_or_else(|| {
        let reason = format!("{slots} slots (rows times top-k) are too many; split the batch");
        Error::input("batch", reason)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sorts_stably_and_leaves_out_the_rest() {
        let mut plan = Plan::default();
        // rows of two: (2,0) (0,9) (none,2) — expert 1 has nothing, 9 is no expert here
        let ids = [2, 0, 0, 9, NO_EXPERT.0, 2].map(LocalId);
        plan.build(&ids, 2, 3).unwrap();
        assert_eq!(plan.slots(0), [1, 2]);
        assert_eq!(plan.slots(1), [] as [u32; 0]);
        assert_eq!(plan.slots(2), [0, 5]);
        assert_eq!(plan.active().collect::<Vec<_>>(), [0, 2]);
        assert_eq!((plan.slots_total(), plan.slots_planned()), (6, 4));
        assert_eq!(plan.row(5), 2);
        assert_eq!(plan.planned(), [1, 2, 0, 5]);
        assert_eq!(plan.places(), [2, 0, 1, NO_PLACE, NO_PLACE, 3]);
        assert_eq!([0, 1, 2, 3].map(|place| plan.expert(place)), [0, 0, 2, 2]);
        assert_eq!(plan.blocks(), [0..2, 2..4]);
        plan.build(&[], 2, 3).unwrap();
        assert_eq!((plan.slots_planned(), plan.active().count()), (0, 0));
    }

    #[test]
    fn dense_plans_are_those_of_all_ids() {
        let (mut dense, mut sorted) = (Plan::default(), Plan::default());
        for (rows, experts) in [(0, 2), (3, 1), (300, 3)] {
            let ids: Vec<LocalId> = (0..rows).flat_map(|_| (0..experts).map(LocalId)).collect();
            let experts = experts as usize;
            dense.build_dense(rows, experts).unwrap();
            sorted.build(&ids, experts, experts).unwrap();
            assert_eq!(format!("{dense:?}"), format!("{sorted:?}"));
            let most = dense.blocks().iter().map(|block| block.len()).max();
            assert!(most.is_none_or(|most| most <= TOGETHER));
        }
    }

    #[test]
    fn a_batch_beyond_the_slots_numbers_is_refused() {
        let mut plan = Plan::default();
        assert!(plan.build_dense(0, 3).is_ok());
        assert!(matches!(plan.build_dense(1 << 31, 2), Err(Error::Input { .. })));
        assert!(matches!(plan.build_dense(usize::MAX, 2), Err(Error::Input { .. })));
    }
}
