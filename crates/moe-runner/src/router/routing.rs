//! What routing yields, in buffers that are used again by the next call.

use super::LogicalId;
use super::scratch::Scratch;
use crate::spec::RouterSpec;
use crate::{Error, Result};

/// The chosen experts and weights of T tokens.
///
/// A call of [`Router::route`](super::Router::route) resizes and overwrites the buffers; once they
/// have grown to the largest T, no call allocates.
#[derive(Clone, Debug, Default)]
pub struct Routing {
    /// T.
    pub tokens: usize,
    /// k.
    pub top_k: usize,
    /// `[T, k]`: the chosen experts; those at or above the number of experts with weights are
    /// identity or skip experts. Best first (hash tables: as the table has them).
    pub ids: Vec<LogicalId>,
    /// `[T, k]`: final weights: renormalised, scaled.
    pub weights: Vec<f32>,
    /// `[T, S]`: weights of the shared experts under a joint softmax; empty without one.
    pub shared_weights: Vec<f32>,
    /// One for each thread.
    pub(super) scratch: Vec<Scratch>,
}

/// Some tokens' rows of a [`Routing`].
pub(super) struct Part<'a> {
    /// The first of the tokens.
    pub(super) first: usize,
    pub(super) ids: &'a mut [LogicalId],
    pub(super) weights: &'a mut [f32],
    pub(super) shared_weights: &'a mut [f32],
}

/// Takes the first `len` elements off.
fn split<'a, T>(rest: &mut &'a mut [T], len: usize) -> &'a mut [T] {
    let (taken, left) = std::mem::take(rest).split_at_mut(len);
    *rest = left;
    taken
}

impl Routing {
    /// Empty, for a router to fill.
    pub fn new() -> Self {
        Self::default()
    }

    /// Routing that was decided elsewhere: `ids` and `weights` are `[T, k]`.
    ///
    /// # Errors
    /// If the lengths do not fit `top_k` or each other.
    pub fn from_parts(top_k: usize, ids: Vec<LogicalId>, weights: Vec<f32>) -> Result<Self> {
        if top_k == 0 || ids.len() != weights.len() || !ids.len().is_multiple_of(top_k) {
            return Err(Error::input(
                "routing",
                format!(
                    "{} ids and {} weights are not rows of top-k {top_k}",
                    ids.len(),
                    weights.len()
                ),
            ));
        }
        Ok(Self { tokens: ids.len() / top_k, top_k, ids, weights, ..Self::default() })
    }

    /// The k experts of a token.
    pub fn ids_of(&self, token: usize) -> &[LogicalId] {
        &self.ids[token * self.top_k..][..self.top_k]
    }

    /// The k weights of a token.
    pub fn weights_of(&self, token: usize) -> &[f32] {
        &self.weights[token * self.top_k..][..self.top_k]
    }

    /// Number of slots (token, j) that went to each of `choices` ids.
    ///
    /// # Panics
    /// If an id is not below `choices`.
    pub fn load(&self, choices: usize) -> Vec<usize> {
        let mut load = vec![0; choices];
        for id in &self.ids {
            load[id.index()] += 1;
        }
        load
    }

    /// Sizes the buffers; what they hold is left over from before.
    pub(super) fn resize(&mut self, tokens: usize, top_k: usize, shared: usize) {
        self.tokens = tokens;
        self.top_k = top_k;
        self.ids.resize(tokens * top_k, LogicalId(0));
        self.weights.resize(tokens * top_k, 0.0);
        self.shared_weights.resize(tokens * shared, 0.0);
    }

    /// Rows of `together` tokens, to be written one part apart from the other.
    pub(super) fn parts(&mut self, together: usize) -> impl Iterator<Item = Part<'_>> + Send {
        let (tokens, top_k) = (self.tokens, self.top_k);
        let shared = self.shared_weights.len() / tokens.max(1);
        let mut rest = (&mut *self.ids, &mut *self.weights, &mut *self.shared_weights);
        (0..tokens).step_by(together).map(move |first| {
            let len = together.min(tokens - first);
            Part {
                first,
                ids: split(&mut rest.0, len * top_k),
                weights: split(&mut rest.1, len * top_k),
                shared_weights: split(&mut rest.2, len * shared),
            }
        })
    }

    /// Bytes that the routing of `tokens` tokens to `top_k` experts takes, on `threads` threads.
    pub(crate) fn bytes(
        router: &RouterSpec,
        (tokens, top_k): (usize, usize),
        threads: usize,
    ) -> usize {
        let shared = router.logits() - router.choices();
        let scratch = size_of::<Scratch>() + Scratch::lens(router).iter().sum::<usize>() * 8;
        tokens * (top_k * 8 + shared * 4) + threads * scratch
    }

    /// One scratch for each thread, as large as `router` needs.
    pub(super) fn take_scratch(&mut self, router: &RouterSpec, threads: usize) -> Vec<Scratch> {
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.reserve_exact(threads.saturating_sub(scratch.len()));
        scratch.resize_with(threads.max(scratch.len()), Scratch::default);
        scratch.iter_mut().for_each(|scratch| scratch.reserve(router));
        scratch
    }

    /// No tokens: what a failed call leaves.
    pub(super) fn clear(&mut self) {
        self.resize(0, self.top_k, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::Routing;
    use crate::router::{Router, RouterTensors};
    use crate::spec::{GroupFill, GroupScore, Groups, RouterSpec, WeightFrom};

    /// Capacities of all buffers.
    fn capacities(routing: &Routing) -> [usize; 10] {
        let scratch = &routing.scratch[0];
        [
            routing.ids.capacity(),
            routing.weights.capacity(),
            routing.shared_weights.capacity(),
            scratch.logits.capacity(),
            scratch.scores.capacity(),
            scratch.choice.capacity(),
            scratch.ratings.capacity(),
            scratch.kept.capacity(),
            scratch.chosen.capacity(),
            scratch.weights.capacity(),
        ]
    }

    #[test]
    fn a_second_call_allocates_nothing() {
        let groups =
            Groups { count: 4, keep: 2, score: GroupScore::Max, fill: GroupFill::NegativeInfinity };
        let spec = RouterSpec {
            groups: Some(groups),
            weight_from: WeightFrom::JointSoftmax { shared: 2 },
            ..RouterSpec::softmax(16, 4, true)
        };
        let router = Router::new(spec, 1.0, RouterTensors::default()).unwrap();
        let mut routing = Routing::new();
        router.route(&[0.5; 9 * 18], None, 9, &mut routing).unwrap();
        let before = capacities(&routing);
        for tokens in [2, 0, 9] {
            router.route(&vec![0.5; tokens * 18], None, tokens, &mut routing).unwrap();
            assert_eq!(capacities(&routing), before);
        }
    }
}
