//! One tile of work: some rows of one expert, times some output features.

use std::ops::Range;

use moe_kernels::kernel::{Activation, Float, Kernel, Rows, RowsMut, Tile, WeightRows};

use crate::experts::ExpertShape;

use crate::weights::{Expert, FloatType, Matrix};

/// Output features in a tile: enough to share a decoded tile's cost among many rows, few enough that
/// one token's work spreads over all threads.
pub(super) const COLUMNS: usize = 32;

/// Rows in one step of a tile, so that their intermediate values stay in cache.
const ROWS: usize = 64;

/// Floats of scratch for a tile: the up projection's share of it, and a tile of decoded weights.
pub(super) fn scratch(shape: ExpertShape, rows: usize) -> usize {
    COLUMNS * (rows + shape.hidden.max(shape.intermediate))
}

/// Hands the weight rows `range` of `matrix` to `work`: as they lie in memory, or decoded to f32.
pub(super) fn with_rows<R>(
    matrix: &Matrix,
    range: Range<usize>,
    decoded: &mut [f32],
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
    let decoded = &mut decoded[..range.len() * cols];
    for (row, out) in range.clone().zip(decoded.chunks_exact_mut(cols.max(1))) {
        matrix.decode_row(row, out);
    }
    work(WeightRows::from_f32(decoded, range.len(), cols, cols))
}

/// `act(x·Wgᵀ + bg, x·Wuᵀ + bu)`.
pub(super) fn gate_up(
    kernel: &Kernel,
    expert: &Expert,
    activation: Activation,
    x: Rows<'_>,
    Tile { cols, out, .. }: &mut Tile<'_>,
    scratch: &mut [f32],
) {
    let (up, decoded) = scratch.split_at_mut(x.rows() * COLUMNS);
    let Some(gate) = &expert.gate else {
        dot(kernel, (&expert.up, expert.up_bias.as_deref()), x, cols, out, decoded);
        (0..out.rows()).for_each(|i| kernel.activate(activation, out.row_mut(i), None));
        return;
    };
    let width = cols.len();
    dot(kernel, (gate, expert.gate_bias.as_deref()), x, cols, out, decoded);
    let mut up = RowsMut::new(up, x.rows(), width, width);
    dot(kernel, (&expert.up, expert.up_bias.as_deref()), x, cols, &mut up, decoded);
    for i in 0..out.rows() {
        kernel.activate(activation, out.row_mut(i), Some(up.row(i)));
    }
}

/// `h·Wdᵀ + bd`.
pub(super) fn down(
    kernel: &Kernel,
    expert: &Expert,
    h: Rows<'_>,
    Tile { cols, out, .. }: &mut Tile<'_>,
    scratch: &mut [f32],
) {
    dot(kernel, (&expert.down, expert.down_bias.as_deref()), h, cols, out, scratch);
}

fn dot(
    kernel: &Kernel,
    (matrix, bias): (&Matrix, Option<&[f32]>),
    x: Rows<'_>,
    cols: &Range<usize>,
    out: &mut RowsMut<'_>,
    decoded: &mut [f32],
) {
    let (width, rows) = (cols.len(), x.rows());
    with_rows(matrix, cols.clone(), decoded, |w| {
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
