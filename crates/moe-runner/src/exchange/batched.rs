//! The batched row format: every expert's rows stand together, `[experts, capacity, H]`, as kernels
//! with one fixed shape for each expert need them.
//!
//! Wraps any exchange: the rows that it delivers are laid out expert by expert after dispatch, and
//! put back into its own slots before combine. A row with several experts here has a copy at each.

use super::{Completeness, DispatchedRows, Exchange, LocalRows, SlotRows};
use crate::experts::RowFormat;
use crate::plan::NO_EXPERT;
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
    stride: usize,
    /// Rows of each expert that are taken.
    counts: Vec<usize>,
    /// For each slot of the inner exchange, its place `expert · capacity + row`, where it has one.
    places: Vec<Option<usize>>,
    hidden: Vec<f32>,
    ids: Vec<LocalId>,
    weights: Vec<f32>,
    /// The inner exchange's slots.
    slots: Vec<f32>,
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

    fn start_dispatch(&mut self, lane: usize, rows: LocalRows<'_>) -> Result<()> {
        self.lanes.resize(self.lanes.len().max(lane + 1), Lane::default());
        self.inner.start_dispatch(lane, rows)
    }

    fn finish_dispatch<'a>(
        &'a mut self,
        lane: usize,
        rows: LocalRows<'a>,
    ) -> Result<DispatchedRows<'a>> {
        let experts = self.inner.local_experts();
        let stride = rows.stride;
        let standard = self.inner.finish_dispatch(lane, rows)?;
        let quantised = standard.quantised;
        let lane = &mut self.lanes[lane];
        lane.stride = stride;
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
        lane.hidden.resize(places * stride, 0.0);
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
                let from = slot / standard.top_k * stride;
                lane.hidden[place * stride..][..stride]
                    .copy_from_slice(&standard.hidden[from..from + stride]);
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

    fn start_combine(&mut self, lane: usize, slots: SlotRows<'_>) -> Result<()> {
        let Lane { stride, places, slots: inner, .. } = &mut self.lanes[lane];
        inner.resize(places.len() * *stride, 0.0);
        for (to, place) in inner.chunks_exact_mut((*stride).max(1)).zip(places.iter()) {
            if let Some(place) = place {
                to.copy_from_slice(&slots.values[place * *stride..][..*stride]);
            }
        }
        self.inner.start_combine(lane, SlotRows { values: inner, ..slots })
    }

    fn finish_combine(
        &mut self,
        lane: usize,
        rows: LocalRows<'_>,
        slots: SlotRows<'_>,
        out: &mut [f32],
    ) -> Result<Completeness> {
        let inner = SlotRows { values: &self.lanes[lane].slots, ..slots };
        self.inner.finish_combine(lane, rows, inner, out)
    }
}
