//! Stored arrays as bytes: some rows of one, with the scales that belong to them. Codes are never
//! decoded, so that nothing is rounded and every kernel can read the copy; rows that are stored in
//! another order are turned into rows.

use std::sync::Arc;

use moe_kernels::numerics::ggml::BlockType;
use moe_kernels::numerics::{DecodeScale, EncodeScale};
use moe_kernels::stored::{
    Blocks, Codes, Element, FloatType, Floats, Global, Granularity, Misfit, Packing, ScaleType,
    Scales, Stored, View, ZeroPoints, Zeros,
};

use super::bytes::{Reader, Writer, broken};
use crate::Result;

const FLOATS: u8 = 1;
const CODES: u8 = 2;
const BLOCKS: u8 = 3;

const GRANULARITIES: &[Granularity] =
    &[Granularity::Tensor, Granularity::Channel, Granularity::Group, Granularity::Block];

/// Writes the rows of `view`, all columns of the array.
pub(super) fn write_array(view: &View, to: &mut Writer) {
    let rows = || (0..view.rows()).map(|row| view.stored_row(row));
    match view.stored() {
        Stored::Floats(floats) => {
            to.tag(FLOATS);
            to.choice(&FloatType::ALL, &floats.float());
            to.count(view.rows());
            to.count(floats.cols());
            to.pieces(rows().map(|row| floats.row(row)));
        }
        Stored::Codes(codes) => write_codes(codes, view, to),
        Stored::Blocks(blocks) => {
            to.tag(BLOCKS);
            to.choice(&BlockType::ALL, &blocks.block());
            to.count(view.rows());
            to.count(blocks.cols());
            to.pieces(rows().map(|row| blocks.row(row).into()));
        }
    }
}

/// What [`write_array`] wrote: the rows of the window, all their columns.
pub(super) fn read_array(from: &mut Reader<'_>) -> Result<Stored> {
    let misfit = |misfit: Misfit| broken(&misfit.to_string());
    match from.tag()? {
        FLOATS => {
            let float = from.choice(&FloatType::ALL)?;
            let shape = [from.count()?, from.count()?];
            let bytes = from.bytes()?.to_vec();
            Floats::row_major(bytes.into(), float, shape).map(Stored::Floats).map_err(misfit)
        }
        CODES => read_codes(from).map(Stored::Codes),
        BLOCKS => {
            let block = from.choice(&BlockType::ALL)?;
            let shape = [from.count()?, from.count()?];
            let bytes = from.bytes()?.to_vec();
            Blocks::new(block, bytes.into(), shape).map(Stored::Blocks).map_err(misfit)
        }
        tag => Err(broken(&format!("array of kind {tag}"))),
    }
}

/// Scales of whole rows of blocks are kept as they are. Where the rows do not fill them (rows of two
/// projections in turn), each row gets a block of its own, with the same values.
fn write_codes(codes: &Codes, view: &View, to: &mut Writer) {
    let rows = || (0..view.rows()).map(|row| view.stored_row(row));
    let scales = codes.scales();
    let (granularity, [down, across]) = (scales.granularity(), scales.block());
    let aligned = view.step() == 1 && view.stored_row(0).is_multiple_of(down);
    // the first row of each block that the copy has, and how many rows a block there has
    let (heads, down): (Vec<usize>, usize) = match (granularity, aligned) {
        (Granularity::Tensor, _) => (vec![view.stored_row(0)], view.rows()),
        (_, true) => (rows().step_by(down).collect(), down),
        (_, false) => (rows().collect(), 1),
    };
    let groups = scales.shape()[1];
    let each = || heads.iter().flat_map(|head| (0..groups).map(move |group| (*head, group)));
    to.tag(CODES);
    to.choice(&Element::ALL, &codes.element());
    to.count(view.rows());
    to.count(codes.cols());
    to.pieces(rows().map(|row| codes.row(row)));
    to.choice(&ScaleType::ALL, &scales.stored());
    to.choice(GRANULARITIES, &granularity);
    to.count(down);
    to.count(across);
    to.pieces(each().map(|(row, group)| scales.get_bytes(row, group).into()));
    match codes.zeros() {
        Zeros::None => to.tag(0),
        Zeros::Same(zero) => {
            to.tag(1);
            to.bytes(&zero.to_le_bytes());
        }
        Zeros::Minima(minima) => {
            to.tag(3);
            to.choice(&ScaleType::ALL, &minima.stored());
            to.pieces(each().map(|(row, group)| minima.get_bytes(row, group).into()));
        }
        Zeros::Each(_) => {
            to.tag(2);
            // zero points are small integers: f32 holds them
            let zeros = each().map(|(row, group)| codes.zero(row, group) as i16);
            to.bytes(&zeros.flat_map(|zero| zero.to_le_bytes()).collect::<Vec<u8>>());
        }
    }
    match codes.global() {
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
    to.tag(u8::from(codes.group_of().is_some()));
    if let Some(groups) = codes.group_of() {
        let bytes: Vec<u8> = groups.iter().flat_map(|group| group.to_le_bytes()).collect();
        to.bytes(&bytes);
    }
}

fn read_codes(from: &mut Reader<'_>) -> Result<Codes> {
    let misfit = |misfit: Misfit| broken(&misfit.to_string());
    let element = from.choice(&Element::ALL)?;
    let shape = [from.count()?, from.count()?];
    let codes = from.bytes()?.to_vec();
    let (stored, granularity) = (from.choice(&ScaleType::ALL)?, from.choice(GRANULARITIES)?);
    let block = [from.count()?, from.count()?];
    let scales = from.bytes()?.to_vec();
    let scales = Scales::new(scales.into(), stored, granularity, block, shape).map_err(misfit)?;
    let zeros = match from.tag()? {
        0 => Zeros::None,
        3 => {
            let stored = from.choice(&ScaleType::ALL)?;
            let minima = from.bytes()?.to_vec();
            let minima = Scales::new(minima.into(), stored, granularity, block, shape);
            Zeros::Minima(minima.map_err(misfit)?)
        }
        kind => {
            let zeros: Vec<i16> =
                from.bytes()?.as_chunks().0.iter().map(|z| i16::from_le_bytes(*z)).collect();
            match (kind, &*zeros) {
                (1, [zero]) => Zeros::Same(*zero),
                (2, zeros) => {
                    Zeros::Each(ZeroPoints::from_i16(zeros, scales.shape()).map_err(misfit)?)
                }
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
    let packing = (element, Packing::Rows);
    let codes = Codes::new(packing, codes.into(), shape, scales, zeros, global).map_err(misfit)?;
    match groups {
        None => Ok(codes),
        Some(groups) => codes.with_groups(groups).map_err(misfit),
    }
}
