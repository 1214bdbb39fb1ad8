//! Plain floats: one tensor, one number for each weight.

use super::accounting::Loader;
use crate::checkpoint::architecture::{Part, Projection, Stack, VectorPart};
use crate::checkpoint::{Checkpoint, Dtype, Tensor};
use crate::weights::quant::module::Problem;
use crate::weights::{FloatType, Floats, Matrix};
use crate::{Error, Result};

/// A projection stored as `<module>.weight` or `<module>`, in F32, F16 or BF16.
pub(super) fn matrix(
    loader: &mut Loader,
    projection: &Projection,
) -> Option<Result<Matrix, Problem>> {
    let name = name(loader.checkpoint(), &projection.module)?;
    match loader.claim(&name) {
        Ok(Some(tensor)) => Some(view(&tensor, projection).map_err(Problem::Wrong)),
        Ok(None) => None,
        Err(error) => Some(Err(Problem::Wrong(error))),
    }
}

/// The tensor that holds a module's weights as plain floats; `None` if there is none of its name.
pub(crate) fn name(checkpoint: &Checkpoint, module: &str) -> Option<String> {
    [format!("{module}.weight"), module.to_string()]
        .into_iter()
        .find(|name| checkpoint.contains(name))
}

/// The part of `tensor` that `projection` names, as a view.
pub(crate) fn view(tensor: &Tensor, projection: &Projection) -> Result<Matrix> {
    let float = float_type(tensor)?;
    tensor.expect_shape(&projection.stored_shape())?;
    let Part { first, step, of, stack } = projection.part;
    let size = of * projection.cols * float.size();
    let start = stack.map_or(0, |stack| stack.index * size);
    let bytes = tensor.bytes.slice(start..start + size);
    let shape = [of, projection.cols];
    let floats = bytes.and_then(|bytes| match projection.transposed {
        false => Floats::row_major(bytes, float, shape).ok(),
        true => Floats::transposed(bytes, float, shape).ok(),
    });
    floats
        .and_then(|floats| Matrix::new(floats).rows_of(first, step, projection.rows))
        .ok_or_else(|| tensor.error("holds fewer bytes than its shape says"))
}

/// The part of a vector, or of a stack of vectors.
pub(super) fn vector(tensor: &Tensor, part: &VectorPart) -> Result<Vec<f32>> {
    let Part { first, step, of, stack } = part.part;
    match stack {
        None => tensor.expect_shape(&[of])?,
        Some(Stack { count, .. }) => tensor.expect_shape(&[count, of])?,
    }
    float_type(tensor)?;
    let size = of * tensor.dtype.size().unwrap_or(1);
    let start = stack.map_or(0, |stack| stack.index * size);
    let row = tensor
        .bytes
        .slice(start..start + size)
        .map(|bytes| Tensor { bytes, ..tensor.clone() })
        .ok_or_else(|| tensor.error("holds fewer bytes than its shape says"))?;
    Ok(row.to_f32()?.into_iter().skip(first).step_by(step).take(part.len).collect())
}

fn float_type(tensor: &Tensor) -> Result<FloatType> {
    match tensor.dtype {
        Dtype::F32 => Ok(FloatType::F32),
        Dtype::F16 => Ok(FloatType::F16),
        Dtype::Bf16 => Ok(FloatType::Bf16),
        other => Err(unreadable(tensor, other)),
    }
}

fn unreadable(tensor: &Tensor, dtype: Dtype) -> Error {
    tensor.error(format!(
        "is {dtype}, but no configuration says how it is quantised (quantization_config is missing, \
         or leaves this module as it is)"
    ))
}
