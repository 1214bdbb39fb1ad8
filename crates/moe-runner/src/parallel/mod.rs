//! How a layer is split over ranks: which rows, which experts, which slices of them.
//!
//! ```text
//! rows      dealt to DP ranks, then to PCP ranks, then (sequence parallel) to TP ranks
//! experts   expert parallel: whole ones, dealt to all ranks; else a slice of each on every rank
//! shared    slices over the TP ranks; whole under sequence parallel
//! ```

pub mod balance;
pub mod cost;
pub mod placement;
pub mod rebalance;
mod rows;
pub mod shard;

pub use placement::Placement;
pub use rows::deal_rows;
pub use shard::shard;

use serde::{Deserialize, Serialize};

use crate::comm::Sizes;
use crate::experts::RowFormat;
use crate::shared_experts::SharedOrder;

/// How a layer is split, beyond the sizes of its groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parallel {
    /// Sizes of the groups.
    pub sizes: Sizes,
    /// Which rank holds which experts.
    pub placement: Placement,
    /// How rows reach the experts.
    pub exchange: ExchangeKind,
    /// How the exchange lays out the rows that it delivers.
    pub row_format: RowFormat,
    /// Micro-batches whose dispatch, experts and combine overlap; 1: none.
    pub micro_batches: usize,
    /// When the shared experts run.
    pub order: SharedOrder,
}

impl Default for Parallel {
    fn default() -> Self {
        Self {
            sizes: Sizes::default(),
            placement: Placement::Linear,
            exchange: ExchangeKind::Auto,
            row_format: RowFormat::Standard,
            micro_batches: 1,
            order: SharedOrder::NoOverlap,
        }
    }
}

/// Which exchange brings rows to experts, where there is a choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExchangeKind {
    /// All-to-all under expert parallelism; else what the sizes require.
    Auto,
    /// Every rank gets all rows; sums are reduced.
    Naive,
    /// Each row goes only to the ranks that own its experts. Needs expert parallelism.
    AllToAll,
}
