//! A single projection on all threads: the gate, the latent projections.

use moe_kernels::arena::{Arena, room};
use moe_kernels::isa::Isa;
use moe_kernels::kernel::{Kernel, Rows, RowsMut};
use moe_kernels::pool::ThreadPool;
use moe_kernels::region::for_each_with;

use super::tile;
use crate::plan::TOGETHER;
use crate::weights::Matrix;

/// `out [T, rows] = x [T, cols] · Wᵀ`.
#[derive(Clone)]
pub struct Linear {
    matrix: Matrix,
    kernel: Kernel,
}

impl Linear {
    /// Packs `matrix` for `isa`, or for the best there is where this processor lacks it.
    pub fn new(matrix: &Matrix, isa: Isa) -> Self {
        let kernel = Kernel::new(isa).unwrap_or_else(Kernel::detect);
        Self { matrix: matrix.packed(), kernel }
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.matrix.rows()
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.matrix.cols()
    }

    /// Bytes of the arena that it needs on `threads` threads.
    pub fn scratch_bytes(&self, threads: usize) -> usize {
        threads * room::<f32>(self.scratch())
    }

    fn scratch(&self) -> usize {
        tile::COLUMNS * self.matrix.cols()
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
        let (rows, cols, threads) = (self.matrix.rows(), self.matrix.cols(), pool.threads());
        arena.reserve(self.scratch_bytes(threads));
        let each = room::<f32>(self.scratch()) / size_of::<f32>();
        let scratch = arena.cut().floats(threads * each);
        let x = Rows::new(x, tokens, cols, cols);
        let mut out = RowsMut::new(out, tokens, rows, rows);
        let tiles = out.even_tiles(TOGETHER, tile::COLUMNS);
        for_each_with(pool, scratch.chunks_exact_mut(each), tiles, |decoded, mut tile| {
            tile::with_rows(&self.matrix, tile.cols, decoded, |w| {
                self.kernel.dot(x.slice(tile.rows), w, &mut tile.out);
            });
        });
    }
}

impl std::fmt::Debug for Linear {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} with {:?}", self.matrix, self.kernel)
    }
}
