//! The one product: f32 sums in a fixed order.

use std::ops::Range;

use super::operand::Operand;

/// Output features that are computed side by side. Each has a sum of its own, so this number is
/// not seen in any result.
pub(super) const LANES: usize = 32;

/// Floats of scratch for a product of rows of `cols` columns.
pub(super) fn scratch(cols: usize) -> usize {
    cols + cols * LANES
}

/// Computes `Σ_k x[k]·w[n, k] + bias[n]` for the features `n` in `cols`, at most [`LANES`] of them,
/// of each row of `x`; hands the row's number and its sums to `store`.
///
/// Sums are f32 and begin at zero; k ascends; each product is rounded before it is added (for bf16
/// and f16 operands it is exact), then the bias is added.
pub(super) fn rows(
    weights: &Operand,
    bias: Option<&[f32]>,
    x: &[f32],
    cols: Range<usize>,
    scratch: &mut [f32],
    mut store: impl FnMut(usize, &[f32]),
) {
    debug_assert!(cols.len() <= LANES && cols.end <= weights.rows());
    let (row, tile) = scratch.split_at_mut(weights.cols());
    // for each k the weights of all lanes
    let tile = &mut tile.as_chunks_mut::<LANES>().0[..weights.cols()];
    tile.fill([0.0; LANES]);
    for (lane, n) in cols.clone().enumerate() {
        weights.decode_row(n, row);
        for (lanes, w) in tile.iter_mut().zip(&*row) {
            lanes[lane] = *w;
        }
    }
    for (i, x) in x.chunks_exact(weights.cols().max(1)).enumerate() {
        let mut sums = dot(x, tile);
        if let Some(bias) = bias {
            sums.iter_mut().zip(&bias[cols.clone()]).for_each(|(sum, b)| *sum += b);
        }
        store(i, &sums[..cols.len()]);
    }
}

fn dot(x: &[f32], tile: &[[f32; LANES]]) -> [f32; LANES] {
    let mut sums = [0.0; LANES];
    for (x, weights) in x.iter().zip(tile) {
        for (sum, w) in sums.iter_mut().zip(weights) {
            *sum += x * w;
        }
    }
    sums
}
