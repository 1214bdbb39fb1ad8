//! Rows quantised to 8-bit integers that the checkpoint leaves as they are: the way of llama.cpp.

use moe_kernels::numerics::quantise::Qdq;
use moe_kernels::pack::integer_rows;

use super::{ActivationQuant, Expert, LoadedLayer, Matrix};
use crate::{Error, Result};

impl LoadedLayer {
    /// The layer with rows quantised to 8-bit integers before every product with weights that are integers
    /// of at most 8 bits, times scales: kernels that multiply integers can run it. A row has a scale,
    /// `max|x| / 127`, for as many columns as share one of the weights, at least 32 and at most 256. Rows
    /// that the checkpoint quantises stay as it says, and so do those of weights in floats.
    ///
    /// This changes what the layer computes: by 1e-4 to 4e-4 in NMSE where weights are random. All kernels
    /// and the reference quantise at the same points.
    ///
    /// # Errors
    /// [`Error::Spec`] where no expert has such weights.
    pub fn with_int8_activations(mut self) -> Result<Self> {
        let mut found = false;
        let shared = self.shared.iter_mut().flat_map(|shared| &mut shared.experts);
        for expert in self.experts.iter_mut().chain(shared) {
            found |= quantise_rows(expert);
        }
        if found {
            return Ok(self);
        }
        let formats: Vec<String> =
            self.experts.first().iter().map(|expert| expert.up.describe()).collect();
        Err(Error::Spec {
            layer: self.spec.name,
            reason: format!(
                "no weights whose rows could be quantised to 8-bit integers: those are integers of at \
                 most 8 bits with scales, and rows that are not quantised already; the experts are {}",
                formats.concat()
            ),
        })
    }
}

/// Whether any rows of the expert are.
fn quantise_rows(expert: &mut Expert) -> bool {
    // gate and up have the same rows
    let first = match &expert.gate {
        None => rows_of(&expert.up),
        Some(gate) => match (rows_of(gate), rows_of(&expert.up)) {
            (Some(gate), Some(up)) => Some(if size(gate) < size(up) { gate } else { up }),
            _ => None,
        },
    };
    if let Some(first) = first {
        let quantised = ActivationQuant::Quantised(first);
        expert.up.input = quantised;
        expert.gate.iter_mut().for_each(|gate| gate.input = quantised);
    }
    let second = rows_of(&expert.down);
    if let Some(second) = second {
        expert.down.input = ActivationQuant::Quantised(second);
    }
    first.is_some() || second.is_some()
}

/// How the rows of `matrix` are quantised, if they are not yet.
fn rows_of(matrix: &Matrix) -> Option<Qdq> {
    match matrix.input {
        ActivationQuant::None => integer_rows(matrix.view()),
        ActivationQuant::Quantised(_) => None,
    }
}

/// Columns that share a scale.
fn size(qdq: Qdq) -> Option<usize> {
    ActivationQuant::Quantised(qdq).group()
}
