//! The rules of a router, as kernels take them.

use moe_cuda::router::{
    self as cuda, RouterOptions, RouterTensors as CudaTensors, Score as CudaScore,
};

use super::device::{Device, error};
use super::upload::Upload;
use crate::spec::{
    Correction, GroupFill, GroupScore, IdleExperts, LayerSpec, Renormalise, RouterSpec, ScaleOn,
    Score, Selection, WeightFrom,
};
use crate::weights::GateWeights;
use crate::{Error, Result};

/// The router with its tensors on the device.
pub(super) fn router(
    upload: &Upload<'_>,
    device: &Device,
    spec: &LayerSpec,
    gate: Option<&GateWeights>,
) -> Result<cuda::Router> {
    let scale = match spec.routed_scale.on {
        ScaleOn::Weights => spec.routed_scale.factor,
        ScaleOn::Output => 1.0,
    };
    let floats = |values: Option<&Vec<f32>>| values.map(|v| upload.vector(v)).transpose();
    let table = gate.and_then(|gate| gate.hash_table.as_ref());
    let tensors = CudaTensors {
        bias: floats(gate.and_then(|gate| gate.correction.as_ref()))?,
        per_expert_scale: floats(gate.and_then(|gate| gate.per_expert_scale.as_ref()))?,
        table: table.map(|table| upload.ids(table)).transpose()?,
    };
    let options = options(&spec.router, scale);
    cuda::Router::new(&device.modules, options, tensors).map_err(|refused| match refused {
        moe_cuda::Error::Input { what, reason } => Error::NoKernel(format!("{what}: {reason}")),
        other => error(other),
    })
}

/// A router's options as kernels take them.
fn options(spec: &RouterSpec, scale: f32) -> RouterOptions {
    RouterOptions {
        experts: spec.experts,
        idle: match spec.idle {
            Some(IdleExperts::Identity { count } | IdleExperts::Skip { count }) => count,
            None => 0,
        },
        shared: match spec.weight_from {
            WeightFrom::JointSoftmax { shared } => shared,
            _ => 0,
        },
        top_k: spec.top_k,
        logit_multiplier: spec.logit_multiplier,
        soft_cap: spec.soft_cap,
        score: match spec.score {
            Score::Softmax => CudaScore::Softmax,
            Score::Sigmoid => CudaScore::Sigmoid,
            Score::SqrtSoftplus => CudaScore::SqrtSoftplus,
            Score::Logits => CudaScore::Logits,
        },
        correction: match spec.correction {
            Correction::None => cuda::Correction::None,
            Correction::OnScore => cuda::Correction::OnScore,
            Correction::OnLogits => cuda::Correction::OnLogits,
        },
        groups: spec.groups.map(|groups| cuda::Groups {
            count: groups.count,
            keep: groups.keep,
            top_two_sum: groups.score == GroupScore::TopTwoSum,
            fill_zero: groups.fill == GroupFill::Zero,
        }),
        selection: match spec.selection {
            Selection::TopK => cuda::Selection::TopK,
            Selection::TopKPerGroup { groups } => cuda::Selection::TopKPerGroup { groups },
            Selection::SparseMixer { eps } => cuda::Selection::SparseMixer { eps },
            Selection::HashTable { vocabulary } => cuda::Selection::HashTable { vocabulary },
        },
        weight_from: match spec.weight_from {
            WeightFrom::Score => cuda::WeightFrom::Score,
            WeightFrom::SoftmaxChosen => cuda::WeightFrom::SoftmaxChosen,
            WeightFrom::SigmoidChosen => cuda::WeightFrom::SigmoidChosen,
            WeightFrom::JointSoftmax { .. } => cuda::WeightFrom::JointSoftmax,
        },
        renormalise: match spec.renormalise {
            Renormalise::None => cuda::Renormalise::None,
            Renormalise::Sum { eps } => cuda::Renormalise::Sum(eps),
            Renormalise::SumFloor { floor } => cuda::Renormalise::SumFloor(floor),
            Renormalise::PNorm { p } => cuda::Renormalise::PNorm(p),
        },
        scale,
    }
}
