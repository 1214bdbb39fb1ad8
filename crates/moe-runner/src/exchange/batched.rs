//! The batched row format: every expert's rows stand together, `[experts, capacity, H]`, as kernels
//! with one fixed shape for each expert need them.
//!
//! Wraps any exchange: the rows that it delivers are laid out expert by expert after dispatch, and
//! put back into its own slots before combine. A row with several experts here has a copy at each.

use moe_kernels::pool::ThreadPool;

use super::{Completeness, DispatchedRows, Exchange, LocalRows, SlotRows};
use crate::experts::RowFormat;
use crate::plan::{NO_EXPERT, NO_PLACE};
use crate::router::LocalId;
use crate::{Error, Result};

/// An exchange whose rows come expert by expert.
#[derive(Debug)]
pub struct BatchedExchange {
    inner: Box<dyn Exchange>,
    /// Rows that an expert can take; `None`: as many as come.
    capacity: Option<usize>,
    lanes: Vec<Lane>,
}

#[derive(Clone, Debug, Default)]
struct Lane {
    /// Rows of each expert that are taken.
    counts: Vec<usize>,
    /// For each slot of the inner exchange, its place `expert · capacity + row`, where it has one.
    places: Vec<Option<usize>>,
    hidden: Vec<f32>,
    ids: Vec<LocalId>,
    weights: Vec<f32>,
    /// For each slot of the inner exchange, where the experts' row for it stands.
    rows: Vec<u32>,
}

impl BatchedExchange {
    /// Lays out the rows of `inner`, at most `capacity` for each expert.
    pub fn new(inner: Box<dyn Exchange>, capacity: Option<usize>) -> Self {
        Self { inner, capacity, lanes: Vec::new() }
    }
}

impl Exchange for BatchedExchange {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn row_format(&self) -> RowFormat {
        RowFormat::Batched
    }

    fn experts(&self) -> usize {
        self.inner.experts()
    }

    fn local_experts(&self) -> usize {
        self.inner.local_experts()
    }

    fn moves_rows(&self) -> bool {
        self.inner.moves_rows()
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
        let experts = self.inner.local_experts();
        let width = rows.width;
        let standard = self.inner.finish_dispatch(lane, rows, pool)?;
        let quantised = standard.quantised;
        let lane = &mut self.lanes[lane];
        lane.counts.clear();
        lane.counts.resize(experts, 0);
        for id in standard.ids.iter().filter(|id| id.index() < experts) {
            lane.counts[id.index()] += 1;
        }
        let most = lane.counts.iter().copied().max().unwrap_or(0);
        let capacity = self.capacity.unwrap_or(most);
        if most > capacity {
            return Err(Error::input(
                "batched rows",
                format!("an expert has {most} rows; its capacity is {capacity}"),
            ));
        }
        let places = experts * capacity;
        lane.hidden.clear();
        lane.hidden.resize(places * width, 0.0);
        lane.ids.clear();
        lane.ids.resize(places, NO_EXPERT);
        lane.weights.clear();
        lane.weights.resize(places, 0.0);
        lane.places.clear();
        lane.counts.fill(0);
        for (slot, id) in standard.ids.iter().enumerate() {
            let place = (id.index() < experts).then(|| {
                let row = &mut lane.counts[id.index()];
                *row += 1;
                id.index() * capacity + *row - 1
            });
            lane.places.push(place);
            if let Some(place) = place {
                let from = slot / standard.top_k * width;
                lane.hidden[place * width..][..width]
                    .copy_from_slice(&standard.hidden[from..from + width]);
                lane.ids[place] = *id;
                lane.weights[place] = standard.weights[slot];
            }
        }
        Ok(DispatchedRows {
            hidden: &lane.hidden,
            top_k: 1,
            ids: &lane.ids,
            weights: &lane.weights,
            quantised,
        })
    }

    fn start_combine(
        &mut self,
        lane: usize,
        slots: SlotRows<'_>,
        pool: &dyn ThreadPool,
    ) -> Result<()> {
        let Lane { places, rows, .. } = &mut self.lanes[lane];
        rows.clear();
        rows.extend(places.iter().map(|place| place.map_or(NO_PLACE, |place| slots.places[place])));
        self.inner.start_combine(lane, SlotRows { places: rows, ..slots }, pool)
    }

    fn finish_combine(
        &mut self,
        lane: usize,
        rows: LocalRows<'_>,
        slots: SlotRows<'_>,
        out: &mut [f32],
        pool: &dyn ThreadPool,
    ) -> Result<Completeness> {
        let inner = SlotRows { places: &self.lanes[lane].rows, ..slots };
        self.inner.finish_combine(lane, rows, inner, out, pool)
    }
}
