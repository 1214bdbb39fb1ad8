//! Blocks of GGUF: scales and codes side by side.

use std::ops::Range;

use moe_kernels::numerics::ggml::BlockType;

use crate::checkpoint::Bytes;
use crate::spec::WeightFormat;
use crate::weights::Encoding;
use crate::weights::portable::{RowWindow, Writer, write_blocks};

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
    /// `rows` rows of `cols` values. `None` if `cols` are not whole blocks, or `bytes` has another
    /// length.
    pub fn new(block: BlockType, bytes: Bytes, [rows, cols]: [usize; 2]) -> Option<Self> {
        let row_bytes = block.row_bytes(cols)?;
        let fits = rows.checked_mul(row_bytes)? == bytes.len();
        fits.then_some(Self { block, bytes, row_bytes, rows, cols })
    }
}

impl Encoding for Blocks {
    fn format(&self) -> WeightFormat {
        WeightFormat::Ggml(self.block)
    }

    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn decode(&self, row: usize, cols: Range<usize>, out: &mut [f32]) {
        assert_eq!(cols.len(), out.len());
        let bytes = &self.bytes[row * self.row_bytes..(row + 1) * self.row_bytes];
        self.block.decode_row(bytes, cols.start, out);
    }

    fn bytes_of_rows(&self, rows: usize) -> usize {
        rows * self.row_bytes
    }

    fn write_rows(&self, window: RowWindow, to: &mut Writer) {
        write_blocks(self.block, window, self.cols, &self.bytes, self.row_bytes, to);
    }
}
