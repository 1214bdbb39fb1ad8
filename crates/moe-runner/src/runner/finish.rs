//! Everything after the experts: reductions, scaling, output transform, the sum of the branches,
//! output steps, identity experts.

use super::{MoeRunner, scale::scaling};
use crate::Result;
use crate::comm::{At, Step};
use crate::exchange::{Partial, Sum};
use crate::experts::rms_norm;
use crate::hidden::RowsMut;
use crate::router::Routing;
use crate::spec::{IdleExperts, LayerSpec, SharedCombine};

/// What is known of a written output.
pub(super) struct Finished {
    /// The true output is the written one times this.
    pub(super) output_scale: f32,
    /// The written output is the sum over all ranks.
    pub(super) complete: bool,
    /// So was the shared experts' output when it was added.
    pub(super) shared_complete: bool,
}

impl MoeRunner {
    /// Writes the output of `tokens` rows.
    pub(super) fn finish(
        &mut self,
        spec: &LayerSpec,
        tokens: usize,
        routed: Sum,
        shared: Vec<f32>,
        output: &mut RowsMut<'_>,
    ) -> Result<Finished> {
        let group = self.group.clone();
        let at = |step| At { layer: &spec.name, step };
        let layer = &mut self.layer;
        let reduces = group.size() > 1;

        // 1. a transform that does not commute with the sum over ranks needs the complete sum
        let mut routed = match layer.output_transform.is_linear() {
            true => routed,
            false => Sum::Reduced(routed.reduce(&*group, at(Step::ReduceRouted))?),
        };
        // 2. the shared branch: a part of the sum on every rank, as the routed one would be
        let mut shared = match &layer.shared {
            None => None,
            Some(experts) => {
                let part = Partial::new(shared);
                let mut sum = match routed.is_reduced() || experts.finishes() || !reduces {
                    true => Sum::Reduced(part.reduce(&*group, at(Step::ReduceShared))?),
                    false => Sum::Partial(part),
                };
                experts.finish(sum.values_mut());
                Some(sum)
            }
        };
        let shared_complete = shared.as_ref().is_none_or(Sum::is_reduced);
        self.buffers.shared_seen.clear();
        if let Some(shared) = &mut shared {
            self.buffers.shared_seen.extend_from_slice(shared.values_mut());
        }
        // 3. the scaling factor, once
        let linear_output = !spec.output.bias && spec.output.norm.is_none();
        let scaling = scaling(spec.routed_scale, layer.dtype, shared.is_some(), linear_output);
        multiply(routed.values_mut(), scaling.routed);
        // 4. the output transform
        layer.output_transform.apply(routed.values_mut(), tokens);
        // 5. the branches become one; only sums of the same state can be added
        let mut sum = match shared {
            None => routed,
            Some(mut shared) => {
                multiply(shared.values_mut(), scaling.shared);
                if routed.is_reduced() != shared.is_reduced() {
                    routed = Sum::Reduced(routed.reduce(&*group, at(Step::ReduceRouted))?);
                    shared = Sum::Reduced(shared.reduce(&*group, at(Step::ReduceShared))?);
                }
                let values = routed.values_mut();
                values.iter_mut().zip(shared.values_mut()).for_each(|(y, s)| *y += *s);
                if spec.shared.as_ref().is_some_and(|s| s.combine == SharedCombine::Average) {
                    multiply(values, 0.5);
                }
                self.buffers.shared = std::mem::take(shared.values_mut());
                routed
            }
        };
        // 6. the final reduction, unless the caller does it and nothing here needs it
        let identity = matches!(spec.router.idle, Some(IdleExperts::Identity { .. }));
        if self.reduce_results || identity || !linear_output || !reduces {
            sum = Sum::Reduced(sum.reduce(&*group, at(Step::ReduceOutput))?);
        }
        // 7. what is done to the sum of both branches
        let values = sum.values_mut();
        if let Some(bias) = &layer.output.bias {
            for row in values.chunks_exact_mut(bias.len()) {
                row.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
            }
        }
        if let Some((norm, weight)) = spec.output.norm.zip(layer.output.norm.as_ref()) {
            values.chunks_exact_mut(weight.len()).for_each(|row| rms_norm(norm, weight, row));
        }
        multiply(values, spec.output.multiplier);
        // 8. identity experts: from this rank's own rows, after every reduction
        if identity {
            add_identity(&self.routing, spec.router.experts, &self.buffers.rows, values);
        }
        output.write(values);
        let complete = sum.is_reduced();
        self.buffers.routed = std::mem::take(sum.values_mut());
        Ok(Finished { output_scale: scaling.output, complete, shared_complete })
    }
}

/// `y[t] += x[t] · Σ w` over the token's choices of identity experts.
fn add_identity(routing: &Routing, experts: usize, rows: &[f32], out: &mut [f32]) {
    let Some(width) = rows.len().checked_div(routing.tokens) else { return };
    for (t, (x, y)) in rows.chunks_exact(width).zip(out.chunks_exact_mut(width)).enumerate() {
        let chosen = routing.ids_of(t).iter().zip(routing.weights_of(t));
        let weight: f32 = chosen.filter(|(id, _)| id.index() >= experts).map(|(_, w)| *w).sum();
        y.iter_mut().zip(x).for_each(|(y, x)| *y += weight * x);
    }
}

fn multiply(values: &mut [f32], factor: f32) {
    if factor != 1.0 {
        values.iter_mut().for_each(|v| *v *= factor);
    }
}
