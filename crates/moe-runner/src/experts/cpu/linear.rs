//! A single projection on all threads: the gate, the latent projections.

use moe_kernels::arena::{Arena, room};
use moe_kernels::isa::{Cpu, Features};
use moe_kernels::operand::OperandKind;
use moe_kernels::pack::UNIT;
use moe_kernels::pool::ThreadPool;
use moe_kernels::region::{for_each_tile, for_each_with, rows_together};
use moe_kernels::rows::RowsMut;

use super::packed::Projection;
use crate::plan::TOGETHER;
use crate::weights::{ActivationQuant, Matrix};
use crate::{Error, Result};

/// `out [T, rows] = x [T, cols] · Wᵀ`.
#[derive(Debug)]
pub struct Linear {
    weights: Projection,
    input: ActivationQuant,
    cpu: Cpu,
}

impl Linear {
    /// Packs `matrix` for a processor with `features`.
    ///
    /// # Errors
    /// [`Error::NoKernel`] if no product reads it.
    pub fn new(matrix: &Matrix, features: Features) -> Result<Self> {
        let weights =
            Projection::new(matrix, None, features, OperandKind::F32).map_err(Error::NoKernel)?;
        let cpu = Cpu::detect().only(features);
        Ok(Self { weights, input: matrix.input, cpu })
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.weights.rows()
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.weights.cols()
    }

    /// Bytes of the arena that it needs for `tokens` rows on `threads` threads.
    pub fn scratch_bytes(&self, tokens: usize, threads: usize) -> usize {
        room::<f32>(tokens * self.weights.row_len()) + threads * room::<f32>(self.cols())
    }

    /// Writes the products of `tokens` rows of `x`, both without gaps.
    pub fn forward(
        &self,
        x: &[f32],
        tokens: usize,
        out: &mut [f32],
        pool: &dyn ThreadPool,
        arena: &mut Arena,
    ) {
        let (rows, cols, stride) = (self.rows(), self.cols(), self.weights.row_len());
        let threads = pool.threads();
        arena.reserve(self.scratch_bytes(tokens, threads));
        let mut cut = arena.cut();
        let operand = cut.floats(tokens * stride);
        let each = room::<f32>(cols) / size_of::<f32>();
        let scratch = cut.floats(threads * each);
        let together = rows_together(tokens, stride * size_of::<f32>(), threads);
        let parts = operand.chunks_mut(together * stride).zip(x.chunks(together * cols));
        for_each_with(pool, scratch.chunks_exact_mut(each), parts, |row, (to, from)| {
            for (to, from) in to.chunks_exact_mut(stride).zip(from.chunks_exact(cols)) {
                let row = &mut row[..cols];
                row.copy_from_slice(from);
                self.input.apply(self.cpu, row);
                self.weights.write(row, to);
            }
        });
        let mut out = RowsMut::new(out, tokens, rows, rows);
        // few enough rows that a projection with few features keeps all threads busy
        let together = TOGETHER.min(tokens.div_ceil(2 * threads).next_multiple_of(8));
        for_each_tile(pool, &mut [], &out.even_tiles(together.max(1), UNIT), |_, mut tile| {
            let x = &operand[tile.rows.start * stride..];
            self.weights.run((x, stride), None, &tile.cols, &mut tile.out);
        });
    }
}
