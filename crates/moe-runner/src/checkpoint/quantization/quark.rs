//! `quant_method: "quark"`: a scheme for all, others for layers by name, each from a description of
//! weights and input tensors.

use super::pattern::Pattern;
use super::{
    InputScheme, MxElement, Number, Rule, Rules, ScaleShape, Scheme, Unsupported, WeightScheme,
    block_size, patterns, positive,
};
use crate::Result;
use crate::checkpoint::Config;

type Outcome<T> = std::result::Result<T, Unsupported>;

pub(super) fn read(config: &Config) -> Result<Rules> {
    let interleaved = match config.str("export.pack_method")? {
        None | Some("reorder") => true,
        Some("order") => false,
        Some(other) => {
            let reason = format!("is '{other}'; supported are 'reorder' and 'order'");
            return Err(config.error("export.pack_method", reason));
        }
    };
    let ignored = patterns(config, "exclude", glob_or_regex)?;
    let mut rules = Vec::new();
    if let Some(layers) = config.sub("layer_quant_config")? {
        for name in layers.keys() {
            let Some(layer) = layers.entry(name)? else { continue };
            let modules = vec![glob_or_regex(&layers, name, name)?];
            rules.push(Rule { modules, scheme: scheme(&layer, interleaved)? });
        }
    }
    if let Some(types) = config.sub("layer_type_quant_config")?
        && let Some(linear) =
            types.entry("Linear").transpose().or(types.entry("nn.Linear").transpose())
    {
        let scheme = scheme(&linear?, interleaved)?;
        rules.push(Rule { modules: vec![Pattern::All], scheme });
    }
    if let Some(global) = config.sub("global_quant_config")? {
        let scheme = scheme(&global, interleaved)?;
        rules.push(Rule { modules: vec![Pattern::All], scheme });
    }
    Ok(Rules { ignored, rules })
}

fn glob_or_regex(config: &Config, key: &str, text: &str) -> Result<Pattern> {
    match text.starts_with("re:") {
        true => Pattern::name_or_regex(config, key, text),
        false => Pattern::glob(config, key, text),
    }
}

/// The description of one tensor.
struct Spec {
    dtype: String,
    scheme: String,
    group: Option<usize>,
    block: Option<Vec<usize>>,
    symmetric: bool,
    dynamic: bool,
    powers: bool,
}

impl Spec {
    fn read(config: &Config) -> Result<Self> {
        Ok(Self {
            dtype: config.str("dtype")?.unwrap_or_default().to_lowercase(),
            scheme: config.str("qscheme")?.unwrap_or_default().to_lowercase(),
            group: positive(config, "group_size")?,
            block: config.usize_list("block_size")?,
            symmetric: config.bool("symmetric")?.unwrap_or(true),
            dynamic: config.bool("is_dynamic")?.unwrap_or(false),
            powers: config.str("scale_format")? == Some("e8m0"),
        })
    }

    fn describe(&self) -> String {
        let dynamic = if self.dynamic { "dynamic" } else { "static" };
        format!("{dynamic} {} {}", self.dtype, self.scheme)
    }

    fn mx(&self) -> Option<MxElement> {
        if self.scheme != "per_group" || self.group != Some(32) || !self.powers {
            return None;
        }
        match self.dtype.as_str() {
            "fp4" => Some(MxElement::Fp4),
            "fp6_e2m3" => Some(MxElement::Fp6E2m3),
            "fp6_e3m2" => Some(MxElement::Fp6E3m2),
            "fp8_e4m3" => Some(MxElement::Fp8),
            _ => None,
        }
    }

    fn is_fp4_of_16(&self) -> bool {
        self.dtype == "fp4" && self.scheme == "per_group" && self.group == Some(16)
    }
}

/// One description, or the list of them that describes scales on two levels.
fn specs(config: &Config, key: &str) -> Result<Vec<Spec>> {
    if config.get(key).is_some_and(|value| value.is_array()) {
        return config.sub_list(key)?.iter().map(Spec::read).collect();
    }
    match config.sub(key)? {
        Some(one) => Ok(vec![Spec::read(&one)?]),
        None => Ok(Vec::new()),
    }
}

fn scheme(config: &Config, interleaved: bool) -> Result<Outcome<Scheme>> {
    for key in ["output_tensors", "bias"] {
        if config.get(key).is_some() {
            return Ok(Err(Unsupported::new(key, "is quantised, which is not supported")));
        }
    }
    let (weights, input) = (specs(config, "weight")?, specs(config, "input_tensors")?);
    if weights.is_empty() {
        return Ok(Ok(Scheme::FLOAT));
    }
    Ok(weight_scheme(&weights, interleaved).and_then(|weights| {
        let input = input_scheme(&input, weights)?;
        Ok(Scheme { weights, input })
    }))
}

fn weight_scheme(specs: &[Spec], interleaved: bool) -> Outcome<WeightScheme> {
    let unsupported = || {
        let described: Vec<String> = specs.iter().map(Spec::describe).collect();
        Unsupported::new(
            "weight",
            format!(
                "is {}; supported are fp8_e4m3 (per_tensor, per_channel, per_block), int8 \
                 (per_tensor, per_channel), int4 and uint4 (per_group, per_channel), fp4, fp6_e2m3, \
                 fp6_e3m2 and fp8_e4m3 per group of 32 with e8m0 scales, fp4 per group of 16 with \
                 two scales, int4 per channel with a scale for the tensor; static",
                described.join(" and ")
            ),
        )
    };
    if specs.iter().any(|spec| spec.dynamic) {
        return Err(unsupported());
    }
    let [spec] = specs else {
        let has = |test: &dyn Fn(&Spec) -> bool| specs.iter().any(test);
        return match specs.len() {
            2 if has(&Spec::is_fp4_of_16) => Ok(WeightScheme::Nvfp4),
            2 if has(&|s| s.dtype == "int4" && s.scheme == "per_channel") => {
                Ok(WeightScheme::Int4TwoScales)
            }
            _ => Err(unsupported()),
        };
    };
    if let Some(element) = spec.mx() {
        return Ok(WeightScheme::Mx(element));
    }
    let block = spec.block.as_deref().and_then(block_size);
    let scales = match (spec.scheme.as_str(), block, spec.group) {
        ("per_tensor", ..) => ScaleShape::Tensor,
        ("per_channel", ..) => ScaleShape::Channel,
        ("per_block", Some(block), _) => ScaleShape::Block(block),
        ("per_group", _, Some(size)) => ScaleShape::Group(size),
        _ => return Err(unsupported()),
    };
    let group = match scales {
        ScaleShape::Group(size) => Some(size),
        _ => None,
    };
    Ok(match (spec.dtype.as_str(), scales) {
        ("fp8_e4m3", _) => WeightScheme::Codes { number: Number::Fp8, scales },
        ("int8", ScaleShape::Tensor | ScaleShape::Channel) => {
            WeightScheme::Codes { number: Number::Int8, scales }
        }
        ("int4" | "uint4", ScaleShape::Channel | ScaleShape::Group(_)) => WeightScheme::KFirst {
            group,
            symmetric: spec.symmetric,
            interleaved,
            signed: spec.symmetric,
        },
        _ => return Err(unsupported()),
    })
}

fn input_scheme(specs: &[Spec], weights: WeightScheme) -> Outcome<InputScheme> {
    let unsupported = || {
        let described: Vec<String> = specs.iter().map(Spec::describe).collect();
        Unsupported::new(
            "input_tensors",
            format!(
                "are {}; supported are fp8_e4m3 and int8 (static per_tensor; dynamic per_tensor, \
                 per_channel), the OCP MX formats (dynamic), and nvfp4 for nvfp4 weights",
                described.join(" and ")
            ),
        )
    };
    let spec = match specs {
        [] => return Ok(InputScheme::None),
        [_, _] if weights == WeightScheme::Nvfp4 && specs.iter().any(Spec::is_fp4_of_16) => {
            return Ok(InputScheme::Nvfp4);
        }
        [spec] => spec,
        _ => return Err(unsupported()),
    };
    if let Some(element) = spec.mx() {
        // scales of MX activations are always taken from the values
        return if spec.dynamic { Ok(InputScheme::Mx(element)) } else { Err(unsupported()) };
    }
    Ok(match (spec.dtype.as_str(), spec.scheme.as_str(), spec.dynamic) {
        ("fp8_e4m3", "per_tensor", false) => InputScheme::Fp8Static,
        ("fp8_e4m3", "per_tensor" | "per_channel" | "per_token", true) => InputScheme::Fp8Token,
        ("int8", "per_tensor", false) => InputScheme::Int8Static,
        ("int8", "per_tensor" | "per_channel" | "per_token", true) => InputScheme::Int8Token,
        _ => return Err(unsupported()),
    })
}
