//! A model's runners, by the names that their layers have in the checkpoint.

use super::MoeRunner;
use crate::{Error, Result};

/// The MoE layers of a model. Names are unique; the order is that of insertion.
#[derive(Debug, Default)]
pub struct Model {
    runners: Vec<MoeRunner>,
}

/// How many near names an unknown one is answered with.
const NEAR: usize = 3;

impl Model {
    /// Without layers.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a layer under the name in its spec.
    ///
    /// # Errors
    /// [`Error::DuplicateLayer`] if the model has one of that name.
    pub fn insert(&mut self, runner: MoeRunner) -> Result<()> {
        let name = &runner.spec().name;
        if self.runners.iter().any(|other| other.spec().name == *name) {
            return Err(Error::DuplicateLayer { name: name.clone() });
        }
        self.runners.push(runner);
        Ok(())
    }

    /// The layers' names, in the model's order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.runners.iter().map(|runner| runner.spec().name.as_str())
    }

    /// The runner of the layer with this name.
    ///
    /// # Errors
    /// [`Error::UnknownLayer`] with the nearest names.
    pub fn get_layer_from_name(&mut self, name: &str) -> Result<&mut MoeRunner> {
        match self.runners.iter().position(|runner| runner.spec().name == name) {
            Some(index) => Ok(&mut self.runners[index]),
            None => Err(Error::UnknownLayer {
                name: name.to_owned(),
                near: near_names(name, self.names()),
            }),
        }
    }

    /// All runners, in the model's order.
    pub fn runners_mut(&mut self) -> impl Iterator<Item = &mut MoeRunner> {
        self.runners.iter_mut()
    }
}

/// The names closest to `name`, best first, by edit distance.
fn near_names<'a>(name: &str, names: impl Iterator<Item = &'a str>) -> Vec<String> {
    let mut rated: Vec<(usize, &str)> =
        names.map(|other| (strsim::levenshtein(name, other), other)).collect();
    rated.sort();
    rated.into_iter().take(NEAR).map(|(_, name)| name.to_owned()).collect()
}
