//! The file with hidden states, and what else may stand in it.

use std::path::Path;

use anyhow::{Context, Result, bail};
use moe_runner::checkpoint::{Checkpoint, Dtype, Tensor};
use moe_runner::runner::Batch;
use moe_runner::spec::{LayerSpec, Selection};

use crate::memory;

/// An input file.
pub(crate) struct Input {
    file: Checkpoint,
    hidden_name: String,
    /// Names with the layer's prefix come first.
    many_layers: bool,
}

/// The inputs of one layer.
pub(crate) struct LayerInput {
    /// T.
    pub(crate) tokens: usize,
    /// `[T, H]`, as they stand in the file.
    pub(crate) hidden: Vec<f32>,
    /// `[T, E]`, in place of the gate.
    pub(crate) router_logits: Option<Vec<f32>>,
    /// `[T]`.
    pub(crate) input_ids: Option<Vec<u32>>,
}

impl LayerInput {
    /// As the library takes it.
    pub(crate) fn batch(&self) -> Batch<'_> {
        Batch {
            hidden: &self.hidden,
            router_logits: self.router_logits.as_deref(),
            input_ids: self.input_ids.as_deref(),
        }
    }
}

impl Input {
    /// Opens the file; `-` is standard input. `hidden_name` is the tensor with the hidden states.
    pub(crate) fn open(path: &Path, hidden_name: &str, many_layers: bool) -> Result<Self> {
        let file = match path == Path::new("-") {
            true => standard_input()?,
            false => Checkpoint::open_safetensors(path)?,
        };
        Ok(Self { file, hidden_name: hidden_name.to_owned(), many_layers })
    }

    /// What the file holds for one layer.
    pub(crate) fn layer(&self, spec: &LayerSpec) -> Result<LayerInput> {
        let Some(hidden) = self.find(&self.hidden_name, spec.index)? else {
            let names: Vec<&str> = self.file.names().take(6).collect();
            bail!(
                "{}: no tensor '{}'; it holds {}{}; name one with --input-name",
                self.file.path().display(),
                self.hidden_name,
                if names.is_empty() { "nothing".into() } else { names.join(", ") },
                if self.file.names().count() > names.len() { ", …" } else { "" },
            );
        };
        let width = spec.dims.hidden;
        let tokens = match hidden.shape[..] {
            [tokens, columns] if columns == width => tokens,
            _ => bail!(hidden.error(format!(
                "has shape {:?}; layer {} needs [tokens, {width}]",
                hidden.shape, spec.index
            ))),
        };
        memory::ensure(
            tokens.saturating_mul(width).saturating_mul(4),
            &format!("'{}' [{tokens}, {width}] in f32", self.hidden_name),
            "give fewer rows",
        )?;
        let rows = floats(&hidden)?;

        let router_logits = match self.find("router_logits", spec.index)? {
            None => None,
            Some(tensor) => {
                tensor.expect_shape(&[tokens, spec.router.logits()])?;
                Some(floats(&tensor)?)
            }
        };
        let input_ids = self.input_ids(spec, tokens)?;
        Ok(LayerInput { tokens, hidden: rows, router_logits, input_ids })
    }

    /// The file's token ids, for a layer that routes by them. Others do not look at them: a file for
    /// many purposes may hold those of another batch.
    pub(crate) fn input_ids(&self, spec: &LayerSpec, tokens: usize) -> Result<Option<Vec<u32>>> {
        match (&spec.router.selection, self.find("input_ids", spec.index)?) {
            (Selection::HashTable { .. }, Some(ids)) => token_ids(&ids, tokens).map(Some),
            _ => Ok(None),
        }
    }

    /// Whether the file has hidden states for a layer.
    pub(crate) fn has_hidden(&self, spec: &LayerSpec) -> Result<bool> {
        Ok(self.find(&self.hidden_name, spec.index)?.is_some())
    }

    /// A tensor by its name, or by its name with the layer's prefix; which one first depends on
    /// whether there are several layers to tell apart.
    fn find(&self, name: &str, layer: usize) -> Result<Option<Tensor>> {
        let prefixed = format!("layers.{layer}.{name}");
        let names = match self.many_layers {
            true => [prefixed.as_str(), name],
            false => [name, prefixed.as_str()],
        };
        for name in names {
            if let Some(tensor) = self.file.tensor(name)? {
                return Ok(Some(tensor));
            }
        }
        Ok(None)
    }
}

/// What standard input brings, in a file that has lost its name: it is gone with this process.
fn standard_input() -> Result<Checkpoint> {
    let what = "cannot read hidden states from standard input";
    let mut file = tempfile::Builder::new()
        .prefix("standard-input-")
        .suffix(".safetensors")
        .tempfile()
        .context(what)?;
    std::io::copy(&mut std::io::stdin().lock(), &mut file).context(what)?;
    // opened, it is mapped, and needs no name any more
    Ok(Checkpoint::open_safetensors(file.path())?)
}

/// The token ids of a tensor `[tokens]`.
pub(crate) fn token_ids(tensor: &Tensor, tokens: usize) -> Result<Vec<u32>> {
    tensor.expect_shape(&[tokens])?;
    let ids = tensor.to_i64()?;
    if let Some(at) = ids.iter().position(|id| u32::try_from(*id).is_err()) {
        bail!(tensor.error(format!("element {at} is {}, no token id", ids[at])));
    }
    Ok(ids.into_iter().map(|id| id as u32).collect())
}

/// The values of a tensor of activations.
pub(crate) fn floats(tensor: &Tensor) -> Result<Vec<f32>> {
    match tensor.dtype {
        Dtype::F32 | Dtype::F16 | Dtype::Bf16 => Ok(tensor.to_f32()?),
        other => bail!(tensor.error(format!("is {other}; F32, F16 or BF16 is needed"))),
    }
}
