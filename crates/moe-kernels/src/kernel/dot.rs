//! The product, for any instruction set: tiles of token rows × weight rows, held in registers.
//!
//! ```text
//! for each block of weight rows that fits the second-level cache
//!     for each strip of two to six token rows      (as many as the registers allow, or what is left)
//!         for each two to four weight rows of it   (likewise; what is left, one by one)
//!             for k in steps of COUNT: acc[row][token] += x[token][k..] * w[row][k..]
//!             out[token][row] = sum of the lanes of acc[row][token]
//! ```
//!
//! The innermost loop is the same for every tile: that is the promise of bit-identical results.

use super::lanes::{Element, F32, Lanes};

/// Token rows of the largest tile.
const fn most_tokens<S: Lanes>() -> usize {
    match S::REGISTERS {
        32.. => 6,
        16.. => 3,
        _ => 2,
    }
}

/// Weight rows of the largest tile.
const MOST_ROWS: usize = 4;

/// Bytes of weights that are reused from the second-level cache: half of the smallest in use.
const BLOCK_BYTES: usize = 128 << 10;

/// The weight rows of a block are a multiple of this, so that tiles of any height fill it.
const BLOCK_ROWS: usize = 12;

/// The operands of a product: `x` [m, k], `w` [n, k], `out` [m, n].
pub(super) struct DotArgs {
    pub(super) x: *const f32,
    /// In elements.
    pub(super) x_stride: usize,
    pub(super) m: usize,
    pub(super) w: *const u8,
    /// In bytes.
    pub(super) w_stride: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) out: *mut f32,
    /// In elements.
    pub(super) out_stride: usize,
}

/// A product. Unsafe to call: the CPU must have its instruction set, and the pointers of the
/// arguments must be good for the rows that they name, `out` for writing.
pub(super) type DotFn = unsafe fn(&DotArgs);

/// The product for each type of weights.
#[derive(Clone, Copy)]
pub(super) struct DotFns {
    pub(super) f32: DotFn,
    pub(super) f16: DotFn,
    pub(super) bf16: DotFn,
}

/// # Safety
/// As [`DotFn`]; inlined into a function that enables the instruction set of `S`.
#[inline(always)]
pub(super) unsafe fn dot<S: Lanes, E: Element>(args: &DotArgs) {
    let row_bytes = (args.k * E::SIZE).max(1);
    let block = (BLOCK_BYTES / row_bytes / BLOCK_ROWS).max(1) * BLOCK_ROWS;
    let mut row = 0;
    while row < args.n {
        let rows = block.min(args.n - row);
        let mut token = 0;
        while token < args.m {
            // Strips of about equal height, none of them higher than a tile.
            let left = args.m - token;
            let most = most_tokens::<S>();
            let tokens = left.div_ceil(left.div_ceil(most));
            // SAFETY: `token + tokens <= m`, `row + rows <= n`.
            unsafe {
                match tokens {
                    1 => strip::<S, E, 1>(args, token, row, rows),
                    3 if most >= 3 => strip::<S, E, 3>(args, token, row, rows),
                    4 if most >= 4 => strip::<S, E, 4>(args, token, row, rows),
                    5 if most >= 5 => strip::<S, E, 5>(args, token, row, rows),
                    6 if most >= 6 => strip::<S, E, 6>(args, token, row, rows),
                    _ => strip::<S, E, 2>(args, token, row, rows),
                }
            }
            token += tokens;
        }
        row += rows;
    }
}

/// The products of `M` token rows from `token` on with `rows` weight rows from `row` on.
///
/// # Safety
/// As [`dot`]; the rows are among those of `args`.
#[inline(always)]
unsafe fn strip<S: Lanes, E: Element, const M: usize>(
    args: &DotArgs,
    token: usize,
    row: usize,
    rows: usize,
) {
    // SAFETY: all of the tiles' rows are among those of `args`.
    unsafe {
        let whole = match const { tile_rows::<S>(M) } {
            4 => tiles::<S, E, M, 4>(args, token, row, rows),
            3 => tiles::<S, E, M, 3>(args, token, row, rows),
            _ => tiles::<S, E, M, 2>(args, token, row, rows),
        };
        tiles::<S, E, M, 1>(args, token, row + whole, rows - whole);
    }
}

/// Weight rows of a tile of `tokens` token rows: as many as leave the registers room for the sums,
/// the token vectors and two vectors of weights, one in use and one on its way.
const fn tile_rows<S: Lanes>(tokens: usize) -> usize {
    let mut rows = MOST_ROWS;
    while rows > 2 && tokens * rows + tokens + 2 > S::REGISTERS {
        rows -= 1;
    }
    rows
}

/// As many tiles of `R` weight rows as `rows` rows from `row` on hold; returns the rows done.
///
/// # Safety
/// As [`strip`].
#[inline(always)]
unsafe fn tiles<S: Lanes, E: Element, const M: usize, const R: usize>(
    args: &DotArgs,
    token: usize,
    row: usize,
    rows: usize,
) -> usize {
    let whole = rows - rows % R;
    for row in (row..row + whole).step_by(R) {
        // SAFETY: the tile's rows are among those of the strip.
        unsafe { tile::<S, E, M, R>(args, token, row) };
    }
    whole
}

/// The products of `M` token rows from `token` on with `R` weight rows from `row` on.
///
/// # Safety
/// As [`dot`]; the rows are among those of `args`.
#[inline(always)]
unsafe fn tile<S: Lanes, E: Element, const M: usize, const R: usize>(
    args: &DotArgs,
    token: usize,
    row: usize,
) {
    // SAFETY: the tile's rows are among those of `args`, whose pointers are good for all of them:
    // full steps read `COUNT` elements that end at `full <= k`, the last one reads `k - full`.
    unsafe {
        let x = args.x.add(token * args.x_stride);
        let w = args.w.add(row * args.w_stride);
        let mut acc = [[S::splat(0.0); M]; R];
        let full = args.k - args.k % S::COUNT;
        let mut k = 0;
        while k < full {
            let w_at = |j: usize| w.wrapping_add(j * args.w_stride + k * E::SIZE);
            // Once for each cache line of a row, the same of the next tile's rows, which hardware
            // does not foresee across pages. Past the end a prefetch is idle.
            if (k * E::SIZE).is_multiple_of(64) {
                for j in 0..R {
                    S::prefetch(w_at(j + R));
                }
            }
            let mut xs = [S::splat(0.0); M];
            for (i, x_i) in xs.iter_mut().enumerate() {
                *x_i = S::load_f32(x.add(i * args.x_stride + k).cast());
            }
            for (j, acc) in acc.iter_mut().enumerate() {
                let w_j = E::load::<S>(w_at(j));
                for (acc, x_i) in acc.iter_mut().zip(xs) {
                    *acc = S::mul_add(x_i, w_j, *acc);
                }
            }
            k += S::COUNT;
        }
        if k < args.k {
            let rest = args.k - k;
            for (j, acc) in acc.iter_mut().enumerate() {
                let w_j = E::load_part::<S>(w.add(j * args.w_stride + k * E::SIZE), rest);
                for (i, acc) in acc.iter_mut().enumerate() {
                    let x_i = F32::load_part::<S>(x.add(i * args.x_stride + k).cast(), rest);
                    *acc = S::mul_add(x_i, w_j, *acc);
                }
            }
        }
        for i in 0..M {
            let mut vectors = [S::splat(0.0); MOST_ROWS];
            for (vector, acc) in vectors.iter_mut().zip(&acc) {
                *vector = acc[i];
            }
            let sums = S::sums(vectors);
            let out = args.out.add((token + i) * args.out_stride + row);
            std::ptr::copy_nonoverlapping(sums.as_ptr(), out, R);
        }
    }
}
