//! What the routing of one token needs on its way.

use crate::spec::RouterSpec;

/// An id (of an expert or of a group) and the value it competes with.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Candidate {
    pub(super) choice: f32,
    pub(super) id: u32,
}

/// Working space for one token.
#[derive(Clone, Debug, Default)]
pub(super) struct Scratch {
    /// `[E_total]`: multiplied, capped.
    pub(super) logits: Vec<f64>,
    /// `[choices]`, without the bias.
    pub(super) scores: Vec<f64>,
    /// `[choices]`: what ids are chosen by.
    pub(super) choice: Vec<f32>,
    /// `[groups]`.
    pub(super) ratings: Vec<f32>,
    /// The groups that stay.
    pub(super) kept: Vec<Candidate>,
    /// `[k]`.
    pub(super) chosen: Vec<Candidate>,
    /// `[k + S]`.
    pub(super) weights: Vec<f64>,
}

impl Scratch {
    /// Elements of the buffers, in the order of the fields.
    pub(super) fn lens(router: &RouterSpec) -> [usize; 7] {
        let groups = router.groups.map_or((0, 0), |groups| (groups.count, groups.keep));
        let (logits, choices, k) = (router.logits(), router.choices(), router.top_k);
        [logits, choices, choices, groups.0, groups.1, k, k + logits - choices]
    }

    /// Which thread meets which row is left to chance: all buffers get their size at once.
    pub(super) fn reserve(&mut self, router: &RouterSpec) {
        let lens = Self::lens(router);
        let Self { logits, scores, choice, ratings, kept, chosen, weights } = self;
        for (buffer, len) in [logits, scores, weights].into_iter().zip([lens[0], lens[1], lens[6]])
        {
            buffer.clear();
            buffer.reserve_exact(len);
        }
        for (buffer, len) in [choice, ratings].into_iter().zip([lens[2], lens[3]]) {
            buffer.clear();
            buffer.reserve_exact(len);
        }
        for (buffer, len) in [kept, chosen].into_iter().zip([lens[4], lens[5]]) {
            buffer.clear();
            buffer.reserve_exact(len);
        }
    }

    /// Takes ids as they are, whatever their choice value.
    pub(super) fn force(&mut self, ids: impl Iterator<Item = u32>) {
        self.chosen.clear();
        self.chosen.extend(ids.map(|id| Candidate { choice: 0.0, id }));
    }
}
