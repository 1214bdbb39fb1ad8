//! The table of GGUF architectures.

use crate::spec::Activation;

/// What an architecture fixes, where the file's keys do not say otherwise. Absent keys are read as
/// llama.cpp reads them for that architecture.
#[derive(Clone, Copy)]
pub(super) struct Row {
    pub name: &'static str,
    /// `expert_gating_func` where the key is absent.
    pub gating: Gating,
    /// `expert_weights_norm` where the key is absent.
    pub renormalise: bool,
    /// Weights multiply the experts' input.
    pub on_input: bool,
    /// Experts have a gate projection.
    pub gated: bool,
    pub activation: Activation,
    /// What else differs.
    pub form: RowForm,
}

/// Blocks that are more than a router, experts, and shared experts.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum RowForm {
    Plain,
    /// Norms around every branch, a dense branch in every layer, scales of the router.
    Gemma4,
    /// Projections to a narrower width around the routed experts, where the file has them.
    Latent,
    /// `swiglu_clamp_exp` and `swiglu_clamp_shexp` clamp before the SiLU, not after it.
    Clamped,
    /// The same; shared experts are clamped as the routed ones, some layers choose by token.
    DeepseekV4,
    /// Clamped by fixed numbers, as the model's own activation is.
    ClampedSwiglu,
    /// SiTU, and projections to a narrower width around the routed experts.
    KimiK3,
    /// Half the sum of routed and shared experts.
    Average,
    /// Capped logits; a dense branch beside the experts, where the file has one, and the sum times √½.
    Grok,
    /// Two experts by sparsemixer, which is the model's own router.
    SparseMixer,
}

/// `expert_gating_func`: how logits become weights.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Gating {
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

/// Routers with sigmoids whose files say whether weights are renormalised.
const STATED_SIGMOID: Row = Row { gating: Gating::Sigmoid, ..STATED };

const GEMMA4: Row =
    Row { name: "gemma4", activation: Activation::GeluTanh, form: RowForm::Gemma4, ..SOFTMAX };

pub(super) const ROWS: &[Row] = &[
    Row { name: "llama", ..SOFTMAX },
    Row { name: "llama-embed", ..SOFTMAX },
    Row { name: "mistral3", ..SOFTMAX },
    Row { name: "minicpm", ..SOFTMAX },
    Row { name: "qwen3moe", ..SOFTMAX },
    Row { name: "qwen3vlmoe", ..SOFTMAX },
    Row { name: "qwen3next", ..SOFTMAX },
    Row { name: "qwen35moe", ..SOFTMAX },
    Row { name: "qwen4exp", ..SOFTMAX },
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
    Row { name: "granite", ..SOFTMAX },
    Row { name: "granitemoe", ..SOFTMAX },
    Row { name: "granite_swa", ..SOFTMAX },
    Row { name: "granitehybrid", ..SOFTMAX },
    Row { name: "deepseek", ..STATED },
    Row { name: "deepseek2", ..STATED },
    Row { name: "deepseek2-ocr", ..STATED },
    Row { name: "mistral4", ..STATED },
    Row { name: "bailingmoe", ..STATED },
    Row { name: "bailingmoe2", ..STATED_SIGMOID },
    Row { name: "bailingmoe3", ..STATED_SIGMOID },
    Row { name: "cohere2moe", form: RowForm::Average, ..STATED_SIGMOID },
    Row { name: "laguna", ..STATED_SIGMOID },
    Row { name: "axk2", ..STATED_SIGMOID },
    Row { name: "dots3note", ..STATED_SIGMOID },
    Row { name: "glm5next", form: RowForm::Clamped, ..STATED_SIGMOID },
    Row { name: "glm5-next", form: RowForm::Clamped, ..STATED_SIGMOID },
    Row { name: "kimi-k3", form: RowForm::KimiK3, ..STATED_SIGMOID },
    Row { name: "minimax-m3", form: RowForm::ClampedSwiglu, ..STATED_SIGMOID },
    Row { name: "deepseek32", ..STATED_SIGMOID },
    Row { name: "hy_v3", ..STATED_SIGMOID },
    Row { name: "hy_v4", form: RowForm::Clamped, ..STATED_SIGMOID },
    Row { name: "glm-dsa", ..STATED_SIGMOID },
    Row { name: "exaone-moe", ..STATED_SIGMOID },
    Row { name: "afmoe", ..STATED_SIGMOID },
    Row { name: "glm4moe", ..STATED_SIGMOID },
    Row { name: "dots1", ..STATED_SIGMOID },
    Row { name: "minimax-m2", ..SIGMOID },
    Row { name: "minimax-01", ..SOFTMAX },
    Row { name: "mimo2", ..SIGMOID },
    Row { name: "lfm2moe", ..SIGMOID },
    Row { name: "kimi-linear", ..SIGMOID },
    Row { name: "step35", ..STATED_SIGMOID },
    Row {
        name: "nemotron_h_moe",
        gated: false,
        activation: Activation::Relu2,
        form: RowForm::Latent,
        ..STATED_SIGMOID
    },
    Row { name: "deepseek4", gating: Gating::SqrtSoftplus, form: RowForm::DeepseekV4, ..SOFTMAX },
    GEMMA4,
    Row { name: "diffusion-gemma", ..GEMMA4 },
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
pub(super) const REFUSED: &[(&str, &str)] = &[
    (
        "smallthinker",
        "its router reads the decoder layer's input, its experts what attention makes of it: a layer \
         here has one input",
    ),
    (
        "grovemoe",
        "each group of experts has a further expert of its own, which runs once however many of the \
         group are chosen",
    ),
];
