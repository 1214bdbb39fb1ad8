//! Which tensors of a layer have been asked for, and what was wrong with them.

use std::collections::{BTreeSet, HashSet};
use std::path::PathBuf;
use std::sync::Arc;

use crate::checkpoint::architecture::{ExpertTensors, Form, LayerEntry};
use crate::checkpoint::quantization::{Quantization, Scheme};
use crate::checkpoint::{Checkpoint, Tensor};
use crate::{Error, Result};

/// What a layer's tensors are, against what they should be.
#[derive(Debug, Default)]
pub struct Accounting {
    /// Tensors that the layer needs and the checkpoint lacks.
    pub missing: Vec<String>,
    /// Tensors that are there, but of the wrong shape, dtype or content.
    pub wrong: Vec<Error>,
    /// Tensors that belong to the block, but have no role in it: what is computed without them is
    /// not what the model's author meant.
    pub unexpected: Vec<String>,
    /// As `unexpected`, of the routed experts: an expert too many, a second copy under another
    /// spelling, a scale that no format asked for.
    pub unexpected_experts: Vec<String>,
    /// Tensors that several files hold, with those files.
    pub duplicates: Vec<(String, Vec<PathBuf>)>,
    /// Bytes of the tensors with a role.
    pub bytes: usize,
}

impl Accounting {
    /// Whether the layer can be loaded.
    pub fn is_complete(&self) -> bool {
        self.problems() == 0
    }

    fn problems(&self) -> usize {
        self.missing.len()
            + self.wrong.len()
            + self.unexpected_experts.len()
            + self.unexpected.len()
            + self.duplicates.len()
    }

    /// The first problem, with the number of others; `None` if there is none.
    pub(super) fn into_error(mut self, checkpoint: &Checkpoint) -> Option<Error> {
        let others = match self.problems() {
            0 | 1 => String::new(),
            count => format!(" (and {} more problems with this layer)", count - 1),
        };
        let about = |name: &str, reason: String| {
            let info = checkpoint.info(name);
            let path = info.as_ref().map_or(checkpoint.path(), |info| info.file);
            Some(Error::tensor(path, name, reason + &others))
        };
        if let Some((name, files)) = self.duplicates.first() {
            let files: Vec<String> = files.iter().map(|f| f.display().to_string()).collect();
            return about(name, format!("is in several files: {}", files.join(", ")));
        }
        if !self.wrong.is_empty() {
            return Some(match self.wrong.swap_remove(0) {
                Error::Tensor { path, tensor, reason } => {
                    Error::Tensor { path, tensor, reason: reason + &others }
                }
                other => other,
            });
        }
        if let Some(name) = self.missing.first() {
            return about(name, "is missing".into());
        }
        if let Some(name) = self.unexpected_experts.first() {
            let reason = "belongs to the experts, but the model as configured has no use for it";
            return about(name, reason.into());
        }
        let name = self.unexpected.first()?;
        about(name, "belongs to the block, but the model as configured has no use for it".into())
    }
}

/// Gets tensors, and keeps account of them.
pub(crate) struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    accounting: Accounting,
    claimed: HashSet<&'a str>,
    /// Tensors that several files hold.
    duplicates: Vec<(String, Vec<PathBuf>)>,
    /// Tensors with a problem noted: a stack of experts is asked for once for each.
    noted: BTreeSet<String>,
    /// What the configuration says about number formats.
    quantization: Option<Arc<Quantization>>,
    /// Tensors that have a role elsewhere, though their names are those of matrices' scales.
    reserved: Vec<String>,
}

impl<'a> Loader<'a> {
    pub(crate) fn new(checkpoint: &'a Checkpoint) -> Self {
        Self {
            checkpoint,
            accounting: Accounting::default(),
            claimed: HashSet::new(),
            duplicates: checkpoint
                .duplicates()
                .map(|(name, files)| {
                    (name.to_string(), files.into_iter().map(PathBuf::from).collect())
                })
                .collect(),
            noted: BTreeSet::new(),
            quantization: None,
            reserved: Vec::new(),
        }
        .with_quantization()
    }

    /// Reads the configuration; what is wrong with it is noted.
    fn with_quantization(mut self) -> Self {
        let quantization = self.checkpoint.quantization();
        self.quantization = self.note(quantization).flatten();
        self
    }

    /// How the configuration says that `module` is stored.
    ///
    /// # Errors
    /// As [`Quantization::scheme`].
    pub(crate) fn scheme(&self, module: &str) -> Result<Scheme> {
        self.quantization.as_ref().map_or(Ok(Scheme::FLOAT), |q| q.scheme(module))
    }

    /// Checks that the projections of an expert that multiply the same rows agree about them.
    ///
    /// # Errors
    /// As [`Quantization::common_input`].
    pub(super) fn common_input(&self, tensors: &ExpertTensors) -> Result<()> {
        match (&self.quantization, &tensors.gate) {
            (Some(quantization), Some(gate)) if gate.module != tensors.up.module => {
                let modules = [gate.module.as_str(), tensors.up.module.as_str()];
                // what cannot be read is told where it is read, if it need be
                match modules.iter().all(|module| quantization.scheme(module).is_ok()) {
                    true => quantization.common_input(modules[0], modules[1]),
                    false => Ok(()),
                }
            }
            _ => Ok(()),
        }
    }

    /// Keeps tensors for other roles than that of a matrix's scale.
    pub(super) fn reserve(&mut self, names: [&Option<String>; 2]) {
        self.reserved = names.into_iter().flatten().cloned().collect();
    }

    /// Whether a tensor is kept for another role.
    pub(crate) fn is_reserved(&self, name: &str) -> bool {
        self.reserved.iter().any(|reserved| reserved == name)
    }

    /// The checkpoint that is loaded from: formats look here at what is there.
    pub(crate) fn checkpoint(&self) -> &'a Checkpoint {
        self.checkpoint
    }

    /// The tensor `name`, which now has a role; `None` if there is none.
    ///
    /// # Errors
    /// As [`Checkpoint::tensor`].
    pub(crate) fn claim(&mut self, name: &str) -> Result<Option<Tensor>> {
        if let Some(info) = self.checkpoint.info(name)
            && self.claimed.insert(info.name)
        {
            self.accounting.bytes += info.bytes;
        }
        self.checkpoint.tensor(name)
    }

    /// The tensor `name`; if it is not there or cannot be read, that is noted.
    pub(super) fn needed(&mut self, name: &str) -> Option<Tensor> {
        let tensor = self.claim(name);
        match self.note(tensor)? {
            Some(tensor) => Some(tensor),
            None => {
                self.note_missing(name.to_string());
                None
            }
        }
    }

    /// The value, or `None` after the error is noted (once for each tensor).
    pub(super) fn note<T>(&mut self, result: Result<T>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                let first = match &error {
                    // duplicates are listed by themselves
                    Error::Tensor { tensor, .. } => {
                        !self.duplicates.iter().any(|(name, _)| name == tensor)
                            && self.noted.insert(tensor.clone())
                    }
                    // the same for each expert
                    Error::Config { key, .. } => self.noted.insert(format!("key {key}")),
                    _ => true,
                };
                if first {
                    self.accounting.wrong.push(error);
                }
                None
            }
        }
    }

    pub(super) fn note_missing(&mut self, name: String) {
        // in a file that is absent, or elsewhere than the index says
        let found = self.checkpoint.tensor(&name);
        if found.is_err() {
            self.note(found);
            return;
        }
        if self.noted.insert(name.clone()) {
            self.accounting.missing.push(name);
        }
    }

    /// The account, with the tensors of the block that nothing asked for.
    pub(super) fn finish(mut self, entry: &LayerEntry) -> Accounting {
        let mut unclaimed: Vec<&str> = Vec::new();
        for scope in &entry.tensors.scopes {
            let names = self.checkpoint.names_below(scope);
            unclaimed.extend(names.filter(|name| !self.claimed.contains(*name)));
        }
        self.duplicates.retain(|(name, _)| {
            self.claimed.contains(name.as_str())
                || entry.tensors.scopes.iter().any(|s| name.starts_with(s))
        });
        self.accounting.duplicates = std::mem::take(&mut self.duplicates);
        if self.accounting.wrong.iter().any(|error| matches!(error, Error::Config { .. })) {
            // without a format, nobody could ask for the tensors that make it up
            return self.accounting;
        }
        unclaimed.retain(|name| !is_idle_expert(entry, name));
        unclaimed.dedup();
        self.describe_what_is_there(entry, &unclaimed);
        for name in unclaimed {
            let accounting = &mut self.accounting;
            match name.contains(".experts.") {
                true => accounting.unexpected_experts.push(name.to_string()),
                false => accounting.unexpected.push(name.to_string()),
            }
        }
        self.accounting
    }
}

impl Loader<'_> {
    /// Where no expert's weights are there under a known name, but others are: says what was found
    /// before what is missing.
    fn describe_what_is_there(&mut self, entry: &LayerEntry, unclaimed: &[&str]) {
        let experts = &entry.tensors.experts;
        let first = experts.get(0);
        let needed = [&first.up.module, &first.down.module];
        let lacks = |module: &String| {
            self.accounting.missing.iter().any(|name| name.starts_with(module.as_str()))
        };
        if !needed.into_iter().all(lacks) {
            return;
        }
        let mut kinds: Vec<String> = Vec::new();
        let mut example = None;
        for name in unclaimed.iter().filter(|name| name.contains("exp")) {
            let Some(info) = self.checkpoint.info(name) else { continue };
            let inside = entry.tensors.scopes.iter().find_map(|s| name.strip_prefix(s.as_str()));
            let parts = inside.unwrap_or(name).split('.').map(|part| match part.parse::<u32>() {
                Ok(_) => "{e}",
                Err(_) => part,
            });
            let name_of_kind = parts.collect::<Vec<_>>().join(".");
            if kinds.iter().any(|kind| kind.starts_with(&format!("'{name_of_kind}'"))) {
                continue;
            }
            kinds.push(format!("'{name_of_kind}' {} {:?}", info.dtype, info.shape));
            example = example.or(Some((info.file, *name)));
            if kinds.len() == 4 {
                break;
            }
        }
        let Some((file, name)) = example else { return };
        let reason = format!(
            "experts are stored as {}, which is no layout that is known for this model; one that is \
             known needs '{}' {:?}",
            kinds.join(", "),
            first.up.module,
            first.up.stored_shape()
        );
        self.accounting.wrong.insert(0, Error::tensor(file, name, reason));
    }
}

/// Whether `name` is a tensor of an identity expert: some saves of longcat have them, unused.
fn is_idle_expert(entry: &LayerEntry, name: &str) -> bool {
    let (experts, router) = (&entry.tensors.experts, &entry.spec.router);
    let index = (experts.form == Form::Each)
        .then(|| experts.up.split_once("{e}"))
        .flatten()
        .and_then(|(before, _)| name.strip_prefix(before))
        .and_then(|rest| rest.split('.').next())
        .and_then(|index| index.parse::<usize>().ok());
    index.is_some_and(|index| (router.experts..router.choices()).contains(&index))
}
