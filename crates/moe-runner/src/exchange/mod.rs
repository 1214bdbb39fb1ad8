//! Dispatch and combine: how rows reach the ranks that own their experts, and how results return.
//!
//! Dispatch takes *all* inputs of a row together, so that rows before and after it cannot be mixed
//! up. Combine applies the weights and adds a token's slots in slot order, in f32, on the token's
//! own rank; and it says by its type whether the sum is complete.

mod local;
mod sum;

pub use local::LocalExchange;
pub use sum::{Partial, Reduced, Sum};

use crate::router::{LocalId, LogicalId, Routing};
use crate::spec::WeightOn;
use crate::{Result, experts::RowFormat};

/// The rows of this rank, with everything that belongs to them.
#[derive(Clone, Copy, Debug)]
pub struct LocalRows<'a> {
    /// Number of rows.
    pub tokens: usize,
    /// `[T, stride]`.
    pub hidden: &'a [f32],
    /// Elements from one row to the next.
    pub stride: usize,
    /// Ids and weights `[T, k]`.
    pub routing: &'a Routing,
}

/// The rows that this rank's experts get: after dispatch.
#[derive(Clone, Copy, Debug)]
pub struct DispatchedRows<'a> {
    /// `[rows, stride]`.
    pub hidden: &'a [f32],
    /// Ids of this rank's experts `[rows, k]`; any other means: not here.
    pub ids: &'a [LocalId],
    /// Weights `[rows, k]`.
    pub weights: &'a [f32],
}

/// Brings rows to experts and results back.
pub trait Exchange: Send + std::fmt::Debug {
    /// How rows are handed to the experts.
    fn row_format(&self) -> RowFormat {
        RowFormat::Standard
    }

    /// Sends rows to the ranks that own their experts.
    ///
    /// # Errors
    /// A rank that does not arrive.
    fn dispatch<'a>(&'a mut self, rows: LocalRows<'a>) -> Result<DispatchedRows<'a>>;

    /// Takes back what the experts made of the dispatched rows, `[rows · k, stride]` by slot, and
    /// writes the weighted sum of each of this rank's rows to `out` `[T, stride]`.
    ///
    /// # Errors
    /// A rank that does not arrive.
    fn combine(
        &mut self,
        rows: LocalRows<'_>,
        weight_on: WeightOn,
        slots: &[f32],
        out: Vec<f32>,
    ) -> Result<Sum>;
}

/// `out[t] = Σ_j w_j · slots[t·k + j]`, in slot order, for the ids that belong to an expert.
/// The one place where weights meet experts' outputs.
pub fn weighted_sum(
    ids: &[LogicalId],
    weights: &[f32],
    top_k: usize,
    experts: usize,
    weight_on: WeightOn,
    (slots, stride): (&[f32], usize),
    out: &mut [f32],
) {
    for (t, out) in out.chunks_exact_mut(stride).enumerate() {
        out.fill(0.0);
        for slot in t * top_k..(t + 1) * top_k {
            if ids[slot].index() >= experts {
                continue;
            }
            let weight = match weight_on {
                WeightOn::Output => weights[slot],
                WeightOn::Input => 1.0,
            };
            for (out, value) in out.iter_mut().zip(&slots[slot * stride..(slot + 1) * stride]) {
                *out += weight * value;
            }
        }
    }
}
