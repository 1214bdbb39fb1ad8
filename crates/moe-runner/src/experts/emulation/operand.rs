//! One projection as a native unit reads it: its weights in the activations' dtype, and the
//! quantisation of the rows that it multiplies.

use moe_kernels::isa::Cpu;
use moe_kernels::numerics::for_each_group;
use moe_kernels::numerics::quantise::{Nvfp4Rule, Qdq};

use crate::hidden::ActivationDtype;
use crate::spec::WeightFormat;
use crate::weights::{ActivationQuant, Codes, Global, Matrix};

pub(super) struct Operand {
    matrix: Matrix,
    input: ActivationQuant,
    /// Multiplies the scales of NVFP4 blocks.
    alpha: Option<f32>,
    dtype: ActivationDtype,
}

impl Operand {
    pub(super) fn new(matrix: &Matrix, dtype: ActivationDtype) -> Self {
        let alpha = (matrix.format() == WeightFormat::Nvfp4).then(|| {
            match matrix.codes().and_then(Codes::global) {
                Some(Global::Multiply(scale)) => scale.0,
                Some(Global::Divide(scale)) => scale.to_decode().0,
                None => 1.0,
            }
        });
        let input = match matrix.input {
            ActivationQuant::Quantised(Qdq::Nvfp4 { global, .. }) => {
                ActivationQuant::Quantised(Qdq::Nvfp4 { global, rule: Nvfp4Rule::Reciprocal })
            }
            ActivationQuant::Quantised(Qdq::Nvfp4Token { .. }) => {
                ActivationQuant::Quantised(Qdq::Nvfp4Token { rule: Nvfp4Rule::Reciprocal })
            }
            other => other,
        };
        Self { matrix: matrix.clone(), input, alpha, dtype }
    }

    /// Output features.
    pub(super) fn rows(&self) -> usize {
        self.matrix.rows()
    }

    /// Input features.
    pub(super) fn cols(&self) -> usize {
        self.matrix.cols()
    }

    /// Quantises and dequantises a row in f32, then rounds it to T. A slice of a row comes with the
    /// largest magnitude of the whole, and with scratch longer than the row.
    pub(super) fn quantise_input(&self, row: &mut [f32], whole: Option<f32>, scratch: &mut [f32]) {
        match whole {
            Some(max) => self.input.apply_slice(Cpu::detect(), row, max, scratch),
            None => self.input.apply(Cpu::detect(), row),
        }
        row.iter_mut().for_each(|v| *v = self.dtype.round(*v));
    }

    /// Writes row `row` of the weights, rounded to T.
    pub(super) fn decode_row(&self, row: usize, out: &mut [f32]) {
        match (self.alpha, self.matrix.codes()) {
            (Some(alpha), Some(codes)) => {
                // As a kernel does it: the scales' product first, itself rounded to f32.
                let (row, cols) =
                    (self.matrix.view().stored_row(row), self.matrix.view().stored_cols());
                let (scales, start) = (codes.scales(), cols.start);
                codes.elements(row, cols, out);
                for_each_group(out, start, scales.block()[1], |group, values| {
                    let scale = scales.get(row, group) * alpha;
                    values.iter_mut().for_each(|v| *v *= scale);
                });
            }
            _ => self.matrix.decode_row(row, out),
        }
        out.iter_mut().for_each(|v| *v = self.dtype.round(*v));
    }
}
