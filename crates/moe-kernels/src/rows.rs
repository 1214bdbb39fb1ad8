//! Views of token rows: rows of f32, and rows to write.
//!
//! A view checks once, when it is made, that its rows lie inside its slice; the kernels rely on it.
//! `stride` is the number of elements from the start of one row to the start of the next.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Elements from the start of the first row to the end of the last; `None` beyond `usize`.
fn extent(rows: usize, cols: usize, stride: usize) -> Option<usize> {
    match rows {
        0 => Some(0),
        _ => (rows - 1).checked_mul(stride)?.checked_add(cols),
    }
}

/// `range` has an order and ends within `len`.
fn assert_within(range: &Range<usize>, len: usize, what: &str) {
    assert!(range.start <= range.end && range.end <= len, "{what} {range:?} of {len}");
}

/// Rows of f32 [rows, cols], such as hidden states.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    stride: usize,
}

impl<'a> Rows<'a> {
    /// Row `i`.
    ///
    /// # Panics
    /// If there is none.
    pub fn row(&self, i: usize) -> &'a [f32] {
        assert!(i < self.rows, "row {i} of {}", self.rows);
        &self.data[i * self.stride..][..self.cols]
    }

    /// `rows` rows of `cols` elements of `data`, `stride` apart.
    ///
    /// # Panics
    /// If `data` is too short.
    pub fn new(data: &'a [f32], rows: usize, cols: usize, stride: usize) -> Rows<'a> {
        let fits = extent(rows, cols, stride).is_some_and(|extent| extent <= data.len());
        assert!(fits, "[{rows}, {cols}] at stride {stride} in {} elements", data.len());
        Rows { data, rows, cols, stride }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements of a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The rows of `range`.
    ///
    /// # Panics
    /// If they are not all there.
    pub fn slice(&self, range: Range<usize>) -> Rows<'a> {
        assert_within(&range, self.rows, "rows");
        let data = if range.is_empty() { &[] } else { &self.data[range.start * self.stride..] };
        Rows { data, rows: range.len(), ..*self }
    }
}

/// Rows of f32 [rows, cols] to write. Unlike a slice, it can be a window of some columns, so that
/// several threads may write to different columns of the same rows.
#[derive(Debug)]
pub struct RowsMut<'a> {
    // Invariant: the elements [r·stride + c] for r < rows, c < cols are borrowed mutably for 'a, and
    // by this view alone; rows do not overlap (stride >= cols where there are several).
    data: *mut f32,
    rows: usize,
    cols: usize,
    stride: usize,
    borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: a `RowsMut` is a mutable borrow of f32s, like `&mut [f32]`.
unsafe impl Send for RowsMut<'_> {}
// SAFETY: as above; a shared `RowsMut` only lends shared rows.
unsafe impl Sync for RowsMut<'_> {}

impl<'a> RowsMut<'a> {
    /// `rows` rows of `cols` elements of `data`, `stride` apart.
    ///
    /// # Panics
    /// If `data` is too short, or the rows overlap.
    pub fn new(data: &'a mut [f32], rows: usize, cols: usize, stride: usize) -> RowsMut<'a> {
        let fits = extent(rows, cols, stride).is_some_and(|extent| extent <= data.len());
        assert!(fits, "[{rows}, {cols}] at stride {stride} in {} elements", data.len());
        assert!(rows <= 1 || stride >= cols, "rows of {cols} elements overlap at stride {stride}");
        RowsMut { data: data.as_mut_ptr(), rows, cols, stride, borrow: PhantomData }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements of a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    pub(crate) fn stride(&self) -> usize {
        self.stride
    }

    /// Where the element `[row, col]` is, if it is there.
    pub(crate) fn at(&mut self, row: usize, col: usize) -> *mut f32 {
        self.data.wrapping_add(row * self.stride + col)
    }

    /// Row `i`.
    ///
    /// # Panics
    /// If there is none.
    pub fn row(&self, i: usize) -> &[f32] {
        assert!(i < self.rows, "row {i} of {}", self.rows);
        // SAFETY: the row is borrowed by this view, and shared for as long as `self` is.
        unsafe { std::slice::from_raw_parts(self.data.add(i * self.stride), self.cols) }
    }

    /// Row `i`, to write.
    ///
    /// # Panics
    /// If there is none.
    pub fn row_mut(&mut self, i: usize) -> &mut [f32] {
        assert!(i < self.rows, "row {i} of {}", self.rows);
        // SAFETY: the row is borrowed by this view alone, mutably for as long as `self` is.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(i * self.stride), self.cols) }
    }

    /// The window of `rows` and `cols`.
    ///
    /// # Panics
    /// If they are not all there.
    pub fn window(&mut self, rows: Range<usize>, cols: Range<usize>) -> RowsMut<'_> {
        assert_within(&rows, self.rows, "rows");
        assert_within(&cols, self.cols, "columns");
        // SAFETY: it is inside `self`, which stays borrowed mutably while the window lives.
        unsafe { self.window_unchecked(rows, cols) }
    }

    /// # Safety
    /// The ranges lie inside `self`, and the window overlaps no other live view.
    unsafe fn window_unchecked<'b>(&self, rows: Range<usize>, cols: Range<usize>) -> RowsMut<'b> {
        // An empty window may start past the end of the slice: its pointer is never used.
        let data = self.data.wrapping_add(rows.start * self.stride + cols.start);
        RowsMut {
            data,
            rows: rows.len(),
            cols: cols.len(),
            stride: self.stride,
            borrow: PhantomData,
        }
    }

    /// Cuts the rows into tiles, for [`for_each_tile`](crate::region::for_each_tile): each is the
    /// window of the rows `blocks[block]` and the columns `cols`, at most `tile_cols` of them. Tiles
    /// of one block come one after another. Rows outside all blocks are left alone.
    ///
    /// # Panics
    /// If `blocks` are not ascending, disjoint and inside the rows, or `tile_cols` is zero.
    pub fn tiles<'b>(&'b mut self, blocks: &'b [Range<usize>], tile_cols: usize) -> Tiles<'b> {
        let mut last = 0;
        for rows in blocks {
            assert_within(rows, self.rows, "rows");
            assert!(last <= rows.start, "rows {rows:?} come after row {last}");
            last = rows.end;
        }
        self.tiles_of(Blocks::Given(blocks), blocks.len(), tile_cols)
    }

    /// The same for all rows, `block_rows` at a time.
    ///
    /// # Panics
    /// If a size is zero.
    pub fn even_tiles(&mut self, block_rows: usize, tile_cols: usize) -> Tiles<'_> {
        let blocks = self.rows.div_ceil(block_rows);
        self.tiles_of(Blocks::Even(block_rows), blocks, tile_cols)
    }

    fn tiles_of<'b>(&'b mut self, of: Blocks<'b>, blocks: usize, tile_cols: usize) -> Tiles<'b> {
        assert!(tile_cols > 0, "tiles of no columns");
        let count = blocks * self.cols.div_ceil(tile_cols);
        Tiles {
            whole: self.window(0..self.rows, 0..self.cols),
            blocks: of,
            tile_cols,
            next: AtomicUsize::new(0),
            count,
        }
    }
}

/// A window of some rows and columns, to write.
#[derive(Debug)]
pub struct Tile<'a> {
    /// The number of its block.
    pub block: usize,
    /// Its rows: the block's.
    pub rows: Range<usize>,
    /// Its columns.
    pub cols: Range<usize>,
    /// The window.
    pub out: RowsMut<'a>,
}

/// The tiles of some rows; see [`RowsMut::tiles`].
#[derive(Debug)]
pub struct Tiles<'a> {
    whole: RowsMut<'a>,
    blocks: Blocks<'a>,
    tile_cols: usize,
    /// The next that nobody has claimed; `count` or more when all are.
    next: AtomicUsize,
    count: usize,
}

/// Which rows make a block. Blocks are disjoint and inside the rows.
#[derive(Clone, Copy, Debug)]
enum Blocks<'a> {
    Given(&'a [Range<usize>]),
    Even(usize),
}

impl<'a> Tiles<'a> {
    /// The number of tiles, claimed or not.
    pub fn count(&self) -> usize {
        self.count
    }

    /// The next tile, which nobody else gets.
    pub fn claim(&self) -> Option<Tile<'a>> {
        // The first look spares the line from writes of those who come too late.
        if self.next.load(Ordering::Relaxed) >= self.count {
            return None;
        }
        let tile = self.next.fetch_add(1, Ordering::Relaxed);
        if tile >= self.count {
            return None;
        }
        let across = self.whole.cols.div_ceil(self.tile_cols);
        let (block, column) = (tile / across, tile % across);
        let rows = match self.blocks {
            Blocks::Given(blocks) => blocks[block].clone(),
            Blocks::Even(rows) => block * rows..self.whole.rows.min((block + 1) * rows),
        };
        let start = column * self.tile_cols;
        let cols = start..self.whole.cols.min(start + self.tile_cols);
        // SAFETY: blocks are disjoint and inside, the columns of different tiles do not overlap, the
        // counter gives each tile once, and the rows stay borrowed for 'a.
        let out = unsafe { self.whole.window_unchecked(rows.clone(), cols.clone()) };
        Some(Tile { block, rows, cols, out })
    }
}

#[cfg(test)]
mod tests;
