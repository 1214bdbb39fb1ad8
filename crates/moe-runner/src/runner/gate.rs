//! The gate, ready to run: `logits = norm(x)·Wgᵀ + b`, in f32 whatever the activation dtype.

use moe_kernels::arena::Arena;
use moe_kernels::isa::Features;
use moe_kernels::pool::ThreadPool;
use moe_kernels::region::{for_each, rows_together};

use crate::Result;
use crate::experts::cpu::Linear;
use crate::experts::rms_norm;
use crate::spec::{GateSpec, RmsNorm};
use crate::weights::GateWeights;

/// The gate with its weights.
#[derive(Debug)]
pub(crate) struct Gate {
    linear: Linear,
    bias: Option<Vec<f32>>,
    /// ε, and scale · H^-1/2 (gemma4).
    input_norm: Option<(RmsNorm, Vec<f32>)>,
}

impl Gate {
    pub(crate) fn new(
        spec: GateSpec,
        weights: &GateWeights,
        features: Features,
        threads: usize,
    ) -> Result<Self> {
        let root = (weights.weight.cols() as f64).sqrt();
        let scale = weights
            .input_scale
            .as_ref()
            .map(|scale| scale.iter().map(|v| (f64::from(*v) / root) as f32).collect());
        let norm = |eps| RmsNorm { eps, unit_offset: false, scale_first: false };
        Ok(Self {
            linear: Linear::new(&weights.weight, features, threads)?,
            bias: weights.bias.clone(),
            input_norm: spec.scaled_rms_eps.map(norm).zip(scale),
        })
    }

    /// Floats that the rows of `tokens` tokens need beside the logits.
    pub(crate) fn normed_len(&self, tokens: usize) -> usize {
        self.input_norm.as_ref().map_or(0, |(_, scale)| tokens * scale.len())
    }

    /// Bytes of scratch for `tokens` rows on `threads` threads.
    pub(crate) fn scratch_bytes(&self, tokens: usize, threads: usize) -> usize {
        self.linear.scratch_bytes(tokens, threads)
    }

    /// Writes the logits `[T, E_total]` of `rows` `[T, H]`. `normed` is
    /// [`normed_len`](Self::normed_len) long.
    pub(crate) fn forward(
        &self,
        rows: &[f32],
        normed: &mut [f32],
        logits: &mut [f32],
        pool: &dyn ThreadPool,
        scratch: &mut Arena,
    ) {
        let tokens = logits.len() / self.linear.rows();
        let rows = match &self.input_norm {
            None => rows,
            Some((norm, scale)) => {
                let width = scale.len();
                let together = rows_together(tokens, width * size_of::<f32>(), pool.threads());
                let parts = normed.chunks_mut(together * width);
                for_each(pool, parts.zip(rows.chunks(together * width)), |(to, from)| {
                    to.copy_from_slice(from);
                    to.chunks_exact_mut(width).for_each(|row| rms_norm(*norm, scale, row));
                });
                normed
            }
        };
        self.linear.forward(rows, tokens, logits, pool, scratch);
        if let Some(bias) = &self.bias {
            let together = rows_together(tokens, bias.len() * size_of::<f32>(), pool.threads());
            for_each(pool, logits.chunks_mut(together * bias.len()), |rows| {
                for row in rows.chunks_exact_mut(bias.len()) {
                    row.iter_mut().zip(bias).for_each(|(logit, bias)| *logit += bias);
                }
            });
        }
    }
}
