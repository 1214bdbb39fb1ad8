//! The device's memory of a pass, cut from one arena.

use moe_cuda::{Cut, ViewMut};

use crate::experts::cuda::layer::{CudaLayer, Experts, Step};
use crate::spec::Selection;

/// Memory of a pass of T tokens with k slots each.
pub(super) struct Parts<'a> {
    /// `[T, H]` and `[T, H or routed_hidden]`: what came, in the layer's dtype.
    pub(super) rows: [ViewMut<'a, u8>; 2],
    /// The same as it came, and the output before it goes: for rows of the host.
    pub(super) staged: ViewMut<'a, u8>,
    pub(super) transformed: [ViewMut<'a, f32>; 2],
    pub(super) finished: [ViewMut<'a, f32>; 2],
    pub(super) routing: RoutingParts<'a>,
    pub(super) routed: ViewMut<'a, f32>,
    pub(super) slots: Slots<'a>,
    pub(super) shared: Option<SharedParts<'a>>,
}

/// What the gate and the router read and write.
pub(super) struct RoutingParts<'a> {
    pub(super) normed: ViewMut<'a, f32>,
    pub(super) logits: ViewMut<'a, f32>,
    pub(super) token_ids: ViewMut<'a, u32>,
    pub(super) given_ids: ViewMut<'a, u32>,
    pub(super) ids: ViewMut<'a, u32>,
    pub(super) weights: ViewMut<'a, f32>,
    pub(super) shared_weights: ViewMut<'a, f32>,
}

/// Rows of the experts' slots: for products in f32.
pub(in crate::experts::cuda) struct Slots<'a> {
    /// `[slots, H]`: rows before the first product, where they are not the tokens' own.
    pub(in crate::experts::cuda) x: ViewMut<'a, f32>,
    /// `[slots, I]`: between the products.
    pub(in crate::experts::cuda) h: ViewMut<'a, f32>,
    /// `[slots, H]`: the experts' outputs.
    pub(in crate::experts::cuda) y: ViewMut<'a, f32>,
    /// `[T, H]`: the tokens' rows as Hopper's kernels read them, where they are not such.
    pub(in crate::experts::cuda) narrow: ViewMut<'a, u16>,
}

pub(super) struct SharedParts<'a> {
    pub(super) normed: ViewMut<'a, f32>,
    pub(super) ids: ViewMut<'a, u32>,
    /// Ones: weights for kernels that want some.
    pub(super) ones: ViewMut<'a, f32>,
    pub(super) slots: Slots<'a>,
    /// Before and after the norm of the output.
    pub(super) out: [ViewMut<'a, f32>; 2],
}

impl<'a> Slots<'a> {
    /// For `tokens` tokens of `top_k` slots.
    pub(in crate::experts::cuda) fn cut(
        cut: &mut Cut<'a>,
        experts: &Experts,
        tokens: usize,
        top_k: usize,
    ) -> Self {
        let (fast, gathered) = (experts.is_fast(), experts.quantise[0].is_some());
        let slots = if fast { 0 } else { tokens * top_k };
        Self {
            x: cut.take(if gathered { slots * experts.hidden() } else { 0 }),
            h: cut.take(slots * experts.intermediate()),
            y: cut.take(slots * experts.hidden()),
            narrow: cut.take(if fast { tokens * experts.hidden() } else { 0 }),
        }
    }
}

impl<'a> Parts<'a> {
    pub(super) fn cut(cut: &mut Cut<'a>, layer: &CudaLayer, tokens: usize, top_k: usize) -> Self {
        let (spec, slots) = (&layer.spec, tokens * top_k);
        let dims = spec.dims;
        let widest = dims.hidden.max(dims.routed_hidden);
        let router = &spec.router;
        let hash = matches!(router.selection, Selection::HashTable { .. });
        let jointly = router.logits() - router.choices();
        let buffers = |steps: &[Step], width: usize| {
            let mut lens = [0; 2];
            let mut width = width;
            for (i, step) in steps.iter().enumerate() {
                if let Step::Linear(linear) = step {
                    width = linear.features();
                }
                lens[i % 2] = lens[i % 2].max(tokens * width);
            }
            lens
        };
        let input = buffers(&layer.input_transform, dims.hidden);
        let output = buffers(&layer.output_transform, dims.routed_hidden);
        let normed = layer.gate.as_ref().is_some_and(|gate| gate.norm.is_some());
        Self {
            rows: [dims.hidden, widest].map(|width| cut.take(tokens * width * layer.dtype.size())),
            staged: cut.take(tokens * widest * size_of::<f32>()),
            transformed: input.map(|len| cut.take(len)),
            finished: output.map(|len| cut.take(len)),
            routing: RoutingParts {
                normed: cut.take(if normed { tokens * dims.hidden } else { 0 }),
                logits: cut.take(tokens * router.logits()),
                token_ids: cut.take(if hash { tokens } else { 0 }),
                given_ids: cut.take(slots),
                ids: cut.take(slots),
                weights: cut.take(slots),
                shared_weights: cut.take(tokens * jointly),
            },
            routed: cut.take(tokens * dims.routed_hidden),
            slots: Slots::cut(cut, &layer.experts, tokens, top_k),
            shared: layer.shared.as_ref().map(|shared| {
                let (slots, all) = (tokens * shared.spec.count, tokens * dims.hidden);
                SharedParts {
                    normed: cut.take(if shared.input_norm.is_some() { all } else { 0 }),
                    ids: cut.take(slots),
                    ones: cut.take(if shared.experts.is_fast() { slots } else { 0 }),
                    slots: Slots::cut(cut, &shared.experts, tokens, shared.spec.count),
                    out: [all, if shared.output_norm.is_some() { all } else { 0 }]
                        .map(|len| cut.take(len)),
                }
            }),
        }
    }
}
