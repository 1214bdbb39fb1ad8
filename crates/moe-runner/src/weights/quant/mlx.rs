//! MLX's own quantisation: codes in words along K, from the lowest bit of the first word on.

use moe_kernels::numerics::DecodeScale;

use super::module::{FLOATS, Module, Result, WORDS, expect_dtype, misfit, scale_of, scale_type};
use super::{names, small_floats};
use crate::checkpoint::quantization::{MlxMode, MxElement};
use crate::checkpoint::{Dtype, StoredDtype, Tensor};
use crate::spec::Granularity;
use crate::weights::{Codes, Element, Global, Matrix, Packing, Scales, Zeros};

/// The largest number that NVFP4 has without a scale for the tensor.
const NVFP4_MAX: f32 = 448.0 * 6.0;

/// `mode` is what the configuration says. The tensors themselves leave nothing open, and files are
/// published whose configuration says something else: they decide.
pub(super) fn matrix(module: &mut Module, mode: MlxMode) -> Result<Matrix> {
    match as_stored(module).unwrap_or(mode) {
        MlxMode::Affine { bits, group } => affine(module, bits, group),
        MlxMode::Mxfp4 => small_floats::mx(module, MxElement::Fp4),
        MlxMode::Mxfp8 => small_floats::mx(module, MxElement::Fp8),
        MlxMode::Nvfp4 => {
            // what the largest weight was
            let global = match module.name(names::MAX_WEIGHT) {
                None => None,
                Some(_) => Some(module.need_scale(names::MAX_WEIGHT)?),
            };
            let global = global.map(|max| Global::Multiply(DecodeScale(max / NVFP4_MAX)));
            small_floats::nvfp4_blocks(module, global)
        }
    }
}

/// The mode that shapes and dtypes tell.
fn as_stored(module: &mut Module) -> Option<MlxMode> {
    let [_, cols] = module.dims();
    let info = |endings| {
        let name = module.name(endings)?;
        let info = module.loader.checkpoint().info(&name)?;
        let last = *info.shape.last()?;
        let StoredDtype::Known(dtype) = info.dtype else { return None };
        Some((*dtype, last)).filter(|_| last > 0)
    };
    let ((_, words), (dtype, groups)) = (info(names::CODES)?, info(names::QSCALES)?);
    let bits = words.checked_mul(32)?.checked_div(cols)?;
    let group = cols / groups;
    if bits * cols != words * 32 || group * groups != cols {
        return None;
    }
    match (dtype, bits, group) {
        (Dtype::U8, 4, 16) => Some(MlxMode::Nvfp4),
        (Dtype::U8, 4, 32) => Some(MlxMode::Mxfp4),
        (Dtype::U8, 8, 32) => Some(MlxMode::Mxfp8),
        _ if scale_of(dtype).is_some_and(|kind| FLOATS.contains(&kind)) => {
            let (_, minima) = info(names::MINIMA)?;
            let may_be = MlxMode::BITS.contains(&bits) && minima == groups;
            may_be.then_some(MlxMode::Affine { bits, group })
        }
        _ => None,
    }
}

/// Integers with a scale and a least value for each group.
fn affine(module: &mut Module, bits: usize, group: usize) -> Result<Matrix> {
    let [rows, cols] = module.dims();
    let tensor = module.need(names::CODES)?;
    expect_dtype(&tensor, WORDS)?;
    if module.projection.transposed {
        return Err(tensor.error("is stored transposed, which MLX's words are not").into());
    }
    if !cols.is_multiple_of(group) || !cols.is_multiple_of(32) {
        let reason = format!("has {cols} columns, which groups of {group} and words do not fill");
        return Err(tensor.error(reason).into());
    }
    tensor.expect_shape(&[rows, cols / 32 * bits])?;
    let numbers = |tensor: Tensor| -> Result<Scales> {
        let kind = scale_type(&tensor, FLOATS)?;
        tensor.expect_shape(&[rows, cols / group])?;
        let (granularity, block) = (Granularity::Group, [1, group]);
        let numbers = Scales::new(tensor.bytes.clone(), kind, granularity, block, [rows, cols]);
        numbers.map_err(misfit(&tensor))
    };
    let scales = numbers(module.need(names::QSCALES)?)?;
    let minima = numbers(module.need(names::MINIMA)?)?;
    let element = match bits {
        1 => Element::Uint1,
        2 => Element::Uint2,
        3 => Element::Uint3,
        4 => Element::Uint4,
        5 => Element::Uint5,
        6 => Element::Uint6,
        _ => Element::Uint8,
    };
    let (packing, shape) = ((element, Packing::Rows), [rows, cols]);
    let minima = Zeros::Minima(minima);
    let codes = Codes::new(packing, tensor.bytes.clone(), shape, scales, minima, None);
    module.part(codes.map_err(misfit(&tensor))?)
}
