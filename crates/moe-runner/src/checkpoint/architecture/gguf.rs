//! Layers of a GGUF file: llama.cpp's general names and keys, and what each architecture fixes.

use super::build::{Resolver, Scope};
use super::row::{ExpertNames, Names};
use super::tensors::Form;
use super::{Description, LayerEntry};
use crate::Result;
use crate::checkpoint::gguf::Metadata;
use crate::spec::{
    Activation, Correction, Dims, ExpertSpec, GateSpec, GroupFill, GroupScore, Groups, LayerSpec,
    OutputSpec, Renormalise, RoutedScale, RouterSpec, ScaleOn, Score, SharedCombine, SharedSpec,
    Transform, WeightFrom, WeightOn,
};

/// What an architecture fixes, where the file's keys do not say otherwise.
#[derive(Clone, Copy)]
struct Row {
    name: &'static str,
    /// `expert_gating_func` where the key is absent.
    gating: Gating,
    /// `expert_weights_norm` where the key is absent.
    renormalise: bool,
    /// Weights multiply the experts' input.
    on_input: bool,
    activation: Activation,
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
    /// Sigmoid of the chosen logit; no number, fixed by the architecture.
    SigmoidChosen,
}

const SOFTMAX: Row = Row {
    name: "",
    gating: Gating::Softmax,
    renormalise: true,
    on_input: false,
    activation: Activation::Silu,
};

const SIGMOID: Row = Row { gating: Gating::Sigmoid, ..SOFTMAX };

const ROWS: &[Row] = &[
    Row { name: "llama", ..SOFTMAX },
    Row { name: "qwen3moe", ..SOFTMAX },
    Row { name: "qwen3vlmoe", ..SOFTMAX },
    Row { name: "qwen3next", ..SOFTMAX },
    Row { name: "qwen2moe", renormalise: false, ..SOFTMAX },
    Row { name: "olmoe", renormalise: false, ..SOFTMAX },
    // a softmax over the chosen logits is a renormalised softmax over all of them
    Row { name: "granitemoe", ..SOFTMAX },
    Row { name: "deepseek2", renormalise: false, ..SOFTMAX },
    Row { name: "glm4moe", ..SIGMOID },
    Row { name: "dots1", ..SIGMOID },
    Row { name: "minimax-m2", ..SIGMOID },
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

const NAMES: Names = Names {
    block: "",
    gate: "ffn_gate_inp",
    gate_bias: "ffn_gate_inp.bias",
    correction: "exp_probs_b.bias",
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
    ],
    ..Names::MLP
};

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
    for index in 0..count {
        let scope = Scope::new("blk.", &NAMES, index);
        let has = |name: &str| resolver.index.has_module(&scope.resolve(name));
        if !["ffn_gate_inp", "ffn_down_exps", "ffn_up_exps"].into_iter().any(has) {
            continue;
        }
        let spec = spec(row, &keys, scope.block.clone(), index, has)?;
        spec.validate()?;
        let tensors = resolver.tensors(&scope, &NAMES, &spec);
        layers.push(LayerEntry { spec, tensors });
    }
    Ok(layers)
}

fn spec(
    row: &Row,
    keys: &Keys,
    name: String,
    index: usize,
    has: impl Fn(&str) -> bool,
) -> Result<LayerSpec> {
    let hidden = keys.need("embedding_length")?;
    let intermediate = match keys.size("expert_feed_forward_length")? {
        Some(width) => width,
        None => keys.need("feed_forward_length")?,
    };
    let shared_width = match keys.size("expert_shared_feed_forward_length")? {
        Some(width) => width,
        None => keys.size("expert_shared_count")?.unwrap_or(1).saturating_mul(intermediate),
    };
    let bias = has("ffn_gate_exps.bias") || has("ffn_gate_up_exps.bias");
    Ok(LayerSpec {
        name,
        index,
        dims: Dims { hidden, routed_hidden: hidden, intermediate },
        gate: GateSpec { bias: has("ffn_gate_inp.bias"), scaled_rms_eps: None },
        router: router(row, keys, has("exp_probs_b.bias"))?,
        expert: ExpertSpec { gated: true, activation: row.activation, bias, norm: None },
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
            gated: true,
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
        None | Some(0) => row.gating,
        Some(1) => Gating::Softmax,
        Some(2) if row.gating == Gating::SigmoidChosen => Gating::SigmoidChosen,
        Some(2) => Gating::Sigmoid,
        Some(3) => Gating::SoftmaxChosen,
        Some(other) => {
            return Err(keys.metadata.error(
                &keys.key("expert_gating_func"),
                format!("is {other}; known are 1 (softmax), 2 (sigmoid) and 3 (softmax of chosen)"),
            ));
        }
    };
    let (score, weight_from) = match gating {
        Gating::Softmax => (Score::Softmax, WeightFrom::Score),
        Gating::Sigmoid => (Score::Sigmoid, WeightFrom::Score),
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
            true if score == Score::Sigmoid => Renormalise::Sum { eps: 1e-20 },
            true => Renormalise::Sum { eps: 0.0 },
            false => Renormalise::None,
        },
        weight_on: if row.on_input { WeightOn::Input } else { WeightOn::Output },
        ..RouterSpec::softmax(keys.need("expert_count")?, keys.need("expert_used_count")?, false)
    })
}
