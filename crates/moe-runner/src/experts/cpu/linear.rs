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

/// Features that the least tile has: the lanes of a vector.
const PANEL: usize = UNIT / 4;

/// `out [T, rows] = x [T, cols] · Wᵀ`.
#[derive(Debug)]
pub struct Linear {
    /// All of it; or, where that would leave threads without work, every sixteen features alone.
    parts: Vec<Projection>,
    /// Features of a tile: those of a part, or a unit's.
    tile: usize,
    input: ActivationQuant,
    cpu: Cpu,
}

impl Linear {
    /// Packs `matrix` for a processor with `features`, so that a single row keeps `threads` threads busy
    /// if there is anything to do for them. The products are the same bit by bit for any number.
    ///
    /// # Errors
    /// [`Error::NoKernel`] if no product reads it.
    pub fn new(matrix: &Matrix, features: Features, threads: usize) -> Result<Self> {
        let rows = matrix.rows();
        let (tile, part) = match rows.div_ceil(UNIT) < threads {
            true => (PANEL, PANEL),
            false => (UNIT, rows.max(1)),
        };
        let window = |first: usize| matrix.rows_of(first, 1, part.min(rows - first));
        let parts = (0..rows).step_by(part).filter_map(window).map(|part| {
            Projection::new(&part, None, features, OperandKind::F32).map_err(Error::NoKernel)
        });
        let parts = parts.collect::<Result<_>>()?;
        let cpu = Cpu::detect().only(features);
        Ok(Self { parts, tile, input: matrix.input, cpu })
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.parts.iter().map(Projection::rows).sum()
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.parts.first().map_or(0, Projection::cols)
    }

    /// Floats of memory that a row takes as the products read it.
    fn row_len(&self) -> usize {
        self.parts.first().map_or(0, Projection::row_len)
    }

    /// Bytes of the arena that it needs for `tokens` rows on `threads` threads.
    pub fn scratch_bytes(&self, tokens: usize, threads: usize) -> usize {
        room::<f32>(tokens * self.row_len()) + threads * room::<f32>(self.cols())
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
        let (rows, cols, stride) = (self.rows(), self.cols(), self.row_len());
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
                // all parts have the columns in one order
                self.parts[0].write(row, None, to);
            }
        });
        let mut out = RowsMut::new(out, tokens, rows, rows);
        // few enough rows that a projection with few features keeps all threads busy
        let together = TOGETHER.min(tokens.div_ceil(2 * threads).next_multiple_of(8));
        for_each_tile(pool, &mut [], &out.even_tiles(together.max(1), self.tile), |_, mut tile| {
            let x = &operand[tile.rows.start * stride..];
            let (part, cols) = match &self.parts[..] {
                [all] => (all, tile.cols),
                parts => (&parts[tile.cols.start / PANEL], 0..tile.cols.len()),
            };
            part.run((x, stride), None, &cols, &mut tile.out);
        });
    }
}

#[cfg(test)]
mod tests {
    use moe_kernels::isa::Cpu;
    use moe_kernels::pool::Pool;

    use super::*;
    use crate::random::Random;

    /// However many threads it is packed for, and whatever is left over of a tile.
    #[test]
    fn the_same_bits_for_any_number_of_threads() {
        let mut random = Random::new(4);
        for rows in [1, 8, 16, 60, 128, 130] {
            let (cols, tokens) = (70, 3);
            let values = random.values(rows * cols, 1.0);
            let matrix = Matrix::from_f32(&values, [rows, cols]).unwrap();
            let x = random.values(tokens * cols, 1.0);
            let product = |threads| {
                let features = Cpu::detect().features();
                let linear = Linear::new(&matrix, features, threads).unwrap();
                assert_eq!((linear.rows(), linear.cols()), (rows, cols));
                let mut out = vec![f32::NAN; tokens * rows];
                let pool = Pool::new(threads).unwrap();
                linear.forward(&x, tokens, &mut out, &pool, &mut Arena::default());
                out
            };
            let one = product(1);
            assert!([2, 3, 8].into_iter().all(|threads| product(threads) == one), "{rows}");
            let truth = |t: usize, r: usize| {
                let products = values[r * cols..].iter().zip(&x[t * cols..(t + 1) * cols]);
                products.map(|(w, x)| f64::from(*w) * f64::from(*x)).sum::<f64>()
            };
            for (i, got) in one.iter().enumerate() {
                let want = truth(i / rows, i % rows);
                assert!((f64::from(*got) - want).abs() < 1e-5, "{rows}: {i}");
            }
        }
    }
}
