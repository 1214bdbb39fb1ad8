//! The file with hidden states, and what else may stand in it.

use std::path::Path;

use anyhow::{Context, Result, bail};
use moe_runner::checkpoint::{Checkpoint, Dtype, Tensor};
use moe_runner::hidden::ActivationDtype;
use moe_runner::runner::Batch;
use moe_runner::spec::{LayerSpec, Selection};

use crate::{interrupt, memory};

/// What messages call what comes through a pipe.
const STANDARD_INPUT: &str = "standard input";

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
    /// Opens the file; `-` is standard input, and a pipe of any name is read as that is.
    /// `hidden_name` is the tensor with the hidden states.
    pub(crate) fn open(path: &Path, hidden_name: &str, many_layers: bool) -> Result<Self> {
        let file = match path.as_os_str() == "-" {
            true => piped(&mut std::io::stdin().lock(), Path::new(STANDARD_INPUT))?,
            false if is_pipe(path) => {
                let mut pipe = std::fs::File::open(path).with_context(|| cannot_read(path))?;
                piped(&mut pipe, path)?
            }
            false => Checkpoint::open_safetensors(path)?,
        };
        Ok(Self { file, hidden_name: hidden_name.to_owned(), many_layers })
    }

    /// What the file holds for one layer whose activations are in `dtype`.
    pub(crate) fn layer(&self, spec: &LayerSpec, dtype: ActivationDtype) -> Result<LayerInput> {
        let Some(hidden) = self.find(&self.hidden_name, spec.index)? else {
            bail!(
                "{}: no tensor '{}'; {}",
                self.file.path().display(),
                self.hidden_name,
                self.offers(spec.dims.hidden)
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
        let lost = |v: &f32| v.is_finite() && !dtype.round(*v).is_finite();
        if let Some(at) = rows.iter().position(lost) {
            bail!(hidden.error(format!(
                "row {}, column {} is {:e}, which {} cannot hold; --dtype f32 holds it",
                at / width,
                at % width,
                rows[at],
                dtype.name()
            )));
        }

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

    /// What could be named as hidden states of `width`, else what there is.
    fn offers(&self, width: usize) -> String {
        let fits = |name: &&str| {
            let info = self.file.info(name);
            info.is_some_and(|info| matches!(info.shape, [_, columns] if *columns == width))
        };
        let list = |names: &[&str]| {
            let more = if names.len() > 6 { ", …" } else { "" };
            format!("{}{more}", names[..names.len().min(6)].join(", "))
        };
        let all: Vec<&str> = self.file.names().collect();
        let fitting: Vec<&str> = all.iter().copied().filter(fits).collect();
        match (&all[..], &fitting[..]) {
            ([], _) => "it holds nothing".into(),
            (all, []) => format!("none has the shape [tokens, {width}]: it holds {}", list(all)),
            (_, fitting) => format!(
                "of the shape [tokens, {width}] it holds {}; name one with --input-name",
                list(fitting)
            ),
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

/// What a pipe brings, in a file that has lost its name. Messages call it `name`.
fn piped(pipe: &mut dyn std::io::Read, name: &Path) -> Result<Checkpoint> {
    let what = || cannot_read(name);
    let folder = interrupt::temporary()?;
    let path = folder.path().join("input.safetensors");
    let mut file = std::fs::File::create_new(&path).with_context(what)?;
    std::io::copy(pipe, &mut file).with_context(what)?;
    // opened, it is mapped, and needs no name any more
    Ok(Checkpoint::open_safetensors_as(&path, name)?)
}

fn cannot_read(path: &Path) -> String {
    format!("{}: cannot read", path.display())
}

#[cfg(unix)]
fn is_pipe(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    std::fs::metadata(path).is_ok_and(|there| there.file_type().is_fifo())
}

#[cfg(not(unix))]
fn is_pipe(_path: &Path) -> bool {
    false
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
