//! Rows that have arrived from all ranks, laid out for the experts.

use moe_kernels::pool::ThreadPool;
use moe_kernels::region::{for_each, rows_together};

use super::{DispatchedRows, Wire};
use crate::comm::Received;
use crate::router::LocalId;

/// The rows of all ranks, in rank order. The buffers keep their memory from pass to pass.
#[derive(Default)]
pub(super) struct Arrivals {
    /// For each rank, where its rows end.
    ends: Vec<usize>,
    width: usize,
    top_k: usize,
    quantised: bool,
    /// `[rows, width]`, and room for more.
    hidden: Vec<f32>,
    /// `[rows, k]`.
    ids: Vec<LocalId>,
    /// `[rows, k]`.
    weights: Vec<f32>,
}

impl Arrivals {
    /// Reads what `wire` wrote: rows of `width` columns with `top_k` slots. `local` is this rank's id
    /// for one that travelled, given the row's number on its own rank.
    ///
    /// # Errors
    /// What came from a rank is not rows.
    pub(super) fn read(
        &mut self,
        received: &Received<u8>,
        (wire, top_k, width): (&Wire, usize, usize),
        local: impl Fn(LocalId, usize) -> LocalId + Sync,
        pool: &dyn ThreadPool,
    ) -> Result<(), String> {
        let row_bytes = wire.row_bytes(top_k, width).max(1);
        self.ends.clear();
        let mut rows = 0;
        for (rank, part) in received.iter().enumerate() {
            if !part.len().is_multiple_of(row_bytes) {
                let len = part.len();
                return Err(format!(
                    "rank {rank} sent {len} bytes, which are no rows of {row_bytes}"
                ));
            }
            rows += part.len() / row_bytes;
            self.ends.push(rows);
        }
        (self.width, self.top_k, self.quantised) = (width, top_k, wire.is_quantised());
        if self.hidden.len() < rows * width {
            self.hidden.resize(rows * width, 0.0);
        }
        self.ids.resize(rows * top_k, LocalId(0));
        self.weights.resize(rows * top_k, 0.0);
        let Self { ends, hidden, ids, weights, .. } = self;
        let together = rows_together(rows, row_bytes, pool.threads());
        let chunks = hidden[..rows * width]
            .chunks_mut((together * width).max(1))
            .zip(ids.chunks_mut((together * top_k).max(1)))
            .zip(weights.chunks_mut((together * top_k).max(1)));
        for_each(pool, chunks.enumerate(), |(chunk, ((hidden, ids), weights))| {
            let first = chunk * together;
            let mut rank = ends.partition_point(|end| *end <= first);
            let rows = hidden.chunks_mut(width.max(1)).zip(ids.chunks_mut(top_k.max(1)));
            let rows = rows.zip(weights.chunks_mut(top_k.max(1)));
            for (row, ((hidden, ids), weights)) in (first..).zip(rows) {
                while ends[rank] <= row {
                    rank += 1;
                }
                let here = row - rank.checked_sub(1).map_or(0, |before| ends[before]);
                let bytes = &received.part(rank)[here * row_bytes..][..row_bytes];
                wire.read(bytes, ids, weights, hidden);
                ids.iter_mut().for_each(|id| *id = local(*id, here));
            }
        });
        Ok(())
    }

    /// The slots of the rows of each rank, in rank order.
    pub(super) fn slots_of_ranks(&self) -> impl Iterator<Item = std::ops::Range<usize>> {
        let mut start = 0;
        self.ends.iter().map(move |end| {
            let slots = start * self.top_k..end * self.top_k;
            start = *end;
            slots
        })
    }

    /// Number of rows.
    pub(super) fn rows(&self) -> usize {
        self.ends.last().copied().unwrap_or(0)
    }

    /// For the experts.
    pub(super) fn dispatched(&self) -> DispatchedRows<'_> {
        let Self { hidden, width, top_k, ids, weights, quantised, .. } = self;
        let hidden = &hidden[..self.rows() * width];
        DispatchedRows { hidden, top_k: *top_k, ids, weights, quantised: *quantised }
    }

    /// Bytes that `rows` rows take.
    pub(super) fn bytes(rows: usize, top_k: usize, width: usize) -> usize {
        rows * (width * size_of::<f32>() + top_k * (size_of::<LocalId>() + size_of::<f32>()))
    }
}
