//! Stored arrays as bytes: some rows of one, as they are stored, with the scales that belong to
//! them. Codes are never decoded, so that nothing is rounded and every kernel can read the copy.

use std::sync::Arc;

use moe_kernels::numerics::ggml::BlockType;
use moe_kernels::numerics::{DecodeScale, EncodeScale};

use super::bytes::{Reader, Writer, broken};
use crate::Result;
use crate::spec::Granularity;
use crate::weights::{
    Blocks, Element, Encoding, FloatEncoding, FloatType, Global, ScaleType, Scaled, Scales, Zeros,
};

const FLOATS: u8 = 1;
const SCALED: u8 = 2;
const BLOCKS: u8 = 3;

const FLOAT_TYPES: &[FloatType] = &[FloatType::F32, FloatType::F16, FloatType::Bf16];
const ELEMENTS: &[Element] = &[
    Element::E4m3,
    Element::E5m2,
    Element::Int8,
    Element::Uint8,
    Element::Uint4,
    Element::E2m1,
    Element::E2m3,
    Element::E3m2,
];
const SCALE_TYPES: &[ScaleType] =
    &[ScaleType::F32, ScaleType::F16, ScaleType::Bf16, ScaleType::E4m3, ScaleType::E8m0];
const GRANULARITIES: &[Granularity] =
    &[Granularity::Tensor, Granularity::Channel, Granularity::Group, Granularity::Block];

/// Rows `first`, `first + step`, … of an array, `count` of them.
#[derive(Clone, Copy, Debug)]
pub struct RowWindow {
    /// The first one.
    pub first: usize,
    /// From one to the next.
    pub step: usize,
    /// How many.
    pub count: usize,
}

impl RowWindow {
    fn rows(self) -> impl Iterator<Item = usize> {
        (0..self.count).map(move |row| self.first + row * self.step)
    }
}

/// What [`Encoding::write_rows`] wrote: the rows of the window, all their columns.
pub(super) fn read_array(from: &mut Reader<'_>) -> Result<Arc<dyn Encoding>> {
    Ok(match from.tag()? {
        FLOATS => Arc::new(read_floats(from)?),
        SCALED => Arc::new(read_scaled(from)?),
        BLOCKS => Arc::new(read_blocks(from)?),
        tag => return Err(broken(&format!("array of kind {tag}"))),
    })
}

/// `run(row, col)` are the bytes from there on of `run_len` elements of a row, which lie in memory
/// one after the other.
pub(in crate::weights) fn write_floats<'a>(
    float: FloatType,
    window: RowWindow,
    (cols, run_len): (usize, usize),
    run: impl Fn(usize, usize) -> &'a [u8],
    to: &mut Writer,
) {
    to.tag(FLOATS);
    to.choice(FLOAT_TYPES, &float);
    to.count(window.count);
    to.count(cols);
    let run = &run;
    let starts = || (0..cols).step_by(run_len.max(1));
    to.pieces(window.rows().flat_map(|row| starts().map(move |col| run(row, col))));
}

fn read_floats(from: &mut Reader<'_>) -> Result<FloatEncoding> {
    let float = from.choice(FLOAT_TYPES)?;
    let (rows, cols) = (from.count()?, from.count()?);
    let bytes = from.bytes()?.to_vec();
    FloatEncoding::row_major(bytes.into(), float, rows, cols)
        .ok_or_else(|| broken(&format!("floats {rows} × {cols}")))
}

pub(in crate::weights) fn write_blocks(
    block: BlockType,
    window: RowWindow,
    cols: usize,
    rows: &[u8],
    row_bytes: usize,
    to: &mut Writer,
) {
    to.tag(BLOCKS);
    to.choice(&BlockType::ALL, &block);
    to.count(window.count);
    to.count(cols);
    to.pieces(window.rows().map(|row| &rows[row * row_bytes..][..row_bytes]));
}

fn read_blocks(from: &mut Reader<'_>) -> Result<Blocks> {
    let block = from.choice(&BlockType::ALL)?;
    let (rows, cols) = (from.count()?, from.count()?);
    let bytes = from.bytes()?.to_vec();
    Blocks::new(block, bytes.into(), [rows, cols])
        .ok_or_else(|| broken(&format!("blocks {rows} × {cols}")))
}

/// Scales of whole rows of blocks are kept as they are. Where the rows do not fill them (rows of two
/// projections in turn), each row gets a block of its own, with the same values.
pub(in crate::weights) fn write_scaled(scaled: &Scaled, window: RowWindow, to: &mut Writer) {
    let (scales, row_bytes) = (scaled.scales(), scaled.row_bytes());
    let (granularity, [down, across]) = (scales.granularity(), scales.block());
    let aligned = window.step == 1 && window.first.is_multiple_of(down);
    // the first row of each block that the copy has, and how many rows a block there has
    let (heads, down): (Vec<usize>, usize) = match (granularity, aligned) {
        (Granularity::Tensor, _) => (vec![window.first], window.count),
        (_, true) => (window.rows().step_by(down).collect(), down),
        (_, false) => (window.rows().collect(), 1),
    };
    to.tag(SCALED);
    to.choice(ELEMENTS, &scaled.element());
    to.count(window.count);
    to.count(scaled.cols());
    to.pieces(window.rows().map(|row| &scaled.codes()[row * row_bytes..][..row_bytes]));
    to.choice(SCALE_TYPES, &scales.stored());
    to.choice(GRANULARITIES, &granularity);
    to.count(down);
    to.count(across);
    let size = scales.stored().size();
    let run = |head: &usize| scales.index(*head, 0)..scales.index(*head, 0) + scales.per_row();
    to.pieces(heads.iter().map(run).map(|run| &scales.bytes()[run.start * size..run.end * size]));
    match scaled.zeros() {
        Zeros::None => to.tag(0),
        Zeros::Same(zero) => {
            to.tag(1);
            to.bytes(&zero.to_le_bytes());
        }
        Zeros::Each(zeros) => {
            to.tag(2);
            let bytes: Vec<u8> =
                heads.iter().flat_map(|h| &zeros[run(h)]).flat_map(|z| z.to_le_bytes()).collect();
            to.bytes(&bytes);
        }
    }
    match scaled.global() {
        None => to.tag(0),
        Some(Global::Divide(EncodeScale(scale))) => {
            to.tag(1);
            to.f32(scale);
        }
        Some(Global::Multiply(DecodeScale(scale))) => {
            to.tag(2);
            to.f32(scale);
        }
    }
    to.tag(u8::from(scaled.group_of().is_some()));
    if let Some(groups) = scaled.group_of() {
        let bytes: Vec<u8> = groups.iter().flat_map(|group| group.to_le_bytes()).collect();
        to.bytes(&bytes);
    }
}

fn read_scaled(from: &mut Reader<'_>) -> Result<Scaled> {
    let element = from.choice(ELEMENTS)?;
    let shape = [from.count()?, from.count()?];
    let codes = from.bytes()?.to_vec();
    let (stored, granularity) = (from.choice(SCALE_TYPES)?, from.choice(GRANULARITIES)?);
    let block = [from.count()?, from.count()?];
    let scales = from.bytes()?.to_vec();
    let zeros = match from.tag()? {
        0 => Zeros::None,
        kind => {
            let zeros = from.bytes()?.as_chunks().0.iter().map(|z| i16::from_le_bytes(*z));
            match (kind, zeros.len()) {
                (1, 1) => Zeros::Same(zeros.sum()),
                (2, _) => Zeros::Each(zeros.collect()),
                _ => return Err(broken(&format!("zero points of kind {kind}"))),
            }
        }
    };
    let global = match from.tag()? {
        0 => None,
        1 => Some(Global::Divide(EncodeScale(from.f32()?))),
        2 => Some(Global::Multiply(DecodeScale(from.f32()?))),
        kind => return Err(broken(&format!("tensor scale of kind {kind}"))),
    };
    let groups: Option<Arc<[u32]>> = match from.tag()? {
        0 => None,
        _ => Some(from.bytes()?.as_chunks().0.iter().map(|g| u32::from_le_bytes(*g)).collect()),
    };
    let array = Scales::new(scales.into(), stored, granularity, block, shape)
        .and_then(|scales| Scaled::new(element, codes.into(), shape, scales, zeros, global));
    let array = match groups {
        None => array,
        Some(groups) => array.and_then(|array| array.with_groups(groups)),
    };
    array.ok_or_else(|| broken(&format!("{element:?} {shape:?} with scales of {block:?}")))
}
