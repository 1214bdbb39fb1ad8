//! Checkpoints as files: `config.json` and `model.safetensors` in each architecture's published
//! layout, or one GGUF file, with weights whose values every format holds exactly.

mod config;
mod form;
mod gguf;
mod names;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use half::bf16;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::json;

use crate::Block;

pub use form::Form;

/// A tensor that is written.
struct Tensor {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// The file of a form that is one.
const GGUF: &str = "model.gguf";

/// Tensors by name.
type Tensors = BTreeMap<String, Tensor>;

/// Writes `block` as a checkpoint in `form` to `folder`, which is made if it is not there, with the
/// questions as `probes.json`.
///
/// # Errors
/// [`io::ErrorKind::Unsupported`] if the architecture is not published in such a form; what the file
/// system refuses.
pub fn checkpoint(block: &Block, form: Form, folder: &Path) -> io::Result<()> {
    if let Some(reason) = form.refuses(block.family) {
        return Err(io::Error::new(io::ErrorKind::Unsupported, reason));
    }
    fs::create_dir_all(folder)?;
    match gguf::Ggml::of(form) {
        Some(experts) => fs::write(folder.join(GGUF), gguf::file(block, experts))?,
        None => safetensors(block, form, folder)?,
    }
    let probes = &block.probes;
    let description = json!({
        "family": block.family.name,
        "form": form.name(),
        "prompt": (0..probes.len()).collect::<Vec<usize>>(),
        "tokens": block.vocabulary(),
        "probes": probes.names,
    });
    fs::write(folder.join("probes.json"), pretty(&description)?)
}

fn safetensors(block: &Block, form: Form, folder: &Path) -> io::Result<()> {
    let tensors = names::tensors(block, form);
    let views: Vec<(&String, TensorView<'_>)> = tensors
        .iter()
        .map(|(name, tensor)| {
            let view = TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes);
            (name, view.expect("bytes were made for the shape"))
        })
        .collect();
    let metadata = [("format".to_string(), "pt".to_string())].into_iter().collect();
    safetensors::serialize_to_file(views, Some(metadata), &folder.join("model.safetensors"))
        .map_err(io::Error::other)?;
    fs::write(folder.join("config.json"), pretty(&config::config(block, form))?)
}

fn pretty(value: &serde_json::Value) -> io::Result<String> {
    Ok(serde_json::to_string_pretty(value)? + "\n")
}

impl Tensor {
    fn f32(shape: &[usize], values: impl IntoIterator<Item = f64>) -> Self {
        let bytes = values.into_iter().flat_map(|v| (v as f32).to_le_bytes()).collect();
        Self { dtype: Dtype::F32, shape: shape.to_vec(), bytes }
    }

    fn bf16(shape: &[usize], values: impl IntoIterator<Item = f64>) -> Self {
        let bytes = values.into_iter().flat_map(|v| bf16::from_f64(v).to_le_bytes()).collect();
        Self { dtype: Dtype::BF16, shape: shape.to_vec(), bytes }
    }

    fn u8(shape: &[usize], bytes: Vec<u8>) -> Self {
        Self { dtype: Dtype::U8, shape: shape.to_vec(), bytes }
    }
}
