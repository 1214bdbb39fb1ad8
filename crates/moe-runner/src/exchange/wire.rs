//! Rows on their way between ranks: ids, weights and values of a row in one run of bytes.

use moe_kernels::isa::Cpu;
use moe_kernels::numerics::float16;
use moe_kernels::numerics::quantise::Qdq;

use crate::hidden::ActivationDtype;
use crate::router::LocalId;
use crate::spec::WeightOn;
use crate::weights::{ActivationQuant, LoadedLayer};

/// How a dispatched row's values travel.
///
/// 16-bit activations that no transform has touched are exact in 16 bits: they travel so. Rows that
/// every expert would quantise in the same way are quantised before they leave, and travel as codes
/// and scales: the values that arrive are those that the experts would have made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Wire {
    dtype: ActivationDtype,
    quantised: Option<Qdq>,
}

impl Wire {
    /// The smallest format that is exact for rows of `dtype`; `transformed` rows are f32.
    pub fn exact(dtype: ActivationDtype, transformed: bool) -> Self {
        Self { dtype: if transformed { ActivationDtype::F32 } else { dtype }, quantised: None }
    }

    /// The smallest format that gives `layer`'s experts what they would have on one rank.
    pub fn of_layer(layer: &LoadedLayer, dtype: ActivationDtype) -> Self {
        let exact = Self::exact(dtype, !layer.spec.input_transform.is_identity());
        let width = layer.spec.dims.routed_hidden;
        let inputs = || layer.experts.iter().flat_map(|e| e.gate.iter().chain([&e.up]));
        let quantised = match inputs().next().map(|matrix| matrix.input) {
            Some(first @ ActivationQuant::Quantised(qdq))
                if qdq.row_bytes(width).is_some()
                    // a weight on the input comes before the quantisation
                    && layer.spec.router.weight_on == WeightOn::Output
                    && inputs().all(|matrix| matrix.input == first) =>
            {
                Some(qdq)
            }
            _ => None,
        };
        Self { quantised, ..exact }
    }

    /// Rows are quantised before they leave.
    pub(super) fn quantises(&self) -> bool {
        self.quantised.is_some()
    }

    /// The same for experts that quantise rows themselves.
    pub fn unquantised(self) -> Self {
        Self { quantised: None, ..self }
    }

    /// Bytes of a row with `top_k` slots and `width` columns.
    pub fn row_bytes(&self, top_k: usize, width: usize) -> usize {
        let values = self.quantised.and_then(|qdq| qdq.row_bytes(width));
        top_k * 8 + values.unwrap_or(width * self.dtype.size())
    }

    /// Writes a row, [`row_bytes`](Self::row_bytes) long: k ids, k weights, its values.
    pub(super) fn write(
        &self,
        row: &mut [u8],
        ids: impl Iterator<Item = LocalId>,
        weights: &[f32],
        values: &[f32],
    ) {
        let (id_bytes, rest) = row.split_at_mut(weights.len() * 4);
        let (weight_bytes, value_bytes) = rest.split_at_mut(weights.len() * 4);
        for (to, id) in id_bytes.as_chunks_mut().0.iter_mut().zip(ids) {
            *to = id.0.to_le_bytes();
        }
        write_f32(weights, weight_bytes);
        if let Some(qdq) = &self.quantised {
            return qdq.encode_row(Cpu::detect(), values, value_bytes);
        }
        match self.dtype {
            ActivationDtype::F32 => write_f32(values, value_bytes),
            ActivationDtype::Bf16 => float16::f32_to_bf16_bytes(values, value_bytes),
            ActivationDtype::F16 => float16::f32_to_f16_bytes(values, value_bytes),
        }
    }

    /// Reads a row that [`write`](Self::write) made.
    pub(super) fn read(
        &self,
        row: &[u8],
        ids: &mut [LocalId],
        weights: &mut [f32],
        values: &mut [f32],
    ) {
        let (id_bytes, rest) = row.split_at(ids.len() * 4);
        let (weight_bytes, value_bytes) = rest.split_at(weights.len() * 4);
        for (id, bytes) in ids.iter_mut().zip(id_bytes.as_chunks().0) {
            *id = LocalId(u32::from_le_bytes(*bytes));
        }
        read_f32(weight_bytes, weights);
        match (&self.quantised, self.dtype) {
            (Some(qdq), _) => qdq.decode_row(value_bytes, values),
            (None, ActivationDtype::F32) => read_f32(value_bytes, values),
            (None, ActivationDtype::Bf16) => float16::bf16_bytes_to_f32(value_bytes, values),
            (None, ActivationDtype::F16) => float16::f16_bytes_to_f32(value_bytes, values),
        }
    }

    /// Rows travel as codes and scales.
    pub(super) fn is_quantised(&self) -> bool {
        self.quantised.is_some()
    }
}

fn write_f32(values: &[f32], bytes: &mut [u8]) {
    for (to, value) in bytes.as_chunks_mut().0.iter_mut().zip(values) {
        *to = value.to_le_bytes();
    }
}

fn read_f32(bytes: &[u8], values: &mut [f32]) {
    for (to, bytes) in values.iter_mut().zip(bytes.as_chunks().0) {
        *to = f32::from_le_bytes(*bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A row that a transform has made holds more than 16 bits, and all of them arrive.
    #[test]
    fn transformed_rows_keep_all_their_bits() {
        let sent = [1.0 + f32::EPSILON, -3.0e-30, 7.0e30];
        for dtype in [ActivationDtype::Bf16, ActivationDtype::F16] {
            let wire = Wire::exact(dtype, true);
            let mut row = vec![0; wire.row_bytes(1, sent.len())];
            wire.write(&mut row, [LocalId(5)].into_iter(), &[0.5], &sent);
            let (mut ids, mut weights, mut values) = ([LocalId(0)], [0.0], [0.0; 3]);
            wire.read(&row, &mut ids, &mut weights, &mut values);
            assert_eq!((ids, weights, values), ([LocalId(5)], [0.5], sent), "{dtype:?}");
        }
    }
}
