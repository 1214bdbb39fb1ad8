//! Integers of 4 or 8 bits in words along K: compressed-tensors' `pack-quantized`, and Quark's W4A8.

use std::sync::Arc;

use moe_kernels::numerics::{DecodeScale, int4};

use super::module::{
    FLOATS, Module, Problem, Result, WORDS, expect_dims, expect_dtype, scale_type,
};
use super::names;
use crate::checkpoint::Tensor;
use crate::checkpoint::quantization::ScaleShape;
use crate::spec::Granularity;
use crate::weights::{Element, Global, Matrix, Scaled, Scales, Zeros};

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
    tensor.expect_shape(&[rows, cols.div_ceil(per_word)])?;
    if let Some(shape) = module.find(names::SHAPE)? {
        let stored = shape.to_i64()?;
        if stored != [rows as i64, cols as i64] {
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
    expect_dims(&stored, &[down, groups])?;
    let scales = Scales::new(stored.bytes.clone(), kind, granularity, [1, size], [rows, cols])
        .ok_or_else(|| stored.error("does not hold a scale for each group"))?;
    let (element, middle) = element(bits);
    let zeros = match symmetric {
        true => Zeros::Same(middle),
        false => zero_points(&module.need(names::ZEROS)?, bits, down, groups)?,
    };
    if symmetric {
        module.set_aside(names::ZEROS)?;
    }
    let codes = tensor.bytes.clone();
    let scaled = Scaled::new(element, codes, [rows, cols], scales, zeros, None)
        .ok_or_else(|| tensor.error("cannot be read with these scales"))?;
    let scaled = match module.find(names::GROUPS)? {
        Some(groups) => with_groups(scaled, &groups)?,
        None => scaled,
    };
    module.part(Arc::new(scaled))
}

/// Zero points `[N·b/32, groups]`, packed along N.
fn zero_points(tensor: &Tensor, bits: usize, rows: usize, groups: usize) -> Result<Zeros> {
    expect_dtype(tensor, WORDS)?;
    let per_word = 32 / bits;
    expect_dims(tensor, &[rows.div_ceil(per_word), groups])?;
    let mut zeros = Vec::with_capacity(rows * groups);
    for row in 0..rows {
        for group in 0..groups {
            let code = match bits {
                4 => int4::gptq_nibble(&tensor.bytes, groups, group, row),
                _ => tensor.bytes[(row / per_word * groups + group) * 4 + row % per_word],
            };
            zeros.push(i16::from(code));
        }
    }
    Ok(Zeros::Each(zeros.into()))
}

/// Act-order: the group of each column.
pub(super) fn with_groups(scaled: Scaled, tensor: &Tensor) -> Result<Scaled> {
    let groups = tensor.to_i64()?;
    let groups: Option<Arc<[u32]>> = groups.iter().map(|g| u32::try_from(*g).ok()).collect();
    groups.and_then(|groups| scaled.with_groups(groups)).ok_or_else(|| {
        tensor.error("does not name a group that has a scale for each column").into()
    })
}

/// Signed codes, a scale for each row and one for the tensor: Quark's W4A8.
pub(super) fn two_scales(module: &mut Module) -> Result<Matrix> {
    let [rows, cols] = module.dims();
    let tensor = module.need(names::CODES)?;
    expect_dtype(&tensor, WORDS)?;
    tensor.expect_shape(&[rows, cols.div_ceil(8)])?;
    let channel = module.need(names::DECODE_SCALE)?;
    let kind = scale_type(&channel, FLOATS)?;
    expect_dims(&channel, &[rows])?;
    let all = module.need_scale(names::SCALES)?;
    let scales =
        Scales::new(channel.bytes.clone(), kind, Granularity::Channel, [1, cols], [rows, cols])
            .ok_or_else(|| channel.error("does not hold a scale for each row"))?;
    // signed nibbles, −8 to 7, as codes from 0 to 15
    let codes: Vec<u8> = tensor.bytes.iter().map(|byte| byte ^ 0x88).collect();
    let global = Some(Global::Multiply(DecodeScale(all)));
    let zeros = Zeros::Same(8);
    let scaled = Scaled::new(Element::Uint4, codes.into(), [rows, cols], scales, zeros, global)
        .ok_or_else(|| Problem::Wrong(tensor.error("cannot be read with these scales")))?;
    module.part(Arc::new(scaled))
}
