//! MLX's own quantisation: one scheme for every module that has scales, and under the names of modules
//! what they have instead. The options stand in `quantization` as in `quantization_config`, without a
//! `quant_method`.

use serde_json::Value;

use super::pattern::Pattern;
use super::{MlxMode, Rule, Rules, Scheme, Unsupported, WeightScheme, positive};
use crate::Result;
use crate::checkpoint::Config;

/// Whether a configuration is MLX's own.
pub(super) fn is_own(config: &Config) -> bool {
    let has = |key| config.get(key).is_some();
    !has("quant_method") && has("bits") && has("group_size")
}

pub(super) fn read(config: &Config) -> Result<Rules> {
    let (mut ignored, mut rules) = (Vec::new(), Vec::new());
    for name in config.keys() {
        let module = || Pattern::Name(name.to_string());
        match config.named(name) {
            Some(Value::Bool(false)) => ignored.push(module()),
            Some(Value::Object(_)) => {
                let Some(own) = config.entry(name)? else { continue };
                rules.push(Rule { modules: vec![module()], scheme: scheme(&own)? });
            }
            // `true` means as all others
            _ => {}
        }
    }
    rules.push(Rule { modules: vec![Pattern::All], scheme: scheme(config)? });
    Ok(Rules { ignored, rules })
}

/// What `mode`, `bits` and `group_size` come to; what is left out has the mode's own value.
fn scheme(config: &Config) -> Result<std::result::Result<Scheme, Unsupported>> {
    let bits = config.usize("bits")?;
    let group = positive(config, "group_size")?;
    let name = config.str("mode")?.unwrap_or("affine");
    let (mode, only) = match name {
        "affine" => {
            let (bits, group) = (bits.unwrap_or(4), group.unwrap_or(64));
            if !MlxMode::BITS.contains(&bits) {
                let reason = format!("is {bits}; supported are {:?}", MlxMode::BITS);
                return Ok(Err(Unsupported::new("bits", reason)));
            }
            (MlxMode::Affine { bits, group }, (bits, group))
        }
        "mxfp4" => (MlxMode::Mxfp4, (4, 32)),
        "mxfp8" => (MlxMode::Mxfp8, (8, 32)),
        "nvfp4" => (MlxMode::Nvfp4, (4, 16)),
        other => {
            let reason =
                format!("is '{other}'; supported are 'affine', 'mxfp4', 'mxfp8' and 'nvfp4'");
            return Ok(Err(Unsupported::new("mode", reason)));
        }
    };
    if (bits.unwrap_or(only.0), group.unwrap_or(only.1)) != only {
        let (bits, group) = only;
        let reason = format!("is '{name}', which has {bits} bits and groups of {group} alone");
        return Ok(Err(Unsupported::new("mode", reason)));
    }
    Ok(Ok(Scheme::weights_only(WeightScheme::Mlx(mode))))
}
