//! One rank's share of a layer's weights. Every share is a view; nothing is copied.
//!
//! | tensor | expert parallel | slices (rank r of n) |
//! |---|---|---|
//! | gate, up (and biases) | whole, of this rank's experts | rows of I |
//! | down | whole | columns of I |
//! | down bias | whole | on rank 0 alone: the sum over ranks must hold it once |
//! | scales, zero points | with their weights | with their weights |
//! | gate of the router, transforms, output norm and bias | whole | whole |

use std::ops::Range;

use crate::comm::Sizes;
use crate::exchange::{ExpertMap, share};
use crate::spec::LayerSpec;
use crate::weights::{Expert, LoadedLayer};
use crate::{Error, Result};

/// The part of `layer` that flat rank `rank` of a deployment holds. `map` says which whole experts,
/// under expert parallelism; otherwise it is not read.
///
/// # Errors
/// [`Error::Spec`] where the layer cannot be cut so, with the reason and what else would work.
pub fn shard(
    layer: &LoadedLayer,
    sizes: Sizes,
    rank: usize,
    map: &ExpertMap,
) -> Result<LoadedLayer> {
    let spec = &layer.spec;
    let mut out = layer.clone();
    if sizes.use_ep() {
        out.experts =
            map.held_by(rank).iter().map(|id| layer.experts[id.index()].clone()).collect();
    } else if sizes.moe_tp() > 1 {
        if spec.expert.norm.is_some() {
            return Err(refuse(spec, "each expert's output is normalised, which needs all of it"));
        }
        let (part, parts) = (rank, sizes.moe_tp());
        out.experts = slices(spec, &layer.experts, part, parts)?;
    }
    if sizes.tp > 1
        && sizes.sp() == 1
        && let Some(shared) = &mut out.shared
    {
        shared.experts = slices(spec, &shared.experts, sizes.tp_rank(rank), sizes.tp)?;
    }
    Ok(out)
}

fn refuse(spec: &LayerSpec, reason: &str) -> Error {
    Error::Spec {
        layer: spec.name.clone(),
        reason: format!(
            "experts cannot be cut into slices: {reason}; whole experts can be dealt to ranks \
             (expert parallelism)"
        ),
    }
}

fn slices(spec: &LayerSpec, experts: &[Expert], part: usize, parts: usize) -> Result<Vec<Expert>> {
    experts.iter().map(|expert| slice(spec, expert, part, parts)).collect()
}

/// Slice `part` of `parts` of one expert's intermediate width. Where rows are quantised in groups
/// between the two products, slices hold whole groups, so that every group's scale is the same as
/// on one rank.
fn slice(spec: &LayerSpec, expert: &Expert, part: usize, parts: usize) -> Result<Expert> {
    let intermediate = expert.up.rows();
    let group = expert.down.input.group().unwrap_or(1);
    let units = intermediate.div_ceil(group);
    let Range { start, end } = share(units, part, parts);
    let range = start * group..intermediate.min(end * group);
    if units < parts {
        return Err(refuse(
            spec,
            &format!("{units} groups of {group} columns do not go round {parts} ranks"),
        ));
    }
    let rows = |matrix: &crate::weights::Matrix| matrix.rows_of(range.start, 1, range.len());
    let missing = || refuse(spec, "an expert is narrower than the layer");
    let vector = |values: &Option<Vec<f32>>| values.as_ref().map(|v| v[range.clone()].to_vec());
    Ok(Expert {
        gate: match &expert.gate {
            Some(gate) => Some(rows(gate).ok_or_else(missing)?),
            None => None,
        },
        up: rows(&expert.up).ok_or_else(missing)?,
        down: expert.down.cols_of(range.clone()).ok_or_else(missing)?,
        gate_bias: vector(&expert.gate_bias),
        up_bias: vector(&expert.up_bias),
        down_bias: if part == 0 { expert.down_bias.clone() } else { None },
        norm: expert.norm.clone(),
    })
}
