//! What is wrong with the quantisation of a layer's experts, beyond what keeps it from loading:
//! experts that a quantiser skipped, that calibration never reached, or that do not fit together.

use std::collections::BTreeMap;
use std::fmt;

use super::module::{Module, scale_of, scale_value};
use super::names;
use crate::checkpoint::architecture::{Experts, LayerEntry, Projection};
use crate::checkpoint::quantization::{InputScheme, Scheme, WeightScheme};
use crate::checkpoint::{Checkpoint, Dtype, StoredDtype, Tensor};
use crate::weights::load::Loader;
use crate::weights::{ScaleType, Scales};

/// Something that a user of the checkpoint should know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What it is.
    pub kind: FindingKind,
    /// The modules or tensors that it concerns, in order.
    pub names: Vec<String>,
    /// The first of them, in a sentence.
    pub detail: String,
}

/// Kinds of [`Finding`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum FindingKind {
    /// The configuration says quantised, the weights are floats.
    Skipped,
    /// A stored scale of activations is absent, not positive, not finite, or a placeholder.
    Uncalibrated,
    /// A scale of weights is NaN or infinite.
    BadScale,
    /// A scale of weights is so large or small that it can hardly be meant.
    AbsurdScale,
    /// Experts of the layer are stored in different formats.
    Inconsistent,
    /// Gate and up projection of an expert have different scales for their tensors. Nothing is
    /// lost here, each keeps its own; engines that merge the two use one of them.
    GateUpScales,
    /// Gate and up projections have different stored scales of activations. The one with the
    /// largest range counts for all.
    InputScales,
}

impl FindingKind {
    /// Whether outputs are wrong, or the checkpoint is not what its configuration says; the other
    /// kinds are worth knowing only.
    pub fn is_fault(self) -> bool {
        !matches!(self, Self::GateUpScales | Self::InputScales)
    }

    fn words(self) -> &'static str {
        match self {
            Self::Skipped => "left as floats, although the configuration says quantised",
            Self::Uncalibrated => "not calibrated",
            Self::BadScale => "with scales that are no numbers",
            Self::AbsurdScale => "with scales that cannot be meant",
            Self::Inconsistent => "in another format than the other experts",
            Self::GateUpScales => "where gate and up have different tensor scales",
            Self::InputScales => "where the scales of the same activations differ",
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = match self.names.len() {
            1 => "1 module".to_string(),
            many => format!("{many} modules"),
        };
        write!(f, "{count} {}: {}", self.kind.words(), self.detail)
    }
}

/// Scales of weights beyond these are called out: weights of published models, and their steps,
/// lie far inside.
const SANE: std::ops::RangeInclusive<f32> = 1e-20..=1e6;

/// Looks at the scales and formats of all experts, routed and shared, without decoding weights.
/// One finding for each kind; none where the checkpoint is not quantised or all is well. What
/// keeps the layer from loading at all, [`account`](crate::weights::account) tells.
pub fn diagnose(checkpoint: &Checkpoint, entry: &LayerEntry) -> Vec<Finding> {
    let mut loader = Loader::new(checkpoint);
    let mut findings = Findings::default();
    branch(&mut loader, &entry.tensors.experts, &mut findings);
    if let Some(shared) = &entry.tensors.shared {
        branch(&mut loader, &shared.experts, &mut findings);
    }
    findings.0.into_values().collect()
}

/// By kind.
#[derive(Default)]
struct Findings(BTreeMap<FindingKind, Finding>);

impl Findings {
    fn add(&mut self, kind: FindingKind, name: &str, detail: impl FnOnce() -> String) {
        let finding = self.0.entry(kind).or_insert_with(|| Finding {
            kind,
            names: Vec::new(),
            detail: format!("'{name}' {}", detail()),
        });
        if finding.names.last().is_none_or(|last| last != name) {
            finding.names.push(name.to_string());
        }
    }
}

/// What is seen of one projection.
struct Seen {
    dtype: String,
    global: Option<f32>,
    input: Option<f32>,
}

fn branch(loader: &mut Loader, experts: &Experts, findings: &mut Findings) {
    let mut formats: BTreeMap<String, usize> = BTreeMap::new();
    let mut modules: Vec<(String, String)> = Vec::new();
    let mut inputs: Vec<(String, f32)> = Vec::new();
    for index in 0..experts.count {
        let tensors = experts.get(index);
        let gate = tensors.gate.as_ref().map(|gate| (gate, look(loader, gate, findings)));
        let up = look(loader, &tensors.up, findings);
        let down = look(loader, &tensors.down, findings);
        if let Some((gate, seen)) = &gate
            && let (Some(a), Some(b)) = (seen.global, up.global)
            && a != b
        {
            findings.add(FindingKind::GateUpScales, &gate.module, || format!("has {a}, up {b}"));
        }
        let first = gate.iter().map(|(gate, seen)| (*gate, seen)).chain([(&tensors.up, &up)]);
        for (projection, seen) in first.clone() {
            inputs.extend(seen.input.map(|scale| (projection.module.clone(), scale)));
        }
        for (projection, seen) in first.chain([(&tensors.down, &down)]) {
            *formats.entry(seen.dtype.clone()).or_default() += 1;
            modules.push((projection.module.clone(), seen.dtype.clone()));
        }
    }
    let usual = formats.iter().max_by_key(|(_, count)| **count).map(|(dtype, _)| dtype.clone());
    for (module, dtype) in &modules {
        if usual.as_ref().is_some_and(|usual| usual != dtype) {
            findings.add(FindingKind::Inconsistent, module, || {
                format!("is {dtype}, most are {}", usual.clone().unwrap_or_default())
            });
        }
    }
    if let Some((first, scale)) = inputs.first() {
        for (module, other) in inputs.iter().filter(|(_, other)| other != scale) {
            findings.add(FindingKind::InputScales, module, || {
                format!("has {other}, '{first}' {scale}")
            });
        }
    }
}

fn look(loader: &mut Loader, projection: &Projection, findings: &mut Findings) -> Seen {
    let scheme = loader.scheme(&projection.module).unwrap_or(Scheme::FLOAT);
    let name = &projection.module;
    let mut module = Module { loader, projection };
    let codes = [names::PACKED_FLOATS, names::PACKED, names::QWEIGHT].concat();
    let dtype = module
        .name(&codes)
        .and_then(|name| module.loader.checkpoint().info(&name).map(|info| info.dtype.clone()));
    let float = matches!(dtype, Some(StoredDtype::Known(Dtype::F32 | Dtype::F16 | Dtype::Bf16)));
    let shown = dtype.map_or("absent".into(), |dtype| dtype.to_string());
    let mut seen = Seen { dtype: shown, global: None, input: None };
    // block types of GGUF may well differ between projections
    if module.loader.checkpoint().metadata().is_some() {
        seen.dtype = String::new();
        return seen;
    }
    if scheme.weights == WeightScheme::Float {
        return seen;
    }
    if float {
        findings.add(FindingKind::Skipped, name, || {
            format!("is {}, the configuration says {}", seen.dtype, scheme.weights)
        });
        return seen;
    }
    for endings in [names::SCALES, names::QSCALES] {
        if let Ok(Some(tensor)) = module.find(endings) {
            weight_scales(&tensor, findings);
        }
    }
    for endings in [names::ENCODE_SCALE, names::DECODE_SCALE] {
        if let Ok(Some(tensor)) = module.find(endings) {
            weight_scales(&tensor, findings);
            seen.global = scale_value(&tensor).ok();
        }
    }
    seen.input = input_scale(&mut module, scheme.input, findings);
    seen
}

fn weight_scales(tensor: &Tensor, findings: &mut Findings) {
    if tensor.blank {
        return;
    }
    let Some(kind) = scale_of(tensor.dtype) else { return };
    let Ok(scales) = Scales::vector(tensor.bytes.clone(), kind) else { return };
    // blocks of zeros have a scale of zero, or the smallest one; powers of two go further
    let sane = |scale: f32| match kind {
        ScaleType::E4m3 | ScaleType::E8m0 => true,
        _ => scale == 0.0 || SANE.contains(&scale.abs()),
    };
    for (index, scale) in scales.iter().enumerate() {
        if !scale.is_finite() {
            let detail = || format!("holds {scale} at {index}");
            return findings.add(FindingKind::BadScale, &tensor.name, detail);
        }
        if !sane(scale) {
            let detail = || format!("holds {scale} at {index}");
            return findings.add(FindingKind::AbsurdScale, &tensor.name, detail);
        }
    }
}

/// The stored scale of activations, where the scheme needs one.
fn input_scale(module: &mut Module, scheme: InputScheme, findings: &mut Findings) -> Option<f32> {
    let endings = match scheme {
        InputScheme::Fp8Static | InputScheme::Int8Static => names::INPUT_SCALE.to_vec(),
        InputScheme::Nvfp4 => {
            [names::INPUT_ENCODE_SCALE, names::INPUT_SCALE_2, names::INPUT_SCALE].concat()
        }
        _ => return None,
    };
    let name = module.projection.module.clone();
    let tensor = match module.find(&endings) {
        Ok(Some(tensor)) => tensor,
        _ => {
            let detail = || format!("has no '{}'", endings[0]);
            findings.add(FindingKind::Uncalibrated, &name, detail);
            return None;
        }
    };
    if tensor.blank {
        return None;
    }
    let problem = match scale_value(&tensor) {
        Ok(1.0) => Some("is exactly 1, which a quantiser writes before it has seen data".into()),
        Ok(scale) if !(1e-12..=1e12).contains(&scale) => Some(format!("is {scale}")),
        Ok(_) => None,
        Err(_) => {
            let value = tensor.to_f32().ok().and_then(|values| values.first().copied());
            Some(value.map_or("is unusable".into(), |value| format!("is {value}")))
        }
    };
    if let Some(problem) = problem {
        findings.add(FindingKind::Uncalibrated, &tensor.name, || problem);
        return None;
    }
    scale_value(&tensor).ok()
}
