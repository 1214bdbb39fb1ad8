//! Blocks of GGUF: scales and codes side by side.

use std::ops::Range;

use super::{Bytes, Misfit};
use crate::numerics::ggml::BlockType;

/// Rows of blocks.
#[derive(Clone, Debug)]
pub struct Blocks {
    block: BlockType,
    bytes: Bytes,
    row_bytes: usize,
    rows: usize,
    cols: usize,
}

impl Blocks {
    /// `rows` rows of `cols` values.
    ///
    /// # Errors
    /// If `cols` are not whole blocks, or `bytes` has another length.
    pub fn new(block: BlockType, bytes: Bytes, [rows, cols]: [usize; 2]) -> Result<Self, Misfit> {
        let Some(row_bytes) = block.row_bytes(cols) else {
            let (name, len) = (block.name(), block.block_len());
            return Err(Misfit::new(format!(
                "rows of {cols} are not whole {name} blocks of {len}"
            )));
        };
        let needed = rows.checked_mul(row_bytes);
        if needed != Some(bytes.len()) {
            let what = format_args!("a matrix [{rows}, {cols}] of {}", block.name());
            return Err(Misfit::bytes(what, bytes.len(), needed));
        }
        Ok(Self { block, bytes, row_bytes, rows, cols })
    }

    /// The block type.
    pub fn block(&self) -> BlockType {
        self.block
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// All blocks, row after row.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The blocks of one row.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&self, row: usize) -> &[u8] {
        &self.bytes[row * self.row_bytes..(row + 1) * self.row_bytes]
    }

    pub(super) fn decode(&self, row: usize, cols: Range<usize>, out: &mut [f32]) {
        self.block.decode_row(self.row(row), cols.start, out);
    }
}
