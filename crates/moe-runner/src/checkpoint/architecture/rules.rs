//! Which decoder layers are MoE.

use serde_json::Value;

use super::settings::{Keys, Settings};
use crate::Result;

/// Which decoder layers are MoE. A list `mlp_layer_types` in the config decides for every model.
#[derive(Clone, Copy)]
pub(super) enum LayerRule {
    /// All.
    Every,
    /// All from the number on that the key gives, and of those the ones that `moe_layer_freq`
    /// leaves, a period or a list of 0 and 1.
    AfterDense(Keys),
    /// Not in `mlp_only_layers` (default: these), and `(layer+1) % decoder_sparse_step == 0`.
    SparseStep(&'static [usize]),
    /// `layer % expert_layer_period == expert_layer_offset` (jamba).
    Period,
    /// `moe_layer_start_index..=moe_layer_end_index`, every `moe_layer_interval`-th (ernie).
    Interval,
    /// In `moe_layers`, else every `interleave_moe_layer_step`-th (llama4).
    Interleave,
    /// 'E' or "moe" in the pattern of layer kinds (nemotron_h).
    Pattern,
    /// In `moe_layers_enum`, a list or a string with commas; absent: all from 3 on (step3p7).
    Enumerated,
    /// `enable_moe_block`: all or none (gemma4).
    Enabled,
}

impl LayerRule {
    /// Whether decoder layer `layer` is MoE.
    pub(super) fn is_moe(self, settings: &Settings, layer: usize) -> Result<bool> {
        let size =
            |key: Keys, default| Ok::<_, crate::Error>(settings.size(key, 0)?.unwrap_or(default));
        let period = |key: Keys, default| match size(key, default)? {
            0 => Err(settings.error(key, "is 0; it must be positive")),
            period => Ok(period),
        };
        if let Some(kind) = listed_kind(settings, layer)? {
            return Ok(kind != "dense");
        }
        Ok(match self {
            Self::Every => true,
            Self::AfterDense(keys) => {
                let dense = settings.class.dense.unwrap_or(0);
                layer >= size(keys, dense)? && in_frequency(settings, layer)?
            }
            Self::SparseStep(default) => {
                let dense = settings.list(&["mlp_only_layers"])?;
                !dense.as_deref().unwrap_or(default).contains(&layer)
                    && (layer + 1).is_multiple_of(period(&["decoder_sparse_step"], 1)?)
            }
            Self::Period => {
                layer % period(&["expert_layer_period"], 2)? == size(&["expert_layer_offset"], 1)?
            }
            Self::Interval => {
                let end = match settings.integer(&["moe_layer_end_index"])? {
                    None | Some(-1) => settings.layers,
                    Some(end) => usize::try_from(end).map_err(|_| {
                        settings.error(&["moe_layer_end_index"], "must be a layer, or -1")
                    })?,
                };
                (size(&["moe_layer_start_index"], 1)?..=end).contains(&layer)
                    && (layer + 1).is_multiple_of(period(&["moe_layer_interval"], 1)?)
            }
            Self::Interleave => match settings.list(&["moe_layers"])? {
                Some(list) => list.contains(&layer),
                None => (layer + 1).is_multiple_of(period(&["interleave_moe_layer_step"], 1)?),
            },
            Self::Pattern => {
                let keys: Keys = &["hybrid_override_pattern", "layers_block_type"];
                let pattern = settings.pattern()?.ok_or_else(|| settings.missing(keys))?;
                let kind = pattern.get(layer).ok_or_else(|| {
                    let reason = format!("has {} layers of {}", pattern.len(), settings.layers);
                    settings.error(keys, reason)
                })?;
                kind == "E" || kind == "moe"
            }
            Self::Enumerated => {
                const KEY: &str = "moe_layers_enum";
                if settings.config.get(KEY).is_some_and(Value::is_array) {
                    return Ok(settings
                        .config
                        .usize_list(KEY)?
                        .is_some_and(|l| l.contains(&layer)));
                }
                match settings.config.str(KEY)? {
                    None => layer >= 3,
                    Some(list) => list.split(',').any(|item| item.trim().parse() == Ok(layer)),
                }
            }
            Self::Enabled => settings.flag(&["enable_moe_block"], false)?,
        })
    }
}

/// The layer's entry in `mlp_layer_types`, where the config has that list.
pub(super) fn listed_kind(settings: &Settings, layer: usize) -> Result<Option<String>> {
    let Some(kinds) = settings.config.str_list("mlp_layer_types")? else { return Ok(None) };
    match kinds.get(layer) {
        Some(kind @ (&"dense" | &"sparse" | &"moe" | &"hash_moe")) => Ok(Some((*kind).into())),
        Some(kind) => Err(settings.config.error(
            "mlp_layer_types",
            format!("has '{kind}' for layer {layer}; known are dense, sparse, moe and hash_moe"),
        )),
        None => Err(settings.config.error(
            "mlp_layer_types",
            format!("has {} entries; layer {layer} needs one", kinds.len()),
        )),
    }
}

fn in_frequency(settings: &Settings, layer: usize) -> Result<bool> {
    const KEY: Keys = &["moe_layer_freq"];
    if settings.config.get(KEY[0]).is_some_and(Value::is_array) {
        return Ok(settings.size(KEY, layer)? != Some(0));
    }
    match settings.size(KEY, layer)? {
        None => Ok(true),
        Some(0) => Err(settings.error(KEY, "is 0; it must be positive")),
        Some(period) => Ok(layer.is_multiple_of(period)),
    }
}
