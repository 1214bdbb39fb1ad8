//! The gate, ready to run: `logits = norm(x)·Wgᵀ + b`, in f32 whatever the activation dtype.

use moe_kernels::isa::Isa;

use crate::experts::cpu::{Linear, SharedPool};
use crate::spec::GateSpec;
use crate::weights::GateWeights;

/// The gate with its weights.
#[derive(Debug)]
pub(crate) struct Gate {
    linear: Linear,
    bias: Option<Vec<f32>>,
    /// ε, and scale · H^-1/2 (gemma4).
    input_norm: Option<(f32, Vec<f32>)>,
    normalised: Vec<f32>,
}

impl Gate {
    pub(crate) fn new(spec: GateSpec, weights: &GateWeights, isa: Isa, pool: &SharedPool) -> Self {
        let root = (weights.weight.cols() as f64).sqrt();
        let scale = weights
            .input_scale
            .as_ref()
            .map(|scale| scale.iter().map(|v| (f64::from(*v) / root) as f32).collect());
        Self {
            linear: Linear::new(&weights.weight, isa, pool.clone()),
            bias: weights.bias.clone(),
            input_norm: spec.scaled_rms_eps.zip(scale),
            normalised: Vec::new(),
        }
    }

    /// Writes the logits `[T, E_total]` of `rows` `[T, H]`.
    pub(crate) fn forward(&mut self, rows: &[f32], tokens: usize, logits: &mut Vec<f32>) {
        logits.clear();
        logits.resize(tokens * self.linear.rows(), 0.0);
        let rows = match &self.input_norm {
            None => rows,
            Some((eps, scale)) => {
                let norm =
                    crate::spec::RmsNorm { eps: *eps, unit_offset: false, scale_first: false };
                self.normalised.clear();
                self.normalised.extend_from_slice(rows);
                for row in self.normalised.chunks_exact_mut(scale.len()) {
                    crate::experts::rms_norm(norm, scale, row);
                }
                &self.normalised
            }
        };
        self.linear.forward(rows, tokens, logits);
        if let Some(bias) = &self.bias {
            for row in logits.chunks_exact_mut(bias.len()) {
                row.iter_mut().zip(bias).for_each(|(logit, bias)| *logit += bias);
            }
        }
    }
}
