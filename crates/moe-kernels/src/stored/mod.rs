//! Weight matrices `[rows, cols]` = `[out, in]` as checkpoints store them.
//!
//! [`Stored`] is closed: [`Floats`], [`Codes`] with scales in an array of their own (every
//! safetensors format), and [`Blocks`] with scales and codes side by side (GGUF). All are views:
//! they share the [`Bytes`] they were made from, and what a file holds transposed or packed along
//! another dimension is read where it lies. [`View`] is a window of one: which of its rows, which
//! of its columns; slices for experts, for interleaved gate and up rows and for tensor parallelism
//! are windows and copy nothing.
//!
//! The value of a code is `(code − zero) · scale`, or `code · scale + minimum`, and for some formats
//! one more scale for the whole tensor. It is computed exactly and rounded once to f32: [`View::decode_row`] is the truth
//! that packed layouts and kernels are tested against.
//!
//! A new format of codes is one more [`Element`] or one more type of scale; a new way to pack codes
//! is one more [`Packing`].

mod blocks;
mod bytes;
mod codes;
mod element;
mod floats;
mod format;
mod misfit;
mod packing;
mod scales;
mod view;
mod zeros;

use std::ops::Range;

pub use blocks::Blocks;
pub use bytes::Bytes;
pub use codes::{Codes, Global};
pub use element::Element;
pub use floats::{FloatRows, Floats};
pub use format::{FloatType, Granularity, WeightFormat};
pub use misfit::Misfit;
pub use packing::Packing;
pub use scales::{ScaleType, Scales};
pub use view::View;
pub use zeros::{ZeroPacking, ZeroPoints, Zeros};

/// A stored array `[rows, cols]` of numbers. Cloning shares the bytes.
#[derive(Clone, Debug)]
pub enum Stored {
    /// Plain floats.
    Floats(Floats),
    /// Codes, with scales in an array of their own.
    Codes(Codes),
    /// Blocks of GGUF.
    Blocks(Blocks),
}

impl Stored {
    /// The number format.
    pub fn format(&self) -> WeightFormat {
        match self {
            Self::Floats(floats) => floats.float().into(),
            Self::Codes(codes) => codes.format(),
            Self::Blocks(blocks) => WeightFormat::Ggml(blocks.block()),
        }
    }

    /// The format with sizes of groups and all else that belongs to it, for people.
    pub fn describe(&self) -> String {
        match self {
            Self::Codes(codes) => codes.describe(),
            _ => self.format().to_string(),
        }
    }

    /// Rows of the whole array.
    pub fn rows(&self) -> usize {
        match self {
            Self::Floats(floats) => floats.rows(),
            Self::Codes(codes) => codes.rows(),
            Self::Blocks(blocks) => blocks.rows(),
        }
    }

    /// Columns of the whole array.
    pub fn cols(&self) -> usize {
        match self {
            Self::Floats(floats) => floats.cols(),
            Self::Codes(codes) => codes.cols(),
            Self::Blocks(blocks) => blocks.cols(),
        }
    }

    /// Writes the values of `cols` of `row`: each the exact stored value, rounded once to f32.
    ///
    /// # Panics
    /// If they do not lie inside the array, or `out` has another length than `cols`.
    pub fn decode(&self, row: usize, cols: Range<usize>, out: &mut [f32]) {
        assert_eq!(cols.len(), out.len());
        match self {
            Self::Floats(floats) => floats.decode(row, cols, out),
            Self::Codes(codes) => codes.decode(row, cols, out),
            Self::Blocks(blocks) => blocks.decode(row, cols, out),
        }
    }

    /// The bytes behind the whole array: of its numbers or codes, its scales, its zero points. With
    /// its `Debug` text, which has everything else, they say what the array is.
    pub fn arrays(&self) -> impl Iterator<Item = &[u8]> {
        let arrays = match self {
            Self::Floats(floats) => [Some(floats.bytes()), None, None],
            Self::Blocks(blocks) => [Some(blocks.bytes()), None, None],
            Self::Codes(codes) => {
                let zeros = match codes.zeros() {
                    Zeros::Each(zeros) => Some(zeros.bytes()),
                    Zeros::Minima(minima) => Some(minima.bytes()),
                    Zeros::None | Zeros::Same(_) => None,
                };
                [Some(codes.bytes()), Some(codes.scales().bytes()), zeros]
            }
        };
        arrays.into_iter().flatten()
    }

    /// Bytes of the file behind the whole array, scales and zero points included.
    pub fn stored_bytes(&self) -> usize {
        match self {
            Self::Floats(floats) => floats.bytes().len(),
            Self::Codes(codes) => codes.stored_bytes(),
            Self::Blocks(blocks) => blocks.bytes().len(),
        }
    }
}

impl From<Floats> for Stored {
    fn from(floats: Floats) -> Self {
        Self::Floats(floats)
    }
}

impl From<Codes> for Stored {
    fn from(codes: Codes) -> Self {
        Self::Codes(codes)
    }
}

impl From<Blocks> for Stored {
    fn from(blocks: Blocks) -> Self {
        Self::Blocks(blocks)
    }
}
