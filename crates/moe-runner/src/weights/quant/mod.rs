//! Which tensors make a quantised matrix: from a module's [`Scheme`] and its tensors to a [`Matrix`].
//!
//! [`names`] is the table of tensors, for reading and for writing.

mod codes;
mod input;
mod k_first;
mod mlx;
pub(crate) mod module;
pub(crate) mod names;
mod packed;
mod scaled_blocks;
mod small_floats;

pub(crate) use input::share_input_scale;
pub(crate) use module::{Module, Problem, scale_of, scale_value};
pub(crate) use scaled_blocks::times_its_scale;

use moe_kernels::numerics::ggml::BlockType;

use super::load::accounting::Loader;
use super::{Blocks, Matrix};
use crate::checkpoint::architecture::Projection;
use crate::checkpoint::quantization::{Scheme, WeightScheme};
use crate::checkpoint::{Dtype, StoredDtype};
use module::Result;

/// A projection that the configuration gives a scheme; `None` for plain floats, also where the
/// configuration says otherwise, but the checkpoint has them as floats.
pub(crate) fn matrix(loader: &mut Loader, projection: &Projection) -> Option<Result<Matrix>> {
    let scheme = match loader.scheme(&projection.module) {
        Ok(Scheme { weights: WeightScheme::Float, .. }) => return None,
        _ if is_float(loader, projection) => return None,
        Ok(scheme) => scheme,
        Err(error) => return Some(Err(error.into())),
    };
    let module = &mut Module { loader, projection };
    let matrix = quantised(module, scheme);
    if matrix.is_err() {
        module.set_all_aside();
    }
    Some(matrix)
}

/// Whether the configuration gives the projection a scheme, and codes of it are there.
pub(crate) fn is_quantised(loader: &mut Loader, projection: &Projection) -> bool {
    let scheme = loader.scheme(&projection.module);
    let float = matches!(scheme, Ok(Scheme { weights: WeightScheme::Float, .. }));
    let module = Module { loader, projection };
    let codes = [names::QWEIGHT, names::PACKED_FLOATS].concat();
    !float && module.name(&codes).is_some() && !is_float(loader, projection)
}

/// Whether the module's weights are stored as floats.
fn is_float(loader: &mut Loader, projection: &Projection) -> bool {
    let module = Module { loader, projection };
    let info = module
        .name(names::CODES)
        .and_then(|name| module.loader.checkpoint().info(&name).map(|info| info.dtype.clone()));
    matches!(info, Some(StoredDtype::Known(Dtype::F32 | Dtype::F16 | Dtype::Bf16)))
}

fn quantised(module: &mut Module, scheme: Scheme) -> Result<Matrix> {
    let matrix = match scheme.weights {
        WeightScheme::Codes { number, scales } => codes::matrix(module, number, scales)?,
        WeightScheme::Packed { bits, scales, symmetric } => {
            packed::matrix(module, bits, scales, symmetric)?
        }
        WeightScheme::Nvfp4 => small_floats::nvfp4(module)?,
        WeightScheme::Mx(element) => small_floats::mx(module, element)?,
        WeightScheme::Gptq { bits, group, symmetric, zeros_less_one } => {
            k_first::gptq(module, bits, group, symmetric, zeros_less_one)?
        }
        WeightScheme::KFirst { group, symmetric, interleaved, signed } => {
            k_first::packed_along_n(module, group, symmetric, interleaved, signed)?
        }
        WeightScheme::Int4TwoScales => packed::two_scales(module)?,
        WeightScheme::Mlx(mode) => mlx::matrix(module, mode)?,
        WeightScheme::Float => unreachable!("floats have no scheme to be read by"),
    };
    Ok(matrix.with_input(input::quant(module, scheme.input)?))
}

/// A projection in a block type of GGUF; `None` for other types.
pub(crate) fn blocks(loader: &mut Loader, projection: &Projection) -> Option<Result<Matrix>> {
    let mut module = Module { loader, projection };
    let name = module.name(names::CODES)?;
    let StoredDtype::Known(Dtype::Ggml(number)) = *module.loader.checkpoint().info(&name)?.dtype
    else {
        return None;
    };
    let build = |module: &mut Module| {
        let tensor = module.need(names::CODES)?;
        let block = BlockType::from_ggml(number).ok_or_else(|| {
            let known: Vec<&str> = BlockType::ALL.iter().map(|block| block.name()).collect();
            tensor.error(format!(
                "is {}, which cannot be decoded; can be: {}",
                tensor.dtype,
                known.join(", ")
            ))
        })?;
        let [rows, cols] = module.dims();
        tensor.expect_shape(&[rows, cols])?;
        let blocks = Blocks::new(block, tensor.bytes.clone(), [rows, cols]);
        module.part(blocks.map_err(module::misfit(&tensor))?)
    };
    Some(build(&mut module))
}
