//! What the new checkpoint will hold, and in which files, before a weight is read.

use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::path::Path;

use super::format::{Format, dtype};
use super::{Options, Role};
use crate::checkpoint::architecture::{Experts, Form, LayerEntry, Projection};
use crate::checkpoint::quantization::{Quantization, Scheme};
use crate::checkpoint::{Checkpoint, Config, NewTensor};
use crate::spec::WeightFormat;
use crate::weights::{FloatType, LoadedLayer, Matrix, float};
use crate::{Error, Result};

/// Tensors that are written together.
pub(super) struct Unit {
    pub(super) tensors: Vec<NewTensor>,
    pub(super) content: Content,
}

/// Where a unit's contents come from.
pub(super) enum Content {
    /// The tensor of the same name, byte for byte.
    Copy,
    /// The modules of one expert.
    Expert(Expert),
}

/// One expert that is to be written.
pub(super) struct Expert {
    /// The decoder layer.
    pub(super) layer: usize,
    pub(super) modules: Vec<Module>,
    /// Taken out of a stack, but left as floats.
    pub(super) ignored: bool,
}

/// One module of the new checkpoint.
pub(super) struct Module {
    pub(super) role: Role,
    /// The module's name there.
    pub(super) name: String,
    /// The tensor that holds it now.
    pub(super) source: String,
    pub(super) matrix: Matrix,
    pub(super) float: FloatType,
}

impl Module {
    pub(super) fn dims(&self) -> [usize; 2] {
        [self.matrix.rows(), self.matrix.cols()]
    }

    /// An error about the tensor that holds the module now.
    pub(super) fn error(&self, checkpoint: &Checkpoint, reason: String) -> Error {
        let info = checkpoint.info(&self.source);
        let path = info.as_ref().map_or(checkpoint.path(), |info| info.file);
        Error::tensor(path, &self.source, reason)
    }
}

impl Unit {
    fn bytes(&self) -> u64 {
        self.tensors.iter().map(size).sum()
    }
}

/// Bytes of a tensor.
pub(super) fn size(tensor: &NewTensor) -> u64 {
    let elements: usize = tensor.shape.iter().product();
    (elements * tensor.dtype.size().unwrap_or(0)) as u64
}

/// The whole new checkpoint.
pub(super) struct Plan {
    /// Unit by unit, file by file.
    pub(super) shards: Vec<Vec<Unit>>,
    /// Modules that stay as they are.
    pub(super) ignore: Vec<String>,
}

impl Plan {
    /// # Errors
    /// What the checkpoint cannot be quantised for: see [`super::quantize`].
    pub(super) fn new(
        checkpoint: &Checkpoint,
        layers: &[LayerEntry],
        options: &Options,
    ) -> Result<Self> {
        let ignored = Ignored::new(checkpoint.path(), options.format, &options.ignore)?;
        let mut units = Vec::new();
        // tensors that the new checkpoint has in another form
        let mut replaced = BTreeSet::new();
        for entry in layers {
            // complete, and of the right shapes
            LoadedLayer::load(checkpoint, entry)?;
            let branches = [
                Some((&entry.tensors.experts, entry.tensors.experts_by_module.as_ref(), false)),
                entry.tensors.shared.as_ref().map(|shared| (&shared.experts, None, true)),
            ];
            for (stored, by_module, shared) in branches.into_iter().flatten() {
                let branch = Branch { checkpoint, entry, stored, by_module, shared };
                for expert in branch.experts(&ignored)? {
                    replaced.extend(expert.modules.iter().map(|module| module.source.clone()));
                    units.push(expert.unit(checkpoint, options.format)?);
                }
            }
        }
        if units.is_empty() {
            let reason = "has no expert that is not ignored: there is nothing to quantise";
            return Err(Error::file(checkpoint.path(), reason));
        }
        let mut left = Vec::new();
        for name in checkpoint.names().filter(|name| !replaced.contains(*name)) {
            let tensor = copied(checkpoint, name)?;
            if tensor.shape.len() == 2
                && let Some(module) = name.strip_suffix(".weight")
            {
                left.push(module.to_string());
            }
            units.push(Unit { tensors: vec![tensor], content: Content::Copy });
        }
        for pattern in &options.ignore {
            let alone =
                Ignored::new(checkpoint.path(), options.format, std::slice::from_ref(pattern))?;
            if !alone.any(&units)? {
                let reason = format!("'{pattern}' is the name of no module, and matches none");
                return Err(Error::config(checkpoint.path(), "ignore", reason));
            }
        }
        let mut ignore = options.ignore.clone();
        ignore.extend(left.into_iter().chain(["lm_head".to_string()]));
        ignore.extend(units.iter().flat_map(Unit::floats));
        ignore.sort();
        ignore.dedup();
        units.sort_by(|a, b| natural(&a.tensors[0].name, &b.tensors[0].name));
        Ok(Self { shards: shards(units, options.max_shard_bytes), ignore })
    }

    /// Bytes of all tensors.
    pub(super) fn bytes(&self) -> u64 {
        self.shards.iter().flatten().map(Unit::bytes).sum()
    }
}

impl Unit {
    /// Modules of an expert that stays in floats.
    fn floats(&self) -> impl Iterator<Item = String> {
        let expert = match &self.content {
            Content::Expert(expert) if expert.ignored => Some(expert),
            _ => None,
        };
        expert.into_iter().flat_map(|e| e.modules.iter().map(|module| module.name.clone()))
    }
}

/// Files of at most `max` bytes of tensors, as long as a unit is not larger by itself.
fn shards(units: Vec<Unit>, max: u64) -> Vec<Vec<Unit>> {
    let mut shards: Vec<Vec<Unit>> = Vec::new();
    let mut room = 0;
    for unit in units {
        let bytes = unit.bytes();
        match shards.last_mut() {
            Some(shard) if bytes <= room => {
                room -= bytes;
                shard.push(unit);
            }
            _ => {
                room = max.saturating_sub(bytes);
                shards.push(vec![unit]);
            }
        }
    }
    shards
}

/// What the caller wants left as it is, read as a reader of the new checkpoint will read it.
struct Ignored(Quantization);

impl Ignored {
    fn new(path: &Path, format: Format, patterns: &[String]) -> Result<Self> {
        let config = Config::new(path, format.config(patterns));
        Ok(Self(Quantization::read(&config)?))
    }

    /// Whether anything that the new checkpoint holds is ignored; the output head may be absent, and
    /// is never quantised.
    fn any(&self, units: &[Unit]) -> Result<bool> {
        let tensors = units.iter().flat_map(|unit| &unit.tensors);
        let names =
            tensors.map(|tensor| tensor.name.strip_suffix(".weight").unwrap_or(&tensor.name));
        for name in names.chain(["lm_head"]) {
            if self.0.scheme(name)? == Scheme::FLOAT {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether all of an expert's modules are ignored.
    ///
    /// # Errors
    /// [`Error::Config`] if only some are: no engine runs such an expert.
    fn expert(&self, modules: &[&str]) -> Result<bool> {
        Ok(self.0.common_scheme(modules)? == Scheme::FLOAT)
    }
}

/// The routed or the shared experts of a layer.
struct Branch<'a> {
    checkpoint: &'a Checkpoint,
    entry: &'a LayerEntry,
    stored: &'a Experts,
    by_module: Option<&'a Experts>,
    shared: bool,
}

impl Branch<'_> {
    /// The experts that the new checkpoint has in another form; none, where all are ignored.
    fn experts(&self, ignored: &Ignored) -> Result<Vec<Expert>> {
        let stack = self.stored.form != Form::Each;
        let experts = match (stack, self.by_module) {
            (false, _) => (0..self.stored.count).map(|e| self.modules(e)).collect::<Result<_>>()?,
            (true, Some(names)) if self.stored.bias.is_none() && !self.is_mixed() => {
                (0..self.stored.count).map(|e| self.unstacked(names, e)).collect::<Result<_>>()?
            }
            (true, _) if ignored.expert(&self.stack_names())? => Vec::new(),
            (true, _) => return Err(self.only_stacks()),
        };
        let mut kept = Vec::with_capacity(experts.len());
        for modules in experts {
            let names: Vec<&str> = modules.iter().map(|module| module.name.as_str()).collect();
            let ignored = ignored.expert(&names)?;
            kept.push(Expert { layer: self.entry.spec.index, modules, ignored });
        }
        // Where they have arrays of their own, or all of a stack is ignored, they can stay there.
        if !stack || kept.iter().all(|expert| expert.ignored) {
            kept.retain(|expert| !expert.ignored);
        }
        Ok(kept)
    }

    /// Whether routed and shared experts stand in one stack.
    fn is_mixed(&self) -> bool {
        self.stored.stacked != self.stored.count
    }

    fn stack_names(&self) -> Vec<&str> {
        let Experts { gate, up, down, .. } = self.stored;
        gate.iter().chain([up, down]).map(String::as_str).collect()
    }

    fn only_stacks(&self) -> Error {
        let kind = if self.shared { "shared experts" } else { "experts" };
        if self.is_mixed() {
            let reason = format!(
                "holds the routed and the shared experts of layer {} as one stack, which is not taken \
                 apart: ignore these experts",
                self.entry.spec.index
            );
            return Error::tensor(self.checkpoint.path(), &self.stored.up, reason);
        }
        if self.stored.bias.is_some() {
            let reason = format!(
                "holds the {kind} of layer {} as a stack with biases, which is not taken apart into \
                 a module for each expert: ignore these experts",
                self.entry.spec.index
            );
            return Error::tensor(self.checkpoint.path(), &self.stored.up, reason);
        }
        Error::tensor(
            self.checkpoint.path(),
            &self.stored.up,
            format!(
                "holds the {kind} of layer {} as a stack; for this architecture, no names for \
                 quantised experts are published that they could be written under. Quantised can \
                 be what has a module for each expert (such as Mixtral, Qwen, OLMoE, DeepSeek, GLM), \
                 or a stack in an architecture that also has those names (such as Llama 4)",
                self.entry.spec.index
            ),
        )
    }

    /// The modules of an expert that has its own arrays. Gate and up in one array are one module.
    fn modules(&self, index: usize) -> Result<Vec<Module>> {
        let tensors = self.stored.get(index);
        let mut modules = Vec::with_capacity(3);
        match tensors.gate {
            Some(gate) if gate.module == tensors.up.module => {
                let whole = Projection::whole(gate.module, gate.part.of, gate.cols);
                modules.push(self.module(Role::GateUp, whole.module.clone(), &whole)?);
            }
            gate => {
                for (role, projection) in
                    gate.map(|gate| (Role::Gate, gate)).into_iter().chain([(Role::Up, tensors.up)])
                {
                    modules.push(self.module(role, projection.module.clone(), &projection)?);
                }
            }
        }
        modules.push(self.module(Role::Down, tensors.down.module.clone(), &tensors.down)?);
        Ok(modules)
    }

    /// The modules of an expert of a stack, under the names that it has outside of one.
    fn unstacked(&self, names: &Experts, index: usize) -> Result<Vec<Module>> {
        let (stored, named) = (self.stored.get(index), names.get(index));
        let gate = stored.gate.zip(named.gate).map(|(from, to)| (Role::Gate, from, to));
        let others = [(Role::Up, stored.up, named.up), (Role::Down, stored.down, named.down)];
        gate.into_iter()
            .chain(others)
            .map(|(role, from, to)| self.module(role, to.module, &from))
            .collect()
    }

    fn module(&self, role: Role, name: String, stored: &Projection) -> Result<Module> {
        let checkpoint = self.checkpoint;
        let source = float::name(checkpoint, &stored.module).ok_or_else(|| {
            Error::tensor(checkpoint.path(), format!("{}.weight", stored.module), "is missing")
        })?;
        let matrix = float::view(&checkpoint.require(&source)?, stored)?;
        let float = match matrix.format() {
            WeightFormat::F16 => FloatType::F16,
            WeightFormat::Bf16 => FloatType::Bf16,
            _ => FloatType::F32,
        };
        let role = if self.shared { role.of_shared() } else { role };
        Ok(Module { role, name, source, matrix, float })
    }
}

impl Expert {
    fn unit(self, checkpoint: &Checkpoint, format: Format) -> Result<Unit> {
        let mut tensors = Vec::new();
        for module in &self.modules {
            let [rows, cols] = module.dims();
            if self.ignored {
                tensors.push(NewTensor {
                    name: format!("{}.weight", module.name),
                    dtype: dtype(module.float),
                    shape: vec![rows, cols],
                });
                continue;
            }
            if let Some(reason) = format.refuses(cols) {
                return Err(module.error(checkpoint, reason));
            }
            for (ending, dtype, shape) in format.tensors(module.float, [rows, cols]) {
                tensors.push(NewTensor { name: format!("{}{ending}", module.name), dtype, shape });
            }
        }
        Ok(Unit { tensors, content: Content::Expert(self) })
    }
}

/// A tensor that is copied.
fn copied(checkpoint: &Checkpoint, name: &str) -> Result<NewTensor> {
    let tensor = checkpoint.require(name)?;
    Ok(NewTensor { name: tensor.name, dtype: tensor.dtype, shape: tensor.shape })
}

/// Compares names with numbers in them, as people do: layer 2 before layer 10.
fn natural(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a, b);
    loop {
        let digits = |text: &str| text.bytes().take_while(u8::is_ascii_digit).count();
        match (digits(a), digits(b)) {
            (0, _) | (_, 0) => {
                let (mut left, mut right) = (a.chars(), b.chars());
                match (left.next(), right.next()) {
                    (None, None) => return Ordering::Equal,
                    (x, y) if x != y => return x.cmp(&y),
                    _ => (a, b) = (left.as_str(), right.as_str()),
                }
            }
            (x, y) => {
                let number = |text: &str, len| text[..len].trim_start_matches('0').to_owned();
                let (p, q) = (number(a, x), number(b, y));
                let order = p.len().cmp(&q.len()).then_with(|| p.cmp(&q)).then(x.cmp(&y));
                if order != Ordering::Equal {
                    return order;
                }
                (a, b) = (&a[x..], &b[y..]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_the_order_of_their_numbers() {
        let mut names = ["l.10.a", "l.2.b", "l.2.a", "l.x", "l", "l.02.a"];
        names.sort_by(|a, b| natural(a, b));
        assert_eq!(names, ["l", "l.2.a", "l.2.b", "l.02.a", "l.10.a", "l.x"]);
    }
}
