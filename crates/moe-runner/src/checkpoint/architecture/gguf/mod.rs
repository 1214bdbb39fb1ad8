//! Layers of a GGUF file: llama.cpp's general names and keys, and what each architecture fixes
//! (`table`).

mod table;

use super::build::{Resolver, Scope};
use super::row::Names;
use super::tensors::Form;
use super::variants::ExpertNames;
use super::{Description, LayerEntry};
use crate::checkpoint::gguf::Metadata;
use crate::spec::{
    Activation, Correction, Dims, ExpertSpec, GateSpec, GroupFill, GroupScore, Groups, LayerSpec,
    OutputSpec, Renormalise, RmsNorm, RoutedScale, RouterSpec, ScaleOn, Score, Selection,
    SharedCombine, SharedSpec, Transform, TransformStep, WeightFrom, WeightOn,
};
use crate::{Error, Result};
use table::{Gating, REFUSED, ROWS, Row, RowForm};

const NAMES: Names = Names {
    block: "",
    gate: "ffn_gate_inp",
    gate_bias: "ffn_gate_inp.bias",
    correction: "exp_probs_b.bias",
    per_expert_scale: "ffn_down_exps.scale",
    gate_input_scale: "ffn_gate_inp.scale",
    hash_table: "ffn_gate_tid2eid.weight",
    input_transform: &["ffn_latent_down"],
    output_transform: &["ffn_latent_up"],
    experts: &[
        ExpertNames {
            form: Form::Stacked,
            ..ExpertNames::mlp("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
        },
        ExpertNames {
            form: Form::Stacked,
            ..ExpertNames::mlp("ffn_gate_up_exps", "ffn_gate_up_exps", "ffn_down_exps")
        },
        // files from before experts were stacked
        ExpertNames::mlp("ffn_gate.{e}", "ffn_up.{e}", "ffn_down.{e}"),
    ],
    shared: ExpertNames::mlp("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"),
    shared_gate: "ffn_gate_inp_shexp.weight",
    scopes: &[
        "ffn_gate_inp",
        "exp_probs_b",
        "ffn_gate_exps",
        "ffn_up_exps",
        "ffn_gate_up_exps",
        "ffn_down_exps",
        "ffn_gate_shexp",
        "ffn_up_shexp",
        "ffn_down_shexp",
        "ffn_latent_",
        "ffn_routed_",
    ],
    ..Names::MLP
};

/// Gemma 4 has a dense branch in every layer, and norms of each.
const GEMMA4: Names = Names {
    shared: ExpertNames::mlp("ffn_gate", "ffn_up", "ffn_down"),
    shared_gate: "",
    shared_norms: ["ffn_norm.weight", "post_ffw_norm_1.weight"],
    input_transform: &["pre_ffw_norm_2.weight"],
    output_transform: &["post_ffw_norm_2.weight"],
    output_norm: "post_ffw_norm.weight",
    ..NAMES
};

/// Grok's dense branch has the names of a dense layer.
const GROK: Names =
    Names { shared: ExpertNames::mlp("ffn_gate", "ffn_up", "ffn_down"), shared_gate: "", ..NAMES };

/// Kimi-K3's routed experts stand between projections, with a norm before the second.
const KIMI_K3: Names = Names {
    input_transform: &["ffn_routed_down"],
    output_transform: &["ffn_routed_norm.weight", "ffn_routed_up"],
    ..NAMES
};

/// The same without the norm.
const KIMI_K3_PLAIN: Names = Names { output_transform: &["ffn_routed_up"], ..KIMI_K3 };

/// Keys of a GGUF file, under the name of its architecture.
struct Keys<'a> {
    metadata: &'a Metadata,
    architecture: &'a str,
}

impl Keys<'_> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    fn size(&self, key: &str) -> Result<Option<usize>> {
        self.metadata.usize(&self.key(key))
    }

    /// A size, or the `layer`-th of an array of them.
    fn layer_size(&self, key: &str, layer: usize) -> Result<Option<usize>> {
        match self.metadata.usize_list(&self.key(key)) {
            Ok(Some(list)) => Ok(list.get(layer).copied()),
            _ => self.size(key),
        }
    }

    /// A number, or the `layer`-th of an array of them.
    fn number(&self, key: &str, layer: usize) -> Result<Option<f32>> {
        match self.metadata.f32_list(&self.key(key)) {
            Ok(Some(list)) => Ok(list.get(layer).copied()),
            _ => self.metadata.f32(&self.key(key)),
        }
    }

    fn need_number(&self, key: &str) -> Result<f32> {
        self.number(key, 0)?.ok_or_else(|| self.metadata.missing(&self.key(key)))
    }

    fn need(&self, key: &str) -> Result<usize> {
        self.size(key)?.ok_or_else(|| self.metadata.missing(&self.key(key)))
    }
}

fn architecture(metadata: &Metadata) -> Result<&str> {
    const KEY: &str = "general.architecture";
    metadata.str(KEY)?.ok_or_else(|| metadata.missing(KEY))
}

/// Names of the architectures that are understood.
pub(super) fn known() -> impl Iterator<Item = &'static str> {
    ROWS.iter().map(|row| row.name)
}

/// Architectures with experts that do not fit, and why.
pub(super) fn refused() -> impl Iterator<Item = (&'static str, &'static str)> {
    REFUSED.iter().copied()
}

/// What kind of model the file holds.
pub(super) fn describe(metadata: &Metadata) -> Result<Description> {
    let architecture = architecture(metadata)?;
    let decoder_layers = Keys { metadata, architecture }.need("block_count")?;
    Ok(Description { architecture: architecture.to_string(), decoder_layers })
}

/// All layers that have experts.
pub(super) fn layers(metadata: &Metadata, resolver: &Resolver) -> Result<Vec<LayerEntry>> {
    let architecture = architecture(metadata)?;
    if let Some((_, reason)) = REFUSED.iter().find(|(name, _)| *name == architecture) {
        let known: Vec<&str> = known().collect();
        let reason = format!(
            "is '{architecture}', which cannot be run: {reason}; what can be is {}",
            known.join(", ")
        );
        return Err(metadata.error("general.architecture", reason));
    }
    let row = ROWS.iter().find(|row| row.name == architecture).ok_or_else(|| {
        let known: Vec<&str> = known().collect();
        metadata.error(
            "general.architecture",
            format!(
                "is '{architecture}': no such mixture-of-experts architecture is known in GGUF \
                 files; known are {}",
                known.join(", ")
            ),
        )
    })?;
    let keys = Keys { metadata, architecture };
    let count = keys.need("block_count")?;
    if count > super::settings::MAX_LAYERS {
        return Err(metadata.error(&keys.key("block_count"), format!("is {count}")));
    }
    let mut layers = Vec::new();
    for index in 0..count {
        let scope = Scope::new("blk.", &NAMES, index);
        let has = |name: &str| resolver.index.has_module(&scope.resolve(name));
        let names = match row.form {
            RowForm::Gemma4 => &GEMMA4,
            RowForm::Grok => &GROK,
            RowForm::KimiK3 if has("ffn_routed_norm") => &KIMI_K3,
            RowForm::KimiK3 => &KIMI_K3_PLAIN,
            _ => &NAMES,
        };
        if !["ffn_gate_inp", "ffn_down_exps", "ffn_up_exps"].into_iter().any(has) {
            continue;
        }
        let shape = |name: &str| {
            let info = resolver.checkpoint.info(&format!("{}.weight", scope.resolve(name)));
            info.map(|info| info.shape.to_vec())
        };
        let mut spec = spec(row, &keys, scope.block.clone(), index, has, shape)?;
        form(row, &keys, &mut spec, has, shape)?;
        spec.validate()?;
        let mut names = *names;
        // some converters leave the ending out
        if has("exp_probs_b") && !has("exp_probs_b.bias") {
            names.correction = "exp_probs_b";
        }
        if row.gated && has("ffn_up_shexp") && is_fused(shape) {
            names.shared.gate = names.shared.up;
        }
        let tensors = resolver.tensors(&scope, &names, &spec);
        layers.push(LayerEntry { spec, tensors });
    }
    Ok(layers)
}

/// What is wrong with the blocks that have no experts, or are not to have any.
pub(super) fn overlooked(metadata: &Metadata, resolver: &Resolver) -> Result<Vec<Error>> {
    let architecture = architecture(metadata)?;
    let keys = Keys { metadata, architecture };
    let dense = keys.size("leading_dense_block_count")?.unwrap_or(0);
    // blocks of attention or of a state-space model alone
    let hybrid = ["nemotron_h_moe", "granitehybrid", "jamba"].contains(&architecture);
    let mut found = Vec::new();
    for index in 0..keys.need("block_count")?.min(super::settings::MAX_LAYERS) {
        let stem = format!("blk.{index}.");
        let below = resolver.index.below(&stem);
        let error = |reason: &str| {
            Error::file(resolver.checkpoint.path(), format!("layer {index} {reason}"))
        };
        if index < dense && below.iter().any(|name| name.contains("_exps")) {
            found.push(error("is dense by leading_dense_block_count, but holds experts"));
        } else if !below.is_empty() && !hybrid && !below.iter().any(|name| name.contains(".ffn_")) {
            found.push(error("has no feed-forward, neither dense nor experts"));
        }
    }
    Ok(found)
}

/// What blocks of special forms have besides.
fn form(
    row: &Row,
    keys: &Keys,
    spec: &mut LayerSpec,
    has: impl Fn(&str) -> bool,
    shape: impl Fn(&str) -> Option<Vec<usize>>,
) -> Result<()> {
    // by the file's number, where it is one
    let clamp = |key: &str, clamped: fn(f32) -> Activation| -> Result<Activation> {
        let limit = keys.number(key, spec.index)?.filter(|limit| *limit > 0.0);
        Ok(limit.map_or(row.activation, clamped))
    };
    const ROUTED: &str = "swiglu_clamp_exp";
    const SHARED: &str = "swiglu_clamp_shexp";
    let before = |limit| Activation::ClampedSwiglu { alpha: 1.0, beta: 0.0, limit };
    let after = |limit| Activation::SwigluStep { limit };
    let dense = |norm| -> Result<SharedSpec> {
        let stored = shape("ffn_up").and_then(|shape| shape.first().copied());
        Ok(SharedSpec {
            count: 1,
            intermediate: match stored {
                Some(width) => width,
                None => keys.need("feed_forward_length")?,
            },
            gated: true,
            activation: row.activation,
            bias: false,
            sigmoid_gate: false,
            combine: SharedCombine::Add,
            input_norm: norm,
            output_norm: norm,
        })
    };
    match row.form {
        RowForm::Plain if row.activation == Activation::Silu => {
            let [routed, shared] = [clamp(ROUTED, after)?, clamp(SHARED, after)?];
            activations(spec, routed, shared);
        }
        RowForm::Plain => {}
        RowForm::Clamped => {
            let [routed, shared] = [clamp(ROUTED, before)?, clamp(SHARED, before)?];
            activations(spec, routed, shared);
        }
        RowForm::ClampedSwiglu => {
            let both = Activation::ClampedSwiglu { alpha: 1.702, beta: 1.0, limit: 7.0 };
            activations(spec, both, both);
        }
        RowForm::KimiK3 => {
            let beta = keys.need_number("activation.situ_beta")?;
            let lambda = keys.need_number("activation.situ_linear_beta")?;
            let both = Activation::Situ { beta, lambda: Some(lambda).filter(|l| *l > 0.0) };
            activations(spec, both, both);
            if let Some(width) = shape("ffn_routed_down").and_then(|s| s.first().copied()) {
                let back = TransformStep::Linear { width: spec.dims.hidden };
                spec.input_transform.steps = vec![TransformStep::Linear { width }];
                spec.output_transform.steps = vec![back];
                spec.dims.routed_hidden = width;
            }
            if has("ffn_routed_norm") {
                let eps = keys.need_number("attention.layer_norm_rms_epsilon")?;
                let norm = RmsNorm { eps, unit_offset: false, scale_first: false };
                spec.output_transform.steps.insert(0, TransformStep::RmsNorm(norm));
            }
        }
        RowForm::Average => {
            if let Some(branch) = &mut spec.shared {
                branch.combine = SharedCombine::Average;
            }
        }
        RowForm::Grok => {
            let cap = keys.number("router_logit_softcapping", spec.index)?.unwrap_or(30.0);
            spec.router.soft_cap = (cap > 0.0).then_some(cap);
            if shape("ffn_up").is_some() {
                spec.shared = Some(dense(None)?);
                spec.output.multiplier = std::f32::consts::FRAC_1_SQRT_2;
            }
        }
        RowForm::SparseMixer => {
            spec.router.selection = Selection::SparseMixer { eps: 0.01 };
            spec.router.renormalise = Renormalise::None;
        }
        RowForm::Latent => {
            let width = shape("ffn_latent_down").and_then(|shape| shape.first().copied());
            if let Some(width) = width {
                spec.input_transform.steps = vec![TransformStep::Linear { width }];
                spec.output_transform.steps =
                    vec![TransformStep::Linear { width: spec.dims.hidden }];
                spec.dims.routed_hidden = width;
            }
        }
        RowForm::DeepseekV4 => {
            let routed = clamp(ROUTED, before)?;
            let shared = match keys.number(SHARED, spec.index)? {
                Some(_) => clamp(SHARED, before)?,
                None => routed,
            };
            activations(spec, routed, shared);
            if has("ffn_gate_tid2eid") {
                let vocabulary = shape("ffn_gate_tid2eid").and_then(|shape| shape.first().copied());
                spec.router.selection =
                    Selection::HashTable { vocabulary: vocabulary.unwrap_or_default() };
                spec.router.correction = Correction::None;
            }
        }
        RowForm::Gemma4 => {
            let eps = keys.number("attention.layer_norm_rms_epsilon", 0)?.unwrap_or(1e-6);
            let norm = RmsNorm { eps, unit_offset: false, scale_first: false };
            spec.gate.scaled_rms_eps = Some(eps);
            spec.router.per_expert_scale = has("ffn_down_exps.scale");
            spec.input_transform.steps = vec![TransformStep::RmsNorm(norm)];
            spec.output_transform.steps = vec![TransformStep::RmsNorm(norm)];
            spec.output.norm = Some(norm);
            spec.shared = Some(dense(Some(norm))?);
        }
    }
    Ok(())
}

/// Whether gate and up of the shared experts are one tensor, under the name of the latter.
fn is_fused(shape: impl Fn(&str) -> Option<Vec<usize>>) -> bool {
    let inner = shape("ffn_down_shexp").and_then(|shape| shape.get(1).copied());
    let rows = shape("ffn_up_shexp").and_then(|shape| shape.first().copied());
    shape("ffn_gate_shexp").is_none() && rows.is_some() && rows == inner.map(|inner| 2 * inner)
}

fn activations(spec: &mut LayerSpec, routed: Activation, shared: Activation) {
    spec.expert.activation = routed;
    if let Some(branch) = &mut spec.shared {
        branch.activation = shared;
    }
}

fn spec(
    row: &Row,
    keys: &Keys,
    name: String,
    index: usize,
    has: impl Fn(&str) -> bool,
    shape: impl Fn(&str) -> Option<Vec<usize>>,
) -> Result<LayerSpec> {
    let hidden = keys.need("embedding_length")?;
    let stored = |name: &str, axis: usize| shape(name).and_then(|shape| shape.get(axis).copied());
    let intermediate = match keys.layer_size("expert_feed_forward_length", index)? {
        Some(width) if width > 0 => width,
        // not stated in files of models that have no other width
        _ => match stored("ffn_down_exps", 2) {
            Some(width) => width,
            None => keys.need("feed_forward_length")?,
        },
    };
    // some architectures' key is the width of all shared experts, others' that of one
    let shared_width = match stored("ffn_up_shexp", 0) {
        Some(both) if row.gated && is_fused(&shape) => both / 2,
        Some(width) => width,
        None => match keys.size("expert_shared_feed_forward_length")? {
            Some(width) => width,
            None => keys.size("expert_shared_count")?.unwrap_or(1).saturating_mul(intermediate),
        },
    };
    let bias = match row.gated {
        true => has("ffn_gate_exps.bias") || has("ffn_gate_up_exps.bias"),
        false => has("ffn_up_exps.bias"),
    };
    Ok(LayerSpec {
        name,
        index,
        dims: Dims { hidden, routed_hidden: hidden, intermediate },
        gate: GateSpec { bias: has("ffn_gate_inp.bias"), scaled_rms_eps: None },
        router: router(row, keys, has("exp_probs_b"))?,
        expert: ExpertSpec { gated: row.gated, activation: row.activation, bias, norm: None },
        input_transform: Transform::default(),
        output_transform: Transform::default(),
        routed_scale: RoutedScale {
            // files of models without a factor may hold 0
            factor: keys
                .metadata
                .f32(&keys.key("expert_weights_scale"))?
                .filter(|factor| *factor != 0.0)
                .unwrap_or(1.0),
            on: ScaleOn::Weights,
        },
        shared: ["ffn_up_shexp", "ffn_down_shexp"].into_iter().any(&has).then(|| SharedSpec {
            count: 1,
            intermediate: shared_width,
            gated: row.gated,
            activation: row.activation,
            bias: false,
            sigmoid_gate: has("ffn_gate_inp_shexp"),
            combine: SharedCombine::Add,
            input_norm: None,
            output_norm: None,
        }),
        output: OutputSpec::default(),
    })
}

fn router(row: &Row, keys: &Keys, corrected: bool) -> Result<RouterSpec> {
    let gating = match keys.size("expert_gating_func")? {
        // DeepSeek-V2 has no bias: a file with one comes from a model with sigmoids
        None | Some(0)
            if row.gating == Gating::Softmax && corrected && row.name != "ernie4_5-moe" =>
        {
            Gating::Sigmoid
        }
        // GLM-4.7-Flash under the name of DeepSeek-V2
        None | Some(0)
            if row.name == "deepseek2"
                && matches!(keys.size("block_count")?, Some(47 | 48))
                && keys.size("vocab_size")? == Some(154_880) =>
        {
            Gating::Sigmoid
        }
        None | Some(0) => row.gating,
        Some(1) => Gating::Softmax,
        Some(2) if row.gating == Gating::SigmoidChosen => Gating::SigmoidChosen,
        Some(2) => Gating::Sigmoid,
        Some(3) => Gating::SoftmaxChosen,
        Some(4) => Gating::SqrtSoftplus,
        Some(other) => {
            return Err(keys.metadata.error(
                &keys.key("expert_gating_func"),
                format!(
                    "is {other}; known are 1 (softmax), 2 (sigmoid), 3 (softmax of chosen) and 4 \
                     (square root of softplus)"
                ),
            ));
        }
    };
    let (score, weight_from) = match gating {
        Gating::Softmax => (Score::Softmax, WeightFrom::Score),
        Gating::Sigmoid => (Score::Sigmoid, WeightFrom::Score),
        Gating::SqrtSoftplus => (Score::SqrtSoftplus, WeightFrom::Score),
        Gating::SoftmaxChosen => (Score::Logits, WeightFrom::SoftmaxChosen),
        Gating::SigmoidChosen => (Score::Logits, WeightFrom::SigmoidChosen),
    };
    let normed = keys.metadata.bool(&keys.key("expert_weights_norm"))?;
    let groups = match (keys.size("expert_group_count")?, keys.size("expert_group_used_count")?) {
        (None | Some(0 | 1), _) => None,
        (Some(_), None) => {
            return Err(keys.metadata.missing(&keys.key("expert_group_used_count")));
        }
        // DeepSeek-V2 rates groups by their best, everything with sigmoids by the best two
        (Some(count), Some(keep)) if gating == Gating::Softmax => {
            Some(Groups { count, keep, score: GroupScore::Max, fill: GroupFill::Zero })
        }
        (Some(count), Some(keep)) => Some(Groups {
            count,
            keep,
            score: GroupScore::TopTwoSum,
            fill: GroupFill::NegativeInfinity,
        }),
    };
    Ok(RouterSpec {
        score,
        weight_from,
        correction: if corrected { Correction::OnScore } else { Correction::None },
        groups,
        renormalise: match normed.unwrap_or(row.renormalise) {
            true if matches!(score, Score::Sigmoid | Score::SqrtSoftplus) => {
                Renormalise::Sum { eps: 1e-20 }
            }
            true => Renormalise::Sum { eps: 0.0 },
            false => Renormalise::None,
        },
        weight_on: if row.on_input { WeightOn::Input } else { WeightOn::Output },
        ..RouterSpec::softmax(keys.need("expert_count")?, keys.need("expert_used_count")?, false)
    })
}
