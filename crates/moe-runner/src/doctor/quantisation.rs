//! What is wrong with the quantisation of a layer's experts, beyond what keeps it from loading:
//! experts that a quantiser skipped, that calibration never reached, or that do not fit together.
//! Formats and scales alone are looked at: no weight is read, and of an outline no scale either.

use std::collections::BTreeMap;

use super::finding::{About, FindingKind, Findings};
use crate::checkpoint::architecture::{Experts, LayerEntry, Projection};
use crate::checkpoint::quantization::{InputScheme, Scheme, WeightScheme};
use crate::checkpoint::{Checkpoint, Dtype, StoredDtype, Tensor};
use crate::weights::quant::{Module, names, scale_of, scale_value};
use crate::weights::{Loader, ScaleType, Scales};

/// Scales of weights beyond these are called out: weights of published models, and their steps,
/// lie far inside.
const SANE: std::ops::RangeInclusive<f32> = 1e-20..=1e6;

/// A range of activations so many times smaller than the median of the layer's is that of an expert
/// which calibration hardly reached. (Far larger ones are met in published models.)
const UNREACHED: f32 = 1024.0;

/// Looks at the scales and formats of all experts, routed and shared.
pub(super) fn look_at(checkpoint: &Checkpoint, entry: &LayerEntry, findings: &mut Findings) {
    let mut loader = Loader::new(checkpoint);
    branch(&mut loader, &entry.tensors.experts, true, findings);
    if let Some(shared) = &entry.tensors.shared {
        branch(&mut loader, &shared.experts, false, findings);
    }
}

/// What is seen of one projection.
struct Seen {
    /// `None`: there is none to compare.
    dtype: Option<String>,
    global: Option<f32>,
    input: Option<Input>,
}

/// A stored scale of activations.
#[derive(Clone, Copy)]
struct Input {
    scale: f32,
    /// In proportion to the largest value that it is for.
    range: f32,
}

/// A module of the branch, and what was seen of it.
struct Looked {
    expert: Option<usize>,
    module: String,
    seen: Seen,
}

fn branch(loader: &mut Loader, experts: &Experts, routed: bool, findings: &mut Findings) {
    // by role: gate and up see the same rows
    let (mut first, mut down): (Vec<Looked>, Vec<Looked>) = Default::default();
    for index in 0..experts.count {
        let tensors = experts.get(index);
        let expert = routed.then_some(index);
        let mut looked = |projection: &Projection| Looked {
            expert,
            module: projection.module.clone(),
            seen: look(loader, projection, expert, findings),
        };
        let gate = tensors.gate.as_ref().map(&mut looked);
        let up = looked(&tensors.up);
        down.push(looked(&tensors.down));
        if let Some(gate) = &gate
            && let (Some(a), Some(b)) = (gate.seen.global, up.seen.global)
            && a != b
        {
            let about = gate.about(loader.checkpoint());
            findings.add(FindingKind::GateUpScales, about, || format!("has {a}, up {b}"));
        }
        first.extend(gate);
        first.push(up);
    }
    let checkpoint = loader.checkpoint();
    let formats = || {
        let all = first.iter().chain(&down);
        all.filter_map(|looked| Some((looked, looked.seen.dtype.as_deref()?)))
    };
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    formats().for_each(|(_, dtype)| *counts.entry(dtype).or_default() += 1);
    if let Some((usual, _)) = counts.iter().max_by_key(|(_, count)| **count) {
        for (looked, dtype) in formats().filter(|(_, dtype)| dtype != usual) {
            findings.add(FindingKind::Inconsistent, looked.about(checkpoint), || {
                format!("is {dtype}, most are {usual}")
            });
        }
    }
    let mut inputs = first.iter().filter_map(|looked| Some((looked, looked.seen.input?.scale)));
    if let Some((one, scale)) = inputs.next() {
        for (looked, other) in inputs.filter(|(_, other)| *other != scale) {
            findings.add(FindingKind::InputScales, looked.about(checkpoint), || {
                format!("has {other}, '{}' {scale}", one.module)
            });
        }
    }
    for role in [&first, &down] {
        let mut ranges: Vec<f32> =
            role.iter().filter_map(|looked| Some(looked.seen.input?.range)).collect();
        ranges.sort_unstable_by(f32::total_cmp);
        let Some(median) = ranges.get(ranges.len() / 2) else { continue };
        for looked in role.iter() {
            let Some(Input { scale, range }) = looked.seen.input else { continue };
            if range < median / UNREACHED {
                findings.add(FindingKind::Uncalibrated, looked.about(checkpoint), || {
                    let times = median / range;
                    format!("has a scale of activations, {scale:e}, whose range is {times:.0} times smaller than that of the other experts")
                });
            }
        }
    }
}

impl Looked {
    fn about<'a>(&'a self, checkpoint: &'a Checkpoint) -> About<'a> {
        About {
            expert: self.expert,
            file: super::file_of(checkpoint, &self.module),
            name: &self.module,
        }
    }
}

fn look(
    loader: &mut Loader,
    projection: &Projection,
    expert: Option<usize>,
    findings: &mut Findings,
) -> Seen {
    let scheme = loader.scheme(&projection.module).unwrap_or(Scheme::FLOAT);
    let name = &projection.module;
    let mut module = Module { loader, projection };
    let mut codes = [names::PACKED_FLOATS, names::PACKED, names::QWEIGHT].into_iter();
    let dtype = codes
        .find_map(|endings| module.name(endings))
        .and_then(|name| module.loader.checkpoint().info(&name).map(|info| info.dtype.clone()));
    let float = matches!(dtype, Some(StoredDtype::Known(Dtype::F32 | Dtype::F16 | Dtype::Bf16)));
    let mut seen = Seen { dtype: dtype.map(|dtype| dtype.to_string()), global: None, input: None };
    // block types of GGUF may well differ between projections
    if module.loader.checkpoint().metadata().is_some() {
        seen.dtype = None;
        return seen;
    }
    if scheme.weights == WeightScheme::Float {
        return seen;
    }
    if float {
        let file = super::file_of(module.loader.checkpoint(), name);
        findings.add(FindingKind::Skipped, About { expert, file, name }, || {
            let dtype = seen.dtype.as_deref().unwrap_or_default();
            format!("is {dtype}, the configuration says {}", scheme.weights)
        });
        return seen;
    }
    let readable = !module.loader.checkpoint().is_outline();
    for endings in [names::SCALES, names::QSCALES, names::MINIMA].into_iter().filter(|_| readable) {
        if let Ok(Some(tensor)) = module.find(endings) {
            weight_scales(&tensor, expert, findings);
        }
    }
    for endings in [names::ENCODE_SCALE, names::DECODE_SCALE].into_iter().filter(|_| readable) {
        if let Ok(Some(tensor)) = module.find(endings) {
            weight_scales(&tensor, expert, findings);
            seen.global = scale_value(&tensor).ok();
        }
    }
    seen.input = input_scale(&mut module, scheme.input, expert, findings);
    seen
}

fn weight_scales(tensor: &Tensor, expert: Option<usize>, findings: &mut Findings) {
    let Some(kind) = scale_of(tensor.dtype) else { return };
    let Ok(scales) = Scales::vector(tensor.bytes.clone(), kind) else { return };
    // blocks of zeros have a scale of zero, or the smallest one; powers of two go further
    let sane = |scale: f32| match kind {
        ScaleType::E4m3 | ScaleType::E8m0 => true,
        _ => scale == 0.0 || SANE.contains(&scale.abs()),
    };
    for (index, scale) in scales.iter().enumerate() {
        let kind = match scale.is_finite() {
            false => FindingKind::BadScale,
            true if sane(scale) => continue,
            true => FindingKind::AbsurdScale,
        };
        let about = About { expert, file: &tensor.file, name: &tensor.name };
        return findings.add(kind, about, || format!("holds {scale} at {index}"));
    }
}

/// The stored scale of activations, where the scheme needs one.
fn input_scale(
    module: &mut Module,
    scheme: InputScheme,
    expert: Option<usize>,
    findings: &mut Findings,
) -> Option<Input> {
    let endings = match scheme {
        InputScheme::Fp8Static | InputScheme::Int8Static => names::INPUT_SCALE.to_vec(),
        InputScheme::Nvfp4 => {
            [names::INPUT_ENCODE_SCALE, names::INPUT_SCALE_2, names::INPUT_SCALE].concat()
        }
        _ => return None,
    };
    let tensor = match module.find(&endings) {
        Ok(Some(tensor)) => tensor,
        _ => {
            let name = &module.projection.module;
            let file = super::file_of(module.loader.checkpoint(), name);
            findings.add(FindingKind::Uncalibrated, About { expert, file, name }, || {
                format!("has no '{}'", endings[0])
            });
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
        let about = About { expert, file: &tensor.file, name: &tensor.name };
        findings.add(FindingKind::Uncalibrated, about, || problem);
        return None;
    }
    let scale = scale_value(&tensor).ok()?;
    let divides = names::INPUT_ENCODE_SCALE.iter().any(|ending| tensor.name.ends_with(ending));
    Some(Input { scale, range: if divides { 1.0 / scale } else { scale } })
}
