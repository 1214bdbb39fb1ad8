//! `quant_method: "fp8"` and `"mxfp4"`: the formats of transformers itself.

use super::pattern::Pattern;
use super::{
    InputScheme, MxElement, Number, Rule, Rules, ScaleShape, Scheme, WeightScheme, block_size,
    patterns,
};
use crate::Result;
use crate::checkpoint::Config;

/// Modules that both methods leave alone.
fn ignored(config: &Config) -> Result<Vec<Pattern>> {
    let mut ignored = patterns(config, "ignored_layers", Pattern::components)?;
    ignored.extend(patterns(config, "modules_to_not_convert", Pattern::components)?);
    Ok(ignored)
}

/// FP8, one scale for a tensor or for each block. `experts`: what the model says about its routed
/// experts, which may be FP4 in blocks of 32 (DeepSeek-V4); their rows are quantised as all others.
pub(super) fn fp8(config: &Config, experts: Option<&str>) -> Result<Rules> {
    let is_static = match config.str("activation_scheme")? {
        None | Some("dynamic") => false,
        Some("static") => true,
        Some(other) => {
            let reason = format!("is '{other}'; supported are 'dynamic' and 'static'");
            return Err(config.error("activation_scheme", reason));
        }
    };
    const BLOCK: &str = "weight_block_size";
    let block = match config.usize_list(BLOCK)? {
        None => None,
        Some(sizes) => Some(block_size(&sizes).ok_or_else(|| {
            let reason = format!("is {sizes:?}; it must be the rows and columns of a block");
            config.error(BLOCK, reason)
        })?),
    };
    let power_of_two = config.str("scale_fmt")? == Some("ue8m0");
    let (scales, input) = match block {
        Some(_) if is_static => {
            return Err(config.error(
                "activation_scheme",
                "is 'static', but weights have scales of blocks: their activations are dynamic",
            ));
        }
        Some(block) => {
            (ScaleShape::Block(block), InputScheme::Fp8Group { size: block[1], power_of_two })
        }
        None if is_static => (ScaleShape::Tensor, InputScheme::Fp8Static),
        None => (ScaleShape::Tensor, InputScheme::Fp8Token),
    };
    let weights = WeightScheme::Codes { number: Number::Fp8, scales };
    let mut rules = Rules::all(ignored(config)?, Ok(Scheme { weights, input }));
    let fp4 = WeightScheme::Mx(MxElement::Fp4);
    match experts {
        None | Some("fp8" | "bf16" | "bfloat16") => {}
        Some("fp4" | "mxfp4") => rules.rules.insert(
            0,
            Rule { modules: vec![Pattern::Experts], scheme: Ok(Scheme { weights: fp4, input }) },
        ),
        Some(other) => {
            let reason = format!("is '{other}'; known are 'fp4', 'fp8' and 'bf16'");
            return Err(config.error("expert_dtype", reason));
        }
    }
    Ok(rules)
}

/// gpt-oss.
pub(super) fn mxfp4(config: &Config) -> Result<Rules> {
    let scheme = Scheme::weights_only(WeightScheme::Mx(MxElement::Fp4));
    Ok(Rules::all(ignored(config)?, Ok(scheme)))
}
