//! Opening a checkpoint, and choosing among its layers.

use std::path::Path;
use std::str::FromStr;

use anyhow::Result;
use moe_runner::Error;
use moe_runner::checkpoint::architecture::{self, Description, LayerEntry};
use moe_runner::checkpoint::{Checkpoint, Container};
use moe_runner::hidden::ActivationDtype;
use moe_runner::spec::WeightFormat;
use moe_runner::weights::LoadedLayer;

use crate::args::Common;
use crate::failure::unusable;

/// Which layers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum LayerChoice {
    /// Every MoE layer.
    All,
    /// These decoder layers, by their index in the model.
    Some(Vec<usize>),
}

impl FromStr for LayerChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "all" {
            return Ok(Self::All);
        }
        let indices = text.split(',').map(|index| index.trim().parse());
        let indices = indices.collect::<Result<Vec<usize>, _>>();
        indices.map(Self::Some).map_err(|_| "layers are 'all' or numbers".into())
    }
}

/// A checkpoint that is open, with its MoE layers.
pub(crate) struct Opened {
    pub(crate) checkpoint: Checkpoint,
    pub(crate) description: Description,
    pub(crate) layers: Vec<LayerEntry>,
}

impl Opened {
    /// Opens a checkpoint, and finds its MoE layers; there must be some.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let checkpoint = Checkpoint::open(path)?;
        let description = architecture::describe(&checkpoint)?;
        let layers = architecture::layers(&checkpoint)?;
        if layers.is_empty() {
            return Err(Error::file(
                path,
                format!("is a '{}' model without MoE layers", description.architecture),
            )
            .into());
        }
        Ok(Self { checkpoint, description, layers })
    }

    /// The chosen layers, in the model's order.
    pub(crate) fn select(&self, choice: &LayerChoice) -> Result<Vec<&LayerEntry>> {
        let LayerChoice::Some(wanted) = choice else { return Ok(self.layers.iter().collect()) };
        let has = |index: usize| self.layers.iter().any(|entry| entry.spec.index == index);
        if let Some(unknown) = wanted.iter().find(|index| !has(**index)) {
            let indices: Vec<usize> = self.layers.iter().map(|entry| entry.spec.index).collect();
            return Err(unusable(format!(
                "layer {unknown} is no MoE layer of {}; those are {}",
                self.checkpoint.path().display(),
                ranges(&indices)
            )));
        }
        Ok(self.layers.iter().filter(|entry| wanted.contains(&entry.spec.index)).collect())
    }

    /// Dtype of a layer's activations: the one that was named, or, for `auto`, f32 in a GGUF file
    /// (which knows no dtype of activations), else the one that the experts' weights are stored in,
    /// and bf16 where that is no dtype of activations.
    pub(crate) fn dtype(&self, common: &Common, layer: &LoadedLayer) -> ActivationDtype {
        let stored = layer.experts.first().map(|expert| expert.up.format());
        common.dtype.unwrap_or(match (self.checkpoint.container(), stored) {
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

    #[test]
    fn layer_choices() {
        assert_eq!("all".parse(), Ok(LayerChoice::All));
        assert_eq!("3,5".parse(), Ok(LayerChoice::Some(vec![3, 5])));
        for bad in ["", "x", "-1", "3,", "1.5", "99999999999999999999999"] {
            assert!(bad.parse::<LayerChoice>().is_err(), "{bad}");
        }
    }
}
