//! The batched row format: every expert's rows stand together, as kernels with one shape for each
//! expert need them: `[experts, capacity, H]` where a capacity is given. Without one, the experts'
//! rows follow one another, and take no more memory than there are slots.
//!
//! Wraps any exchange: the rows that it delivers are laid out expert by expert after dispatch, and
//! found again before combine. A row with several experts here has a copy at each.

use moe_kernels::pool::ThreadPool;
use moe_kernels::region::{for_each, rows_together};

use super::{Completeness, DispatchedRows, Exchange, ExpertMap, LocalRows, RowFormat, SlotRows};
use crate::plan::{NO_EXPERT, NO_PLACE};
use crate::router::LocalId;
use crate::{Error, Result};

/// An exchange whose rows come expert by expert.
#[derive(Debug)]
pub struct BatchedExchange {
    inner: Box<dyn Exchange>,
    /// Rows that every expert has room for; `None`: as many as come.
    capacity: Option<usize>,
    lanes: Vec<Lane>,
}

#[derive(Clone, Debug, Default)]
struct Lane {
    /// For each expert, where its next row goes.
    next: Vec<usize>,
    /// For each slot of the inner exchange, its batched row; [`NO_PLACE`] without an expert here.
    batched: Vec<u32>,
    /// For each batched row, the inner slot that it is for; [`NO_PLACE`] without.
    sources: Vec<u32>,
    hidden: Vec<f32>,
    ids: Vec<LocalId>,
    weights: Vec<f32>,
    /// For each slot of the inner exchange, where the experts' row for it stands.
    places: Vec<u32>,
}

impl BatchedExchange {
    /// Lays out the rows of `inner`, at most `capacity` for each expert.
    pub fn new(inner: Box<dyn Exchange>, capacity: Option<usize>) -> Self {
        Self { inner, capacity, lanes: Vec::new() }
    }
}

impl Lane {
    /// Deals the slots to batched rows.
    fn deal(&mut self, ids: &[LocalId], experts: usize, capacity: Option<usize>) -> Result<()> {
        let Self { next, batched, sources, .. } = self;
        next.clear();
        next.resize(experts, 0);
        for id in ids.iter().filter(|id| id.index() < experts) {
            next[id.index()] += 1;
        }
        let most = next.iter().copied().max().unwrap_or(0);
        if let Some(capacity) = capacity.filter(|capacity| most > *capacity) {
            return Err(Error::input(
                "batched rows",
                format!("an expert has {most} rows; its capacity is {capacity}"),
            ));
        }
        // counts become starts
        let mut rows = 0;
        for count in next.iter_mut() {
            let start = rows;
            rows += capacity.unwrap_or(*count);
            *count = start;
        }
        if rows >= NO_PLACE as usize || ids.len() >= NO_PLACE as usize {
            return Err(Error::input("batched rows", "too many; split the batch"));
        }
        sources.clear();
        sources.resize(rows, NO_PLACE);
        batched.clear();
        for (slot, id) in ids.iter().enumerate() {
            let row = next.get_mut(id.index()).map(|next| {
                *next += 1;
                *next - 1
            });
            if let Some(row) = row {
                sources[row] = slot as u32;
            }
            batched.push(row.map_or(NO_PLACE, |row| row as u32));
        }
        Ok(())
    }

    /// Copies the slots' rows to where they were dealt.
    fn fill(&mut self, standard: DispatchedRows<'_>, width: usize, pool: &dyn ThreadPool) {
        let Self { sources, hidden, ids, weights, .. } = self;
        let rows = sources.len();
        if hidden.len() < rows * width {
            hidden.resize(rows * width, 0.0);
        }
        ids.resize(rows, NO_EXPERT);
        weights.resize(rows, 0.0);
        let together = rows_together(rows, width * size_of::<f32>(), pool.threads());
        let chunks = hidden[..rows * width]
            .chunks_mut((together * width).max(1))
            .zip(sources.chunks(together))
            .zip(ids.chunks_mut(together).zip(weights.chunks_mut(together)));
        for_each(pool, chunks, |((hidden, sources), (ids, weights))| {
            let to = hidden.chunks_exact_mut(width.max(1)).zip(ids).zip(weights);
            for (source, ((hidden, id), weight)) in sources.iter().zip(to) {
                if *source == NO_PLACE {
                    (*id, *weight) = (NO_EXPERT, 0.0);
                    hidden.fill(0.0);
                    continue;
                }
                let slot = *source as usize;
                (*id, *weight) = (standard.ids[slot], standard.weights[slot]);
                let from = slot / standard.top_k.max(1) * width;
                hidden.copy_from_slice(&standard.hidden[from..from + width]);
            }
        });
    }
}

impl Exchange for BatchedExchange {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn row_format(&self) -> RowFormat {
        RowFormat::Batched
    }

    fn map(&self) -> (&ExpertMap, usize) {
        self.inner.map()
    }

    fn moves_rows(&self) -> bool {
        self.inner.moves_rows()
    }

    fn quantises_rows(&self) -> bool {
        self.inner.quantises_rows()
    }

    fn workspace_bytes(&self, tokens: usize, top_k: usize, width: usize) -> usize {
        let slots = tokens * top_k;
        let rows = self.capacity.map_or(slots, |capacity| self.local_experts() * capacity);
        let of_row = width * size_of::<f32>() + size_of::<LocalId>() + 2 * size_of::<u32>();
        self.inner.workspace_bytes(tokens, top_k, width)
            + rows.max(slots) * of_row
            + slots * 2 * size_of::<u32>()
    }

    fn start_dispatch(
        &mut self,
        lane: usize,
        rows: LocalRows<'_>,
        pool: &dyn ThreadPool,
    ) -> Result<()> {
        self.lanes.resize(self.lanes.len().max(lane + 1), Lane::default());
        self.inner.start_dispatch(lane, rows, pool)
    }

    fn finish_dispatch<'a>(
        &'a mut self,
        lane: usize,
        rows: LocalRows<'a>,
        pool: &dyn ThreadPool,
    ) -> Result<DispatchedRows<'a>> {
        let (experts, width) = (self.inner.local_experts(), rows.width);
        let standard = self.inner.finish_dispatch(lane, rows, pool)?;
        let lane = &mut self.lanes[lane];
        lane.deal(standard.ids, experts, self.capacity)?;
        lane.fill(standard, width, pool);
        let hidden = &lane.hidden[..lane.sources.len() * width];
        let (ids, weights) = (&lane.ids, &lane.weights);
        Ok(DispatchedRows { hidden, top_k: 1, ids, weights, quantised: standard.quantised })
    }

    fn start_combine(
        &mut self,
        lane: usize,
        slots: SlotRows<'_>,
        pool: &dyn ThreadPool,
    ) -> Result<()> {
        let Lane { batched, places, .. } = &mut self.lanes[lane];
        let place = |row: &u32| match *row {
            NO_PLACE => NO_PLACE,
            row => slots.places[row as usize],
        };
        places.clear();
        places.extend(batched.iter().map(place));
        self.inner.start_combine(lane, SlotRows { places, ..slots }, pool)
    }

    fn finish_combine(
        &mut self,
        lane: usize,
        rows: LocalRows<'_>,
        slots: SlotRows<'_>,
        out: &mut [f32],
        pool: &dyn ThreadPool,
    ) -> Result<Completeness> {
        let inner = SlotRows { places: &self.lanes[lane].places, ..slots };
        self.inner.finish_combine(lane, rows, inner, out, pool)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As many rows as fit are dealt to each expert's own places; one more is an error.
    #[test]
    fn a_full_expert_takes_no_further_row() {
        let ids = [1, 0, 1, NO_EXPERT.0].map(LocalId);
        let mut lane = Lane::default();
        lane.deal(&ids, 2, Some(2)).unwrap();
        assert_eq!(lane.batched, [2, 0, 3, NO_PLACE]);
        assert_eq!(lane.sources, [1, NO_PLACE, 0, 2]);
        assert!(lane.deal(&ids, 2, Some(1)).is_err());
    }
}
