//! Opening a checkpoint, and choosing among its layers.

use std::ops::RangeInclusive;
use std::path::Path;

use anyhow::Result;
use moe_runner::Error;
use moe_runner::checkpoint::architecture::{self, Description, LayerEntry};
use moe_runner::checkpoint::{Checkpoint, Container, Seen};
use moe_runner::hidden::ActivationDtype;
use moe_runner::spec::WeightFormat;
use moe_runner::weights::LoadedLayer;

use crate::choice::LayerChoice;
use crate::failure::unusable;

/// A checkpoint that is open, with its MoE layers.
pub(crate) struct Opened {
    pub(crate) checkpoint: Checkpoint,
    pub(crate) description: Description,
    pub(crate) layers: Vec<LayerEntry>,
}

impl Opened {
    /// Opens a checkpoint, and finds its MoE layers; there must be some.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        Self::of(path, Checkpoint::open(path)?)
    }

    fn of(path: &Path, checkpoint: Checkpoint) -> Result<Self> {
        let description = architecture::describe(&checkpoint)?;
        let layers = architecture::layers(&checkpoint)?;
        if layers.is_empty() {
            // experts that no layer of the configuration has say more than that there is none
            if let Some(error) = architecture::overlooked(&checkpoint)?.into_iter().next() {
                return Err(error.into());
            }
            return Err(Error::file(
                path,
                format!("is a '{}' model without MoE layers", description.architecture),
            )
            .into());
        }
        Ok(Self { checkpoint, description, layers })
    }

    /// As [`open`](Self::open), by headers alone: nothing that tensors hold is read, and before the
    /// files are fetched, `config.json`, and an index beside it, will do.
    pub(crate) fn open_outline(path: &Path) -> Result<Self> {
        Self::of(path, Checkpoint::open_outline(path)?)
    }

    /// What was not there to look at, in a sentence; `None` where the files were.
    pub(crate) fn unseen(&self) -> Option<&'static str> {
        match self.checkpoint.seen() {
            Seen::Files => None,
            Seen::Index => Some(
                "from config.json and the index, before the files are there: shapes and number \
                 formats are as configured; the rest of the model, and what is in the files, is \
                 not known",
            ),
            Seen::Config => Some(
                "from config.json alone, before the files are there: shapes and number formats are \
                 as configured; the names of tensors, the rest of the model, and what is in the \
                 files, is not known",
            ),
        }
    }

    /// The chosen layers, in the model's order.
    pub(crate) fn select(&self, choice: &LayerChoice) -> Result<Vec<&LayerEntry>> {
        let LayerChoice::Some(wanted) = choice else { return Ok(self.layers.iter().collect()) };
        let none_in = |range: &&RangeInclusive<usize>| {
            !self.layers.iter().any(|entry| range.contains(&entry.spec.index))
        };
        if let Some(unknown) = wanted.iter().find(none_in) {
            let indices: Vec<usize> = self.layers.iter().map(|entry| entry.spec.index).collect();
            let (first, last) = (unknown.start(), unknown.end());
            let what = match first == last {
                true => format!("layer {first} is no MoE layer of"),
                false => format!("layers {first}-{last}: none is an MoE layer of"),
            };
            return Err(unusable(format!(
                "{what} {}; those are {}",
                self.checkpoint.path().display(),
                ranges(&indices)
            )));
        }
        let chosen = |entry: &&LayerEntry| wanted.iter().any(|r| r.contains(&entry.spec.index));
        Ok(self.layers.iter().filter(chosen).collect())
    }

    /// Dtype of a layer's activations: the one that was named, or, for `auto`, f32 in a GGUF file
    /// (which knows no dtype of activations), else the one that the experts' weights are stored in,
    /// and bf16 where that is no dtype of activations.
    pub(crate) fn dtype(
        &self,
        named: Option<ActivationDtype>,
        layer: &LoadedLayer,
    ) -> ActivationDtype {
        let stored = layer.experts.first().map(|expert| expert.up.format());
        named.unwrap_or(match (self.checkpoint.container(), stored) {
            (Container::Gguf, _) | (_, Some(WeightFormat::F32)) => ActivationDtype::F32,
            (_, Some(WeightFormat::F16)) => ActivationDtype::F16,
            _ => ActivationDtype::Bf16,
        })
    }

    /// A layer with its weights.
    pub(crate) fn load(&self, entry: &LayerEntry) -> Result<LoadedLayer> {
        Ok(LoadedLayer::load(&self.checkpoint, entry)?)
    }
}

/// Sorted numbers as people write them: `0-3, 5`.
pub(crate) fn ranges(numbers: &[usize]) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for &n in numbers {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == n => *last = n,
            _ => runs.push((n, n)),
        }
    }
    let runs = runs.into_iter().map(|(first, last)| match last - first {
        0 => first.to_string(),
        _ => format!("{first}-{last}"),
    });
    runs.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_short() {
        assert_eq!(ranges(&[]), "");
        assert_eq!(ranges(&[0, 2]), "0, 2");
        assert_eq!(ranges(&[1, 2, 3, 5, 7, 8]), "1-3, 5, 7-8");
    }
}
