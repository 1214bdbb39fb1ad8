//! Routing in files: the router's weights as they are written, and recorded choices.

use std::path::Path;

use anyhow::{Result, bail};
use moe_runner::checkpoint::Checkpoint;
use moe_runner::checkpoint::architecture::LayerEntry;
use moe_runner::router::{LogicalId, Routing, Trace};
use moe_runner::spec::{LayerSpec, ScaleOn};

/// What turns the router's weights into those that the experts' outputs are multiplied with: the
/// routed scaling factor, where the runner and not the router applies it.
pub(crate) fn weight_factor(spec: &LayerSpec) -> f32 {
    match spec.routed_scale.on {
        ScaleOn::Weights => 1.0,
        ScaleOn::Output => spec.routed_scale.factor,
    }
}

/// The experts that tokens chose in `layers`: from a routing trace, from what `run` writes
/// (`layers.N.topk_ids`, or `topk_ids` for a single layer), or from recordings
/// (`layers.N.TAG.topk_ids`, one call each).
pub(crate) fn load_trace(path: &Path, layers: &[&LayerEntry]) -> Result<Trace> {
    let file = Checkpoint::open_safetensors(path)?;
    let of_layer = |name: &str, spec: &LayerSpec| {
        let own = name.strip_prefix(&format!("layers.{}.", spec.index));
        own.is_some_and(|rest| rest == "topk_ids" || rest.ends_with(".topk_ids"))
            || (name == "topk_ids" && layers.len() == 1)
    };
    let found = layers.iter().any(|entry| file.names().any(|name| of_layer(name, &entry.spec)));
    if !found {
        if let Some(name) = file.names().find(|name| *name == "topk_ids") {
            bail!("{}: '{name}' is of one layer; name it with --layers", path.display());
        }
        // what `run` or a recording has of other layers
        let others =
            file.names().find(|name| name.starts_with("layers.") && name.ends_with("topk_ids"));
        if let Some(other) = others {
            bail!("{}: has '{other}', and nothing of the chosen layers", path.display());
        }
        return Ok(Trace::load(path)?);
    }
    let mut trace = Trace::new();
    for spec in layers.iter().map(|entry| &entry.spec) {
        for name in file.names().filter(|name| of_layer(name, spec)) {
            let tensor = file.require(name)?;
            let k = spec.router.top_k;
            let tokens = match tensor.shape[..] {
                [tokens, columns] if columns == k => tokens,
                _ => bail!(tensor.error(format!(
                    "has shape {:?}; layer {} needs [tokens, {k}]",
                    tensor.shape, spec.index
                ))),
            };
            let ids = tensor.to_i64()?;
            let choices = spec.router.choices();
            let known = |id: &i64| usize::try_from(*id).is_ok_and(|id| id < choices);
            if let Some(at) = ids.iter().position(|id| !known(id)) {
                bail!(tensor.error(format!("row {}: expert {} of {choices}", at / k, ids[at])));
            }
            let ids = ids.into_iter().map(|id| LogicalId(id as u32)).collect();
            let routing = Routing::from_parts(k, ids, vec![1.0; tokens * k])?;
            trace.record(&spec.name, &spec.router, &routing)?;
        }
    }
    Ok(trace)
}
