//! The dense branch that every token takes beside the routed experts: its experts, its gate, its
//! norms, and when it runs.

use moe_kernels::arena::{Arena, room};
use moe_kernels::pool::ThreadPool;
use moe_kernels::region::{for_each, rows_together};

use crate::experts::{ExpertCall, Experts, KernelDesc, RowMax, dot_f64, rms_norm};
use crate::plan::Plan;
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
}

/// Working memory of the branch, kept from pass to pass.
#[derive(Debug, Default)]
pub struct SharedWork {
    plan: Plan,
    rows: Arena,
    scratch: Arena,
}

impl SharedWork {
    /// Bytes that the arenas hold.
    pub(crate) fn bytes(&self) -> usize {
        self.rows.bytes() + self.scratch.bytes()
    }
}

/// What the branch computes, of the rows `[T, H]`.
pub struct SharedRows<'a> {
    /// `[T, H]`.
    pub rows: &'a [f32],
    /// `[T, S]`: weights of the shared experts, where the router gives them some.
    pub router_weights: &'a [f32],
    /// `[T, H]`, overwritten.
    pub out: &'a mut [f32],
    /// See [`ExpertCall`].
    pub row_max: Option<RowMax<'a>>,
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
        }
    }

    /// What the branch is.
    pub fn spec(&self) -> &SharedSpec {
        &self.spec
    }

    /// What computes the experts.
    pub fn kernel(&self) -> &'static KernelDesc {
        self.experts.desc()
    }

    /// The same branch on another kernel; the old one is returned.
    pub(crate) fn replace_kernel(&mut self, experts: Box<dyn Experts>) -> Box<dyn Experts> {
        std::mem::replace(&mut self.experts, experts)
    }

    /// Bytes of weights read for any number of tokens but zero.
    pub fn weight_bytes(&self) -> usize {
        let mut plan = Plan::default();
        // one row has a slot at each
        match plan.build_dense(1, self.spec.count) {
            Ok(()) => self.experts.weight_bytes(&plan),
            Err(_) => 0,
        }
    }

    /// Bytes of working memory for `tokens` tokens on `threads` threads.
    pub fn workspace_bytes(&self, tokens: usize, threads: usize) -> usize {
        let slots = tokens * self.spec.count;
        self.rows_bytes(tokens)
            + self.experts.scratch_bytes(slots, threads)
            + Plan::bytes(slots, self.spec.count)
    }

    /// Rows after the input norm, weights, and the experts' rows.
    fn rows_bytes(&self, tokens: usize) -> usize {
        let slots = tokens * self.spec.count;
        let normed = if self.input_norm.is_some() { tokens * self.hidden } else { 0 };
        room::<f32>(normed) + room::<f32>(slots) + room::<f32>(slots * self.hidden)
    }

    /// Writes the branch's output: with its gate, but without its output norm, which needs the
    /// complete sum ([`Self::finish`]).
    ///
    /// # Errors
    /// As the kernel's; missing router weights are refused.
    pub fn forward(
        &self,
        call: SharedRows<'_>,
        pool: &dyn ThreadPool,
        work: &mut SharedWork,
    ) -> Result<()> {
        let SharedRows { rows, router_weights, out, row_max } = call;
        let (hidden, count) = (self.hidden, self.spec.count);
        let tokens = rows.len() / hidden.max(1);
        let weighted = self.spec.combine == SharedCombine::RouterWeighted;
        if weighted && router_weights.len() != tokens * count {
            return Err(Error::input(
                "shared experts",
                format!("{} weights for {tokens} tokens of {count}", router_weights.len()),
            ));
        }
        let SharedWork { plan, rows: arena, scratch } = work;
        plan.build_dense(tokens, count)?;
        arena.reserve(self.rows_bytes(tokens));
        let mut cut = arena.cut();
        let together = rows_together(tokens, hidden * size_of::<f32>(), pool.threads());
        let input = match &self.input_norm {
            None => rows,
            Some((norm, weight)) => {
                let normed = cut.floats(tokens * hidden);
                let parts = normed.chunks_mut(together * hidden);
                for_each(pool, parts.zip(rows.chunks(together * hidden)), |(to, from)| {
                    to.copy_from_slice(from);
                    to.chunks_exact_mut(hidden).for_each(|row| rms_norm(*norm, weight, row));
                });
                normed
            }
        };
        let ones = cut.floats(tokens * count);
        ones.fill(1.0);
        let slots = cut.floats(tokens * count * hidden);
        self.experts.forward(ExpertCall {
            rows: input,
            plan,
            weights: ones,
            out: slots,
            quantised: false,
            row_max,
            pool,
            arena: scratch,
        })?;
        let slots = &*slots;
        for_each(pool, out.chunks_mut(together * hidden).enumerate(), |(part, outs)| {
            for (t, out) in (part * together..).zip(outs.chunks_exact_mut(hidden)) {
                out.fill(0.0);
                let of_row = t * count..(t + 1) * count;
                for (j, place) in plan.places()[of_row.clone()].iter().enumerate() {
                    let weight = if weighted { router_weights[of_row.start + j] } else { 1.0 };
                    let place = *place as usize;
                    for (out, v) in out.iter_mut().zip(&slots[place * hidden..][..hidden]) {
                        *out += weight * v;
                    }
                }
                if let Some(gate) = &self.gate {
                    let logit = dot_f64(gate, &rows[t * hidden..][..hidden]);
                    let factor = sigmoid(logit) as f32;
                    out.iter_mut().for_each(|v| *v *= factor);
                }
            }
        });
        Ok(())
    }

    /// True if the output is normalised: [`Self::finish`] then needs the complete sum over ranks.
    pub fn finishes(&self) -> bool {
        self.output_norm.is_some()
    }

    /// Applies the output norm to complete rows `[T, H]`, where there is one.
    pub fn finish(&self, out: &mut [f32], pool: &dyn ThreadPool) {
        let hidden = self.hidden;
        if let Some((norm, weight)) = &self.output_norm {
            let row_bytes = hidden * size_of::<f32>();
            let together = rows_together(out.len() / hidden, row_bytes, pool.threads());
            for_each(pool, out.chunks_mut(together * hidden), |rows| {
                rows.chunks_exact_mut(hidden).for_each(|row| rms_norm(*norm, weight, row));
            });
        }
    }
}
