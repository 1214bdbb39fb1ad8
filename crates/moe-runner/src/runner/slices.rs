//! Ranks with slices of the same experts, where the rows between the two products are quantised with
//! one scale for a whole row: they agree on each row's largest magnitude, so that the result is that
//! of one rank.

use std::sync::Arc;

use crate::Result;
use crate::comm::{At, Communicator, Step};

/// The ranks that hold slices of the same experts.
#[derive(Clone)]
pub(super) struct Slices {
    layer: Arc<str>,
    group: Arc<dyn Communicator>,
}

impl Slices {
    pub(super) fn new(layer: &str, group: Arc<dyn Communicator>) -> Self {
        Self { layer: layer.into(), group }
    }

    /// Replaces `max`, one value for each row, by the largest of all ranks.
    pub(super) fn row_max(&self, max: &mut [f32]) -> Result<()> {
        let at = At::new(&self.layer, Step::RowScales);
        let all = self.group.all_gather_in_place(at, &*max)?;
        for part in all.iter() {
            max.iter_mut().zip(part).for_each(|(max, other)| *max = max.max(*other));
        }
        Ok(())
    }
}
