//! The dense branch that every token takes beside the routed experts: its experts, its gate, its
//! norms, and when it runs.

use crate::experts::{ExpertCall, Experts, RowMax, dot_f64, rms_norm};
use crate::plan::Plan;
use crate::router::LocalId;
use crate::spec::{RmsNorm, SharedCombine, SharedSpec, sigmoid};
use crate::weights::SharedWeights;
use crate::{Error, Result};

/// When the shared experts run in a forward pass. The values do not depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SharedOrder {
    /// There are none.
    None,
    /// Before the routed experts, on the same thread.
    NoOverlap,
    /// While the combine of the routed experts is under way.
    DuringCombine,
    /// On a second thread, from before the gate until after the experts.
    SecondThread,
}

/// A point of the forward pass where shared experts may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// Rows are dispatched, experts have not started.
    BeforeExperts,
    /// The routed results are on their way back.
    DuringCombine,
}

impl SharedOrder {
    /// True if the shared experts run at `point`.
    pub fn runs_at(self, point: Point) -> bool {
        match self {
            Self::None | Self::SecondThread => false,
            Self::NoOverlap => point == Point::BeforeExperts,
            Self::DuringCombine => point == Point::DuringCombine,
        }
    }
}

/// The dense branch, ready to run.
#[derive(Debug)]
pub struct SharedExperts {
    spec: SharedSpec,
    experts: Box<dyn Experts>,
    gate: Option<Vec<f32>>,
    input_norm: Option<(RmsNorm, Vec<f32>)>,
    output_norm: Option<(RmsNorm, Vec<f32>)>,
    hidden: usize,
    plan: Plan,
    ids: Vec<LocalId>,
    weights: Vec<f32>,
    rows: Vec<f32>,
    slots: Vec<f32>,
}

impl SharedExperts {
    /// The branch with its packed experts (one for each of `spec.count`).
    pub fn new(spec: SharedSpec, weights: &SharedWeights, experts: Box<dyn Experts>) -> Self {
        let norm = |spec: Option<RmsNorm>, weight: &Option<Vec<f32>>| spec.zip(weight.clone());
        Self {
            gate: weights.gate.clone(),
            input_norm: norm(spec.input_norm, &weights.input_norm),
            output_norm: norm(spec.output_norm, &weights.output_norm),
            hidden: weights.experts.first().map_or(0, |expert| expert.up.cols()),
            spec,
            experts,
            plan: Plan::default(),
            ids: Vec::new(),
            weights: Vec::new(),
            rows: Vec::new(),
            slots: Vec::new(),
        }
    }

    /// What the branch is.
    pub fn spec(&self) -> &SharedSpec {
        &self.spec
    }

    /// Bytes of weights read for any number of tokens but zero.
    pub fn weight_bytes(&self) -> usize {
        self.experts.weight_bytes(&self.plan)
    }

    /// Bytes of scratch memory for `tokens` tokens.
    pub fn workspace_bytes(&self, tokens: usize) -> usize {
        let slots = tokens * self.spec.count;
        let row = self.experts.padded_width(self.hidden) * size_of::<f32>();
        self.experts.workspace_bytes(slots) + (slots + tokens) * row
    }

    /// Writes the branch's output for `rows` `[T, H]` to `out` `[T, H]`: with its gate, but without
    /// its output norm, which needs the complete sum ([`Self::finish`]). `router_weights` `[T, S]`
    /// weigh the shared experts where the router does so. `row_max`: see [`ExpertCall`].
    ///
    /// # Errors
    /// As the kernel's; missing router weights are refused.
    pub fn forward(
        &mut self,
        rows: &[f32],
        router_weights: &[f32],
        out: &mut [f32],
        row_max: Option<RowMax<'_>>,
    ) -> Result<()> {
        let (hidden, count) = (self.hidden, self.spec.count);
        let tokens = rows.len() / hidden.max(1);
        let weighted = self.spec.combine == SharedCombine::RouterWeighted;
        if weighted && router_weights.len() != tokens * count {
            return Err(Error::input(
                "shared experts",
                format!("{} weights for {tokens} tokens of {count}", router_weights.len()),
            ));
        }
        let stride = self.experts.padded_width(hidden);
        self.rows.clear();
        self.rows.resize(tokens * stride, 0.0);
        for (to, from) in self.rows.chunks_exact_mut(stride).zip(rows.chunks_exact(hidden)) {
            to[..hidden].copy_from_slice(from);
            if let Some((norm, weight)) = &self.input_norm {
                rms_norm(*norm, weight, &mut to[..hidden]);
            }
        }
        self.ids.clear();
        self.ids.extend((0..tokens).flat_map(|_| (0..count as u32).map(LocalId)));
        self.weights.clear();
        self.weights.resize(tokens * count, 1.0);
        self.plan.build(&self.ids, count, count);
        self.slots.resize(tokens * count * stride, 0.0);
        self.experts.forward(ExpertCall {
            rows: &self.rows,
            stride,
            plan: &self.plan,
            weights: &self.weights,
            out: &mut self.slots,
            quantised: false,
            row_max,
        })?;
        for (t, out) in out.chunks_exact_mut(hidden).enumerate() {
            out.fill(0.0);
            let slots = self.slots.chunks_exact(stride).enumerate().skip(t * count).take(count);
            for (slot, values) in slots {
                let weight = if weighted { router_weights[slot] } else { 1.0 };
                for (out, v) in out.iter_mut().zip(values) {
                    *out += weight * v;
                }
            }
            if let Some(gate) = &self.gate {
                let logit = dot_f64(gate, &rows[t * hidden..(t + 1) * hidden]);
                let factor = sigmoid(logit) as f32;
                out.iter_mut().for_each(|v| *v *= factor);
            }
        }
        Ok(())
    }

    /// True if the output is normalised: [`Self::finish`] then needs the complete sum over ranks.
    pub fn finishes(&self) -> bool {
        self.output_norm.is_some()
    }

    /// Applies the output norm to complete rows `[T, H]`, where there is one.
    pub fn finish(&self, out: &mut [f32]) {
        if let Some((norm, weight)) = &self.output_norm {
            out.chunks_exact_mut(self.hidden).for_each(|row| rms_norm(*norm, weight, row));
        }
    }
}
