//! Whether a sum is complete, as a type: a part of it on every rank, or all of it on each.

use moe_kernels::pool::ThreadPool;

use crate::Result;
use crate::comm::{At, Communicator};

/// This rank's part of a sum over the tensor-parallel group.
#[derive(Debug)]
#[must_use = "a partial sum is not the layer's output; reduce it or hand it on as partial"]
pub struct Partial<'a>(&'a mut [f32]);

/// A complete sum.
#[derive(Debug)]
#[must_use]
pub struct Reduced<'a>(&'a mut [f32]);

/// A sum whose state is known when it is made: by the exchange that combined it.
#[derive(Debug)]
#[must_use]
pub enum Sum<'a> {
    /// Each rank holds a part.
    Partial(Partial<'a>),
    /// Complete.
    Reduced(Reduced<'a>),
}

/// What an exchange's combine leaves to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completeness {
    /// The ranks of the tensor-parallel group hold parts of the sum.
    Partial,
    /// The sum is complete on this rank.
    Complete,
}

impl<'a> Partial<'a> {
    /// Declares `values` this rank's part.
    pub fn new(values: &'a mut [f32]) -> Self {
        Self(values)
    }

    /// Adds the parts of all ranks of `group`, on the threads of `pool`.
    ///
    /// # Errors
    /// A rank that does not arrive.
    pub fn reduce(
        self,
        group: &dyn Communicator,
        at: At<'_>,
        pool: &dyn ThreadPool,
    ) -> Result<Reduced<'a>> {
        if group.size() > 1 {
            group.all_reduce_on(at, self.0, pool)?;
        }
        Ok(Reduced(self.0))
    }
}

impl<'a> Reduced<'a> {
    /// Declares `values` complete.
    pub fn new(values: &'a mut [f32]) -> Self {
        Self(values)
    }

    /// The sum.
    pub fn into_values(self) -> &'a mut [f32] {
        self.0
    }
}

impl<'a> Sum<'a> {
    /// `values` in the state that an exchange reported.
    pub fn new(values: &'a mut [f32], completeness: Completeness) -> Self {
        match completeness {
            Completeness::Partial => Self::Partial(Partial(values)),
            Completeness::Complete => Self::Reduced(Reduced(values)),
        }
    }

    /// The complete sum, reducing it over `group` if it is not complete yet, on the threads of
    /// `pool`.
    ///
    /// # Errors
    /// A rank that does not arrive.
    pub fn reduce(
        self,
        group: &dyn Communicator,
        at: At<'_>,
        pool: &dyn ThreadPool,
    ) -> Result<Reduced<'a>> {
        match self {
            Self::Partial(part) => part.reduce(group, at, pool),
            Self::Reduced(sum) => Ok(sum),
        }
    }

    /// The values, whatever their state: for steps that act on each rank's part alike.
    pub fn values_mut(&mut self) -> &mut [f32] {
        match self {
            Self::Partial(Partial(values)) | Self::Reduced(Reduced(values)) => values,
        }
    }

    /// What a step that acts on each rank's part alike makes of the values: a sum in the same state.
    pub fn map(self, step: impl FnOnce(&'a mut [f32]) -> &'a mut [f32]) -> Self {
        match self {
            Self::Partial(Partial(values)) => Self::Partial(Partial(step(values))),
            Self::Reduced(Reduced(values)) => Self::Reduced(Reduced(step(values))),
        }
    }

    /// True for a complete sum.
    pub fn is_reduced(&self) -> bool {
        matches!(self, Self::Reduced(_))
    }
}
