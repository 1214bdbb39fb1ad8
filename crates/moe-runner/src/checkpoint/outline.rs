//! A checkpoint before it is fetched: the tensors of its layers as `config.json` describes them, and
//! an index, where there is one, names them. Nothing in it can be read.

use std::path::Path;
use std::sync::Arc;

use super::architecture::{
    Experts, LayerEntry, LayerTensors, Part, Projection, Stack, StepTensors,
};
use super::container::Seen;
use super::file::{Entry, StoredDtype};
use super::folder::{has_weights, snapshot};
use super::quantization::InputScheme;
use super::quantization::{
    MlxMode, MxElement, Number, Quantization, ScaleShape, Scheme, WeightScheme,
};
use super::{Bytes, Checkpoint, Config, Dtype};
use crate::{Error, Result};

impl Checkpoint {
    /// Opens a checkpoint by its headers; or, before it is fetched, by its `config.json`, and its
    /// index where that is there. What those say is taken for what the files will hold.
    ///
    /// # Errors
    /// As [`Checkpoint::open`], and what `architecture::layers` says about the configuration.
    pub fn open_outline(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let opened = match Self::open(path) {
            Ok(opened) if opened.holds_tensors() => {
                return Ok(opened.outline());
            }
            Ok(without_files) => without_files,
            Err(error) => match Self::open_config(path)? {
                Some(config) => config,
                None => return Err(error),
            },
        };
        let names: Vec<&str> = opened.withheld().collect();
        let seen = if names.is_empty() { Seen::Config } else { Seen::Index };
        // first the names, which tell how experts are stored, then what stands behind them
        let unknown = |name: &&str| Entry {
            name: (*name).into(),
            dtype: StoredDtype::Unknown("?".into()),
            shape: Box::new([]),
            range: 0..0,
        };
        let named =
            opened.with_entries(names.iter().map(unknown).collect(), seen, Vec::new().into())?;
        let layers = super::architecture::layers(&named)?;
        let blanks = tensors(&named, &layers)?;
        let largest = blanks.iter().map(Blank::bytes).max().unwrap_or(0);
        let entry = |blank: Blank| Entry {
            range: 0..blank.bytes(),
            dtype: StoredDtype::Known(blank.dtype),
            shape: blank.shape.into(),
            name: blank.name.into(),
        };
        opened.with_entries(blanks.into_iter().map(entry).collect(), seen, zeros(path, largest)?)
    }

    /// A folder that holds a `config.json` and none of the model's files.
    fn open_config(path: &Path) -> Result<Option<Self>> {
        let path = &snapshot(path)?;
        let config = if path.is_dir() { path.join("config.json") } else { path.to_owned() };
        let is_config = config.file_name().is_some_and(|name| name == "config.json");
        let folder = config.parent().unwrap_or(path).to_owned();
        if !is_config || !config.is_file() || (path.is_dir() && has_weights(path)?) {
            return Ok(None);
        }
        Self::of_config(&folder, Config::open(&config)?).map(Some)
    }
}

/// A tensor that is expected, not seen.
struct Blank {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
}

impl Blank {
    /// Its size. Shapes come from a configuration, which may say anything.
    fn bytes(&self) -> usize {
        let elements = self.shape.iter().try_fold(1usize, |all, size| all.checked_mul(*size));
        elements.and_then(|n| n.checked_mul(self.dtype.size().unwrap_or(1))).unwrap_or(usize::MAX)
    }
}

/// That many zeros, none of which takes memory before it is looked at.
fn zeros(path: &Path, len: usize) -> Result<Bytes> {
    if len == 0 {
        return Ok(Vec::new().into());
    }
    blank(len).ok_or_else(|| {
        Error::file(path, format!("asks for a tensor of {len} bytes, which no address space holds"))
    })
}

#[cfg(feature = "mmap")]
fn blank(len: usize) -> Option<Bytes> {
    let mapped = memmap2::MmapOptions::new().len(len).no_reserve_swap().map_anon();
    let mapped = mapped.and_then(memmap2::MmapMut::make_read_only).ok()?;
    Some(Bytes::new(Arc::new(mapped)))
}

#[cfg(not(feature = "mmap"))]
fn blank(len: usize) -> Option<Bytes> {
    // an allocation that fails ends the program: first one that may
    Vec::<u8>::new().try_reserve_exact(len).ok()?;
    Some(vec![0; len].into())
}

/// Tensors of all layers, as their configuration says that they are stored.
fn tensors(checkpoint: &Checkpoint, layers: &[LayerEntry]) -> Result<Vec<Blank>> {
    let quantization = checkpoint.quantization()?;
    let float = match checkpoint.config() {
        Some(config) => dtype(config)?,
        None => Dtype::Bf16,
    };
    let mut outline = Outline { quantization, float, tensors: Vec::new() };
    for layer in layers {
        outline.layer(layer)?;
    }
    let mut tensors = outline.tensors;
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    tensors.dedup_by(|a, b| a.name == b.name);
    Ok(tensors)
}

/// The dtype that the model is published in.
fn dtype(config: &super::Config) -> Result<Dtype> {
    let keys = ["torch_dtype", "dtype", "text_config.torch_dtype", "text_config.dtype"];
    for key in keys {
        if let Some(name) = config.str(key)? {
            return Ok(match name {
                "float32" => Dtype::F32,
                "float16" => Dtype::F16,
                _ => Dtype::Bf16,
            });
        }
    }
    Ok(Dtype::Bf16)
}

struct Outline {
    quantization: Option<Arc<Quantization>>,
    float: Dtype,
    tensors: Vec<Blank>,
}

impl Outline {
    fn add(&mut self, name: String, dtype: Dtype, shape: Vec<usize>) {
        self.tensors.push(Blank { name, dtype, shape });
    }

    fn layer(&mut self, entry: &LayerEntry) -> Result<()> {
        let (spec, tensors) = (&entry.spec, &entry.tensors);
        let LayerTensors { gate_bias, correction, per_expert_scale, gate_input_scale, .. } =
            tensors;
        let router = &spec.router;
        let hidden = spec.dims.hidden;
        let vectors = [
            (gate_bias, router.logits()),
            (correction, router.choices()),
            (per_expert_scale, router.experts),
            (gate_input_scale, hidden),
            (&tensors.global_scale, 1),
            (&tensors.output_bias, hidden),
            (&tensors.output_norm, hidden),
        ];
        for (name, len) in vectors {
            if let Some(name) = name {
                self.add(name.clone(), Dtype::F32, vec![len]);
            }
        }
        if let (Some(name), crate::spec::Selection::HashTable { vocabulary }) =
            (&tensors.hash_table, router.selection)
        {
            self.add(name.clone(), Dtype::I64, vec![vocabulary, router.top_k]);
        }
        self.projection(&tensors.gate)?;
        self.experts(&tensors.experts)?;
        self.steps(&tensors.input_transform, hidden)?;
        self.steps(&tensors.output_transform, spec.dims.routed_hidden)?;
        if let Some(shared) = &tensors.shared {
            self.experts(&shared.experts)?;
            for name in
                [&shared.gate, &shared.input_norm, &shared.output_norm].into_iter().flatten()
            {
                self.add(name.clone(), self.float, vec![hidden]);
            }
        }
        Ok(())
    }

    fn steps(&mut self, steps: &[StepTensors], mut width: usize) -> Result<()> {
        for step in steps {
            match step {
                StepTensors::Linear(projection) => {
                    width = projection.rows;
                    self.projection(projection)?;
                }
                StepTensors::RmsNorm(name) => self.add(name.clone(), self.float, vec![width]),
            }
        }
        Ok(())
    }

    fn experts(&mut self, experts: &Experts) -> Result<()> {
        let arrays = if experts.get(0).up.part.stack.is_some() { 1 } else { experts.count };
        for index in 0..arrays.min(experts.count) {
            let expert = experts.get(index);
            for projection in expert.gate.iter().chain([&expert.up, &expert.down]) {
                self.projection(projection)?;
            }
            for bias in
                [&expert.gate_bias, &expert.up_bias, &expert.down_bias].into_iter().flatten()
            {
                let Part { of, stack, .. } = bias.part;
                let shape = stack.map(|stack| stack.count).into_iter().chain([of]).collect();
                self.add(bias.tensor.clone(), self.float, shape);
            }
            if let Some(norm) = &expert.norm {
                self.add(norm.clone(), self.float, vec![expert.down.rows]);
            }
        }
        Ok(())
    }

    /// The tensors of one module, all of a stack at once.
    fn projection(&mut self, projection: &Projection) -> Result<()> {
        let module = &projection.module;
        let scheme = match &self.quantization {
            Some(quantization) => quantization.scheme(module)?,
            None => Scheme::FLOAT,
        };
        let stack = projection.part.stack;
        let [rows, cols] = [projection.part.of, projection.cols];
        let shape = |dims: [usize; 2]| shape(stack, projection.transposed, dims);
        let add = |outline: &mut Self, ending: &str, dtype, shape| {
            outline.add(format!("{module}{ending}"), dtype, shape);
        };
        let scales = |of: ScaleShape| match of {
            ScaleShape::Tensor => [1, 1],
            ScaleShape::Channel => [rows, 1],
            ScaleShape::Group(size) => [rows, cols.div_ceil(size.max(1))],
            ScaleShape::Block([r, c]) => [rows.div_ceil(r.max(1)), cols.div_ceil(c.max(1))],
        };
        let gpt_oss = stack.is_some() && scheme.weights == WeightScheme::Mx(MxElement::Fp4);
        match scheme.weights {
            WeightScheme::Float => {
                let ending = if stack.is_some() { "" } else { ".weight" };
                add(self, ending, self.float, projection.stored_shape());
            }
            WeightScheme::Codes { number, scales: of } => {
                let dtype = if number == Number::Fp8 { Dtype::F8E4M3 } else { Dtype::I8 };
                add(self, ".weight", dtype, projection.stored_shape());
                add(self, ".weight_scale", Dtype::F32, shape(scales(of)));
            }
            WeightScheme::Packed { bits, scales: of, symmetric } => {
                let words = 32 / bits.clamp(1, 32);
                add(self, ".weight_packed", Dtype::I32, shape([rows, cols.div_ceil(words)]));
                add(self, ".weight_scale", self.float, shape(scales(of)));
                if !symmetric {
                    let [down, groups] = scales(of);
                    let zeros = [down.div_ceil(words), groups];
                    add(self, ".weight_zero_point", Dtype::I32, shape(zeros));
                }
            }
            WeightScheme::Nvfp4 => {
                add(self, ".weight_packed", Dtype::U8, shape([rows, cols / 2]));
                add(self, ".weight_scale", Dtype::F8E4M3, shape([rows, cols / 16]));
                add(self, ".weight_global_scale", Dtype::F32, vec![1]);
            }
            WeightScheme::Mlx(mode) => {
                let (bits, group, kind) = match mode {
                    MlxMode::Affine { bits, group } => (bits, group.max(1), self.float),
                    MlxMode::Mxfp4 => (4, 32, Dtype::U8),
                    MlxMode::Mxfp8 => (8, 32, Dtype::U8),
                    MlxMode::Nvfp4 => (4, 16, Dtype::U8),
                };
                add(self, ".weight", Dtype::U32, shape([rows, cols / 32 * bits]));
                add(self, ".scales", kind, shape([rows, cols / group]));
                if matches!(mode, MlxMode::Affine { .. }) {
                    add(self, ".biases", kind, shape([rows, cols / group]));
                }
            }
            WeightScheme::Mx(_) if gpt_oss => {
                let blocks = [rows, cols / 32];
                let mut codes = shape(blocks);
                codes.push(16);
                add(self, "_blocks", Dtype::U8, codes);
                add(self, "_scales", Dtype::U8, shape(blocks));
            }
            WeightScheme::Mx(element) => {
                let (dtype, bytes) = match element {
                    MxElement::Fp4 => (Dtype::U8, cols / 2),
                    MxElement::Fp6E2m3 | MxElement::Fp6E3m2 => (Dtype::U8, cols / 4 * 3),
                    MxElement::Fp8 => (Dtype::F8E4M3, cols),
                };
                add(self, ".weight", dtype, shape([rows, bytes]));
                add(self, ".weight_scale", Dtype::U8, shape([rows, cols / 32]));
            }
            WeightScheme::Gptq { bits, group, .. } => {
                let words = 32 / bits.clamp(1, 32);
                let groups = group.map_or(1, |size| cols.div_ceil(size.max(1)));
                add(self, ".qweight", Dtype::I32, vec![cols / words, rows]);
                add(self, ".scales", Dtype::F16, vec![groups, rows]);
                add(self, ".qzeros", Dtype::I32, vec![groups, rows / words]);
            }
            WeightScheme::KFirst { group, .. } => {
                let groups = group.map_or(1, |size| cols.div_ceil(size.max(1)));
                add(self, ".qweight", Dtype::I32, vec![cols, rows / 8]);
                add(self, ".scales", Dtype::F16, vec![groups, rows]);
                add(self, ".qzeros", Dtype::I32, vec![groups, rows / 8]);
            }
            WeightScheme::Int4TwoScales => {
                add(self, ".weight", Dtype::I32, shape([rows, cols / 8]));
                add(self, ".weight_scale_2", Dtype::F32, vec![rows]);
                add(self, ".weight_scale", Dtype::F32, vec![1]);
            }
        }
        match scheme.input {
            InputScheme::Fp8Static | InputScheme::Int8Static => {
                add(self, ".input_scale", Dtype::F32, vec![1]);
            }
            InputScheme::Nvfp4 => add(self, ".input_global_scale", Dtype::F32, vec![1]),
            _ => {}
        }
        Ok(())
    }
}

/// A matrix, or a stack of them; as it is stored.
fn shape(stack: Option<Stack>, transposed: bool, [rows, cols]: [usize; 2]) -> Vec<usize> {
    let dims = if transposed { [cols, rows] } else { [rows, cols] };
    match stack {
        Some(Stack { count, flat: true, .. }) => vec![count * dims[0], dims[1]],
        Some(Stack { count, .. }) => vec![count, dims[0], dims[1]],
        None => dims.to_vec(),
    }
}
