//! Rows on their way between ranks: ids, weights and values of a row in one run of bytes.

use half::{bf16, f16};

use crate::hidden::ActivationDtype;
use crate::plan::NO_EXPERT;
use crate::router::LocalId;

/// How a dispatched row's values travel.
///
/// 16-bit activations that no transform has touched are exact in 16 bits: they travel so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wire {
    dtype: ActivationDtype,
}

impl Wire {
    /// The smallest format that is exact for rows of `dtype`; `transformed` rows are f32.
    pub fn exact(dtype: ActivationDtype, transformed: bool) -> Self {
        Self { dtype: if transformed { ActivationDtype::F32 } else { dtype } }
    }

    /// Bytes of a row with `top_k` slots and `width` columns.
    pub fn row_bytes(&self, top_k: usize, width: usize) -> usize {
        top_k * 8 + width * self.dtype.size()
    }

    /// Appends a row: k ids, k weights, its values.
    pub(super) fn write(
        &self,
        out: &mut Vec<u8>,
        ids: impl Iterator<Item = LocalId>,
        weights: &[f32],
        values: &[f32],
    ) {
        ids.for_each(|id| out.extend_from_slice(&id.0.to_le_bytes()));
        weights.iter().for_each(|w| out.extend_from_slice(&w.to_le_bytes()));
        match self.dtype {
            ActivationDtype::F32 => {
                values.iter().for_each(|v| out.extend_from_slice(&v.to_le_bytes()));
            }
            ActivationDtype::Bf16 => {
                values.iter().for_each(|v| out.extend_from_slice(&bf16::from_f32(*v).to_le_bytes()))
            }
            ActivationDtype::F16 => {
                values.iter().for_each(|v| out.extend_from_slice(&f16::from_f32(*v).to_le_bytes()));
            }
        }
    }

    /// Reads a row that [`write`](Self::write) made, of `top_k` slots, and appends it; the values
    /// are padded with zeros to `stride`.
    pub(super) fn read(
        &self,
        bytes: &[u8],
        top_k: usize,
        stride: usize,
        (ids, weights, values): (&mut Vec<LocalId>, &mut Vec<f32>, &mut Vec<f32>),
    ) {
        let (id_bytes, rest) = bytes.split_at(top_k * 4);
        let (weight_bytes, value_bytes) = rest.split_at(top_k * 4);
        ids.extend(id_bytes.as_chunks().0.iter().map(|b| LocalId(u32::from_le_bytes(*b))));
        weights.extend(weight_bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)));
        let end = values.len() + stride;
        match self.dtype {
            ActivationDtype::F32 => {
                values.extend(value_bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)));
            }
            ActivationDtype::Bf16 => values
                .extend(value_bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32())),
            ActivationDtype::F16 => values
                .extend(value_bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32())),
        }
        values.resize(end, 0.0);
    }
}

/// True for a slot whose expert is on this rank.
pub(super) fn is_here(id: &LocalId) -> bool {
    *id != NO_EXPERT
}
