//! A checkpoint on disk: its files, mapped, and one table of all their tensors.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::config::Config;
use super::gguf;
use super::tensor::Tensor;
use crate::{Error, Result};

/// The file format of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Container {
    /// A folder with `config.json` and safetensors files.
    Safetensors,
    /// A GGUF file.
    Gguf,
}

/// What a container's header says about one tensor.
#[derive(Clone, Debug)]
pub struct TensorInfo<'a> {
    /// Full name.
    pub name: &'a str,
    /// The file that holds it.
    pub file: &'a Path,
    /// The dtype, as the format spells it; it may be one that cannot be read.
    pub dtype: String,
    /// Dimensions, outermost first.
    pub shape: &'a [usize],
    /// Its size in the file.
    pub bytes: usize,
}

/// A checkpoint that is open: every file mapped, every header checked, no weight read.
pub struct Checkpoint {
    path: PathBuf,
    container: Container,
    config: Option<Config>,
    metadata: Option<gguf::Metadata>,
    names: BTreeMap<String, usize>,
    duplicates: BTreeMap<String, Vec<PathBuf>>,
}

impl Checkpoint {
    /// Opens a folder with `config.json` and `*.safetensors` (one file, or shards with
    /// `model.safetensors.index.json`), or a `.gguf` file.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::File`], [`Error::Config`] or [`Error::Tensor`], with the file and,
    /// where one is at fault, the tensor.
    pub fn open(path: &Path) -> Result<Self> {
        Err(Error::file(path, "this version cannot open checkpoints"))
    }

    /// The folder, or the GGUF file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file format.
    pub fn container(&self) -> Container {
        self.container
    }

    /// The parsed `config.json`; a GGUF file has none.
    pub fn config(&self) -> Option<&Config> {
        self.config.as_ref()
    }

    /// The key/values of a GGUF file; other checkpoints have none.
    pub fn metadata(&self) -> Option<&gguf::Metadata> {
        self.metadata.as_ref()
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.names.keys().map(String::as_str)
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.names.contains_key(name)
    }

    /// What the header says about a tensor, also where its dtype cannot be read.
    pub fn info(&self, name: &str) -> Option<TensorInfo<'_>> {
        let _ = name;
        None
    }

    /// A tensor, sharing the mapped file; `None` where there is none of that name.
    ///
    /// # Errors
    /// [`Error::Tensor`] if its dtype is unknown, or several files hold a tensor of that name.
    pub fn tensor(&self, name: &str) -> Result<Option<Tensor>> {
        let _ = name;
        Ok(None)
    }

    /// A tensor that must be there.
    ///
    /// # Errors
    /// As [`Checkpoint::tensor`]; [`Error::Tensor`] with the names nearest to it if it is missing.
    pub fn require(&self, name: &str) -> Result<Tensor> {
        self.tensor(name)?.ok_or_else(|| Error::tensor(&self.path, name, "is missing"))
    }

    /// Tensors that more than one file holds, with those files. Asking for one is an error.
    pub fn duplicates(&self) -> &BTreeMap<String, Vec<PathBuf>> {
        &self.duplicates
    }
}
