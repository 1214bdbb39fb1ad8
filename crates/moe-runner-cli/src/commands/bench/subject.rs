//! The layers that are measured: one of a checkpoint, or a preset's with random weights.

use anyhow::Result;
use moe_kernels::limits::last_level_cache;
use moe_runner::checkpoint::Checkpoint;
use moe_runner::hidden::ActivationDtype;
use moe_runner::random::Random;
use moe_runner::spec::{Correction, LayerSpec, RouterSpec};
use moe_runner::weights::{GateWeights, LoadedLayer, RandomFormat, random_layer, random_matrix};

use crate::args::{BenchArgs, Common};
use crate::checkpoints::Opened;
use crate::failure::unusable;
use crate::report::units::plural;
use crate::{formats, memory, presets};

/// Distinct weights of a preset that are touched in turn, at least: far more than caches hold.
const DISTINCT_BYTES: usize = 1 << 30;

/// What is this many times a cache's size does not stay there: hits are one in four at most.
const BEYOND_CACHE: usize = 4;

/// The last-level cache, where the machine does not tell: what large servers have a processor.
const USUAL_CACHE: usize = 64 << 20;

/// What is measured.
pub(super) struct Subject {
    /// Run in turn.
    pub(super) layers: Vec<LoadedLayer>,
    pub(super) title: String,
    pub(super) format: String,
    pub(super) dtype: ActivationDtype,
    pub(super) distinct_bytes: usize,
    /// `None` for a preset.
    pub(super) checkpoint: Option<Checkpoint>,
}

impl Subject {
    /// What the arguments name.
    pub(super) fn of(args: &BenchArgs, common: &Common) -> Result<Self> {
        match (&args.checkpoint, &args.preset) {
            (Some(_), None) if args.format.is_some() => {
                Err(unusable("--format is for presets; a checkpoint has its own"))
            }
            (None, Some(_)) if args.layers.is_some() => {
                Err(unusable("--layer is for checkpoints; a preset is one layer"))
            }
            (Some(path), None) => {
                let opened = Opened::open(path)?;
                let entry = match &args.layers {
                    None => &opened.layers[0],
                    Some(layer) => match opened.select(layer)?[..] {
                        [entry] => entry,
                        _ => return Err(unusable("--layer: bench takes one layer")),
                    },
                };
                let layer = common.quantising(opened.load(entry)?)?;
                let mut formats: Vec<String> =
                    layer.experts.iter().map(|expert| expert.up.format().to_string()).collect();
                formats.dedup();
                let experts = layer.experts.iter();
                let matrices = experts.flat_map(|e| e.gate.iter().chain([&e.up, &e.down]));
                Ok(Self {
                    title: title(&format!("{}, {}", path.display(), entry.spec.name), &entry.spec),
                    format: formats.join(" and "),
                    dtype: opened.dtype(common.dtype, &layer),
                    distinct_bytes: matrices.map(|matrix| matrix.stored_bytes()).sum(),
                    layers: vec![layer],
                    checkpoint: Some(opened.checkpoint),
                })
            }
            (None, Some(name)) => {
                let preset = presets::find(name)?;
                let name = args.format.as_deref().unwrap_or(preset.format);
                let format = formats::find(name)?;
                let spec = preset.spec();
                let (layers, distinct_bytes) = synthetic(&spec, format, name, common.seed)?;
                let layers = layers.into_iter().map(|layer| common.quantising(layer));
                let layers = layers.collect::<Result<_>>()?;
                Ok(Self {
                    title: title(preset.name, &spec),
                    format: name.to_ascii_lowercase(),
                    dtype: common.dtype.unwrap_or(formats::activations(format)),
                    layers,
                    distinct_bytes,
                    checkpoint: None,
                })
            }
            _ => Err(unusable(format!(
                "bench needs a checkpoint or a preset; presets are {}",
                presets::names()
            ))),
        }
    }

    /// Whether so few distinct weights may stay in the last-level cache of the processor.
    pub(super) fn is_cached(&self, on_gpu: bool) -> bool {
        let cache = last_level_cache().filter(|_| !on_gpu).unwrap_or(USUAL_CACHE);
        self.distinct_bytes / BEYOND_CACHE < cache
    }
}

fn title(name: &str, spec: &LayerSpec) -> String {
    format!(
        "{name}: {}, top-{}, hidden {}, intermediate {}",
        plural(spec.router.experts, "expert"),
        spec.router.top_k,
        spec.dims.hidden,
        spec.dims.intermediate
    )
}

/// Layers with random weights, and the bytes of them that differ. All experts of a large model
/// would not fit into memory, and would say nothing more: distinct weights beyond what caches hold
/// are made once, and the experts take them in turn.
fn synthetic(
    spec: &LayerSpec,
    format: RandomFormat,
    name: &str,
    seed: u64,
) -> Result<(Vec<LoadedLayer>, usize)> {
    let (hidden, intermediate) = (spec.dims.routed_hidden, spec.dims.intermediate);
    let in_bytes = format.bytes(intermediate, hidden);
    let (Some(in_bytes), Some(down_bytes)) = (in_bytes, format.bytes(hidden, intermediate)) else {
        return Err(unusable(format!(
            "--format {name}: its rows are whole blocks, and rows of {hidden} and {intermediate} \
             weights are not; choose another format"
        )));
    };
    let expert_bytes = down_bytes + in_bytes * if spec.expert.gated { 2 } else { 1 };
    let beyond = last_level_cache().unwrap_or(0).saturating_mul(BEYOND_CACHE).max(DISTINCT_BYTES);
    let wanted = memory::available().map_or(beyond, |free| beyond.min(free / 4));
    let distinct = wanted.div_ceil(expert_bytes).clamp(1, spec.router.experts);
    memory::ensure(
        distinct * expert_bytes,
        "a layer of this shape",
        "choose a smaller preset or format",
    )?;
    let layers = wanted.div_ceil(spec.router.experts * expert_bytes).max(1);
    let made = (0..layers as u64).map(|i| layer_of(spec, distinct, format, seed.wrapping_add(i)));
    let made = made.collect::<Result<Vec<_>>>()?;
    Ok((made, layers * distinct * expert_bytes))
}

/// A layer whose experts share the weights of `distinct` ones.
fn layer_of(
    spec: &LayerSpec,
    distinct: usize,
    format: RandomFormat,
    seed: u64,
) -> Result<LoadedLayer> {
    let few = LayerSpec {
        router: RouterSpec::softmax(distinct, spec.router.top_k.min(distinct), true),
        ..spec.clone()
    };
    let layer = random_layer(&few, format, seed)?;
    let mut random = Random::new(seed);
    let router = &spec.router;
    let gate = GateWeights {
        weight: random_matrix(&mut random, format.float(), router.logits(), spec.dims.hidden),
        bias: spec.gate.bias.then(|| random.values(router.logits(), 0.5)),
        // what balances the load of a trained layer would unbalance this one's
        correction: (router.correction != Correction::None)
            .then(|| random.values(router.choices(), 0.01)),
        per_expert_scale: None,
        input_scale: None,
        hash_table: None,
    };
    let experts = (0..router.experts).map(|e| layer.experts[e % distinct].clone()).collect();
    Ok(LoadedLayer { spec: spec.clone(), gate: Some(gate), experts, ..layer })
}
