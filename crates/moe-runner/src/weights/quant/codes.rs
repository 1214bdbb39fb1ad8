//! FP8 and INT8: a code in a byte for each weight.

use super::module::{FLOATS, Module, Problem, Result, expect_dims, misfit, scale_type};
use super::names;
use crate::checkpoint::quantization::{Number, ScaleShape};
use crate::checkpoint::{Dtype, Tensor};
use crate::spec::Granularity;
use crate::weights::{
    Codes, Element, Matrix, Packing, ScaleType, Scales, ZeroPacking, ZeroPoints, Zeros,
};

pub(super) fn matrix(module: &mut Module, number: Number, shape: ScaleShape) -> Result<Matrix> {
    let tensor = module.need(names::CODES)?;
    let element = match (number, tensor.dtype) {
        (Number::Fp8, Dtype::F8E4M3) => Element::E4m3,
        (Number::Fp8, Dtype::F8E5M2) => Element::E5m2,
        (Number::Int8 | Number::Int4, Dtype::I8) => Element::Int8,
        (_, other) => {
            let reason = format!("is {other}, but the configuration says {number}");
            return Err(tensor.error(reason).into());
        }
    };
    let [rows, cols] = module.dims();
    let transposed = module.projection.transposed;
    tensor.expect_shape(&if transposed { [cols, rows] } else { [rows, cols] })?;
    let stored = module.need(names::SCALES)?;
    let scales = scales(&stored, shape, [rows, cols], transposed)?;
    let zeros = match module.find(names::ZEROS)? {
        Some(zeros) if element == Element::Int8 => zero_points(&zeros, &scales)?,
        _ => Zeros::None,
    };
    let packing = if transposed { Packing::Transposed } else { Packing::Rows };
    let (codes, shape) = (tensor.bytes.clone(), [rows, cols]);
    let codes = Codes::new((element, packing), codes, shape, scales, zeros, None);
    module.part(codes.map_err(misfit(&tensor))?)
}

/// The scales, by what the configuration says about them; between one for a tensor and one for
/// each row the shape decides, since both are written under the same words.
fn scales(
    tensor: &Tensor,
    shape: ScaleShape,
    [rows, cols]: [usize; 2],
    transposed: bool,
) -> Result<Scales> {
    let count = tensor.shape.iter().product::<usize>();
    let (granularity, block) = match shape {
        ScaleShape::Tensor | ScaleShape::Channel if count == 1 => (Granularity::Tensor, [1, 1]),
        ScaleShape::Tensor | ScaleShape::Channel => (Granularity::Channel, [1, 1]),
        ScaleShape::Group(size) => (Granularity::Group, [1, size]),
        ScaleShape::Block(block) => (Granularity::Block, block),
    };
    let grid = match granularity {
        Granularity::Tensor => [1, 1],
        Granularity::Channel => [rows, 1],
        Granularity::Group | Granularity::Block => {
            [rows.div_ceil(block[0]), cols.div_ceil(block[1])]
        }
    };
    let allowed: &[ScaleType] = match shape {
        ScaleShape::Block(_) => &[ScaleType::F32, ScaleType::F16, ScaleType::Bf16, ScaleType::E8m0],
        _ => FLOATS,
    };
    let kind = scale_type(tensor, allowed)?;
    expect_dims(tensor, &if transposed { [grid[1], grid[0]] } else { grid })?;
    let scales = Scales::new(tensor.bytes.clone(), kind, granularity, block, [rows, cols]);
    let scales = scales.map_err(misfit(tensor))?;
    Ok(if transposed { scales.transposed() } else { scales })
}

/// Zero points beside the scales, one byte each. All zero, they say nothing.
fn zero_points(tensor: &Tensor, scales: &Scales) -> Result<Zeros> {
    if tensor.blank || tensor.bytes.iter().all(|b| *b == 0) {
        return Ok(Zeros::None);
    }
    let zeros = match tensor.dtype {
        Dtype::I8 => ZeroPoints::new(tensor.bytes.clone(), ZeroPacking::I8, scales.shape(), 0).ok(),
        _ => None,
    };
    zeros.map(Zeros::Each).ok_or_else(|| {
        Problem::Wrong(tensor.error(format!(
            "is {} {:?}; a zero point of I8 for each scale is needed",
            tensor.dtype, tensor.shape
        )))
    })
}
