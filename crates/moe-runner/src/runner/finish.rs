//! Everything after the experts: reductions, scaling, output transform, the sum of the branches,
//! output steps, identity experts.

use moe_kernels::arena::Arena;
use moe_kernels::pool::ThreadPool;
use moe_kernels::region::{for_each, rows_together};

use super::{ForwardOutput, MoeRunner, Report};
use crate::Result;
use crate::comm::{At, Step};
use crate::exchange::{Partial, Sum};
use crate::experts::rms_norm;
use crate::hidden::RowsMut;
use crate::router::Routing;
use crate::spec::{IdleExperts, LayerSpec, RouterSpec, SharedCombine};

/// Both branches, and what they are finished with.
pub(super) struct Branches<'a> {
    pub(super) tokens: usize,
    /// `[T, routed_hidden]`: what the routed experts saw.
    pub(super) rows: &'a [f32],
    pub(super) routing: &'a Routing,
    pub(super) routed: Sum<'a>,
    /// `[T, H]`: the shared experts' output, where there are any.
    pub(super) shared: Option<&'a mut [f32]>,
    /// Buffers of the output transform.
    pub(super) finished: [&'a mut [f32]; 2],
    pub(super) scratch: &'a mut Arena,
}

impl MoeRunner {
    /// Writes the output.
    pub(super) fn finish(
        &self,
        spec: &LayerSpec,
        branches: Branches<'_>,
        output: RowsMut<'_>,
        report: Option<&mut Report>,
    ) -> Result<ForwardOutput> {
        let Branches { tokens, rows, routing, routed, shared, finished, scratch } = branches;
        let group = &*self.group;
        let at = |step| At { layer: &spec.name, step };
        let (layer, pool) = (&self.layer, &*self.layer.pool);
        let reduces = group.size() > 1;
        let regions = Regions { pool, tokens };

        // 1. a transform that does not commute with the sum over ranks needs the complete sum
        let mut routed = match layer.output_transform.is_linear() {
            true => routed,
            false => Sum::Reduced(routed.reduce(group, at(Step::ReduceRouted), pool)?),
        };
        // 2. the shared branch: a part of the sum on every rank, as the routed one would be
        let mut shared = match (&layer.shared, shared) {
            (Some(experts), Some(rows)) => {
                let part = Partial::new(rows);
                let mut sum = match routed.is_reduced() || experts.finishes() || !reduces {
                    true => Sum::Reduced(part.reduce(group, at(Step::ReduceShared), pool)?),
                    false => Sum::Partial(part),
                };
                experts.finish(sum.values_mut(), pool);
                Some(sum)
            }
            _ => None,
        };
        if let Some(report) = report {
            report.shared_complete = shared.as_ref().is_none_or(Sum::is_reduced);
            report.shared = shared.as_mut().map(|sum| {
                let mut rows = report.shared.take().unwrap_or_default();
                rows.clear();
                rows.extend_from_slice(sum.values_mut());
                rows
            });
        }
        // 3. the scaling factor, once
        let scaling = layer.scaling(shared.is_some());
        if scaling.routed != 1.0 {
            regions.rows(routed.values_mut(), |_, row| multiply(row, scaling.routed));
        }
        // 4. the output transform
        let mut routed = routed.map(|rows| {
            let transform = &layer.output_transform;
            match transform.is_identity() {
                true => rows,
                false => transform.apply(rows, tokens, finished, pool, scratch).unwrap_or(rows),
            }
        });
        // 5. the branches become one; only sums of the same state can be added
        let mut sum = match shared {
            None => routed,
            Some(mut shared) => {
                if routed.is_reduced() != shared.is_reduced() {
                    routed = Sum::Reduced(routed.reduce(group, at(Step::ReduceRouted), pool)?);
                    shared = Sum::Reduced(shared.reduce(group, at(Step::ReduceShared), pool)?);
                }
                let combine = spec.shared.as_ref().map(|shared| shared.combine);
                let (width, shared) = (spec.dims.hidden, &*shared.values_mut());
                regions.rows(routed.values_mut(), |t, row| {
                    for (y, s) in row.iter_mut().zip(&shared[t * width..]) {
                        *y += scaling.shared * s;
                    }
                    if combine == Some(SharedCombine::Average) {
                        multiply(row, 0.5);
                    }
                });
                routed
            }
        };
        // 6. the final reduction, unless the caller does it and nothing here needs it
        let identity = matches!(spec.router.idle, Some(IdleExperts::Identity { .. }));
        if self.reduce_results || identity || !layer.linear_output() || !reduces {
            sum = Sum::Reduced(sum.reduce(group, at(Step::ReduceOutput), pool)?);
        }
        // 7. what is done to the sum of both branches; identity experts, from this rank's own rows
        //    after every reduction; and out
        let complete = sum.is_reduced();
        let bias = layer.output.bias.as_deref();
        let norm = spec.output.norm.zip(layer.output.norm.as_deref());
        let width = spec.dims.hidden;
        let together = regions.together(width);
        let parts = sum.values_mut().chunks_mut(together * width);
        let parts = parts.zip(output.chunks(together * width)).enumerate();
        for_each(pool, parts, |(part, (values, mut output))| {
            for (t, row) in (part * together..).zip(values.chunks_exact_mut(width)) {
                if let Some(bias) = bias {
                    row.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
                }
                if let Some((norm, weight)) = norm {
                    rms_norm(norm, weight, row);
                }
                if spec.output.multiplier != 1.0 {
                    multiply(row, spec.output.multiplier);
                }
                if identity {
                    add_identity(routing, &spec.router, t, rows, row);
                }
            }
            output.write(values);
        });
        Ok(ForwardOutput { tokens, output_scale: scaling.output, complete })
    }
}

/// Parallel regions over the rows of a pass.
struct Regions<'a> {
    pool: &'a dyn ThreadPool,
    tokens: usize,
}

impl Regions<'_> {
    fn together(&self, width: usize) -> usize {
        rows_together(self.tokens, width * size_of::<f32>(), self.pool.threads())
    }

    /// Calls `work(t, row)` for every row of `values`.
    fn rows(&self, values: &mut [f32], work: impl Fn(usize, &mut [f32]) + Sync) {
        let Some(width) = values.len().checked_div(self.tokens) else { return };
        let together = self.together(width);
        let parts = values.chunks_mut(together * width).enumerate();
        for_each(self.pool, parts, |(part, rows)| {
            for (t, row) in (part * together..).zip(rows.chunks_exact_mut(width)) {
                work(t, row);
            }
        });
    }
}

/// `y += x[t] · Σ w` over the token's choices of identity experts.
fn add_identity(routing: &Routing, router: &RouterSpec, t: usize, rows: &[f32], y: &mut [f32]) {
    let identity = router.experts..router.choices();
    let chosen = routing.ids_of(t).iter().zip(routing.weights_of(t));
    let weight: f32 =
        chosen.filter(|(id, _)| identity.contains(&id.index())).map(|(_, w)| *w).sum();
    let width = y.len();
    y.iter_mut().zip(&rows[t * width..]).for_each(|(y, x)| *y += weight * x);
}

fn multiply(values: &mut [f32], factor: f32) {
    values.iter_mut().for_each(|v| *v *= factor);
}
