//! One tile of work: some rows of one expert, times some output features.

use std::cell::RefCell;
use std::ops::Range;

use moe_kernels::kernel::{Activation, Float, Kernel, Rows, RowsMut, WeightRows};

use crate::weights::{Expert, FloatType, Matrix};

/// Output features in a tile: enough to share a decoded tile's cost among many rows, few enough that
/// one token's work spreads over all threads.
pub(super) const COLUMNS: usize = 32;

/// Rows in one step of a tile, so that their intermediate values stay in cache.
const ROWS: usize = 64;

thread_local! {
    /// A tile of decoded weights, and the up projection's share of a step.
    static DECODED: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    static UP: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Hands the weight rows `range` of `matrix` to `work`: as they lie in memory, or decoded to f32.
pub(super) fn with_rows<R>(
    matrix: &Matrix,
    range: Range<usize>,
    work: impl FnOnce(WeightRows<'_>) -> R,
) -> R {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    if let Some(floats) = matrix.float_rows() {
        let float = match floats.float {
            FloatType::F32 => Float::F32,
            FloatType::F16 => Float::F16,
            FloatType::Bf16 => Float::Bf16,
        };
        return work(WeightRows::new(floats.bytes, float, rows, cols, floats.stride).slice(range));
    }
    DECODED.with_borrow_mut(|decoded| {
        decoded.resize(range.len() * cols, 0.0);
        for (row, out) in range.clone().zip(decoded.chunks_exact_mut(cols.max(1))) {
            matrix.decode_row(row, out);
        }
        work(WeightRows::from_f32(decoded, range.len(), cols, cols))
    })
}

/// `out = act(x·Wgᵀ + bg, x·Wuᵀ + bu)` for the intermediate features `cols`.
pub(super) fn gate_up(
    kernel: &Kernel,
    expert: &Expert,
    activation: Activation,
    x: Rows<'_>,
    cols: Range<usize>,
    mut out: RowsMut<'_>,
) {
    let Some(gate) = &expert.gate else {
        dot(kernel, &expert.up, expert.up_bias.as_deref(), x, cols, &mut out);
        (0..out.rows()).for_each(|i| kernel.activate(activation, out.row_mut(i), None));
        return;
    };
    UP.with_borrow_mut(|up| {
        let width = cols.len();
        dot(kernel, gate, expert.gate_bias.as_deref(), x, cols.clone(), &mut out);
        up.resize(x.rows() * width, 0.0);
        let mut up_rows = RowsMut::new(up, x.rows(), width, width);
        dot(kernel, &expert.up, expert.up_bias.as_deref(), x, cols, &mut up_rows);
        for (i, up) in up.chunks_exact(width).enumerate() {
            kernel.activate(activation, out.row_mut(i), Some(up));
        }
    });
}

/// `out = h·Wdᵀ + bd` for the output features `cols`.
pub(super) fn down(
    kernel: &Kernel,
    expert: &Expert,
    h: Rows<'_>,
    cols: Range<usize>,
    mut out: RowsMut<'_>,
) {
    dot(kernel, &expert.down, expert.down_bias.as_deref(), h, cols, &mut out);
}

fn dot(
    kernel: &Kernel,
    matrix: &Matrix,
    bias: Option<&[f32]>,
    x: Rows<'_>,
    cols: Range<usize>,
    out: &mut RowsMut<'_>,
) {
    let (width, rows) = (cols.len(), x.rows());
    with_rows(matrix, cols.clone(), |w| {
        for start in (0..rows).step_by(ROWS) {
            let step = start..rows.min(start + ROWS);
            kernel.dot(x.slice(step.clone()), w, &mut out.window(step, 0..width));
        }
    });
    if let Some(bias) = bias {
        for i in 0..rows {
            out.row_mut(i).iter_mut().zip(&bias[cols.clone()]).for_each(|(v, b)| *v += b);
        }
    }
}
