//! Rows, ids and weights where candle holds them.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, Error, Layout, Result, Shape, bail};
use half::{bf16, f16};
use moe_runner::hidden::{Rows, RowsMut};
use moe_runner::weights::FloatType;

/// A tensor's elements and how they lie.
pub(crate) type Stored<'a> = (&'a CpuStorage, &'a Layout);

/// Runs `pass` over rows `[…, H]`, with room for as many.
pub(crate) fn mapped(
    (storage, layout): Stored<'_>,
    pass: impl FnOnce(Rows<'_>, RowsMut<'_>) -> moe_runner::Result<()>,
) -> Result<(CpuStorage, Shape)> {
    let len = layout.shape().elem_count();
    let output = match storage {
        CpuStorage::F32(data) => {
            let mut out = vec![0.0; len];
            pass(Rows::F32(in_order(data, layout)?), RowsMut::F32(&mut out))
                .map_err(Error::wrap)?;
            CpuStorage::F32(out)
        }
        CpuStorage::BF16(data) => {
            let mut out = vec![bf16::ZERO; len];
            pass(Rows::Bf16(in_order(data, layout)?), RowsMut::Bf16(&mut out))
                .map_err(Error::wrap)?;
            CpuStorage::BF16(out)
        }
        CpuStorage::F16(data) => {
            let mut out = vec![f16::ZERO; len];
            pass(Rows::F16(in_order(data, layout)?), RowsMut::F16(&mut out))
                .map_err(Error::wrap)?;
            CpuStorage::F16(out)
        }
        other => bail!("moe-runner: rows of {:?}; F32, BF16 or F16 is needed", other.dtype()),
    };
    Ok((output, layout.shape().clone()))
}

/// Ids `[…, k]` and weights `[…, k]` of rows `[…, H]`. An id that no expert can have is −1: nobody's.
pub(crate) fn routing<'a>(
    hidden: &Layout,
    (ids, ids_layout): Stored<'_>,
    (weights, weights_layout): Stored<'a>,
) -> Result<(Vec<i32>, &'a [f32])> {
    let [rows, of_ids, of_weights] =
        [hidden, ids_layout, weights_layout].map(|layout| layout.shape().dims());
    let leading = |dims: &[usize]| dims.split_last().map(|(_, leading)| leading.to_vec());
    if of_ids != of_weights || leading(rows) != leading(of_ids) {
        bail!("moe-runner: ids {of_ids:?} and weights {of_weights:?} for rows {rows:?}");
    }
    let id = |id: Option<i32>| id.unwrap_or(-1);
    let ids = match ids {
        CpuStorage::U32(data) => {
            in_order(data, ids_layout)?.iter().map(|i| id((*i).try_into().ok())).collect()
        }
        CpuStorage::I64(data) => {
            in_order(data, ids_layout)?.iter().map(|i| id((*i).try_into().ok())).collect()
        }
        other => bail!("moe-runner: ids of {:?}; U32 or I64 is needed", other.dtype()),
    };
    let CpuStorage::F32(data) = weights else {
        bail!("moe-runner: weights of {:?}; F32 is needed", weights.dtype());
    };
    Ok((ids, in_order(data, weights_layout)?))
}

/// All elements as little-endian floats, copied.
pub(crate) fn floats(what: &str, (storage, layout): Stored<'_>) -> Result<(Vec<u8>, FloatType)> {
    fn each<T: Copy, const N: usize>(data: &[T], of: impl Fn(T) -> [u8; N]) -> Vec<u8> {
        data.iter().flat_map(|value| of(*value)).collect()
    }
    Ok(match storage {
        CpuStorage::F32(data) => (each(in_order(data, layout)?, f32::to_le_bytes), FloatType::F32),
        CpuStorage::BF16(data) => {
            (each(in_order(data, layout)?, bf16::to_le_bytes), FloatType::Bf16)
        }
        CpuStorage::F16(data) => (each(in_order(data, layout)?, f16::to_le_bytes), FloatType::F16),
        other => {
            bail!("moe-runner: {what} of {:?}; F32, BF16 or F16 is needed", other.dtype())
        }
    })
}

/// The elements, which must lie one after the other.
fn in_order<'a, T>(data: &'a [T], layout: &Layout) -> Result<&'a [T]> {
    match layout.contiguous_offsets() {
        Some((first, last)) => Ok(&data[first..last]),
        None => bail!("moe-runner: elements that do not lie one after the other"),
    }
}
