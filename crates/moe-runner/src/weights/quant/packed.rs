//! Integers of 4 or 8 bits in words along K: compressed-tensors' `pack-quantized`, and Quark's W4A8.

use std::sync::Arc;

use moe_kernels::numerics::DecodeScale;

use super::module::{FLOATS, Module, Result, WORDS, expect_dims, expect_dtype, misfit, scale_type};
use super::names;
use crate::checkpoint::Tensor;
use crate::checkpoint::quantization::ScaleShape;
use crate::spec::Granularity;
use crate::weights::{
    Codes, Element, Global, Matrix, Packing, Scales, ZeroPacking, ZeroPoints, Zeros,
};

/// Unsigned codes of 4 or 8 bits, and the middle of their range.
pub(super) fn element(bits: usize) -> (Element, i16) {
    match bits {
        4 => (Element::Uint4, 8),
        _ => (Element::Uint8, 128),
    }
}

pub(super) fn matrix(
    module: &mut Module,
    bits: usize,
    shape: ScaleShape,
    symmetric: bool,
) -> Result<Matrix> {
    let [rows, cols] = module.dims();
    let tensor = module.need(names::PACKED)?;
    expect_dtype(&tensor, WORDS)?;
    let per_word = 32 / bits;
    let transposed = module.projection.transposed;
    let turned = |shape: [usize; 2]| if transposed { [shape[1], shape[0]] } else { shape };
    tensor.expect_shape(&turned([rows, cols.div_ceil(per_word)]))?;
    if let Some(shape) = module.find(names::SHAPE)? {
        let stored = shape.to_i64()?;
        let wanted = [rows as i64, cols as i64];
        let may_be = stored == wanted || transposed && stored.iter().rev().eq(&wanted);
        if !shape.blank && !may_be {
            let reason = format!("is {stored:?}, the layer needs [{rows}, {cols}]");
            return Err(shape.error(reason).into());
        }
    }
    let (granularity, size) = match shape {
        ScaleShape::Tensor => (Granularity::Tensor, cols),
        ScaleShape::Group(size) => (Granularity::Group, size),
        ScaleShape::Channel | ScaleShape::Block(_) => (Granularity::Channel, cols),
    };
    let stored = module.need(names::SCALES)?;
    let kind = scale_type(&stored, FLOATS)?;
    let groups = cols.div_ceil(size.max(1));
    let down = if granularity == Granularity::Tensor { 1 } else { rows };
    expect_dims(&stored, &turned([down, groups]))?;
    let scales = Scales::new(stored.bytes.clone(), kind, granularity, [1, size], [rows, cols])
        .map_err(misfit(&stored))?;
    let scales = if transposed { scales.transposed() } else { scales };
    let (element, middle) = element(bits);
    let zeros = match symmetric {
        true => Zeros::Same(middle),
        false => zero_points(&module.need(names::ZEROS)?, bits, scales.shape(), transposed)?,
    };
    if symmetric {
        module.set_aside(names::ZEROS)?;
    }
    // words along K, row beside row, are GPTQ's
    let packing = if transposed { Packing::Gptq } else { Packing::Rows };
    let (packing, shape) = ((element, packing), [rows, cols]);
    let codes = Codes::new(packing, tensor.bytes.clone(), shape, scales, zeros, None);
    let codes = codes.map_err(misfit(&tensor))?;
    let codes = match module.find(names::GROUPS)? {
        Some(groups) => with_groups(codes, &groups)?,
        None => codes,
    };
    module.part(codes)
}

/// Zero points `[N·b/32, groups]`, packed along N; or the other way round.
fn zero_points(
    tensor: &Tensor,
    bits: usize,
    [rows, groups]: [usize; 2],
    transposed: bool,
) -> Result<Zeros> {
    expect_dtype(tensor, WORDS)?;
    let words = rows.div_ceil(32 / bits);
    expect_dims(tensor, &if transposed { [groups, words] } else { [words, groups] })?;
    let packing = match (bits, transposed) {
        (4, false) => ZeroPacking::NibblesByGroup,
        (_, false) => ZeroPacking::BytesByGroup,
        (4, true) => ZeroPacking::Nibbles,
        (_, true) => ZeroPacking::Bytes,
    };
    let zeros = ZeroPoints::new(tensor.bytes.clone(), packing, [rows, groups], 0);
    zeros.map(Zeros::Each).map_err(misfit(tensor))
}

/// Act-order: the group of each column.
pub(super) fn with_groups(codes: Codes, tensor: &Tensor) -> Result<Codes> {
    let groups = tensor.to_i64()?;
    let groups: Option<Arc<[u32]>> = groups.iter().map(|g| u32::try_from(*g).ok()).collect();
    let groups = groups.ok_or_else(|| tensor.error("does not name a group for each column"))?;
    codes.with_groups(groups).map_err(misfit(tensor))
}

/// Signed codes, a scale for each row and one for the tensor: Quark's W4A8.
pub(super) fn two_scales(module: &mut Module) -> Result<Matrix> {
    let [rows, cols] = module.dims();
    let tensor = module.need(names::CODES)?;
    expect_dtype(&tensor, WORDS)?;
    if module.projection.transposed {
        return Err(tensor.error("is stored transposed, which Quark's W4A8 is not").into());
    }
    tensor.expect_shape(&[rows, cols.div_ceil(8)])?;
    let channel = module.need(names::DECODE_SCALE)?;
    let kind = scale_type(&channel, FLOATS)?;
    expect_dims(&channel, &[rows])?;
    let all = module.need_scale(names::SCALES)?;
    let scales =
        Scales::new(channel.bytes.clone(), kind, Granularity::Channel, [1, cols], [rows, cols])
            .map_err(misfit(&channel))?;
    let global = Some(Global::Multiply(DecodeScale(all)));
    let (packing, shape) = ((Element::Int4, Packing::Rows), [rows, cols]);
    let codes = Codes::new(packing, tensor.bytes.clone(), shape, scales, Zeros::None, global);
    module.part(codes.map_err(misfit(&tensor))?)
}
