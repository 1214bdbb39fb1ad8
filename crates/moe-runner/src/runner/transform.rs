//! The transforms around the routed experts (latent projections, norms), ready to run.

use std::sync::Arc;

use moe_kernels::isa::Isa;

use crate::experts::cpu::{Linear, SharedPool};
use crate::experts::rms_norm;
use crate::spec::{RmsNorm, Transform, TransformStep};
use crate::weights::StepWeights;
use crate::{Error, Result};

/// A [`Transform`] with its weights.
#[derive(Clone, Debug, Default)]
pub(crate) struct TransformOp {
    steps: Vec<Step>,
    linear: bool,
    spare: Vec<f32>,
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
        isa: Isa,
        pool: &SharedPool,
    ) -> Result<Self> {
        if spec.steps.len() != weights.len() {
            return Err(Error::input("transform", "its steps and its weights differ in number"));
        }
        let steps = spec.steps.iter().zip(weights).map(|(step, weights)| match (step, weights) {
            (TransformStep::Linear { .. }, StepWeights::Linear(matrix)) => {
                Ok(Step::Linear(Arc::new(Linear::new(matrix, isa, pool.clone()))))
            }
            (TransformStep::RmsNorm(norm), StepWeights::RmsNorm(weight)) => {
                Ok(Step::RmsNorm(*norm, weight.clone().into()))
            }
            _ => Err(Error::input("transform", "a step and its weights are of different kinds")),
        });
        Ok(Self {
            steps: steps.collect::<Result<_>>()?,
            linear: spec.is_linear(),
            spare: Vec::new(),
        })
    }

    pub(crate) fn is_linear(&self) -> bool {
        self.linear
    }

    /// Replaces rows `[T, width]` by their transform.
    pub(crate) fn apply(&mut self, rows: &mut Vec<f32>, tokens: usize) {
        if tokens == 0 {
            return;
        }
        for step in &self.steps {
            match step {
                Step::Linear(linear) => {
                    self.spare.clear();
                    self.spare.resize(tokens * linear.rows(), 0.0);
                    linear.forward(rows, tokens, &mut self.spare);
                    std::mem::swap(rows, &mut self.spare);
                }
                Step::RmsNorm(norm, weight) => {
                    rows.chunks_exact_mut(weight.len())
                        .for_each(|row| rms_norm(*norm, weight, row));
                }
            }
        }
    }
}
