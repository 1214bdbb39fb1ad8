//! Small floats in blocks along K: NVFP4 and the OCP MX formats.

use moe_kernels::numerics::{DecodeScale, EncodeScale};

use super::module::{Module, Result, expect_dims, expect_dtype, misfit, scale_type};
use super::names;
use crate::checkpoint::quantization::MxElement;
use crate::checkpoint::{Dtype, Tensor};
use crate::spec::Granularity;
use crate::weights::{Codes, Element, Global, Matrix, Packing, ScaleType, Scales, Zeros};

/// NVFP4. The tensor's scale divides or multiplies, as its name says.
pub(super) fn nvfp4(module: &mut Module) -> Result<Matrix> {
    let multiplies = module.name(names::DECODE_SCALE).is_some();
    let scale = module.need_scale(&[names::ENCODE_SCALE, names::DECODE_SCALE].concat())?;
    let global = match multiplies {
        true => Global::Multiply(DecodeScale(scale)),
        false => Global::Divide(EncodeScale(scale)),
    };
    nvfp4_blocks(module, Some(global))
}

/// NVFP4, whatever scale of the tensor there is.
pub(super) fn nvfp4_blocks(module: &mut Module, global: Option<Global>) -> Result<Matrix> {
    blocks(module, Element::E2m1, ScaleType::E4m3, 16, global)
}

/// An OCP MX format.
pub(super) fn mx(module: &mut Module, element: MxElement) -> Result<Matrix> {
    let element = match element {
        MxElement::Fp4 => Element::E2m1,
        MxElement::Fp6E2m3 => Element::E2m3,
        MxElement::Fp6E3m2 => Element::E3m2,
        MxElement::Fp8 => Element::E4m3,
    };
    blocks(module, element, ScaleType::E8m0, 32, None)
}

fn blocks(
    module: &mut Module,
    element: Element,
    scale: ScaleType,
    size: usize,
    global: Option<Global>,
) -> Result<Matrix> {
    let [rows, cols] = module.dims();
    let tensor = module.need(names::PACKED_FLOATS)?;
    let dtypes: &[Dtype] = match element {
        // MLX's bytes are in words
        Element::E4m3 => &[Dtype::F8E4M3, Dtype::U8, Dtype::U32],
        // DeepSeek-V4's FP4 is two codes in a byte of I8
        _ => &[Dtype::U8, Dtype::I8, Dtype::U32],
    };
    expect_dtype(&tensor, dtypes)?;
    if !cols.is_multiple_of(size) {
        return Err(tensor
            .error(format!("has {cols} columns, which blocks of {size} do not fill"))
            .into());
    }
    let row_bytes = cols * element.bits() / 8;
    let transposed = module.projection.transposed;
    let packing = match (transposed, element.bits()) {
        (false, _) => Packing::Rows,
        (true, 8) => Packing::Transposed,
        (true, 4) => Packing::TransposedPairs,
        (true, bits) => {
            let reason = format!("is stored transposed, which codes of {bits} bits are not");
            return Err(tensor.error(reason).into());
        }
    };
    match transposed {
        false => expect_packed(&tensor, rows, row_bytes)?,
        // whose words would be along the rows
        true if tensor.dtype == Dtype::U32 => {
            return Err(tensor.error("is stored transposed, which MLX's words are not").into());
        }
        true => tensor.expect_shape(&[row_bytes, rows])?,
    }
    let stored = module.need(names::SCALES)?;
    let kind = match (scale, stored.dtype) {
        // MLX has no other name for a byte
        (ScaleType::E4m3, Dtype::U8) if tensor.dtype == Dtype::U32 => scale,
        _ => scale_type(&stored, &[scale])?,
    };
    let groups = cols / size;
    expect_dims(&stored, &if transposed { [groups, rows] } else { [rows, groups] })?;
    let granularity = Granularity::Group;
    let scales = Scales::new(stored.bytes.clone(), kind, granularity, [1, size], [rows, cols])
        .map_err(misfit(&stored))?;
    let scales = if transposed { scales.transposed() } else { scales };
    let (packing, shape) = ((element, packing), [rows, cols]);
    let codes = Codes::new(packing, tensor.bytes.clone(), shape, scales, Zeros::None, global);
    module.part(codes.map_err(misfit(&tensor))?)
}

/// `[rows, bytes]`, or blocks `[rows, blocks, bytes of a block]`.
fn expect_packed(tensor: &Tensor, rows: usize, row_bytes: usize) -> Result<()> {
    let fits = tensor.shape.first() == Some(&rows)
        && tensor.shape.len() >= 2
        && tensor.bytes.len() == rows * row_bytes;
    if fits {
        return Ok(());
    }
    let reason = format!(
        "has shape {:?}, the layer needs [{rows}, {row_bytes}] bytes of packed codes",
        tensor.shape
    );
    Err(tensor.error(reason).into())
}
