//! Capture of routing, and its replay.
//!
//! A trace holds the logical ids (before any placement) of every call of every layer. Its file is
//! a safetensors file: for each layer a tensor `LAYER.topk_ids` `[ΣT, k]`, the calls one after the
//! other, of U8, U16 or U32, whichever holds the layer's ids; and in the metadata, under
//! `moe_routing_trace`, this JSON:
//!
//! ```json
//! {"version": 1, "layers": [
//!   {"name": "model.layers.1.mlp", "choices": 256, "top_k": 8, "calls": [7, 1, 1]}]}
//! ```
//! `choices` is the number of ids that can occur, identity and skip experts included; `calls` are
//! the tokens of each call. Layers stand in the order of their first call.

use std::path::Path;

use safetensors::tensor::SafeTensors;
use serde::{Deserialize, Serialize};

use super::compact_ids::{self, CompactIds};
use super::{LogicalId, Routing};
use crate::checkpoint::{NewTensor, write_safetensors};
use crate::spec::{MAX_SIZE, RouterSpec};
use crate::{Error, Result};

const METADATA_KEY: &str = "moe_routing_trace";
const VERSION: u32 = 1;

/// The experts that every layer chose, call by call.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Trace {
    layers: Vec<LayerTrace>,
}

/// The experts that one layer chose.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerTrace {
    info: LayerInfo,
    ids: CompactIds,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct LayerInfo {
    name: String,
    choices: usize,
    top_k: usize,
    calls: Vec<usize>,
}

#[derive(Serialize, Deserialize)]
struct Header {
    version: u32,
    layers: Vec<LayerInfo>,
}

impl Trace {
    /// Nothing recorded yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends one call of `layer`: the ids in `routing`.
    ///
    /// # Errors
    /// If the layer was recorded with other sizes before, or an id is not one of the layer's.
    pub fn record(&mut self, layer: &str, spec: &RouterSpec, routing: &Routing) -> Result<()> {
        let choices = spec.choices();
        if routing.top_k != spec.top_k {
            return Err(Error::input(
                "routing trace",
                format!("layer '{layer}' has top-k {}, its routing {}", spec.top_k, routing.top_k),
            ));
        }
        if let Some(id) = routing.ids.iter().find(|id| id.index() >= choices) {
            return Err(Error::input(
                "routing trace",
                format!("layer '{layer}': expert {id} of {choices}"),
            ));
        }
        let recorded = match self.layers.iter_mut().position(|known| known.info.name == layer) {
            Some(known) => &mut self.layers[known],
            None => {
                self.layers.push(LayerTrace {
                    info: LayerInfo {
                        name: layer.to_owned(),
                        choices,
                        top_k: spec.top_k,
                        calls: Vec::new(),
                    },
                    ids: CompactIds::for_choices(choices),
                });
                self.layers.last_mut().expect("pushed just now")
            }
        };
        recorded.check_sizes(spec)?;
        recorded.info.calls.push(routing.tokens);
        recorded.ids.extend(routing.ids.iter().map(|id| id.0));
        Ok(())
    }

    /// The layers, in the order of their first call.
    pub fn layers(&self) -> &[LayerTrace] {
        &self.layers
    }

    /// The layer of that name.
    pub fn layer(&self, name: &str) -> Option<&LayerTrace> {
        self.layers.iter().find(|layer| layer.info.name == name)
    }

    /// Writes the trace as described at the top of this module: all of it, or nothing.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let header = Header {
            version: VERSION,
            layers: self.layers.iter().map(|layer| layer.info.clone()).collect(),
        };
        let header = serde_json::to_string(&header)
            .map_err(|error| Error::file(path, format!("cannot store a trace: {error}")))?;
        let bytes: Vec<_> = self.layers.iter().map(|layer| layer.ids.to_bytes()).collect();
        let tensors = self.layers.iter().zip(&bytes).map(|(layer, bytes)| {
            let tensor = NewTensor {
                name: tensor_name(layer.name()),
                dtype: layer.ids.dtype(),
                shape: vec![layer.tokens(), layer.top_k()],
            };
            (tensor, &bytes[..])
        });
        write_safetensors(path, &[(METADATA_KEY, &header)], tensors)
    }

    /// Reads what [`Self::save`] wrote.
    ///
    /// # Errors
    /// If the file cannot be read, is no trace, is of a later version, or contradicts itself.
    pub fn load(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|source| Error::Io {
            path: path.to_owned(),
            action: "read",
            source,
        })?;
        let invalid = |error| Error::file(path, format!("not a safetensors file: {error}"));
        let (_, metadata) = SafeTensors::read_metadata(&bytes).map_err(invalid)?;
        let tensors = SafeTensors::deserialize(&bytes).map_err(invalid)?;
        let header = metadata
            .metadata()
            .as_ref()
            .and_then(|entries| entries.get(METADATA_KEY))
            .ok_or_else(|| {
                Error::file(
                    path,
                    format!(
                        "not a routing trace: its metadata have no '{METADATA_KEY}', a JSON text \
                             with a version and the layers' names, choices, top_k and calls"
                    ),
                )
            })?;
        let header: Header = serde_json::from_str(header)
            .map_err(|error| Error::file(path, format!("bad '{METADATA_KEY}': {error}")))?;
        if header.version != VERSION {
            return Err(Error::file(
                path,
                format!("trace of version {}; only {VERSION} can be read", header.version),
            ));
        }
        let mut trace = Self::new();
        for info in header.layers {
            if trace.layer(&info.name).is_some() {
                return Err(Error::file(path, format!("layer '{}' occurs twice", info.name)));
            }
            trace.layers.push(LayerTrace::read(path, info, &tensors)?);
        }
        if tensors.len() != trace.layers.len() {
            return Err(Error::file(
                path,
                format!("{} tensors for {} layers", tensors.len(), trace.layers.len()),
            ));
        }
        Ok(trace)
    }
}

impl LayerTrace {
    /// The layer's name.
    pub fn name(&self) -> &str {
        &self.info.name
    }

    /// Number of ids that can occur, identity and skip experts included.
    pub fn choices(&self) -> usize {
        self.info.choices
    }

    /// k.
    pub fn top_k(&self) -> usize {
        self.info.top_k
    }

    /// Tokens of each call.
    pub fn calls(&self) -> &[usize] {
        &self.info.calls
    }

    /// Tokens of all calls.
    pub fn tokens(&self) -> usize {
        self.ids.len() / self.info.top_k
    }

    /// The ids of all calls, `[ΣT, k]`.
    pub fn ids(&self) -> impl ExactSizeIterator<Item = LogicalId> {
        self.ids_from(0, self.tokens())
    }

    /// The ids of `tokens` rows from `first` on.
    pub(super) fn ids_from(
        &self,
        first: usize,
        tokens: usize,
    ) -> impl ExactSizeIterator<Item = LogicalId> {
        let top_k = self.info.top_k;
        (first * top_k..(first + tokens) * top_k).map(|slot| LogicalId(self.ids.get(slot)))
    }

    pub(super) fn check_sizes(&self, spec: &RouterSpec) -> Result<()> {
        let LayerInfo { name, choices, top_k, .. } = &self.info;
        if (*choices, *top_k) == (spec.choices(), spec.top_k) {
            return Ok(());
        }
        Err(Error::input(
            "routing trace",
            format!(
                "layer '{name}' was recorded with {choices} experts and top-k {top_k}; it has {} and {}",
                spec.choices(),
                spec.top_k
            ),
        ))
    }

    fn read(path: &Path, info: LayerInfo, tensors: &SafeTensors) -> Result<Self> {
        let name = tensor_name(&info.name);
        let wrong = |reason: String| Err(Error::tensor(path, &name, reason));
        if info.choices == 0 || info.choices > MAX_SIZE {
            return wrong(format!("{} experts; there must be 1 to {MAX_SIZE}", info.choices));
        }
        if info.top_k == 0 || info.top_k > info.choices {
            return wrong(format!("top-k is {}, of {} experts", info.top_k, info.choices));
        }
        let Ok(tensor) = tensors.tensor(&name) else {
            return wrong("missing".into());
        };
        let tokens = info.calls.iter().try_fold(0_usize, |sum, &tokens| sum.checked_add(tokens));
        match (tensor.shape(), tokens) {
            (&[rows, columns], Some(tokens)) if rows == tokens && columns == info.top_k => {}
            (shape, tokens) => {
                return wrong(format!(
                    "shape {shape:?}; the calls' tokens and top-k make {:?}",
                    [tokens.unwrap_or(usize::MAX), info.top_k]
                ));
            }
        }
        let Some(values) = compact_ids::decode(tensor.dtype(), tensor.data()) else {
            return wrong(format!("dtype {:?}; expert ids are U8, U16 or U32", tensor.dtype()));
        };
        if let Some(slot) = values.iter().position(|&id| id as usize >= info.choices) {
            return wrong(format!(
                "row {}: expert {} of {}",
                slot / info.top_k,
                values[slot],
                info.choices
            ));
        }
        let mut ids = CompactIds::for_choices(info.choices);
        ids.extend(values.into_iter());
        Ok(Self { info, ids })
    }
}

fn tensor_name(layer: &str) -> String {
    format!("{layer}.topk_ids")
}
