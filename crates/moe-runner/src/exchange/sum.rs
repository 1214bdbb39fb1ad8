//! Whether a sum is complete, as a type: a part of it on every rank, or all of it on each.

use crate::Result;
use crate::comm::{At, Communicator};

/// This rank's part of a sum over the tensor-parallel group.
#[derive(Debug)]
#[must_use = "a partial sum is not the layer's output; reduce it or hand it on as partial"]
pub struct Partial(Vec<f32>);

/// A complete sum.
#[derive(Debug)]
#[must_use]
pub struct Reduced(Vec<f32>);

/// A sum whose state is known when it is made: by the exchange that combined it.
#[derive(Debug)]
#[must_use]
pub enum Sum {
    /// Each rank holds a part.
    Partial(Partial),
    /// Complete.
    Reduced(Reduced),
}

/// What an exchange's combine leaves to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completeness {
    /// The ranks of the tensor-parallel group hold parts of the sum.
    Partial,
    /// The sum is complete on this rank.
    Complete,
}

impl Partial {
    /// Declares `values` this rank's part.
    pub fn new(values: Vec<f32>) -> Self {
        Self(values)
    }

    /// Adds the parts of all ranks of `group`.
    ///
    /// # Errors
    /// A rank that does not arrive.
    pub fn reduce(mut self, group: &dyn Communicator, at: At<'_>) -> Result<Reduced> {
        if group.size() > 1 {
            group.all_reduce(at, &mut self.0)?;
        }
        Ok(Reduced(self.0))
    }

    /// The part.
    pub fn into_values(self) -> Vec<f32> {
        self.0
    }
}

impl Reduced {
    /// Declares `values` complete.
    pub fn new(values: Vec<f32>) -> Self {
        Self(values)
    }

    /// The sum.
    pub fn into_values(self) -> Vec<f32> {
        self.0
    }
}

impl Sum {
    /// `values` in the state that an exchange reported.
    pub fn new(values: Vec<f32>, completeness: Completeness) -> Self {
        match completeness {
            Completeness::Partial => Self::Partial(Partial(values)),
            Completeness::Complete => Self::Reduced(Reduced(values)),
        }
    }

    /// The complete sum, reducing it over `group` if it is not complete yet.
    ///
    /// # Errors
    /// A rank that does not arrive.
    pub fn reduce(self, group: &dyn Communicator, at: At<'_>) -> Result<Reduced> {
        match self {
            Self::Partial(part) => part.reduce(group, at),
            Self::Reduced(sum) => Ok(sum),
        }
    }

    /// The values, whatever their state: for steps that act on each rank's part alike.
    pub fn values_mut(&mut self) -> &mut Vec<f32> {
        match self {
            Self::Partial(Partial(values)) | Self::Reduced(Reduced(values)) => values,
        }
    }

    /// True for a complete sum.
    pub fn is_reduced(&self) -> bool {
        matches!(self, Self::Reduced(_))
    }
}
