//! `quant_method: "modelopt"`, and `hf_quant_config.json`: one algorithm, or one for each layer.

use super::pattern::Pattern;
use super::{
    InputScheme, MxElement, Number, Rule, Rules, ScaleShape, Scheme, Unsupported, WeightScheme,
    patterns,
};
use crate::Result;
use crate::checkpoint::Config;

pub(super) fn read(config: &Config) -> Result<Rules> {
    // flat in config.json, one level down in hf_quant_config.json
    let nested = config.sub("quantization")?;
    let config = nested.as_ref().unwrap_or(config);
    let mut ignored = patterns(config, "ignore", Pattern::glob)?;
    ignored.extend(patterns(config, "exclude_modules", Pattern::glob)?);
    let algorithm = config.str("quant_algo")?.ok_or_else(|| config.missing("quant_algo"))?;
    if !algorithm.eq_ignore_ascii_case("MIXED_PRECISION") {
        return Ok(Rules::all(ignored, scheme(algorithm, config)?));
    }
    let layers =
        config.sub("quantized_layers")?.ok_or_else(|| config.missing("quantized_layers"))?;
    let mut rules = Vec::new();
    for name in layers.keys() {
        let Some(layer) = layers.entry(name)? else { continue };
        let Some(algorithm) = layer.str("quant_algo")? else { continue };
        let modules = vec![Pattern::glob(&layers, name, name)?];
        rules.push(Rule { modules, scheme: scheme(algorithm, &layer)? });
    }
    Ok(Rules { ignored, rules })
}

/// Rules of ModelOpt, in front of those of the model that it made a copy of.
pub(super) fn over(config: &Config, model: Rules) -> Result<Rules> {
    let mut rules = read(config)?;
    // what ModelOpt left alone is stored as the model has it: its rules stand before the list
    rules.rules.extend(model.rules);
    rules.ignored = model.ignored;
    Ok(rules)
}

/// What an algorithm means; `config` is what stands beside its name.
fn scheme(algorithm: &str, config: &Config) -> Result<std::result::Result<Scheme, Unsupported>> {
    let size = config.usize("group_size")?.filter(|size| *size > 0);
    Ok(known(algorithm, size.unwrap_or(128)))
}

/// `size`: rows and columns of a block of FP8.
fn known(algorithm: &str, size: usize) -> std::result::Result<Scheme, Unsupported> {
    let fp8 = |scales| WeightScheme::Codes { number: Number::Fp8, scales };
    Ok(match algorithm.to_uppercase().as_str() {
        "FP8" => Scheme { weights: fp8(ScaleShape::Tensor), input: InputScheme::Fp8Static },
        "FP8_PER_CHANNEL_PER_TOKEN" => {
            Scheme { weights: fp8(ScaleShape::Channel), input: InputScheme::Fp8Token }
        }
        "FP8_PB_WO" => Scheme::weights_only(fp8(ScaleShape::Block([size, size]))),
        "FP8_BLOCK_SCALES" => Scheme {
            weights: fp8(ScaleShape::Block([size, size])),
            input: InputScheme::Fp8Group { size, power_of_two: false },
        },
        "NVFP4" => Scheme { weights: WeightScheme::Nvfp4, input: InputScheme::Nvfp4 },
        "W4A16_NVFP4" | "NVFP4_W4A16" => Scheme::weights_only(WeightScheme::Nvfp4),
        "MXFP8" => Scheme {
            weights: WeightScheme::Mx(MxElement::Fp8),
            input: InputScheme::Mx(MxElement::Fp8),
        },
        other => {
            return Err(Unsupported::new(
                "quant_algo",
                format!(
                    "is '{other}'; supported are FP8, FP8_PER_CHANNEL_PER_TOKEN, FP8_PB_WO, \
                     FP8_BLOCK_SCALES, NVFP4, W4A16_NVFP4, MXFP8 and MIXED_PRECISION"
                ),
            ));
        }
    })
}
