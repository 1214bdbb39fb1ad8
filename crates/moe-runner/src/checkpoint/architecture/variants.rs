//! The ways in which checkpoints store what every architecture has: one table, apart from the
//! architectures. A row of the table of architectures names what is published for it; whatever
//! else stands here is found as well.

use super::tensors::Form;

/// Names of an expert's modules; `{e}` stands for the expert's index.
#[derive(Clone, Copy)]
pub(super) struct ExpertNames {
    /// Gate projection; empty: none. The same name as `up`: both are one array, gate first.
    pub gate: &'static str,
    /// Up projection.
    pub up: &'static str,
    /// Down projection.
    pub down: &'static str,
    /// How experts share arrays.
    pub form: Form,
    /// Where gate and up are one array: its rows alternate.
    pub interleaved: bool,
    /// Ending of the biases' names.
    pub bias: &'static str,
    /// Ending of a tensor that must be there for this way to be the one; empty: any.
    pub marker: &'static str,
    /// Tensor of the norm after each expert, the same for all of them.
    pub norm: &'static str,
}

impl ExpertNames {
    /// `experts.{e}.gate_proj`, `.up_proj`, `.down_proj`.
    pub(super) const EACH: Self =
        Self::mlp("experts.{e}.gate_proj", "experts.{e}.up_proj", "experts.{e}.down_proj");

    /// `experts.{e}.w1` (gate), `.w3` (up), `.w2` (down).
    pub(super) const W123: Self = Self::mlp("experts.{e}.w1", "experts.{e}.w3", "experts.{e}.w2");

    /// `experts.{e}.gate_up_proj` `[2I, H]`, `experts.{e}.down_proj`.
    pub(super) const EACH_FUSED: Self =
        Self::mlp("experts.{e}.gate_up_proj", "experts.{e}.gate_up_proj", "experts.{e}.down_proj");

    /// `experts.gate_up_proj` `[E, 2I, H]`, `experts.down_proj` `[E, H, I]`.
    pub(super) const STACKED: Self = Self {
        form: Form::Stacked,
        bias: "_bias",
        ..Self::mlp("experts.gate_up_proj", "experts.gate_up_proj", "experts.down_proj")
    };

    /// `experts.gate_up_proj` `[E, H, 2I]`, `experts.down_proj` `[E, I, H]`.
    pub(super) const STACKED_TRANSPOSED: Self =
        Self { form: Form::StackedTransposed, ..Self::STACKED };

    /// An array for each projection.
    pub(super) const fn mlp(gate: &'static str, up: &'static str, down: &'static str) -> Self {
        Self {
            gate,
            up,
            down,
            form: Form::Each,
            interleaved: false,
            bias: ".bias",
            marker: "",
            norm: "",
        }
    }
}

/// Where decoder layers stand in published checkpoints. Names of modules in configurations may have
/// another one of these than the tensors: they mean the same.
pub(in crate::checkpoint) const STEMS: &[&str] = &[
    "model.layers.",
    "language_model.model.layers.",
    "model.language_model.layers.",
    "model.language_model.model.layers.",
    "thinker.model.layers.",
    "model.llm.layers.",
    "backbone.layers.",
    "language_model.layers.",
    "language_model.backbone.layers.",
    "model.decoder.layers.",
    "model.text_model.layers.",
    "layers.",
];

/// What a block is called in its layer.
pub(super) const BLOCKS: &[&str] =
    &["mlp", "block_sparse_moe", "feed_forward", "moe", "mixer", "ffn"];

/// The gate's module.
pub(super) const GATES: &[&str] =
    &["gate", "router", "router.gate", "router.layer", "router.classifier", "gate.wg"];

/// Tensors of the correction bias.
pub(super) const CORRECTIONS: &[&str] = &[
    "gate.e_score_correction_bias",
    "e_score_correction_bias",
    "gate.expert_bias",
    "expert_bias",
    "router.e_score_correction_bias",
    "experts.e_score_correction_bias",
    "moe_statics.e_score_correction_bias",
    "router_bias",
    "gate.bias",
];

const fn stack(names: ExpertNames) -> ExpertNames {
    ExpertNames { form: Form::Stacked, ..names }
}

const fn transposed(names: ExpertNames) -> ExpertNames {
    ExpertNames { form: Form::StackedTransposed, ..names }
}

const APART: ExpertNames = ExpertNames {
    bias: "_bias",
    ..stack(ExpertNames::mlp("experts.gate_proj", "experts.up_proj", "experts.down_proj"))
};
const APART_WEIGHT: ExpertNames =
    ExpertNames::mlp("experts.gate_proj", "experts.up_proj", "experts.down_proj");
const LINEARS: ExpertNames = ExpertNames::mlp("input_linear", "input_linear", "output_linear");
const W13: ExpertNames =
    ExpertNames::mlp("experts.w13_weight", "experts.w13_weight", "experts.w2_weight");
const SWITCH: ExpertNames =
    ExpertNames::mlp("switch_mlp.gate_proj", "switch_mlp.up_proj", "switch_mlp.down_proj");
const SWITCH_FUSED: ExpertNames =
    ExpertNames::mlp("switch_mlp.gate_up_proj", "switch_mlp.gate_up_proj", "switch_mlp.down_proj");
const GLU: ExpertNames = ExpertNames::mlp(
    "experts.switch_glu.gate_proj",
    "experts.switch_glu.up_proj",
    "experts.switch_glu.down_proj",
);
const FC: ExpertNames = ExpertNames::mlp("experts.fc1", "experts.fc1", "experts.fc2");
const W123_STACK: ExpertNames = ExpertNames::mlp("experts.w1", "experts.w3", "experts.w2");

/// Routed experts.
pub(super) const EXPERTS: &[ExpertNames] = &[
    ExpertNames::EACH,
    ExpertNames::W123,
    // gate and up of an expert in one array
    ExpertNames::EACH_FUSED,
    ExpertNames::mlp("experts.{e}.w13", "experts.{e}.w13", "experts.{e}.w2"),
    ExpertNames::STACKED,
    ExpertNames::STACKED_TRANSPOSED,
    // a stack of each projection
    APART,
    transposed(APART),
    stack(APART_WEIGHT),
    // MLX
    stack(SWITCH),
    stack(SWITCH_FUSED),
    stack(GLU),
    stack(W13),
    stack(W123_STACK),
    transposed(W123_STACK),
    stack(LINEARS),
    transposed(FC),
];

/// Shared experts.
pub(super) const SHARED: &[ExpertNames] = &[
    ExpertNames::mlp(
        "shared_experts.gate_proj",
        "shared_experts.up_proj",
        "shared_experts.down_proj",
    ),
    ExpertNames::mlp(
        "shared_experts.gate_up_proj",
        "shared_experts.gate_up_proj",
        "shared_experts.down_proj",
    ),
    ExpertNames::mlp("shared_experts.w1", "shared_experts.w3", "shared_experts.w2"),
    ExpertNames::mlp("shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj"),
    ExpertNames::mlp(
        "shared_expert.gate_up_proj",
        "shared_expert.gate_up_proj",
        "shared_expert.down_proj",
    ),
    ExpertNames::mlp("shared_expert.w1", "shared_expert.w3", "shared_expert.w2"),
    ExpertNames::mlp("shared_mlp.gate_proj", "shared_mlp.up_proj", "shared_mlp.down_proj"),
    ExpertNames::mlp("../shared_mlp.gate_proj", "../shared_mlp.up_proj", "../shared_mlp.down_proj"),
    ExpertNames::mlp(
        "../shared_mlp.input_linear",
        "../shared_mlp.input_linear",
        "../shared_mlp.output_linear",
    ),
    ExpertNames::mlp(
        "../share_expert.gate_proj",
        "../share_expert.up_proj",
        "../share_expert.down_proj",
    ),
    stack(ExpertNames::mlp(
        "shared_experts.gate_proj",
        "shared_experts.up_proj",
        "shared_experts.down_proj",
    )),
];
