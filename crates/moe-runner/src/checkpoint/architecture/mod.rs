//! The table of architectures: which tensors of a checkpoint make up which MoE layer, and what
//! the layer computes.
//!
//! A row (`row::Architecture`) is data: values of `model_type`, config keys, the rule for which
//! decoder layers are MoE, names of tensors, and one value for each option of
//! [`LayerSpec`]. Rows are grouped by kind of router: `softmax`, `chosen`, `sigmoid`,
//! `ungrouped`; `refused` names what does not fit and why. A new architecture is a few lines in one of them.

mod build;
mod chosen;
mod classes;
mod gguf;
mod refused;
mod row;
mod rules;
mod settings;
mod sigmoid;
mod softmax;
mod tensors;
mod ungrouped;
pub(super) mod variants;

pub use tensors::{
    ExpertTensors, Experts, Form, LayerTensors, Part, Projection, SharedTensors, Stack,
    StepTensors, VectorPart,
};

use super::{Checkpoint, Config, Seen};
use crate::spec::LayerSpec;
use crate::{Error, Result};
use build::{Model, Resolver};
use classes::Class;
use row::Architecture;
use settings::Settings;

/// One MoE layer of a checkpoint: what it is, and where its weights stand.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerEntry {
    /// What it is.
    pub spec: LayerSpec,
    /// Where its weights stand.
    pub tensors: LayerTensors,
}

/// What kind of model a checkpoint is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// `model_type`, or GGUF's `general.architecture`.
    pub architecture: String,
    /// Number of decoder layers, MoE or not.
    pub decoder_layers: usize,
}

/// All MoE layers of a checkpoint, in order.
///
/// # Errors
/// [`Error::Config`] with the key that is absent, unusable, or names an architecture that is
/// unknown or does not fit (with the reason); [`Error::Spec`] if a layer's options contradict
/// each other. No tensor is read.
pub fn layers(checkpoint: &Checkpoint) -> Result<Vec<LayerEntry>> {
    let index = TensorNames::new(checkpoint);
    let resolver = Resolver { checkpoint, index: &index };
    match checkpoint.metadata() {
        Some(metadata) => gguf::layers(metadata, &resolver),
        None => {
            let (row, settings) = identify(checkpoint)?;
            Model { row, settings, resolver }.layers()
        }
    }
}

/// What is wrong with the layers that [`layers`] does not list: experts in one that the
/// configuration calls dense, and layers without any feed-forward. Each error names the layer.
/// Nothing, where the files are not there to look at.
///
/// # Errors
/// As [`layers`].
pub fn overlooked(checkpoint: &Checkpoint) -> Result<Vec<Error>> {
    if checkpoint.seen() != Seen::Files {
        return Ok(Vec::new());
    }
    let index = TensorNames::new(checkpoint);
    let resolver = Resolver { checkpoint, index: &index };
    match checkpoint.metadata() {
        Some(metadata) => gguf::overlooked(metadata, &resolver),
        None => {
            let (row, settings) = identify(checkpoint)?;
            Model { row, settings, resolver }.overlooked()
        }
    }
}

/// The architecture's name and the number of decoder layers.
///
/// # Errors
/// As [`layers`].
pub fn describe(checkpoint: &Checkpoint) -> Result<Description> {
    if let Some(metadata) = checkpoint.metadata() {
        return gguf::describe(metadata);
    }
    let (row, settings) = identify(checkpoint)?;
    let name = match checkpoint.config() {
        Some(config) => config.str("model_type")?,
        None => None,
    };
    let name = name.unwrap_or(row.model_types[0]);
    Ok(Description { architecture: name.to_string(), decoder_layers: settings.layers })
}

/// Names of the model types that are understood, row by row.
pub fn known() -> impl Iterator<Item = &'static str> {
    rows().flat_map(|row| row.model_types.iter().copied())
}

/// Model types that are known not to fit the options of a layer, with the reason.
pub fn refused() -> impl Iterator<Item = (&'static str, &'static str)> {
    refused::all()
}

/// Names of the architectures of GGUF files that are understood.
pub fn known_in_gguf() -> impl Iterator<Item = &'static str> {
    gguf::known()
}

/// Architectures of GGUF files that are known not to fit the options of a layer, with the reason.
pub fn refused_in_gguf() -> impl Iterator<Item = (&'static str, &'static str)> {
    gguf::refused()
}

fn rows() -> impl Iterator<Item = &'static Architecture> {
    [softmax::ROWS, chosen::ROWS, sigmoid::ROWS, ungrouped::ROWS].into_iter().flatten()
}

/// Where the text part of a model's config may stand.
const TEXT_CONFIGS: [&str; 5] =
    ["text_config", "thinker_config.text_config", "language_config", "llm_config", "llm"];

/// The row and the text part of the config.
fn identify(checkpoint: &Checkpoint) -> Result<(&'static Architecture, Settings)> {
    let config =
        checkpoint.config().ok_or_else(|| Error::file(checkpoint.path(), "has no config.json"))?;
    let mut text = None;
    for key in TEXT_CONFIGS {
        if text.is_none() {
            text = config.sub(key)?;
        }
    }
    let row = match &text {
        Some(text) => match find(text)? {
            Some(row) => Some(row),
            None => find(config)?,
        },
        None => find(config)?,
    };
    let row = row.ok_or_else(|| unknown(config))?;
    let class = class(config, text.as_ref(), row)?;
    let text = text.unwrap_or_else(|| config.clone());
    Ok((row, Settings::new(text, class, row.layers)?))
}

/// The configuration class of a model: by the type of its text part, by its own, by the row's.
fn class(config: &Config, text: Option<&Config>, row: &Architecture) -> Result<&'static Class> {
    let own =
        [text.map(|text| text.str("model_type")).transpose()?, Some(config.str("model_type")?)];
    let types = own.into_iter().flatten().flatten().chain(row.model_types.iter().copied());
    let recorded = types.into_iter().find(|name| Class::is_recorded(name));
    Ok(recorded.map_or_else(|| Class::of(""), Class::of))
}

/// The row for one level of a config.
fn find(config: &Config) -> Result<Option<&'static Architecture>> {
    let model_type = config.str("model_type")?;
    let classes = config.str_list("architectures")?.unwrap_or_default();
    refused::check(config, model_type)?;
    let by_type = rows().find(|row| model_type.is_some_and(|t| row.model_types.contains(&t)));
    Ok(by_type.or_else(|| rows().find(|row| row.classes.iter().any(|c| classes.contains(c)))))
}

fn unknown(config: &Config) -> Error {
    let reason = match config.get("model_type") {
        None => "is missing: it is what tells which model this is".to_string(),
        Some(name) => not_known(&name.to_string(), known()),
    };
    config.error("model_type", reason)
}

/// Says that `name`, in quotes, is none of the `known` ones, and which are most like it.
fn not_known<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> String {
    const NEAREST: usize = 5;
    // a file may hold a name of any length, and distances take its time
    let asked: String = name.trim_matches('"').chars().take(64).collect();
    let asked = asked.to_lowercase();
    let mut known: Vec<(usize, &str)> =
        known.map(|known| (strsim::levenshtein(&asked, known), known)).collect();
    known.sort();
    let nearest: Vec<&str> = known.iter().take(NEAREST).map(|(_, name)| *name).collect();
    format!(
        "is {name}: no such mixture-of-experts architecture is known; of {} that are, the nearest by \
         name are {}",
        known.len(),
        nearest.join(", ")
    )
}

/// The names of a checkpoint's tensors, sorted: answers which ones begin with something.
pub(super) struct TensorNames<'a> {
    names: Vec<&'a str>,
}

impl<'a> TensorNames<'a> {
    pub(crate) fn new(checkpoint: &'a Checkpoint) -> Self {
        let mut names: Vec<&str> = checkpoint.names().collect();
        names.sort_unstable();
        Self { names }
    }

    /// All names that begin with `prefix`.
    pub(crate) fn below(&self, prefix: &str) -> &[&'a str] {
        let first = self.names.partition_point(|name| *name < prefix);
        let rest = &self.names[first..];
        &rest[..rest.partition_point(|name| name.starts_with(prefix))]
    }

    /// Whether any name begins with `prefix`.
    pub(crate) fn any_below(&self, prefix: &str) -> bool {
        !self.below(prefix).is_empty()
    }
}
