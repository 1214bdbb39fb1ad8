//! Layers of a GGUF file: llama.cpp's general names and keys, and what each architecture fixes.

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

/// What an architecture fixes, where the file's keys do not say otherwise. Absent keys are read as
/// llama.cpp reads them for that architecture.
#[derive(Clone, Copy)]
struct Row {
    name: &'static str,
    /// `expert_gating_func` where the key is absent.
    gating: Gating,
    /// `expert_weights_norm` where the key is absent.
    renormalise: bool,
    /// Weights multiply the experts' input.
    on_input: bool,
    /// Experts have a gate projection.
    gated: bool,
    activation: Activation,
    /// What else differs.
    form: RowForm,
}

/// Blocks that are more than a router, experts, and shared experts.
#[derive(Clone, Copy, PartialEq)]
enum RowForm {
    Plain,
    /// Norms around every branch, a dense branch in every layer, scales of the router.
    Gemma4,
    /// Projections to a narrower width around the routed experts, where the file has them.
    Latent,
    /// Clamped by `swiglu_clamp_exp`; some layers choose by token.
    DeepseekV4,
    /// Half the sum of routed and shared experts.
    Average,
    /// Capped logits; a dense branch beside the experts, where the file has one, and the sum times √½.
    Grok,
    /// Two experts by sparsemixer, which is the model's own router.
    SparseMixer,
}

/// `expert_gating_func`: how logits become weights.
#[derive(Clone, Copy, PartialEq)]
enum Gating {
    /// 1
    Softmax,
    /// 2
    Sigmoid,
    /// 3: softmax over the chosen logits.
    SoftmaxChosen,
    /// 4
    SqrtSoftplus,
    /// Sigmoid of the chosen logit; no number, fixed by the architecture.
    SigmoidChosen,
}

const SOFTMAX: Row = Row {
    name: "",
    gating: Gating::Softmax,
    renormalise: true,
    on_input: false,
    gated: true,
    activation: Activation::Silu,
    form: RowForm::Plain,
};

/// Routers whose files say how they weigh.
const STATED: Row = Row { renormalise: false, ..SOFTMAX };

const SIGMOID: Row = Row { gating: Gating::Sigmoid, ..SOFTMAX };

const ROWS: &[Row] = &[
    Row { name: "llama", ..SOFTMAX },
    Row { name: "mistral3", ..SOFTMAX },
    Row { name: "minicpm", ..SOFTMAX },
    Row { name: "qwen3moe", ..SOFTMAX },
    Row { name: "qwen3vlmoe", ..SOFTMAX },
    Row { name: "qwen3next", ..SOFTMAX },
    Row { name: "qwen35moe", ..SOFTMAX },
    Row { name: "rnd1", ..SOFTMAX },
    Row { name: "mellum", ..SOFTMAX },
    // the experts' branch alone: the dense one has another input
    Row { name: "arctic", ..SOFTMAX },
    Row { name: "phimoe", renormalise: false, form: RowForm::SparseMixer, ..SOFTMAX },
    Row { name: "grok", activation: Activation::GeluTanh, form: RowForm::Grok, ..SOFTMAX },
    Row { name: "nomic-bert-moe", gated: false, activation: Activation::Gelu, ..STATED },
    Row { name: "dbrx", ..SOFTMAX },
    Row { name: "hunyuan-moe", ..SOFTMAX },
    Row { name: "ernie4_5-moe", ..SOFTMAX },
    Row { name: "qwen2moe", ..STATED },
    Row { name: "olmoe", ..STATED },
    Row { name: "llada-moe", ..STATED },
    Row { name: "jamba", ..STATED },
    // a softmax over the chosen logits is a renormalised softmax over all of them
    Row { name: "granitemoe", ..SOFTMAX },
    Row { name: "granitehybrid", ..SOFTMAX },
    Row { name: "deepseek", ..STATED },
    Row { name: "deepseek2", ..STATED },
    Row { name: "deepseek2-ocr", ..STATED },
    Row { name: "mistral4", ..STATED },
    Row { name: "bailingmoe", ..STATED },
    Row { name: "bailingmoe2", gating: Gating::Sigmoid, ..STATED },
    Row { name: "bailingmoe3", gating: Gating::Sigmoid, ..STATED },
    Row { name: "cohere2moe", gating: Gating::Sigmoid, form: RowForm::Average, ..STATED },
    Row { name: "laguna", gating: Gating::Sigmoid, ..STATED },
    Row { name: "deepseek32", gating: Gating::Sigmoid, ..STATED },
    Row { name: "hy_v3", gating: Gating::Sigmoid, ..STATED },
    Row { name: "hy_v4", gating: Gating::Sigmoid, ..STATED },
    Row { name: "glm-dsa", gating: Gating::Sigmoid, ..STATED },
    Row { name: "exaone-moe", gating: Gating::Sigmoid, ..STATED },
    Row { name: "afmoe", gating: Gating::Sigmoid, ..STATED },
    Row { name: "glm4moe", ..SIGMOID },
    Row { name: "dots1", ..SIGMOID },
    Row { name: "minimax-m2", ..SIGMOID },
    Row { name: "mimo2", ..SIGMOID },
    Row { name: "lfm2moe", ..SIGMOID },
    Row { name: "kimi-linear", ..SIGMOID },
    Row { name: "step35", ..SIGMOID },
    Row {
        name: "nemotron_h_moe",
        gated: false,
        activation: Activation::Relu2,
        form: RowForm::Latent,
        ..SIGMOID
    },
    Row { name: "deepseek4", gating: Gating::SqrtSoftplus, form: RowForm::DeepseekV4, ..SOFTMAX },
    Row { name: "gemma4", activation: Activation::GeluTanh, form: RowForm::Gemma4, ..SOFTMAX },
    Row {
        name: "llama4",
        gating: Gating::SigmoidChosen,
        renormalise: false,
        on_input: true,
        ..SOFTMAX
    },
    Row {
        name: "gpt-oss",
        gating: Gating::SoftmaxChosen,
        renormalise: false,
        activation: Activation::ClampedSwiglu { alpha: 1.702, beta: 1.0, limit: 7.0 },
        ..SOFTMAX
    },
];

/// Architectures with experts that do not fit, and why.
const REFUSED: &[(&str, &str)] = &[
    ("smallthinker", "the router sees the layer's input, the experts what attention makes of it"),
    ("grovemoe", "groups of experts share further experts of their own"),
];

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

    fn need(&self, key: &str) -> Result<usize> {
        self.size(key)?.ok_or_else(|| self.metadata.missing(&self.key(key)))
    }
}

fn architecture(metadata: &Metadata) -> Result<&str> {
    const KEY: &str = "general.architecture";
    metadata.str(KEY)?.ok_or_else(|| metadata.missing(KEY))
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
        let known: Vec<&str> = ROWS.iter().map(|row| row.name).collect();
        let reason = format!(
            "is '{architecture}', which cannot be run: {reason}; what can be is {}",
            known.join(", ")
        );
        return Err(metadata.error("general.architecture", reason));
    }
    let row = ROWS.iter().find(|row| row.name == architecture).ok_or_else(|| {
        let known: Vec<&str> = ROWS.iter().map(|row| row.name).collect();
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
    let names = match row.form {
        RowForm::Gemma4 => &GEMMA4,
        RowForm::Grok => &GROK,
        _ => &NAMES,
    };
    for index in 0..count {
        let scope = Scope::new("blk.", names, index);
        let has = |name: &str| resolver.index.has_module(&scope.resolve(name));
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
        // some converters leave the ending out
        let bare = has("exp_probs_b") && !has("exp_probs_b.bias");
        let names = if bare { &Names { correction: "exp_probs_b", ..*names } } else { names };
        let tensors = resolver.tensors(&scope, names, &spec);
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
    let clamp = |key: &str, plain: Activation| {
        let limit = keys.number(key, spec.index)?.filter(|limit| *limit > 0.0);
        Ok::<_, crate::Error>(limit.map_or(plain, |limit| Activation::ClampedSwiglu {
            alpha: 1.0,
            beta: 0.0,
            limit,
        }))
    };
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
        // clamped after the SiLU, where the file says so
        RowForm::Plain if row.activation == Activation::Silu => {
            let clamped = |key: &str| -> Result<Activation> {
                let limit = keys.number(key, spec.index)?.filter(|limit| *limit > 0.0);
                Ok(limit.map_or(row.activation, |limit| Activation::SwigluStep { limit }))
            };
            spec.expert.activation = clamped("swiglu_clamp_exp")?;
            if let Some(branch) = &mut spec.shared {
                branch.activation = clamped("swiglu_clamp_shexp")?;
            }
        }
        RowForm::Plain => {}
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
            let routed = clamp("swiglu_clamp_exp", row.activation)?;
            let shared = match keys.number("swiglu_clamp_shexp", spec.index)? {
                Some(_) => clamp("swiglu_clamp_shexp", row.activation)?,
                None => routed,
            };
            spec.expert.activation = routed;
            if let Some(branch) = &mut spec.shared {
                branch.activation = shared;
            }
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
