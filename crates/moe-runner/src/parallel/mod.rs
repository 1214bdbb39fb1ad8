//! How a layer is split over ranks: which rows, which experts, which slices of them.
//!
//! ```text
//! rows      dealt to DP ranks, then to PCP ranks, then (sequence parallel) to TP ranks
//! experts   expert parallel: whole ones, dealt to all ranks; else a slice of each on every rank
//! shared    slices over the TP ranks; whole under sequence parallel
//! ```

pub mod balance;
pub mod cost;
pub mod links;
pub mod placement;
pub mod rebalance;
mod rows;
pub mod shard;

pub use placement::Placement;
pub use rows::deal_rows;
pub use shard::shard;

use serde::{Deserialize, Serialize};

use crate::comm::Sizes;
use crate::exchange::resident::Room;
use crate::exchange::{BetweenGpus, one_sided};
use crate::experts::RowFormat;
use crate::shared_experts::SharedOrder;
use crate::spec::{LayerSpec, WeightOn};
use crate::{Error, Result};

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
    /// Rows stay on the ranks' GPUs from the gate to the sum, where the GPUs are connected and the split allows it;
    /// else they pass through the processor on their way.
    pub keeps_rows: bool,
    /// Then: the same room for what every rank has for every other in a micro-batch, so that no host learns a count and a
    /// pass can be captured; `None`: as much as it has.
    pub room: Option<Room>,
    /// Then, without such room: ranks write into each other's memory, where all their GPUs reach that.
    pub one_sided: bool,
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
            keeps_rows: true,
            room: None,
            one_sided: true,
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

/// How rows reach experts.
///
/// | rows | experts | route |
/// |---|---|---|
/// | the same on all ranks | slices, or whole ones (naive) | local |
/// | differ | slices, or whole ones (naive) | gather over the ranks whose rows differ |
/// | any | whole ones | all-to-all over all ranks |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// Rows stay.
    Local,
    /// Every rank gets all rows.
    Gather,
    /// Each row goes to the ranks that own its experts.
    AllToAll,
}

impl Parallel {
    /// How rows of a layer like this go from GPU to GPU where all ranks have one and NCCL connects them; `None`: they pass
    /// through the processor. `reach`: all these GPUs write into each other's memory.
    /// All ranks come to the same.
    ///
    /// # Errors
    /// As [`Self::route`].
    pub fn between_gpus(&self, spec: &LayerSpec, reach: bool) -> Result<Option<BetweenGpus>> {
        let sizes = self.sizes;
        let own_rows = sizes.tp == 1 || sizes.sp() > 1;
        let stay = self.keeps_rows
            && sizes.ranks() > 1
            && self.route()? == Route::AllToAll
            && own_rows
            && self.row_format == RowFormat::Standard
            && spec.router.weight_on == WeightOn::Output
            // rows are sent in pieces of 16 bytes, and added in eights
            && spec.dims.routed_hidden.is_multiple_of(8);
        let puts = self.one_sided && reach && sizes.ranks() <= one_sided::MOST_RANKS;
        Ok(match self.room {
            None if stay && puts => Some(BetweenGpus::OneSided),
            _ if !stay => None,
            Some(room) => Some(BetweenGpus::WithRoom(room)),
            None => Some(BetweenGpus::Counted),
        })
    }

    /// The route that the sizes and the wanted exchange come to.
    ///
    /// # Errors
    /// [`Error::Input`] for all-to-all without whole experts to send rows to.
    pub fn route(&self) -> Result<Route> {
        let sizes = self.sizes;
        match (self.exchange, sizes.use_ep()) {
            (ExchangeKind::AllToAll, false) if sizes.ranks() > 1 => Err(Error::input(
                "exchange",
                "all-to-all sends rows to the owners of whole experts: it needs expert parallelism",
            )),
            (ExchangeKind::Auto | ExchangeKind::AllToAll, true) => Ok(Route::AllToAll),
            _ if sizes.sp() > 1 || sizes.dp * sizes.pcp > 1 => Ok(Route::Gather),
            _ => Ok(Route::Local),
        }
    }
}
