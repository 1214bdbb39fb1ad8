//! The transforms around the routed experts (latent projections, norms), ready to run.

use std::sync::Arc;

use moe_kernels::arena::Arena;
use moe_kernels::isa::Features;
use moe_kernels::pool::ThreadPool;
use moe_kernels::region::{for_each, rows_together};

use crate::experts::cpu::Linear;
use crate::experts::rms_norm;
use crate::spec::{RmsNorm, Transform, TransformStep};
use crate::weights::StepWeights;
use crate::{Error, Result};

/// A [`Transform`] with its weights.
#[derive(Clone, Debug, Default)]
pub(crate) struct TransformOp {
    steps: Vec<Step>,
    linear: bool,
}

#[derive(Clone, Debug)]
enum Step {
    Linear(Arc<Linear>),
    RmsNorm(RmsNorm, Arc<[f32]>),
}

impl TransformOp {
    pub(crate) fn new(
        spec: &Transform,
        weights: &[StepWeights],
        features: Features,
        threads: usize,
    ) -> Result<Self> {
        if spec.steps.len() != weights.len() {
            return Err(Error::input("transform", "its steps and its weights differ in number"));
        }
        let steps = spec.steps.iter().zip(weights).map(|(step, weights)| match (step, weights) {
            (TransformStep::Linear { .. }, StepWeights::Linear(matrix)) => {
                Ok(Step::Linear(Arc::new(Linear::new(matrix, features, threads)?)))
            }
            (TransformStep::RmsNorm(norm), StepWeights::RmsNorm(weight)) => {
                Ok(Step::RmsNorm(*norm, weight.clone().into()))
            }
            _ => Err(Error::input("transform", "a step and its weights are of different kinds")),
        });
        Ok(Self { steps: steps.collect::<Result<_>>()?, linear: spec.is_linear() })
    }

    pub(crate) fn is_linear(&self) -> bool {
        self.linear
    }

    /// Nothing is done.
    pub(crate) fn is_identity(&self) -> bool {
        self.steps.is_empty()
    }

    /// Floats of each of the two buffers that [`apply`](Self::apply) needs for `tokens` rows of
    /// `width` columns.
    pub(crate) fn buffers(&self, tokens: usize, width: usize) -> [usize; 2] {
        let mut lens = [0; 2];
        let mut width = width;
        for (i, step) in self.steps.iter().enumerate() {
            if let Step::Linear(linear) = step {
                width = linear.rows();
            }
            lens[i % 2] = lens[i % 2].max(tokens * width);
        }
        lens
    }

    /// Bytes of scratch for `tokens` rows on `threads` threads.
    pub(crate) fn scratch_bytes(&self, tokens: usize, threads: usize) -> usize {
        let bytes = self.steps.iter().map(|step| match step {
            Step::Linear(linear) => linear.scratch_bytes(tokens, threads),
            Step::RmsNorm(..) => 0,
        });
        bytes.max().unwrap_or(0)
    }

    /// The rows `[T, width]`, transformed, in one of `buffers`; `None` where nothing is done to them.
    pub(crate) fn apply<'a>(
        &self,
        rows: &[f32],
        tokens: usize,
        buffers: [&'a mut [f32]; 2],
        pool: &dyn ThreadPool,
        scratch: &mut Arena,
    ) -> Option<&'a mut [f32]> {
        let [mut to, mut other] = buffers;
        for (i, step) in self.steps.iter().enumerate() {
            // what the step before wrote is in `other`
            let from = if i == 0 { rows } else { &*other };
            let len = match step {
                Step::Linear(linear) => {
                    let len = tokens * linear.rows();
                    let cols = tokens * linear.cols();
                    linear.forward(&from[..cols], tokens, &mut to[..len], pool, scratch);
                    len
                }
                Step::RmsNorm(norm, weight) => {
                    let (width, len) = (weight.len(), tokens * weight.len());
                    let together = rows_together(tokens, width * size_of::<f32>(), pool.threads());
                    let parts = to[..len].chunks_mut(together * width);
                    for_each(pool, parts.zip(from.chunks(together * width)), |(to, from)| {
                        to.copy_from_slice(&from[..to.len()]);
                        to.chunks_exact_mut(width).for_each(|row| rms_norm(*norm, weight, row));
                    });
                    len
                }
            };
            if i + 1 == self.steps.len() {
                return Some(&mut std::mem::take(&mut to)[..len]);
            }
            std::mem::swap(&mut to, &mut other);
        }
        None
    }
}
