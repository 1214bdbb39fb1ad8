//! Recorded outputs: of a reference implementation, or of an earlier `run`.
//!
//! Two layouts are understood, for layer L:
//! - `layers.L.TAG.x` with `layers.L.TAG.out` (or `.out_fakequant`, taken where activations are
//!   quantised), `.topk_ids`, `.topk_weights`, for any number of TAGs;
//! - what `run` writes: `layers.L.output`, or `output` for a single layer, with `topk_ids` and
//!   `topk_weights`. The hidden states come from the file itself (`hidden_states`) or from
//!   `--input`.
//!
//! Layers that route by token id find those beside the hidden states, as `input_ids`, or in `--input`;
//! layers without a gate of their own find `router_logits` there.

use std::path::Path;

use anyhow::{Result, bail};
use moe_runner::checkpoint::architecture::LayerEntry;
use moe_runner::checkpoint::{Checkpoint, Tensor};
use moe_runner::hidden::ActivationDtype;
use moe_runner::spec::{ActivationFormat, LayerSpec, Selection};
use moe_runner::weights::LoadedLayer;
use serde::Serialize;

use super::compare::{Errors, Forward, Worst, largest, within};
use crate::input::{Input, LayerInput, floats, token_ids};
use crate::routing::weight_factor;

/// The recordings themselves are of f32 arithmetic.
const F32_RECORDING: f64 = 1e-10;

/// Weights agree within this.
const WEIGHTS_BOUND: f64 = 1e-5;

/// One recorded batch, compared.
#[derive(Serialize)]
pub(crate) struct Comparison {
    /// The recording's tag, or "output".
    pub(super) name: String,
    pub(super) tokens: usize,
    pub(super) nmse: f64,
    pub(super) bound: f64,
    /// `None` where no ids were recorded.
    pub(super) ids_equal: Option<bool>,
    pub(super) weights_max_difference: Option<f64>,
    pub(super) worst_token: Option<Worst>,
    /// The expert that most of the error comes from; `None` where it comes from several, or from
    /// something else.
    pub(super) worst_expert: Option<Worst>,
    pub(super) ok: bool,
}

impl Comparison {
    /// What is wrong, in a sentence.
    pub(super) fn problem(&self) -> String {
        let name = &self.name;
        match (self.ids_equal, self.weights_max_difference) {
            (Some(false), _) => format!("recorded {name}: other experts"),
            (_, Some(difference)) if !within(difference, WEIGHTS_BOUND) => {
                format!("recorded {name}: weights differ by {difference:.1e}")
            }
            _ => {
                let token = self.worst_token.map(|worst| format!("; worst: token {}", worst.index));
                let expert = self.worst_expert.map(|worst| format!(", expert {}", worst.index));
                format!(
                    "recorded {name}: NMSE {:.1e}, at most {:.0e}{}{}",
                    self.nmse,
                    self.bound,
                    token.unwrap_or_default(),
                    expert.unwrap_or_default()
                )
            }
        }
    }
}

/// A file of recorded outputs.
pub(crate) struct Recorded {
    file: Checkpoint,
    /// Names may lack the layer's prefix.
    single: bool,
}

impl Recorded {
    pub(crate) fn open(path: &Path, single: bool) -> Result<Self> {
        Ok(Self { file: Checkpoint::open_safetensors(path)?, single })
    }

    /// Refuses a file without a recording of any of the layers.
    pub(crate) fn ensure_any_of(&self, layers: &[&LayerEntry]) -> Result<()> {
        let output = |layer: usize| self.file.contains(&format!("layers.{layer}.output"));
        let any = layers
            .iter()
            .map(|entry| entry.spec.index)
            .any(|layer| output(layer) || self.tags(layer).next().is_some());
        if any || (self.single && self.file.contains("output")) {
            return Ok(());
        }
        bail!(
            "{}: no recorded output of a checked layer; it should hold layers.N.TAG.x and \
             layers.N.TAG.out, or what `run` writes (of one layer: name it with --layers)",
            self.file.path().display()
        )
    }

    /// The tags that batches of a layer are recorded under.
    fn tags(&self, layer: usize) -> impl Iterator<Item = String> {
        let prefix = format!("layers.{layer}.");
        self.file.names().filter_map(move |name| {
            let tag = name.strip_prefix(&prefix)?.strip_suffix(".x")?;
            self.file.contains(&format!("{prefix}{tag}.out")).then(|| tag.to_owned())
        })
    }

    /// What is recorded of a layer. `input` holds the hidden states of outputs that stand alone.
    pub(super) fn of_layer(
        &self,
        layer: &LoadedLayer,
        dtype: ActivationDtype,
        input: Option<&Input>,
    ) -> Result<Vec<Recording>> {
        let spec = &layer.spec;
        let recording = |name: &str, input: LayerInput, out: Tensor, prefix: &str| {
            let at = |name: &str| self.file.tensor(&format!("{prefix}{name}"));
            let (ids, weights) = (at("topk_ids")?, at("topk_weights")?);
            // rounding an input that is not exact would be a difference of the inputs
            let exact = !input.hidden.iter().all(|v| dtype.round(*v) == *v || v.is_nan());
            let name = if exact { format!("{name} (in f32)") } else { name.to_owned() };
            let routing = ids.zip(weights);
            Ok::<_, anyhow::Error>(Recording { name, input, exact, out, routing })
        };
        let mut recordings = Vec::new();
        let prefix = format!("layers.{}.", spec.index);
        let quantised = layer
            .experts
            .iter()
            .any(|expert| expert.up.input.format() != ActivationFormat::Unquantised);
        for tag in self.tags(spec.index) {
            let prefix = format!("{prefix}{tag}.");
            let hidden = self.file.require(&format!("{prefix}x"))?;
            let out = match self.file.tensor(&format!("{prefix}out_fakequant"))? {
                Some(out) if quantised => out,
                _ => self.file.require(&format!("{prefix}out"))?,
            };
            let input = self.beside(hidden_alone(&hidden, spec)?, layer, &[&prefix], input)?;
            recordings.push(recording(&tag, input, out, &prefix)?);
        }
        let plain = if self.single { "" } else { prefix.as_str() };
        for prefix in [prefix.as_str(), plain] {
            let Some(out) = self.file.tensor(&format!("{prefix}output"))? else { continue };
            let hidden = match self.file.tensor(&format!("{prefix}hidden_states"))? {
                Some(hidden) => Some(hidden),
                None => self.file.tensor("hidden_states")?,
            };
            let mut input = match (hidden, input) {
                (Some(hidden), _) => {
                    self.beside(hidden_alone(&hidden, spec)?, layer, &[prefix, ""], input)?
                }
                (None, Some(input)) => input.layer(spec, dtype)?,
                (None, None) => bail!(
                    "{}: holds outputs without their hidden states; name those with --input",
                    self.file.path().display()
                ),
            };
            // `run` rounded what it was given, and so does this
            input.hidden.iter_mut().for_each(|v| *v = dtype.round(*v));
            recordings.push(recording("output", input, out, prefix)?);
            break;
        }
        Ok(recordings)
    }

    /// `recorded` with what else its routing depends on: under one of the prefixes, or in `--input`.
    fn beside(
        &self,
        mut recorded: LayerInput,
        layer: &LoadedLayer,
        prefixes: &[&str],
        input: Option<&Input>,
    ) -> Result<LayerInput> {
        let spec = &layer.spec;
        let find = |name: &str| {
            let found = prefixes.iter().map(|prefix| self.file.tensor(&format!("{prefix}{name}")));
            found.collect::<Result<Vec<_>, _>>().map(|all| all.into_iter().flatten().next())
        };
        if matches!(spec.router.selection, Selection::HashTable { .. }) {
            recorded.input_ids = match (find("input_ids")?, input) {
                (Some(ids), _) => Some(token_ids(&ids, recorded.tokens)?),
                (None, Some(input)) => input.input_ids(spec, recorded.tokens)?,
                (None, None) => None,
            };
            if recorded.input_ids.is_none() {
                bail!(
                    "{}: layer {} routes by token id, and there is no input_ids [{}] beside its \
                     hidden states; add it, or name a file that has it with --input",
                    self.file.path().display(),
                    spec.index,
                    recorded.tokens
                );
            }
        }
        if layer.gate.is_none()
            && let Some(logits) = find("router_logits")?
        {
            logits.expect_shape(&[recorded.tokens, spec.router.logits()])?;
            recorded.router_logits = Some(floats(&logits)?);
        }
        Ok(recorded)
    }
}

/// One recorded batch.
pub(super) struct Recording {
    pub(super) name: String,
    pub(super) input: LayerInput,
    /// The input is not exact in the dtype of the activations: to be run in f32.
    pub(super) exact: bool,
    out: Tensor,
    /// Ids and weights.
    routing: Option<(Tensor, Tensor)>,
}

impl Recording {
    /// What the layer yielded for [`Self::input`], within `bound` of the recording.
    pub(super) fn judge(&self, spec: &LayerSpec, bound: f64, done: &Forward) -> Result<Comparison> {
        let tokens = done.routing.tokens;
        self.out.expect_shape(&[tokens, spec.dims.hidden])?;
        let recorded: Vec<f64> = floats(&self.out)?.into_iter().map(f64::from).collect();
        let errors = Errors::of(spec.dims.hidden, &done.output, &recorded);
        let nmse = errors.nmse();
        let bound = bound.max(F32_RECORDING);
        let (mut ids_equal, mut weights_max_difference) = (None, None);
        if let Some((ids, weights)) = &self.routing {
            let shape = [tokens, spec.router.top_k];
            ids.expect_shape(&shape)?;
            weights.expect_shape(&shape)?;
            let factor = weight_factor(spec);
            let ours = done.routing.weights.iter().map(|weight| weight * factor);
            let ours = by_id(done.routing.ids.iter().map(|id| i64::from(id.0)).zip(ours), shape[1]);
            let theirs = by_id(ids.to_i64()?.into_iter().zip(floats(weights)?), shape[1]);
            ids_equal = Some(ours.iter().map(|(id, _)| id).eq(theirs.iter().map(|(id, _)| id)));
            let differences = ours.iter().zip(&theirs).map(|(a, b)| f64::from((a.1 - b.1).abs()));
            weights_max_difference = Some(largest(differences));
        }
        let ok = within(nmse, bound)
            && ids_equal != Some(false)
            && weights_max_difference.is_none_or(|difference| within(difference, WEIGHTS_BOUND));
        let name = self.name.clone();
        Ok(Comparison {
            name,
            tokens,
            nmse,
            bound,
            ids_equal,
            weights_max_difference,
            worst_token: errors.worst_token(),
            worst_expert: errors.by_expert(&done.routing, spec.router.experts).culprit(),
            ok,
        })
    }
}

/// Ids and weights `[T, k]`, each token's sorted by id: their order carries no meaning.
fn by_id(slots: impl Iterator<Item = (i64, f32)>, k: usize) -> Vec<(i64, f32)> {
    let mut slots: Vec<(i64, f32)> = slots.collect();
    slots.chunks_mut(k).for_each(|token| token.sort_by_key(|(id, _)| *id));
    slots
}

fn hidden_alone(hidden: &Tensor, spec: &LayerSpec) -> Result<LayerInput> {
    let tokens = match hidden.shape[..] {
        [tokens, width] if width == spec.dims.hidden => tokens,
        _ => bail!(hidden.error(format!(
            "has shape {:?}; layer {} needs [tokens, {}]",
            hidden.shape, spec.index, spec.dims.hidden
        ))),
    };
    Ok(LayerInput { tokens, hidden: floats(hidden)?, router_logits: None, input_ids: None })
}
