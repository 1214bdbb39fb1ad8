//! The columns of the table of architectures.

use super::rules::LayerRule;
use super::settings::{Keys, Settings};
use super::variants::{self, ExpertNames};
use crate::Result;
use crate::spec::{
    Activation, Correction, GroupFill, GroupScore, LayerSpec, ScaleOn, Score, SharedCombine,
    WeightFrom, WeightOn,
};

/// One row: a family of models whose MoE block has one form. Rows are written as what differs
/// from [`Architecture::SOFTMAX`] or from another row.
#[derive(Clone, Copy)]
pub(super) struct Architecture {
    /// Values of `model_type`, of the model and of its text part.
    pub model_types: &'static [&'static str],
    /// Values of `architectures`, for configs whose `model_type` is absent or unknown.
    pub classes: &'static [&'static str],
    /// Number of decoder layers.
    pub layers: Keys,
    /// H.
    pub hidden: Keys,
    /// E, one number or one for each layer.
    pub experts: Keys,
    /// k, likewise.
    pub top_k: Keys,
    /// I, likewise.
    pub intermediate: Keys,
    /// Which decoder layers are MoE.
    pub moe_layers: LayerRule,
    /// From logits to scores.
    pub score: Score,
    /// `scoring_func`, where present, replaces `score`.
    pub scoring_func: bool,
    /// Where a correction bias enters.
    pub correction: Correction,
    /// How groups are rated and filled, in models that choose by groups when the config says so.
    pub groups: Option<(GroupScore, GroupFill)>,
    /// Where weights come from.
    pub weight_from: WeightFrom,
    /// What weights multiply.
    pub weight_on: WeightOn,
    /// What is done to the k weights.
    pub renormalise: Renorm,
    /// `routed_scaling_factor`: spellings. One that is nowhere is 1.
    pub scale: Keys,
    /// Who applies it.
    pub scale_on: ScaleOn,
    /// The function between an expert's products: the keys that name it, and the default.
    pub activation: (Keys, Activation),
    /// Experts have biases.
    pub expert_bias: bool,
    /// The dense branch.
    pub shared: Shared,
    /// How the branches become one.
    pub combine: SharedCombine,
    /// What else the config changes, for one layer.
    pub adjust: fn(&Settings, usize, &mut LayerSpec) -> Result<()>,
    /// Where layers stand, followed by the layer's index and a dot: of these the one that the
    /// checkpoint has most of, or else wherever such layers are found.
    pub stems: &'static [&'static str],
    /// Names of the tensors as they are published; those that the checkpoint has most of count.
    /// What `variants` lists is found besides.
    pub names: &'static [Names],
}

/// What is done to the k weights.
#[derive(Clone, Copy)]
pub(super) enum Renorm {
    /// Nothing.
    Never,
    /// Divided by their sum plus this.
    Always(f32),
    /// So if the key says so.
    If(Keys, f32),
}

/// Width of the dense branch.
#[derive(Clone, Copy)]
pub(super) enum Shared {
    /// There is none.
    No,
    /// Its own key; zero: there is none.
    Width(Keys),
    /// This many times I.
    Times(Keys),
    /// I.
    Same,
}

/// Names of a block's tensors. They are relative to the block; `../` steps out to the layer.
#[derive(Clone, Copy)]
pub(super) struct Names {
    /// The block, relative to the layer; empty: the layer itself.
    pub block: &'static str,
    /// The gate's module.
    pub gate: &'static str,
    /// Tensor of the gate's bias.
    pub gate_bias: &'static str,
    /// Tensor of the correction bias.
    pub correction: &'static str,
    /// Tensor of the scale by expert.
    pub per_expert_scale: &'static str,
    /// Tensor of the scale of the gate's input norm.
    pub gate_input_scale: &'static str,
    /// Tensor of one number that multiplies the routed scaling factor.
    pub global_scale: &'static str,
    /// Tensor of the hash table.
    pub hash_table: &'static str,
    /// Ways in which the routed experts are published; `variants::EXPERTS` follow.
    pub experts: &'static [ExpertNames],
    /// The shared experts.
    pub shared: ExpertNames,
    /// Tensor of the shared branch's scalar gate.
    pub shared_gate: &'static str,
    /// Tensors of the norms before and after the shared branch.
    pub shared_norms: [&'static str; 2],
    /// Modules (of projections) and tensors (of norms) of the input transform's steps.
    pub input_transform: &'static [&'static str],
    /// Likewise, output transform.
    pub output_transform: &'static [&'static str],
    /// Tensor of the output bias.
    pub output_bias: &'static str,
    /// Tensor of the output norm.
    pub output_norm: &'static str,
    /// What belongs to the layer, as beginnings of names. Empty: all of the block.
    pub scopes: &'static [&'static str],
}

/// Spellings of the number of experts. Config classes alias them to each other.
pub(super) const EXPERTS: Keys =
    &["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"];
/// Spellings of k.
pub(super) const TOP_K: Keys = &[
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "moe_topk",
    "moe_k",
    "moe_top_k",
    "top_k_experts",
];
impl Architecture {
    /// The starting point: softmax over all experts, top-k, weights renormalised if
    /// `norm_topk_prob` (absent: not), every layer MoE, names as in Qwen's models.
    pub(super) const SOFTMAX: Self = Self {
        model_types: &[],
        classes: &[],
        layers: &["num_hidden_layers"],
        hidden: &["hidden_size"],
        experts: EXPERTS,
        top_k: TOP_K,
        intermediate: &["moe_intermediate_size"],
        moe_layers: LayerRule::Every,
        score: Score::Softmax,
        scoring_func: false,
        correction: Correction::None,
        groups: None,
        weight_from: WeightFrom::Score,
        weight_on: WeightOn::Output,
        renormalise: Renorm::If(&["norm_topk_prob"], 0.0),
        scale: &[],
        scale_on: ScaleOn::Weights,
        activation: (&["hidden_act"], Activation::Silu),
        expert_bias: false,
        shared: Shared::No,
        combine: SharedCombine::Add,
        adjust: |_, _, _| Ok(()),
        stems: variants::STEMS,
        names: &[Names::MLP],
    };

    /// The DeepSeek-V3 family: sigmoid, bias, groups by their best two, renormalised with
    /// `+ 1e-20`, scaled; shared experts as one MLP.
    pub(super) const SIGMOID: Self = Self {
        layers: &["num_hidden_layers"],
        moe_layers: LayerRule::AfterDense(&["first_k_dense_replace"]),
        score: Score::Sigmoid,
        scoring_func: true,
        correction: Correction::OnScore,
        groups: Some((GroupScore::TopTwoSum, GroupFill::NegativeInfinity)),
        renormalise: Renorm::If(&["norm_topk_prob", "moe_renormalize"], 1e-20),
        scale: &["routed_scaling_factor"],
        shared: Shared::Times(&["n_shared_experts", "num_shared_experts"]),
        names: &[Names::DEEPSEEK],
        ..Self::SOFTMAX
    };
}

impl Names {
    /// `mlp.gate`, `mlp.experts`.
    pub(super) const MLP: Self = Self {
        block: "mlp",
        gate: "gate",
        gate_bias: "",
        correction: "",
        per_expert_scale: "",
        gate_input_scale: "",
        global_scale: "",
        hash_table: "",
        experts: &[ExpertNames::EACH, ExpertNames::STACKED],
        shared: ExpertNames::EACH,
        shared_gate: "",
        shared_norms: ["", ""],
        input_transform: &[],
        output_transform: &[],
        output_bias: "",
        output_norm: "",
        scopes: &[],
    };

    /// DeepSeek's names.
    pub(super) const DEEPSEEK: Self = Self {
        correction: "gate.e_score_correction_bias",
        shared: ExpertNames::mlp(
            "shared_experts.gate_proj",
            "shared_experts.up_proj",
            "shared_experts.down_proj",
        ),
        ..Self::MLP
    };

    /// Qwen2's names: one shared expert with a scalar gate.
    pub(super) const QWEN2: Self = Self {
        shared: ExpertNames::mlp(
            "shared_expert.gate_proj",
            "shared_expert.up_proj",
            "shared_expert.down_proj",
        ),
        shared_gate: "shared_expert_gate.weight",
        ..Self::MLP
    };

    /// Mixtral's names.
    pub(super) const MIXTRAL: Self = Self {
        block: "block_sparse_moe",
        experts: &[ExpertNames::W123, ExpertNames::STACKED],
        ..Self::MLP
    };
}
