//! Quantises the experts of a checkpoint: writes a new one in the layout of compressed-tensors,
//! which this library and the engines that serve such models load.
//!
//! The experts' projections are quantised, routed and shared ones; all other tensors, and the files
//! that a model needs, are copied byte for byte. One expert at a time is in memory for each thread.
//! The new folder appears under its name when it is complete and on disk, or not at all, and takes
//! the place of nothing.

mod companions;
mod format;
mod leftovers;
mod output;
mod place;
mod plan;

pub use companions::is_companion;
pub use format::Format;
pub use leftovers::Leftover;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use crate::checkpoint::architecture;
use crate::checkpoint::quantization::Quantization;
use crate::checkpoint::{Bytes, Checkpoint, Container};
use crate::{Error, Result};
use format::{Quantised, float_bytes};
use plan::{Content, Expert, Module, Plan};

/// What to write.
#[derive(Clone, Debug)]
pub struct Options {
    /// The experts' new number format.
    pub format: Format,
    /// Modules to leave as they are: full names, or `re:` and an expression that matches from the
    /// name's start on. An expert is quantised with all of its modules or with none.
    pub ignore: Vec<String>,
    /// Most bytes of tensors in a file, as long as a single expert is not larger.
    pub max_shard_bytes: u64,
    /// Replace the checkpoint in the output folder: its weights, index, `config.json`, and the files
    /// that the new one has too. Whatever else is there stays.
    pub overwrite: bool,
    /// Experts that are quantised at the same time; at least 1.
    pub threads: usize,
}

/// How far the work is.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// Bytes of tensors that are written.
    pub done: u64,
    /// Bytes of tensors that will be written.
    pub total: u64,
    /// The tensor that was written last.
    pub tensor: &'a str,
}

/// What was written.
#[derive(Clone, Debug)]
pub struct Summary {
    /// The errors of the quantised projections, in the order of layers and roles.
    pub errors: Vec<ProjectionError>,
    /// Bytes of all tensors before.
    pub bytes_before: u64,
    /// Bytes of all tensors after.
    pub bytes_after: u64,
    /// Files with tensors.
    pub shards: usize,
    /// Files and folders beside the checkpoint that were not copied: what [`is_companion`] does not
    /// know.
    pub left_out: Vec<PathBuf>,
    /// What earlier, interrupted runs had left beside or in the output.
    pub leftovers: Vec<Leftover>,
}

/// What a module is in its expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Role {
    Gate,
    Up,
    /// Gate and up in one module.
    GateUp,
    Down,
    SharedGate,
    SharedUp,
    SharedGateUp,
    SharedDown,
}

impl Role {
    fn of_shared(self) -> Self {
        match self {
            Self::Gate => Self::SharedGate,
            Self::Up => Self::SharedUp,
            Self::GateUp => Self::SharedGateUp,
            Self::Down => Self::SharedDown,
            shared => shared,
        }
    }

    /// Its name for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gate => "gate",
            Self::Up => "up",
            Self::GateUp => "gate_up",
            Self::Down => "down",
            Self::SharedGate => "shared gate",
            Self::SharedUp => "shared up",
            Self::SharedGateUp => "shared gate_up",
            Self::SharedDown => "shared down",
        }
    }
}

/// What quantisation does to one projection of a layer, over all of its experts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ProjectionError {
    /// The decoder layer.
    pub layer: usize,
    /// Which projection.
    pub role: Role,
    /// Modules.
    pub modules: usize,
    /// ‖w' − w‖² / ‖w‖², over all modules; 0 if all weights are 0.
    pub nmse: f64,
    /// The largest |w' − w| as a share of the largest |w| of its module; the worst module's.
    pub max_relative: f64,
}

/// Writes a quantised copy of `checkpoint` to the folder `output`.
///
/// The checkpoint is a folder of floats (F32, F16, BF16). Experts that are stored as stacks are
/// written as modules of their own, where their architecture has names for those.
///
/// `output` is made under another name: beside it, as `.NAME.partial-…`, or, where the folder is there
/// already (empty, or with a checkpoint that is to be overwritten), in it. `progress` is told of every
/// tensor that is written, and may break off: everything written so far is removed then, as it is
/// after an error. What a killed process leaves has no `config.json`, so that nothing takes it for a
/// checkpoint; the next run for the same output removes it and says so ([`Summary::leftovers`]).
///
/// # Errors
/// [`Error::File`] if the checkpoint is quantised already or a GGUF file, has nothing to quantise,
/// the output exists or its parent does not, another run is writing it, or the disk has no room;
/// [`Error::Config`] for a pattern that is unusable, matches nothing, or a part of an expert;
/// [`Error::Tensor`] for a stack without names to write it under, a size that groups do not divide, or
/// a weight that is not finite; [`Error::Io`]; [`Error::Interrupted`] if `progress` breaks off.
/// `output` is as it was, then; if something has appeared there meanwhile, the error names the place
/// of the new checkpoint.
pub fn quantize(
    checkpoint: &Checkpoint,
    output: &Path,
    options: &Options,
    progress: &mut dyn FnMut(Progress<'_>) -> ControlFlow<()>,
) -> Result<Summary> {
    if checkpoint.container() == Container::Gguf {
        let reason = "is a GGUF file, which has no config.json for the new checkpoint to have; \
                      quantise the safetensors checkpoint that it was made from";
        return Err(Error::file(checkpoint.path(), reason));
    }
    if let Some(quantization) = Quantization::of(checkpoint)? {
        let reason = format!(
            "is quantised already ({}); quantise the checkpoint that it was made from",
            quantization.method()
        );
        return Err(Error::file(checkpoint.path(), reason));
    }
    let layers = architecture::layers(checkpoint)?;
    let plan = Plan::new(checkpoint, &layers, options)?;
    let mut folder = output::Folder::begin(checkpoint, output, &plan, options.overwrite)?;
    let mut written = Written { done: 0, total: plan.bytes(), errors: Vec::new(), progress };
    for (number, units) in plan.shards.iter().enumerate() {
        let tensors: Vec<_> = units.iter().flat_map(|unit| unit.tensors.clone()).collect();
        let mut shard = folder.shard(number, plan.shards.len(), &tensors)?;
        for batch in units.chunks(options.threads.max(1)) {
            let results = in_parallel(batch, |unit| match &unit.content {
                Content::Copy => {
                    let tensor = checkpoint.require(&unit.tensors[0].name)?;
                    Ok((vec![tensor.bytes], Vec::new()))
                }
                Content::Expert(expert) => expert.contents(checkpoint, options.format),
            });
            for (unit, result) in batch.iter().zip(results) {
                let (bytes, errors) = result?;
                for (tensor, bytes) in unit.tensors.iter().zip(bytes) {
                    shard.write(&tensor.name, &bytes)?;
                    written.tensor(&tensor.name, bytes.len() as u64)?;
                }
                written.errors.extend(errors);
            }
        }
        shard.finish()?;
    }
    let output::Finished { left_out, leftovers } = folder.finish(checkpoint, &plan, options)?;
    let bytes_before = checkpoint.names().filter_map(|name| checkpoint.info(name));
    Ok(Summary {
        errors: by_projection(written.errors),
        bytes_before: bytes_before.map(|info| info.bytes as u64).sum(),
        bytes_after: written.done,
        shards: plan.shards.len(),
        left_out,
        leftovers,
    })
}

/// What has been written so far.
struct Written<'a> {
    done: u64,
    total: u64,
    errors: Vec<ModuleError>,
    progress: &'a mut dyn FnMut(Progress<'_>) -> ControlFlow<()>,
}

impl Written<'_> {
    fn tensor(&mut self, tensor: &str, bytes: u64) -> Result<()> {
        self.done += bytes;
        match (self.progress)(Progress { done: self.done, total: self.total, tensor }) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(Error::Interrupted),
        }
    }
}

/// `work` on every item, each on a thread of its own.
fn in_parallel<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    if let [item] = items {
        return vec![work(item)];
    }
    std::thread::scope(|scope| {
        let threads: Vec<_> = items.iter().map(|item| scope.spawn(|| work(item))).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, R>| match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        threads.into_iter().map(join).collect()
    })
}

/// What quantisation does to one module.
struct ModuleError {
    layer: usize,
    role: Role,
    /// Sum of squares of what changed.
    changed: f64,
    /// Sum of squares of the weights.
    weights: f64,
    max_relative: f64,
}

impl Expert {
    /// The contents of the unit's tensors, and the errors of its modules.
    fn contents(
        &self,
        checkpoint: &Checkpoint,
        format: Format,
    ) -> Result<(Vec<Bytes>, Vec<ModuleError>)> {
        let values: Vec<Vec<f32>> = self.modules.iter().map(Module::values).collect();
        if self.ignored {
            let floats = self.modules.iter().zip(&values);
            return Ok((floats.map(|(m, v)| float_bytes(v, m.float)).collect(), Vec::new()));
        }
        // Gate and up are computed as one, so a scale of their tensor must be the same.
        let largest = |down: bool| {
            let modules = self.modules.iter().zip(&values);
            let alike = modules.filter(|(module, _)| module.is_down() == down);
            alike.flat_map(|(_, values)| values).fold(0f32, |max, value| max.max(value.abs()))
        };
        let largest = format.shares_scale().then(|| [largest(false), largest(true)]);
        let (mut bytes, mut errors) = (Vec::new(), Vec::new());
        for (module, values) in self.modules.iter().zip(&values) {
            let largest = largest.map_or(0.0, |max| max[usize::from(module.is_down())]);
            let quantised = format
                .quantise(values, module.dims(), module.float, largest)
                .map_err(|error| module.error(checkpoint, format!("'{}': {error}", module.name)))?;
            errors.push(module.change(self.layer, values, &quantised));
            bytes.extend(quantised.bytes);
        }
        Ok((bytes, errors))
    }
}

impl Module {
    fn values(&self) -> Vec<f32> {
        let [rows, cols] = self.dims();
        let mut values = vec![0.0; rows * cols];
        for (row, out) in values.chunks_exact_mut(cols).enumerate() {
            self.matrix.decode_row(row, out);
        }
        values
    }

    fn is_down(&self) -> bool {
        matches!(self.role, Role::Down | Role::SharedDown)
    }

    fn change(&self, layer: usize, values: &[f32], quantised: &Quantised) -> ModuleError {
        let [_, cols] = self.dims();
        let mut row = vec![0.0; cols];
        let (mut changed, mut weights) = (0.0, 0.0);
        let (mut largest_change, mut largest) = (0f64, 0f64);
        for (index, values) in values.chunks_exact(cols).enumerate() {
            quantised.matrix.decode_row(index, &mut row);
            for (new, old) in row.iter().zip(values) {
                let (new, old) = (f64::from(*new), f64::from(*old));
                changed += (new - old).powi(2);
                weights += old * old;
                largest_change = largest_change.max((new - old).abs());
                largest = largest.max(old.abs());
            }
        }
        let max_relative = if largest == 0.0 { 0.0 } else { largest_change / largest };
        ModuleError { layer, role: self.role, changed, weights, max_relative }
    }
}

/// The errors of all modules of a layer and role together.
fn by_projection(mut modules: Vec<ModuleError>) -> Vec<ProjectionError> {
    modules.sort_by_key(|module| (module.layer, module.role));
    let same = modules.chunk_by(|a, b| (a.layer, a.role) == (b.layer, b.role));
    same.map(|modules| {
        let sum = |of: fn(&ModuleError) -> f64| modules.iter().map(of).sum::<f64>();
        let weights = sum(|module| module.weights);
        ProjectionError {
            layer: modules[0].layer,
            role: modules[0].role,
            modules: modules.len(),
            nmse: if weights == 0.0 { 0.0 } else { sum(|module| module.changed) / weights },
            max_relative: modules.iter().map(|m| m.max_relative).fold(0.0, f64::max),
        }
    })
    .collect()
}
