//! Quantisation of the rows that a matrix multiplies.

use moe_kernels::isa::Cpu;
use moe_kernels::numerics::quantise::{Fp6, Qdq};

use crate::spec::ActivationFormat;

/// How the rows that a matrix multiplies are quantised before the product.
///
/// A row's result never depends on the other rows of a batch: where a checkpoint asks for one
/// dynamic scale for all rows, each row gets its own (as engines do when results must not depend
/// on the batch). That is never less exact, and it is the same for every way of splitting rows
/// over ranks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ActivationQuant {
    /// Not at all.
    None,
    /// In f32, as [`Qdq`] says; rows in float64 are rounded to f32 first.
    Quantised(Qdq),
}

impl ActivationQuant {
    /// Its name for the oracle.
    pub fn format(&self) -> ActivationFormat {
        let Self::Quantised(qdq) = self else { return ActivationFormat::Unquantised };
        match qdq {
            Qdq::Fp8Static { .. } => ActivationFormat::Fp8Static,
            Qdq::Fp8Tensor | Qdq::Fp8Token => ActivationFormat::Fp8Token,
            Qdq::Fp8Group { .. } => ActivationFormat::Fp8Group,
            Qdq::Int8Static { .. } => ActivationFormat::Int8Static,
            Qdq::Int8Tensor | Qdq::Int8Token => ActivationFormat::Int8Token,
            Qdq::Int8Group { .. } => ActivationFormat::Int8Group,
            Qdq::Nvfp4 { .. } => ActivationFormat::Nvfp4,
            Qdq::Nvfp4Token { .. } => ActivationFormat::Nvfp4Token,
            Qdq::Mxfp4 => ActivationFormat::Mxfp4,
            Qdq::Mxfp6(Fp6::E2M3) => ActivationFormat::Mxfp6E2m3,
            Qdq::Mxfp6(Fp6::E3M2) => ActivationFormat::Mxfp6E3m2,
            Qdq::Mxfp8(_) => ActivationFormat::Mxfp8,
        }
    }

    /// Columns that share one scale, where rows are quantised in groups.
    pub fn group(&self) -> Option<usize> {
        let Self::Quantised(qdq) = self else { return None };
        match *qdq {
            Qdq::Fp8Group { size, .. } | Qdq::Int8Group { size } => Some(size),
            Qdq::Mxfp8(_) | Qdq::Mxfp6(_) | Qdq::Mxfp4 => Some(32),
            Qdq::Nvfp4 { .. } | Qdq::Nvfp4Token { .. } => Some(16),
            Qdq::Fp8Static { .. } | Qdq::Fp8Tensor | Qdq::Fp8Token => None,
            Qdq::Int8Static { .. } | Qdq::Int8Tensor | Qdq::Int8Token => None,
        }
    }

    /// A row's scale depends on all of its columns: ranks that hold slices of a row must agree on
    /// its largest magnitude first ([`Self::apply_slice`]).
    pub fn is_row_wide(&self) -> bool {
        match self {
            Self::None => false,
            Self::Quantised(qdq) => match qdq {
                Qdq::Fp8Tensor | Qdq::Fp8Token | Qdq::Int8Tensor | Qdq::Int8Token => true,
                Qdq::Nvfp4Token { .. } => true,
                Qdq::Fp8Static { .. } | Qdq::Fp8Group { .. } => false,
                Qdq::Int8Static { .. } | Qdq::Int8Group { .. } => false,
                Qdq::Nvfp4 { .. } | Qdq::Mxfp4 | Qdq::Mxfp6(_) | Qdq::Mxfp8(_) => false,
            },
        }
    }

    /// `slice`, some columns of a row whose largest magnitude is `max`, quantised and dequantised as
    /// they would be in the whole row. `scratch` is overwritten.
    ///
    /// # Panics
    /// If `scratch` is not longer than the slice.
    pub fn apply_slice(&self, cpu: Cpu, slice: &mut [f32], max: f32, scratch: &mut [f32]) {
        // one more column that holds the maximum makes the row's scale that of the whole
        let columns = &mut scratch[..=slice.len()];
        columns[..slice.len()].copy_from_slice(slice);
        columns[slice.len()] = max;
        self.apply(cpu, columns);
        slice.copy_from_slice(&columns[..slice.len()]);
    }

    /// `row` quantised and dequantised, in place, with the features of `cpu`: the same bits on any.
    pub fn apply(&self, cpu: Cpu, row: &mut [f32]) {
        if let Self::Quantised(qdq) = self {
            qdq.apply(cpu, row, row.len());
        }
    }

    /// `row` quantised and dequantised; where it is not quantised, it stays float64.
    pub fn apply_f64(&self, row: &[f64]) -> Vec<f64> {
        match self {
            Self::None => row.to_vec(),
            Self::Quantised(qdq) => {
                let mut narrow: Vec<f32> = row.iter().map(|v| *v as f32).collect();
                qdq.apply(Cpu::detect(), &mut narrow, row.len());
                narrow.into_iter().map(f64::from).collect()
            }
        }
    }
}
