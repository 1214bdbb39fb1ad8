//! A single projection on all threads: the gate, the latent projections.

use moe_kernels::isa::Isa;
use moe_kernels::kernel::{Kernel, Rows, RowsMut};
use moe_kernels::region::for_each;

use super::{SharedPool, tile};
use crate::weights::Matrix;

/// `out [T, rows] = x [T, cols] · Wᵀ`.
pub struct Linear {
    matrix: Matrix,
    kernel: Kernel,
    pool: SharedPool,
}

impl Linear {
    /// Packs `matrix` for `isa`, or for the best there is where this processor lacks it.
    pub fn new(matrix: &Matrix, isa: Isa, pool: SharedPool) -> Self {
        let kernel = Kernel::new(isa).unwrap_or_else(Kernel::detect);
        Self { matrix: matrix.packed(), kernel, pool }
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.matrix.rows()
    }

    /// Writes the products of `tokens` rows of `x`, both without gaps.
    pub fn forward(&self, x: &[f32], tokens: usize, out: &mut [f32]) {
        let (rows, cols) = (self.matrix.rows(), self.matrix.cols());
        let x = Rows::new(x, tokens, cols, cols);
        let block = 0..tokens;
        let mut out = RowsMut::new(out, tokens, rows, rows);
        let tiles = out.tiles(std::slice::from_ref(&block), tile::COLUMNS);
        for_each(&*self.pool, tiles, |mut tile| {
            tile::with_rows(&self.matrix, tile.cols, |w| self.kernel.dot(x, w, &mut tile.out));
        });
    }
}

impl std::fmt::Debug for Linear {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} with {:?}", self.matrix, self.kernel)
    }
}
