//! Working memory of forward passes: one for all layers that run one after another.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use moe_kernels::arena::Arena;
use moe_kernels::pool::Pool;

use crate::plan::Plan;
use crate::router::{LocalId, Routing};
use crate::shared_experts::SharedWork;
use crate::{Error, Result};

/// What one pass works in. It grows to the largest need of the layers that use it, and stays there.
#[derive(Debug, Default)]
pub(super) struct Workspace {
    /// Rows of this rank.
    pub(super) rows: Arena,
    /// Scratch of the routed experts and of the projections around them.
    pub(super) experts: Arena,
    /// One for each micro-batch.
    pub(super) lanes: Vec<Lane>,
    pub(super) routing: Routing,
    pub(super) shared: SharedWork,
    companion: Option<Companion>,
}

/// What one micro-batch keeps between its steps.
#[derive(Debug, Default)]
pub(super) struct Lane {
    pub(super) plan: Plan,
    /// The experts' rows.
    pub(super) slots: Arena,
}

/// A second thread beside the caller's, kept from pass to pass.
pub(super) struct Companion(pub(super) Pool);

impl std::fmt::Debug for Companion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a second thread")
    }
}

impl Workspace {
    /// Starts the second thread, unless it runs already, and gives it away for one pass.
    pub(super) fn take_companion(&mut self) -> Result<Companion> {
        match self.companion.take() {
            Some(companion) => Ok(companion),
            None => Pool::new(2).map(Companion).map_err(|source| Error::Io {
                path: "the shared experts' thread".into(),
                action: "start",
                source,
            }),
        }
    }

    /// Takes the second thread back.
    pub(super) fn keep(&mut self, companion: Companion) {
        self.companion = Some(companion);
    }

    /// Makes sure of `count` lanes.
    pub(super) fn lanes(lanes: &mut Vec<Lane>, count: usize) -> &mut [Lane] {
        lanes.reserve_exact(count.saturating_sub(lanes.len()));
        lanes.resize_with(count.max(lanes.len()), Lane::default);
        &mut lanes[..count]
    }

    /// Bytes beside the arenas, plans and ids, with `lanes` lanes; an exchange has as many.
    pub(super) fn own_bytes(lanes: usize) -> usize {
        size_of::<Self>() + lanes.max(4) * (size_of::<Lane>() + size_of::<Vec<LocalId>>())
    }

    fn bytes(&self) -> usize {
        let lanes = self.lanes.iter().map(|lane| lane.slots.bytes()).sum::<usize>();
        self.rows.bytes() + self.experts.bytes() + lanes + self.shared.bytes()
    }
}

/// The working memory that runners share: as many workspaces as there ever were passes at one time.
/// Layers that run one after another have one between them, as large as the largest need.
///
/// Cloning shares it.
#[derive(Clone, Debug, Default)]
pub struct Workspaces(Arc<Mutex<Vec<Workspace>>>);

impl Workspaces {
    /// Empty, shared with no other runner yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The one of this process: what [`Options`](super::Options) hold unless told otherwise.
    pub fn of_process() -> Self {
        static ALL: OnceLock<Workspaces> = OnceLock::new();
        ALL.get_or_init(Self::new).clone()
    }

    /// Bytes that are held now, but for ids, weights and plans.
    pub fn bytes(&self) -> usize {
        self.lock().iter().map(|workspace| workspace.bytes()).sum()
    }

    /// Frees what no pass is using.
    pub fn clear(&self) {
        self.lock().clear();
    }

    /// A workspace for one pass: the smallest that has `bytes`, or else the largest.
    pub(super) fn take(&self, bytes: usize) -> Workspace {
        let mut free = self.lock();
        let fit = |workspace: &Workspace| {
            let held = workspace.bytes();
            if held >= bytes { (0, held) } else { (1, usize::MAX - held) }
        };
        match (0..free.len()).min_by_key(|i| fit(&free[*i])) {
            Some(best) => free.swap_remove(best),
            None => Workspace::default(),
        }
    }

    /// Takes a workspace back.
    pub(super) fn give(&self, workspace: Workspace) {
        let mut free = self.lock();
        free.reserve_exact(1);
        free.push(workspace);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Workspace>> {
        // every change is a single call: what a panic leaves is whole
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_that_fits_or_the_largest() {
        let spaces = Workspaces::new();
        for bytes in [256, 1024, 64] {
            let mut space = Workspace::default();
            space.rows.reserve(bytes);
            spaces.give(space);
        }
        assert_eq!(spaces.bytes(), 1344);
        assert_eq!(spaces.take(100).bytes(), 256);
        assert_eq!(spaces.take(2000).bytes(), 1024);
        assert_eq!(spaces.take(0).bytes(), 64);
        assert_eq!(spaces.take(64).bytes(), 0);
    }
}
