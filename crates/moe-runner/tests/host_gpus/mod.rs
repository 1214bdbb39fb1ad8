//! GPUs of ranks, over plain memory and threads: the steps of exchanges as loops over slices, for everything but the
//! copies to be tried on any machine.
#![allow(dead_code, unreachable_pub)] // each test file uses its own part

pub mod layer;
pub mod put;
pub mod sent;
pub mod small;

use std::sync::Arc;

use moe_runner::comm::Communicator;
use moe_runner::exchange::ExpertMap;
use moe_runner::router::LogicalId;

/// The id of no expert.
pub const NOWHERE: u32 = u32::MAX;

/// A rank's experts, by place.
pub trait Compute {
    /// One output for each slot: the expert at this place, of this row.
    fn outputs(&self, slots: &[(u32, Vec<f32>)]) -> Vec<Vec<f32>>;
}

/// One rank's rows of a batch.
#[derive(Clone, Copy)]
pub struct Own<'a> {
    pub group: &'a Arc<dyn Communicator>,
    pub map: &'a ExpertMap,
    /// Columns of a row, and slots.
    pub width: usize,
    pub top_k: usize,
    pub x: &'a [f32],
    pub ids: &'a [u32],
    pub weights: &'a [f32],
}

impl<'a> Own<'a> {
    pub fn tokens(&self) -> usize {
        self.ids.len() / self.top_k
    }

    /// Rank and place of a slot's expert.
    pub fn home(&self, slot: usize) -> Option<(usize, u32)> {
        let home = self.map.home(LogicalId(*self.ids.get(slot)?), slot / self.top_k)?;
        Some((home.rank, home.local.0))
    }

    pub fn row(&self, t: usize) -> &'a [f32] {
        &self.x[t * self.width..][..self.width]
    }

    /// Some of the rows.
    pub fn part(&self, rows: std::ops::Range<usize>) -> Self {
        let slots = rows.start * self.top_k..rows.end * self.top_k;
        let x = &self.x[rows.start * self.width..rows.end * self.width];
        Self { x, ids: &self.ids[slots.clone()], weights: &self.weights[slots], ..*self }
    }

    /// The rows of a micro-batch of so many, cut as evenly as can be.
    pub fn lane(&self, lane: usize, lanes: usize) -> Self {
        self.part(self.lane_rows(lane, lanes))
    }

    pub fn lane_rows(&self, lane: usize, lanes: usize) -> std::ops::Range<usize> {
        let rows = self.tokens();
        let start = |lane: usize| lane * (rows / lanes) + lane.min(rows % lanes);
        start(lane)..start(lane + 1)
    }

    /// The sums of slots' outputs, in slot order.
    pub fn sums<'o>(&self, output: impl Fn(usize) -> Option<&'o [f32]>) -> Vec<f32> {
        let mut out = vec![0.0; self.x.len()];
        for (slot, weight) in self.weights.iter().enumerate() {
            let to = &mut out[slot / self.top_k * self.width..][..self.width];
            for (out, value) in to.iter_mut().zip(output(slot).unwrap_or_default()) {
                *out += weight * value;
            }
        }
        out
    }
}
