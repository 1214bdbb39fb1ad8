//! Tile registers: what they do, and products of strips of token rows on them.

use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};

use super::simd::AHEAD;
use crate::pack::{PANEL, STEP, UNIT};

/// Rows of a tile register; so many bytes of each row are 16 f32 or 32 bf16.
pub(super) const ROWS: usize = 16;

/// What tile registers do: 0 to 3 hold sums, 4 and 5 token rows, 6 and 7 weights.
///
/// # Safety
/// All functions may be called only where the CPU has tile registers; `load` and `store` only with
/// addresses that are good for all rows of the configured tile.
pub(super) trait Tiles {
    unsafe fn configure(&mut self, config: &Config);

    unsafe fn zero<const T: usize>(&mut self);

    /// Rows, `stride` bytes apart.
    unsafe fn load<const T: usize>(&mut self, at: *const u8, stride: usize);

    /// Rows, `stride` bytes apart.
    unsafe fn store<const T: usize>(&mut self, at: *mut f32, stride: usize);

    /// Adds the products of the pairs of bf16 of `A` and `B` to `C`.
    unsafe fn dot<const C: usize, const A: usize, const B: usize>(&mut self);
}

/// Rows and bytes of a row of each tile, as the processor reads it.
#[repr(C, align(64))]
pub(super) struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    pub(super) row_bytes: [u16; 16],
    pub(super) rows: [u8; 16],
}

impl Config {
    /// `rows` token rows, up to a tile of them, and `k` k at a time.
    pub(super) fn new(rows: usize, k: usize) -> Config {
        let mut config = Config {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            rows: [0; 16],
        };
        let tiles = [(rows, 64), (rows, 64), (rows, 64), (rows, 64)];
        let tiles =
            tiles.into_iter().chain([(rows, 2 * k), (rows, 2 * k), (k / 2, 64), (k / 2, 64)]);
        for (tile, (rows, bytes)) in tiles.enumerate() {
            (config.rows[tile], config.row_bytes[tile]) = (rows as u8, bytes as u16);
        }
        config
    }
}

/// Products of whole tiles, `rounds` times two for each of two sums; returns the number of operations.
///
/// The registers hold numbers: where the core is shared, products of registers that were set to zero
/// are faster than any that a kernel has.
///
/// # Safety
/// As [`Tiles`].
#[inline(always)]
pub(super) unsafe fn probe<T: Tiles>(rounds: usize, tiles: &mut T) -> u64 {
    let ones = [[0x3F80u16; STEP]; ROWS];
    let ones = ones.as_ptr().cast();
    // SAFETY: the caller's; there are as many ones as a tile holds.
    unsafe {
        tiles.configure(&Config::new(ROWS, STEP));
        tiles.zero::<0>();
        tiles.zero::<1>();
        tiles.load::<4>(ones, 2 * STEP);
        tiles.load::<5>(ones, 2 * STEP);
        tiles.load::<6>(ones, 2 * STEP);
        tiles.load::<7>(ones, 2 * STEP);
        for _ in 0..rounds {
            tiles.dot::<0, 4, 6>();
            tiles.dot::<1, 4, 7>();
            tiles.dot::<0, 5, 6>();
            tiles.dot::<1, 5, 7>();
        }
    }
    (rounds * 4 * ROWS * PANEL * STEP * 2) as u64
}

/// Weights as pairs of bf16: where the first item is, and how far it is to the next item, the next
/// panel, the next `k` k.
#[derive(Clone, Copy)]
pub(super) struct Weights {
    pub(super) at: *const u8,
    pub(super) item: usize,
    pub(super) panel: usize,
    pub(super) step: usize,
}

/// What the products after these read, asked for into the second level of the caches a little each
/// turn: lines of weights, and of some of the strip's rows what is `bytes` further on.
#[derive(Clone, Copy)]
pub(super) struct Coming {
    pub(super) lines: *const u8,
    pub(super) each: usize,
    pub(super) rows: (usize, usize),
    pub(super) bytes: usize,
}

/// A tile of token rows, and what it is multiplied by.
#[derive(Clone, Copy)]
pub(super) struct Strip {
    pub(super) x: *const u8,
    /// Bytes from one row to the next.
    pub(super) stride: usize,
    /// Bytes of a row that are multiplied at a time, and how many times.
    pub(super) step: usize,
    pub(super) turns: usize,
    pub(super) weights: Weights,
    pub(super) coming: Coming,
    /// `[rows, UNIT]`
    pub(super) sum: *mut f32,
    /// What stands in `sum` is added to.
    pub(super) adds: bool,
}

impl Strip {
    /// Writes the sums of `N` panels: one, two or four.
    ///
    /// Two at a time are fastest where there are many rows: one load serves two products, and the unit
    /// of tile products is slow with more sums than two while another thread shares its core.
    ///
    /// # Safety
    /// As [`Tiles`].
    #[inline(always)]
    pub(super) unsafe fn multiply<T: Tiles, const N: usize>(&self, tiles: &mut T) {
        // SAFETY: the caller's.
        unsafe {
            match N {
                4 => self.one_by_four(tiles),
                2 => self.one_by_two(tiles),
                _ => self.one_by_one(tiles),
            }
        }
    }

    /// Token rows.
    #[inline(always)]
    fn rows(&self, turn: usize) -> *const u8 {
        self.x.wrapping_add(turn * self.step)
    }

    /// Weights of panel `q`.
    #[inline(always)]
    fn panel(&self, q: usize, turn: usize) -> *const u8 {
        self.weights.at.wrapping_add(q * self.weights.panel + turn * self.weights.step)
    }

    /// Sums of panel `q`.
    #[inline(always)]
    fn to(&self, q: usize) -> *mut f32 {
        self.sum.wrapping_add(q * PANEL)
    }

    /// The register `C` before the first product.
    #[inline(always)]
    unsafe fn begin<T: Tiles, const C: usize>(&self, q: usize, tiles: &mut T) {
        // SAFETY: the caller's.
        unsafe {
            match self.adds {
                true => tiles.load::<C>(self.to(q).cast(), UNIT * 4),
                false => tiles.zero::<C>(),
            }
        }
    }

    /// Asks for what comes later. (Rows of the next turns are near, and asking for them again costs
    /// more than it gives.)
    #[inline(always)]
    fn ask(&self, turn: usize) {
        let Coming { lines, each, rows: (first, end), bytes } = self.coming;
        for line in turn * each..(turn + 1) * each {
            // SAFETY: a prefetch takes any address.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(lines.wrapping_add(line * 64).cast()) };
        }
        for row in first..end {
            let at = self.rows(turn).wrapping_add(row * self.stride + bytes);
            // SAFETY: as above.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) };
        }
    }

    #[inline(always)]
    unsafe fn one_by_two<T: Tiles>(&self, tiles: &mut T) {
        // SAFETY: the caller's.
        unsafe {
            self.begin::<T, 0>(0, tiles);
            self.begin::<T, 1>(1, tiles);
            for turn in 0..self.turns {
                self.ask(turn);
                tiles.load::<4>(self.rows(turn), self.stride);
                tiles.load::<6>(self.panel(0, turn), self.weights.item);
                tiles.load::<7>(self.panel(1, turn), self.weights.item);
                tiles.dot::<0, 4, 6>();
                tiles.dot::<1, 4, 7>();
            }
            tiles.store::<0>(self.to(0), UNIT * 4);
            tiles.store::<1>(self.to(1), UNIT * 4);
        }
    }

    #[inline(always)]
    unsafe fn one_by_four<T: Tiles>(&self, tiles: &mut T) {
        // SAFETY: the caller's; a prefetch takes any address.
        unsafe {
            self.begin::<T, 0>(0, tiles);
            self.begin::<T, 1>(1, tiles);
            self.begin::<T, 2>(2, tiles);
            self.begin::<T, 3>(3, tiles);
            for turn in 0..self.turns {
                tiles.load::<4>(self.rows(turn), self.stride);
                // One stream of four panels, where it is not a buffer.
                for line in 0..self.weights.step / 64 {
                    let at = self.panel(0, turn).wrapping_add(AHEAD + 64 * line);
                    _mm_prefetch::<_MM_HINT_T0>(at.cast());
                }
                tiles.load::<6>(self.panel(0, turn), self.weights.item);
                tiles.dot::<0, 4, 6>();
                tiles.load::<7>(self.panel(1, turn), self.weights.item);
                tiles.dot::<1, 4, 7>();
                tiles.load::<6>(self.panel(2, turn), self.weights.item);
                tiles.dot::<2, 4, 6>();
                tiles.load::<7>(self.panel(3, turn), self.weights.item);
                tiles.dot::<3, 4, 7>();
            }
            tiles.store::<0>(self.to(0), UNIT * 4);
            tiles.store::<1>(self.to(1), UNIT * 4);
            tiles.store::<2>(self.to(2), UNIT * 4);
            tiles.store::<3>(self.to(3), UNIT * 4);
        }
    }

    #[inline(always)]
    unsafe fn one_by_one<T: Tiles>(&self, tiles: &mut T) {
        // SAFETY: the caller's.
        unsafe {
            self.begin::<T, 0>(0, tiles);
            for turn in 0..self.turns {
                tiles.load::<6>(self.panel(0, turn), self.weights.item);
                tiles.load::<4>(self.rows(turn), self.stride);
                tiles.dot::<0, 4, 6>();
            }
            tiles.store::<0>(self.to(0), UNIT * 4);
        }
    }
}
