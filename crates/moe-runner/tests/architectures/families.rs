//! Every row of the table: a small checkpoint with the published names must give exactly the
//! expected spec, and need exactly the tensors it has.

use std::collections::BTreeSet;

use moe_runner::checkpoint::architecture::{self, LayerEntry};
use moe_runner::spec::{
    Activation, Correction, Dims, ExpertSpec, GateSpec, GroupFill, GroupScore, Groups, IdleExperts,
    LayerSpec, OutputSpec, Renormalise, RmsNorm, RoutedScale, RouterSpec, ScaleOn, Score,
    Selection, SharedCombine, SharedSpec, Transform, TransformStep, WeightFrom, WeightOn,
};
use moe_runner::weights::account;

use crate::synthetic::{Model, merged};

/// Four experts, two for each token, H = 8, I = 4, three decoder layers; shared experts 12 wide.
const BASE: &str = r#"{
    "hidden_size": 8, "num_hidden_layers": 3, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5
}"#;

pub(crate) struct Family {
    pub(crate) types: &'static [&'static str],
    /// Laid over `BASE`.
    config: &'static str,
    moe: &'static [usize],
    /// The layer that is checked, and its block's path.
    pub(crate) layer: usize,
    block: &'static str,
    /// "name shape", relative to the block, `../` to the layer; `{e}` for each expert.
    tensors: &'static [&'static [&'static str]],
    /// From the plain spec to the expected one.
    expect: fn(&mut LayerSpec),
}

const GATE: &[&str] = &["gate.weight 4 8"];
const BIAS: &[&str] = &["gate.e_score_correction_bias 4"];
const EACH: &[&str] = &[
    "experts.{e}.gate_proj.weight 4 8",
    "experts.{e}.up_proj.weight 4 8",
    "experts.{e}.down_proj.weight 8 4",
];
const W123: &[&str] =
    &["experts.{e}.w1.weight 4 8", "experts.{e}.w3.weight 4 8", "experts.{e}.w2.weight 8 4"];
const STACKED: &[&str] = &["experts.gate_up_proj 4 8 8", "experts.down_proj 4 8 4"];
const SHARED: &[&str] = &[
    "shared_experts.gate_proj.weight 12 8",
    "shared_experts.up_proj.weight 12 8",
    "shared_experts.down_proj.weight 8 12",
];
const SHARED_ONE: &[&str] = &[
    "shared_expert.gate_proj.weight 12 8",
    "shared_expert.up_proj.weight 12 8",
    "shared_expert.down_proj.weight 8 12",
];
const SHARED_GATE: &[&str] = &["shared_expert_gate.weight 1 8"];
const SHARED_MLP: &[&str] = &[
    "shared_mlp.gate_proj.weight 12 8",
    "shared_mlp.up_proj.weight 12 8",
    "shared_mlp.down_proj.weight 8 12",
];

const SUM: Renormalise = Renormalise::Sum { eps: 0.0 };
const SUM_20: Renormalise = Renormalise::Sum { eps: 1e-20 };

fn plain(name: &str, index: usize) -> LayerSpec {
    LayerSpec {
        name: name.to_string(),
        index,
        dims: Dims { hidden: 8, routed_hidden: 8, intermediate: 4 },
        gate: GateSpec::default(),
        router: RouterSpec::softmax(4, 2, false),
        expert: ExpertSpec { gated: true, activation: Activation::Silu, bias: false, norm: None },
        input_transform: Transform::default(),
        output_transform: Transform::default(),
        routed_scale: RoutedScale { factor: 1.0, on: ScaleOn::Weights },
        shared: None,
        output: OutputSpec::default(),
    }
}

fn shared(spec: &mut LayerSpec) -> &mut SharedSpec {
    spec.shared.insert(SharedSpec {
        count: 1,
        intermediate: 12,
        gated: true,
        activation: Activation::Silu,
        bias: false,
        sigmoid_gate: false,
        combine: SharedCombine::Add,
        input_norm: None,
        output_norm: None,
    })
}

/// Sigmoid, bias on the score, renormalised, scaled.
fn v3(spec: &mut LayerSpec, scale: f32) {
    spec.router.score = Score::Sigmoid;
    spec.router.correction = Correction::OnScore;
    spec.router.renormalise = SUM_20;
    spec.routed_scale.factor = scale;
}

fn v3_shared(spec: &mut LayerSpec, scale: f32) {
    v3(spec, scale);
    shared(spec);
}

fn groups(spec: &mut LayerSpec, score: GroupScore, fill: GroupFill) {
    spec.router.groups = Some(Groups { count: 2, keep: 1, score, fill });
}

fn qwen2(spec: &mut LayerSpec) {
    shared(spec).sigmoid_gate = true;
}

fn chosen(spec: &mut LayerSpec) {
    spec.router.score = Score::Logits;
    spec.router.weight_from = WeightFrom::SoftmaxChosen;
}

fn clamped(alpha: f32, beta: f32, limit: f32) -> Activation {
    Activation::ClampedSwiglu { alpha, beta, limit }
}

fn norm(eps: f32) -> RmsNorm {
    RmsNorm { eps, unit_offset: false, scale_first: false }
}

fn gemma(spec: &mut LayerSpec) {
    spec.router.renormalise = SUM;
    spec.router.per_expert_scale = true;
    spec.gate.scaled_rms_eps = Some(1e-5);
    spec.expert.activation = Activation::GeluTanh;
    spec.input_transform = Transform { steps: vec![TransformStep::RmsNorm(norm(1e-5))] };
    spec.output_transform = spec.input_transform.clone();
    spec.output.norm = Some(norm(1e-5));
    let shared = shared(spec);
    shared.activation = Activation::GeluTanh;
    shared.input_norm = Some(norm(1e-5));
    shared.output_norm = Some(norm(1e-5));
}

const GEMMA: &[&str] = &[
    "router.proj.weight 4 8",
    "router.scale 8",
    "router.per_expert_scale 4",
    "mlp.gate_proj.weight 12 8",
    "mlp.up_proj.weight 12 8",
    "mlp.down_proj.weight 8 12",
    "pre_feedforward_layernorm.weight 8",
    "post_feedforward_layernorm_1.weight 8",
    "pre_feedforward_layernorm_2.weight 8",
    "post_feedforward_layernorm_2.weight 8",
    "post_feedforward_layernorm.weight 8",
];
const GRANITE: &[&str] =
    &["router.layer.weight 4 8", "input_linear.weight 4 8 8", "output_linear.weight 4 8 4"];
const GRANITE_SHARED: &[&str] =
    &["../shared_mlp.input_linear.weight 24 8", "../shared_mlp.output_linear.weight 8 12"];

pub(crate) const FAMILIES: &[Family] = &[
    Family {
        types: &["mixtral", "minimax", "minimax_text_01"],
        config: r#"{"num_local_experts": 4, "intermediate_size": 4}"#,
        moe: &[0, 1, 2],
        layer: 0,
        block: "model.layers.0.block_sparse_moe",
        tensors: &[GATE, W123],
        expect: |s| s.router.renormalise = SUM,
    },
    // as transformers 5 holds it in memory
    Family {
        types: &["mixtral"],
        config: r#"{"num_local_experts": 4, "intermediate_size": 4}"#,
        moe: &[0, 1, 2],
        layer: 2,
        block: "model.layers.2.mlp",
        tensors: &[GATE, STACKED],
        expect: |s| s.router.renormalise = SUM,
    },
    Family {
        types: &["qwen2_moe"],
        config: r#"{"num_experts": 4, "moe_intermediate_size": 4, "mlp_only_layers": [1],
            "shared_expert_intermediate_size": 12, "intermediate_size": 16}"#,
        moe: &[0, 2],
        layer: 2,
        block: "model.layers.2.mlp",
        tensors: &[GATE, EACH, SHARED_ONE, SHARED_GATE],
        expect: qwen2,
    },
    Family {
        types: &["qwen3_next"],
        config: r#"{"num_experts": 4, "moe_intermediate_size": 4, "decoder_sparse_step": 2,
            "shared_expert_intermediate_size": 12}"#,
        moe: &[1],
        layer: 1,
        block: "model.layers.1.mlp",
        tensors: &[GATE, EACH, SHARED_ONE, SHARED_GATE],
        expect: |s| {
            qwen2(s);
            s.router.renormalise = SUM;
        },
    },
    Family {
        types: &["qwen3_5_moe_text", "qwen4_exp_text", "qwen4_exp"],
        config: r#"{"num_experts": 4, "moe_intermediate_size": 4,
            "shared_expert_intermediate_size": 12}"#,
        moe: &[0, 1, 2],
        layer: 0,
        block: "model.language_model.layers.0.mlp",
        tensors: &[GATE, STACKED, SHARED_ONE, SHARED_GATE],
        expect: |s| {
            qwen2(s);
            s.router.renormalise = SUM;
        },
    },
    Family {
        types: &["qwen3_5_moe"],
        config: r#"{"text_config": {"model_type": "qwen3_5_moe_text", "num_experts": 4,
            "moe_intermediate_size": 4, "shared_expert_intermediate_size": 12, "hidden_size": 8,
            "num_hidden_layers": 1, "num_experts_per_tok": 2}}"#,
        moe: &[0],
        layer: 0,
        block: "model.language_model.layers.0.mlp",
        tensors: &[GATE, EACH, SHARED_ONE, SHARED_GATE],
        expect: |s| {
            qwen2(s);
            s.router.renormalise = SUM;
        },
    },
    Family {
        types: &["qwen3_moe"],
        config: r#"{"num_experts": 4, "moe_intermediate_size": 4, "norm_topk_prob": true}"#,
        moe: &[0, 1, 2],
        layer: 1,
        block: "model.layers.1.mlp",
        tensors: &[GATE, EACH],
        expect: |s| s.router.renormalise = SUM,
    },
    Family {
        types: &["mellum"],
        config: r#"{"num_experts": 4, "moe_intermediate_size": 4,
            "mlp_layer_types": ["dense", "sparse", "dense"]}"#,
        moe: &[1],
        layer: 1,
        block: "model.layers.1.mlp",
        tensors: &[GATE, EACH],
        expect: |s| s.router.renormalise = SUM,
    },
    Family {
        types: &["qwen3_omni_moe", "qwen3_omni_moe_thinker", "qwen3_omni_moe_text"],
        config: r#"{"thinker_config": {"text_config": {"num_experts": 4, "hidden_size": 8,
            "moe_intermediate_size": 4, "num_hidden_layers": 1, "num_experts_per_tok": 2}}}"#,
        moe: &[0],
        layer: 0,
        block: "thinker.model.layers.0.mlp",
        tensors: &[GATE, EACH],
        expect: |s| s.router.renormalise = SUM,
    },
    Family {
        types: &["qwen3_vl_moe", "qwen3_vl_moe_text", "cosmos3_omni"],
        config: r#"{"num_experts": 4, "moe_intermediate_size": 4}"#,
        moe: &[0, 1, 2],
        layer: 0,
        block: "model.language_model.layers.0.mlp",
        tensors: &[GATE, &["experts.gate_up_proj 4 8 8", "experts.down_proj 4 4 8"]],
        expect: |s| s.router.renormalise = SUM,
    },
    Family {
        types: &["olmoe", "flex_olmo"],
        config: r#"{"num_experts": 4, "intermediate_size": 4}"#,
        moe: &[0, 1, 2],
        layer: 0,
        block: "model.layers.0.mlp",
        tensors: &[GATE, EACH],
        expect: |_| {},
    },
    Family {
        types: &["jamba"],
        config: r#"{"num_experts": 4, "intermediate_size": 4, "expert_layer_period": 2,
            "expert_layer_offset": 1}"#,
        moe: &[1],
        layer: 1,
        block: "model.layers.1.feed_forward",
        tensors: &[&["router.weight 4 8"], EACH],
        expect: |_| {},
    },
    Family {
        types: &["hunyuan_v1_moe"],
        config: r#"{"num_experts": 4, "intermediate_size": 12, "moe_topk": [1, 2, 3],
            "num_experts_per_tok": null}"#,
        moe: &[0, 1, 2],
        layer: 2,
        block: "model.layers.2.mlp",
        tensors: &[
            &["gate.wg.weight 4 8"],
            &[
                "experts.{e}.gate_proj.weight 12 8",
                "experts.{e}.up_proj.weight 12 8",
                "experts.{e}.down_proj.weight 8 12",
            ],
            SHARED_MLP,
        ],
        expect: |s| {
            s.dims.intermediate = 12;
            s.router.top_k = 3;
            s.router.renormalise = SUM;
            shared(s);
        },
    },
    Family {
        types: &["dbrx"],
        config: r#"{"d_model": 8, "n_layers": 2, "hidden_size": null, "num_hidden_layers": null,
            "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 4,
            "moe_normalize_expert_weights": 2, "ffn_act_fn": {"name": "gelu"}}}"#,
        moe: &[0, 1],
        layer: 1,
        block: "transformer.blocks.1.ffn",
        tensors: &[&[
            "router.layer.weight 4 8",
            "experts.mlp.w1 16 8",
            "experts.mlp.v1 16 8",
            "experts.mlp.w2 16 8",
        ]],
        expect: |s| {
            s.router.renormalise = Renormalise::PNorm { p: 2.0 };
            s.expert.activation = Activation::Gelu;
        },
    },
    Family {
        types: &["gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"],
        config: r#"{"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 4,
            "num_experts_per_tok": null, "intermediate_size": 12, "enable_moe_block": true}"#,
        moe: &[0, 1, 2],
        layer: 1,
        block: "model.language_model.layers.1",
        tensors: &[GEMMA, STACKED],
        expect: gemma,
    },
    Family {
        types: &["diffusion_gemma", "diffusion_gemma_text"],
        config: r#"{"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 4,
            "num_experts_per_tok": null, "intermediate_size": 12}"#,
        moe: &[0, 1, 2],
        layer: 1,
        block: "model.layers.1",
        tensors: &[GEMMA, STACKED],
        expect: gemma,
    },
    Family {
        types: &["ernie4_5_moe"],
        config: r#"{"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 4,
            "moe_num_shared_experts": 3, "moe_layer_start_index": 1, "moe_layer_end_index": -1,
            "moe_layer_interval": 1, "moe_norm_min": 1e-9}"#,
        moe: &[1, 2],
        layer: 1,
        block: "model.layers.1.mlp",
        tensors: &[GATE, &["moe_statics.e_score_correction_bias 1 4"], EACH, SHARED],
        expect: |s| {
            s.router.correction = Correction::OnScore;
            s.router.renormalise = Renormalise::SumFloor { floor: 1e-9 };
            shared(s);
        },
    },
    Family {
        types: &["longcat_flash"],
        config: r#"{"num_layers": 2, "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2,
            "expert_ffn_hidden_size": 4, "num_experts_per_tok": null}"#,
        moe: &[0, 1],
        layer: 0,
        block: "model.layers.0.mlp",
        tensors: &[&["router.classifier.weight 6 8", "router.e_score_correction_bias 6"], EACH],
        expect: |s| {
            s.router.correction = Correction::OnScore;
            s.router.idle = Some(IdleExperts::Identity { count: 2 });
            s.routed_scale.factor = 6.0;
        },
    },
    Family {
        types: &["granitemoe", "granitemoe_swa"],
        config: r#"{"num_local_experts": 4, "intermediate_size": 4}"#,
        moe: &[0, 1, 2],
        layer: 0,
        block: "model.layers.0.block_sparse_moe",
        tensors: &[GRANITE],
        expect: chosen,
    },
    Family {
        types: &["granitemoeshared", "granitemoehybrid"],
        config: r#"{"num_local_experts": 4, "intermediate_size": 4,
            "shared_intermediate_size": 12}"#,
        moe: &[0, 1, 2],
        layer: 0,
        block: "model.layers.0.block_sparse_moe",
        tensors: &[GRANITE, GRANITE_SHARED],
        expect: |s| {
            chosen(s);
            shared(s);
        },
    },
    Family {
        types: &["gpt_oss", "openai_privacy_filter"],
        config: r#"{"num_local_experts": 4, "intermediate_size": 4, "swiglu_limit": 5}"#,
        moe: &[0, 1, 2],
        layer: 0,
        block: "model.layers.0.mlp",
        tensors: &[&[
            "router.weight 4 8",
            "router.bias 4",
            "experts.gate_up_proj 4 8 8",
            "experts.gate_up_proj_bias 4 8",
            "experts.down_proj 4 4 8",
            "experts.down_proj_bias 4 8",
        ]],
        expect: |s| {
            chosen(s);
            s.gate.bias = true;
            s.expert.bias = true;
            s.expert.activation = clamped(1.702, 1.0, 5.0);
        },
    },
    Family {
        types: &["aria", "aria_text"],
        config: r#"{"moe_num_experts": 4, "moe_topk": 2, "intermediate_size": 4,
            "moe_num_shared_experts": 3, "num_experts_per_tok": null, "hidden_act": "gelu"}"#,
        moe: &[0, 1, 2],
        layer: 0,
        block: "language_model.model.layers.0.mlp",
        tensors: &[
            &["router.weight 4 8", "experts.fc1.weight 4 8 8", "experts.fc2.weight 4 4 8"],
            SHARED,
        ],
        expect: |s| {
            chosen(s);
            shared(s).activation = Activation::Gelu;
        },
    },
    Family {
        types: &["jetmoe"],
        config: r#"{"num_local_experts": 4, "intermediate_size": 4}"#,
        moe: &[0, 1, 2],
        layer: 0,
        block: "model.layers.0.mlp",
        tensors: &[GRANITE, &["bias 8"]],
        expect: |s| {
            chosen(s);
            s.output.bias = true;
        },
    },
    Family {
        types: &["cohere2_moe"],
        config: r#"{"num_experts": 4, "intermediate_size": 4, "num_shared_experts": 3,
            "expert_selection_fn": "sigmoid", "first_k_dense_replace": 2}"#,
        moe: &[2],
        layer: 2,
        block: "model.layers.2.mlp",
        tensors: &[GATE, EACH, SHARED],
        expect: |s| {
            chosen(s);
            s.router.weight_from = WeightFrom::SigmoidChosen;
            s.router.renormalise = SUM;
            shared(s).combine = SharedCombine::Average;
        },
    },
    Family {
        types: &["llama4", "llama4_text"],
        config: r#"{"num_local_experts": 4, "intermediate_size": 12,
            "interleave_moe_layer_step": 2}"#,
        moe: &[1],
        layer: 1,
        block: "language_model.model.layers.1.feed_forward",
        tensors: &[
            &["router.weight 4 8", "experts.gate_up_proj 4 8 24", "experts.down_proj 4 12 8"],
            SHARED_ONE,
        ],
        expect: |s| {
            chosen(s);
            s.dims.intermediate = 12;
            s.router.weight_from = WeightFrom::SigmoidChosen;
            s.router.weight_on = WeightOn::Input;
            shared(s);
        },
    },
    Family {
        types: &["phimoe"],
        config: r#"{"num_local_experts": 4, "intermediate_size": 4, "router_jitter_noise": 0.02}"#,
        moe: &[0, 1, 2],
        layer: 0,
        block: "model.layers.0.block_sparse_moe",
        tensors: &[GATE, W123],
        expect: |s| {
            s.router.score = Score::Logits;
            s.router.selection = Selection::SparseMixer { eps: 0.02 };
        },
    },
    Family {
        types: &["kolibri1"],
        config: r#"{"num_local_experts": 4, "moe_intermediate_size": 4, "norm_topk_prob": true,
            "shared_expert_intermediate_size": 12}"#,
        moe: &[0, 1, 2],
        layer: 0,
        block: "model.layers.0.mlp",
        tensors: &[GATE, &["../moe.router.expert_bias 4"], EACH, SHARED],
        expect: |s| {
            s.router.score = Score::Logits;
            s.router.correction = Correction::OnLogits;
            s.router.weight_from = WeightFrom::SigmoidChosen;
            s.router.renormalise = SUM;
            shared(s);
        },
    },
    Family {
        types: &["deepseek_v3", "deepseek_v32", "kimi_k2", "kimi_k25", "glm_moe_dsa"],
        config: r#"{"n_routed_experts": 4, "moe_intermediate_size": 4, "n_shared_experts": 3,
            "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "moe_layer_freq": 1,
            "routed_scaling_factor": 3.5, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}"#,
        moe: &[1, 2],
        layer: 1,
        block: "model.layers.1.mlp",
        tensors: &[GATE, BIAS, EACH, SHARED],
        expect: |s| {
            v3_shared(s, 3.5);
            groups(s, GroupScore::TopTwoSum, GroupFill::NegativeInfinity);
        },
    },
    Family {
        types: &[
            "deepseek_v2",
            "deepseek_ocr2",
            "deepseek_ocr2_text",
            "unlimited_ocr",
            "unlimited_ocr_text",
        ],
        config: r#"{"n_routed_experts": 4, "moe_intermediate_size": 4, "n_shared_experts": 3,
            "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 16,
            "topk_method": "group_limited_greedy", "scoring_func": "softmax"}"#,
        moe: &[1, 2],
        layer: 1,
        block: "model.layers.1.mlp",
        tensors: &[GATE, EACH, SHARED],
        expect: |s| {
            groups(s, GroupScore::Max, GroupFill::Zero);
            s.routed_scale.factor = 16.0;
            shared(s);
        },
    },
    Family {
        types: &["glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm4v_moe_text", "solar_open", "dots1"],
        config: r#"{"n_routed_experts": 4, "moe_intermediate_size": 4, "n_shared_experts": 3,
            "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2, "norm_topk_prob": true,
            "scoring_func": "noaux_tc", "routed_scaling_factor": null}"#,
        moe: &[2],
        layer: 2,
        block: "model.layers.2.mlp",
        tensors: &[GATE, BIAS, EACH, SHARED],
        expect: |s| v3_shared(s, 1.0),
    },
    Family {
        types: &["dots3_note", "dots3_note_text"],
        config: r#"{"n_routed_experts": 4, "moe_intermediate_size": 4, "n_shared_experts": 1,
            "shared_experts_intermediate_size": 12, "moe_layer_freq": [0, 1, 0]}"#,
        moe: &[1],
        layer: 1,
        block: "model.language_model.layers.1.mlp",
        tensors: &[GATE, BIAS, EACH, SHARED],
        expect: |s| v3_shared(s, 1.0),
    },
    Family {
        types: &["exaone_moe"],
        config: r#"{"num_experts": 4, "moe_intermediate_size": 4, "num_shared_experts": 3}"#,
        moe: &[1, 2],
        layer: 1,
        block: "model.layers.1.mlp",
        tensors: &[GATE, &["e_score_correction_bias 4"], EACH, SHARED],
        expect: |s| v3_shared(s, 2.5),
    },
    Family {
        types: &["kimi_linear"],
        config: r#"{"num_experts": 4, "num_experts_per_token": 2, "num_experts_per_tok": null,
            "moe_intermediate_size": 4, "num_shared_experts": 3, "moe_renormalize": false,
            "num_expert_group": 2, "topk_group": 1}"#,
        moe: &[1, 2],
        layer: 1,
        block: "model.layers.1.block_sparse_moe",
        tensors: &[GATE, BIAS, W123, SHARED],
        expect: |s| {
            v3_shared(s, 2.446);
            groups(s, GroupScore::TopTwoSum, GroupFill::NegativeInfinity);
            s.router.renormalise = Renormalise::None;
        },
    },
    Family {
        types: &["bailing_hybrid", "bailing_moe_v2", "bailing_moe_linear"],
        config: r#"{"num_experts": 4, "moe_intermediate_size": 4, "num_shared_experts": 3,
            "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2,
            "routed_scaling_factor": 2.5}"#,
        moe: &[2],
        layer: 2,
        block: "model.layers.2.mlp",
        tensors: &[GATE, &["gate.expert_bias 4"], EACH, SHARED],
        expect: |s| v3_shared(s, 2.5),
    },
    Family {
        types: &["mimo_v2_flash"],
        config: r#"{"n_routed_experts": 4, "moe_intermediate_size": 4, "n_shared_experts": null,
            "routed_scaling_factor": null, "moe_layer_freq": [0, 1, 1]}"#,
        moe: &[1, 2],
        layer: 1,
        block: "model.layers.1.mlp",
        tensors: &[GATE, BIAS, EACH],
        expect: |s| v3(s, 1.0),
    },
    Family {
        types: &["nemotron_h"],
        config: r#"{"n_routed_experts": 4, "moe_intermediate_size": 4, "num_hidden_layers": null,
            "layers_block_type": ["mamba", "moe", "attention"], "moe_latent_size": 6,
            "moe_shared_expert_intermediate_size": 12, "routed_scaling_factor": 2.5}"#,
        moe: &[1],
        layer: 1,
        block: "backbone.layers.1.mixer",
        tensors: &[
            GATE,
            BIAS,
            &["experts.gate_and_up_projs 4 6 4", "experts.down_projs 4 4 6"],
            &["shared_experts.up_proj.weight 12 8", "shared_experts.down_proj.weight 8 12"],
            &["fc1_latent_proj.weight 6 8", "fc2_latent_proj.weight 8 6"],
        ],
        expect: |s| {
            v3(s, 2.5);
            s.dims.routed_hidden = 6;
            s.input_transform = Transform { steps: vec![TransformStep::Linear { width: 6 }] };
            s.output_transform = Transform { steps: vec![TransformStep::Linear { width: 8 }] };
            s.expert.gated = false;
            s.expert.activation = Activation::Relu2;
            let shared = shared(s);
            shared.gated = false;
            shared.activation = Activation::Relu2;
        },
    },
    Family {
        types: &["beam"],
        config: r#"{"n_group": 1, "topk_group": 1, "num_experts": 4, "moe_intermediate_size": 4, "n_group": 2, "topk_group": 1,
            "first_k_dense_replace": 0}"#,
        moe: &[0, 1, 2],
        layer: 0,
        block: "model.layers.0.mlp",
        tensors: &[GATE, BIAS, EACH],
        expect: |s| {
            v3(s, 2.5);
            groups(s, GroupScore::TopTwoSum, GroupFill::NegativeInfinity);
            s.routed_scale.on = ScaleOn::Output;
        },
    },
    Family {
        types: &["axk1"],
        config: r#"{"n_group": 1, "topk_group": 1, "n_routed_experts": 4, "moe_intermediate_size": 4, "n_shared_experts": 3}"#,
        moe: &[1, 2],
        layer: 1,
        block: "model.layers.1.mlp",
        tensors: &[GATE, BIAS, EACH, SHARED, &["../post_mlp_layernorm.weight 8"]],
        expect: |s| {
            v3_shared(s, 2.5);
            s.output.norm = Some(norm(1e-5));
        },
    },
    Family {
        types: &["axk2"],
        config: r#"{"n_routed_experts": 4, "moe_intermediate_size": 4, "n_shared_experts": 3,
            "n_group": 2, "topk_group": 1}"#,
        moe: &[1, 2],
        layer: 1,
        block: "model.layers.1.mlp",
        tensors: &[GATE, BIAS, EACH, SHARED],
        expect: |s| {
            v3_shared(s, 2.5);
            groups(s, GroupScore::TopTwoSum, GroupFill::Zero);
        },
    },
    Family {
        types: &["hy_v4", "hy_v4_vl", "hy_v4_vl_text"],
        config: r#"{"n_routed_experts": 4, "moe_intermediate_size": 4, "n_shared_experts": 3}"#,
        moe: &[1, 2],
        layer: 1,
        block: "model.layers.1.mlp",
        tensors: &[GATE, BIAS, STACKED, SHARED],
        expect: |s| {
            v3_shared(s, 2.827);
            s.expert.activation = clamped(1.0, 0.0, 10.0);
        },
    },
    Family {
        types: &["glm5_next", "glm5_next_text"],
        config: r#"{"n_routed_experts": 4, "moe_intermediate_size": 4, "n_shared_experts": 3,
            "swiglu_limit": 9, "first_k_dense_replace": 0}"#,
        moe: &[0, 1, 2],
        layer: 1,
        block: "model.language_model.layers.1.mlp",
        tensors: &[GATE, BIAS, EACH, SHARED],
        expect: |s| {
            v3_shared(s, 2.5);
            s.expert.activation = clamped(1.0, 0.0, 9.0);
            shared(s).activation = clamped(1.0, 0.0, 9.0);
        },
    },
    Family {
        types: &["mistral4"],
        config: r#"{"n_routed_experts": 4, "moe_intermediate_size": 4, "n_shared_experts": 3,
            "n_group": 2, "topk_group": 1}"#,
        moe: &[0, 1, 2],
        layer: 1,
        block: "model.layers.1.mlp",
        tensors: &[GATE, STACKED, SHARED],
        expect: |s| {
            s.router.renormalise = SUM_20;
            groups(s, GroupScore::TopTwoSum, GroupFill::Zero);
            shared(s);
        },
    },
    Family {
        types: &["mistral_large4", "mistral_large4_text"],
        config: r#"{"n_routed_experts": 4, "moe_intermediate_size": 4, "n_shared_experts": 3}"#,
        moe: &[1, 2],
        layer: 1,
        block: "layers.1",
        tensors: &[
            GATE,
            W123,
            &[
                "shared_experts.w1.weight 12 8",
                "shared_experts.w3.weight 12 8",
                "shared_experts.w2.weight 8 12",
            ],
        ],
        expect: |s| {
            s.router.renormalise = SUM_20;
            shared(s);
        },
    },
    Family {
        types: &["afmoe"],
        config: r#"{"num_experts": 4, "moe_intermediate_size": 4, "num_shared_experts": 3,
            "num_dense_layers": 2, "route_scale": 1.5, "n_group": 2, "topk_group": 1}"#,
        moe: &[2],
        layer: 2,
        block: "model.layers.2.mlp",
        tensors: &[&["router.gate.weight 4 8", "expert_bias 4"], EACH, SHARED],
        expect: |s| v3_shared(s, 1.5),
    },
    Family {
        types: &["minimax_m2"],
        config: r#"{"num_local_experts": 4, "intermediate_size": 4}"#,
        moe: &[0, 1, 2],
        layer: 2,
        block: "model.layers.2.block_sparse_moe",
        tensors: &[GATE, &["e_score_correction_bias 4"], W123],
        expect: |s| {
            v3(s, 1.0);
            s.router.renormalise = SUM;
        },
    },
    Family {
        types: &["minimax_m3_vl", "minimax_m3_vl_text"],
        config: r#"{"num_local_experts": 4, "intermediate_size": 4, "moe_layer_freq": [0, 0, 1],
            "shared_intermediate_size": 12}"#,
        moe: &[2],
        layer: 2,
        block: "language_model.model.layers.2.block_sparse_moe",
        tensors: &[GATE, &["e_score_correction_bias 4"], W123, SHARED],
        expect: |s| {
            v3_shared(s, 2.0);
            s.routed_scale.on = ScaleOn::Output;
            s.router.renormalise = SUM;
            s.expert.activation = clamped(1.702, 1.0, 7.0);
            shared(s).activation = clamped(1.702, 1.0, 7.0);
        },
    },
    Family {
        types: &["step3p7", "step3p5"],
        config: r#"{"moe_num_experts": 4, "moe_top_k": 2, "moe_intermediate_size": 4,
            "num_experts_per_tok": null, "share_expert_dims": 12, "moe_layers_enum": "1,2",
            "moe_router_scaling_factor": 3, "swiglu_limits": [0, 7, 0],
            "swiglu_limits_shared": [0, 0, 16]}"#,
        moe: &[1, 2],
        layer: 1,
        block: "model.layers.1.moe",
        tensors: &[&[
            "gate.weight 4 8",
            "router_bias 4",
            "gate_proj.weight 4 4 8",
            "up_proj.weight 4 4 8",
            "down_proj.weight 4 8 4",
            "../share_expert.gate_proj.weight 12 8",
            "../share_expert.up_proj.weight 12 8",
            "../share_expert.down_proj.weight 8 12",
        ]],
        expect: |s| {
            v3_shared(s, 3.0);
            s.routed_scale.on = ScaleOn::Output;
            s.router.renormalise = SUM;
            s.expert.activation = Activation::SwigluStep { limit: 7.0 };
        },
    },
    Family {
        types: &["hy_v3"],
        config: r#"{"num_experts": 4, "moe_intermediate_size": 4, "num_shared_experts": 3}"#,
        moe: &[1, 2],
        layer: 1,
        block: "model.layers.1.mlp",
        tensors: &[&["router.gate.weight 4 8", "expert_bias 4"], EACH, SHARED_MLP],
        expect: |s| v3_shared(s, 2.826),
    },
    Family {
        types: &["lfm2_moe"],
        config: r#"{"num_experts": 4, "moe_intermediate_size": 4, "num_dense_layers": 1}"#,
        moe: &[1, 2],
        layer: 1,
        block: "model.layers.1.feed_forward",
        tensors: &[GATE, &["expert_bias 4"], W123],
        expect: |s| {
            v3(s, 1.0);
            s.router.renormalise = Renormalise::Sum { eps: 1e-6 };
        },
    },
    Family {
        types: &["laguna"],
        config: r#"{"num_experts": 4, "moe_intermediate_size": 4, "moe_routed_scaling_factor": 1.5,
            "shared_expert_intermediate_size": 12, "moe_router_logit_softcapping": 30}"#,
        moe: &[1, 2],
        layer: 1,
        block: "model.layers.1.mlp",
        tensors: &[GATE, &["experts.e_score_correction_bias 4"], EACH, SHARED_ONE],
        expect: |s| {
            v3_shared(s, 1.5);
            s.routed_scale.on = ScaleOn::Output;
            s.router.renormalise = SUM;
            s.router.soft_cap = Some(30.0);
        },
    },
    Family {
        types: &["flint"],
        config: r#"{"num_experts": 4, "moe_intermediate_size": 4,
            "shared_expert_intermediate_size": 12}"#,
        moe: &[2],
        layer: 2,
        block: "model.layers.2.mlp",
        tensors: &[GATE, EACH, SHARED_ONE],
        expect: |s| {
            s.router.score = Score::Sigmoid;
            s.router.renormalise = SUM;
            shared(s);
        },
    },
    Family {
        types: &["deepseek_v4"],
        config: r#"{"n_routed_experts": 4, "moe_intermediate_size": 4, "n_shared_experts": 3,
            "num_hash_layers": 1, "vocab_size": 5, "scoring_func": "sqrtsoftplus"}"#,
        moe: &[0, 1, 2],
        layer: 1,
        block: "layers.1.ffn",
        tensors: &[
            GATE,
            &["gate.bias 4"],
            W123,
            &[
                "shared_experts.w1.weight 4 8",
                "shared_experts.w3.weight 4 8",
                "shared_experts.w2.weight 8 4",
            ],
        ],
        // one shared expert, as wide as a routed one, whatever `n_shared_experts` says
        expect: |s| {
            v3_shared(s, 1.5);
            s.router.score = Score::SqrtSoftplus;
            s.expert.activation = clamped(1.0, 0.0, 10.0);
            let shared = shared(s);
            shared.activation = clamped(1.0, 0.0, 10.0);
            shared.intermediate = 4;
        },
    },
    Family {
        types: &["muse_spark", "muse_spark_text"],
        config: r#"{"num_local_experts": 4, "moe_intermediate_size": 4, "moe_hidden_size": 6,
            "output_multiplier": 0.25, "post_norm_eps": 1e-7}"#,
        moe: &[0, 1, 2],
        layer: 1,
        block: "model.language_model.layers.1.mlp",
        tensors: &[
            GATE,
            BIAS,
            &[
                "experts.gate_up_proj 4 8 6",
                "experts.down_proj 4 6 4",
                "experts.post_expert_norm.weight 6",
                "pre_expert_proj.weight 6 8",
                "pre_expert_norm.weight 6",
                "post_expert_proj.weight 8 6",
            ],
        ],
        expect: |s| {
            v3(s, 1.0);
            s.router.renormalise = Renormalise::Sum { eps: 1e-15 };
            s.router.logit_multiplier = 0.25;
            s.dims.routed_hidden = 6;
            s.input_transform.steps = vec![
                TransformStep::Linear { width: 6 },
                TransformStep::RmsNorm(RmsNorm { unit_offset: true, ..norm(1e-5) }),
            ];
            s.output_transform.steps = vec![TransformStep::Linear { width: 8 }];
            s.expert.norm = Some(RmsNorm { eps: 1e-7, unit_offset: true, scale_first: true });
        },
    },
    Family {
        types: &["inkling_mm_model", "inkling", "inkling_text"],
        config: r#"{"n_routed_experts": 4, "moe_intermediate_size": 12, "n_shared_experts": 2,
            "dense_mlp_idx": 1, "route_scale": 4}"#,
        moe: &[1, 2],
        layer: 1,
        block: "model.llm.layers.1.mlp",
        tensors: &[&[
            "gate.weight 6 8",
            "gate.bias 4",
            "gate.global_scale 1",
            "experts.w13_weight 4 24 8",
            "experts.w2_weight 4 8 12",
            "shared_experts.shared_w13_weight 2 24 8",
            "shared_experts.shared_w2_weight 2 8 12",
        ]],
        expect: |s| {
            v3(s, 4.0);
            s.dims.intermediate = 12;
            s.router.renormalise = Renormalise::None;
            s.router.weight_from = WeightFrom::JointSoftmax { shared: 2 };
            let shared = shared(s);
            shared.count = 2;
            shared.combine = SharedCombine::RouterWeighted;
        },
    },
    Family {
        types: &["inkling2", "inkling2_text", "inkling2_loop", "inkling2_loop_text"],
        config: r#"{"n_routed_experts": 4, "moe_intermediate_size": 4, "mlp_gate_softcap": 3}"#,
        moe: &[0, 1, 2],
        layer: 1,
        block: "model.llm.layers.1.mlp",
        tensors: &[GATE, &["gate.bias 4", "experts.w13_weight 4 8 8", "experts.w2_weight 4 8 4"]],
        expect: |s| {
            v3(s, 8.0);
            s.expert.activation = Activation::Situ { beta: 3.0, lambda: Some(25.0) };
        },
    },
    // the names of the hub, the bias in the gate
    Family {
        types: &["sarvam_moe", "sarvam_mla"],
        config: r#"{"num_experts": 4, "moe_intermediate_size": 4, "num_shared_experts": 3}"#,
        moe: &[1, 2],
        layer: 1,
        block: "model.layers.1.mlp",
        tensors: &[GATE, &["gate.expert_bias 4"], EACH, SHARED],
        expect: |s| v3_shared(s, 2.5),
    },
    Family {
        types: &["deepseek"],
        config: r#"{"n_routed_experts": 4, "moe_intermediate_size": 4, "n_shared_experts": 3,
            "first_k_dense_replace": 1}"#,
        moe: &[1, 2],
        layer: 1,
        block: "model.layers.1.mlp",
        tensors: &[GATE, EACH, SHARED],
        expect: |s| {
            shared(s);
        },
    },
    Family {
        types: &["bailing_moe"],
        config: r#"{"num_experts": 4, "moe_intermediate_size": 4, "num_shared_experts": 3}"#,
        moe: &[0, 1, 2],
        layer: 1,
        block: "model.layers.1.mlp",
        tensors: &[GATE, EACH, SHARED],
        expect: |s| {
            s.router.renormalise = SUM_20;
            shared(s);
        },
    },
    Family {
        types: &["hunyuan"],
        config: r#"{"num_experts": 4, "intermediate_size": 12, "moe_topk": [1, 1, 1],
            "moe_intermediate_size": [6, 5, 4], "num_shared_expert": [0, 0, 1],
            "use_mixed_mlp_moe": true,
            "num_experts_per_tok": null}"#,
        moe: &[0, 1, 2],
        layer: 2,
        block: "model.layers.2.mlp",
        tensors: &[&["gate.wg.weight 4 8"], EACH, SHARED_MLP],
        expect: |s| {
            s.router.top_k = 1;
            shared(s);
        },
    },
    Family {
        types: &["lara_mini"],
        config: r#"{"num_experts": 4, "moe_intermediate_size": 4,
            "shared_expert_intermediate_size": 12}"#,
        moe: &[0, 1, 2],
        layer: 0,
        block: "model.layers.0.mlp",
        tensors: &[GATE, EACH, SHARED_ONE],
        expect: |s| {
            shared(s);
            s.router.renormalise = SUM;
        },
    },
    // routed experts between projections to a narrower width, with a norm after them
    Family {
        types: &["kimi_k3"],
        config: r#"{"num_experts": 4, "moe_intermediate_size": 4, "num_shared_experts": 3,
            "routed_expert_hidden_size": 6, "hidden_act": "situ", "activation_situ_beta": 4.0,
            "activation_situ_linear_beta": 25.0, "routed_scaling_factor": 1.5}"#,
        moe: &[1, 2],
        layer: 1,
        block: "language_model.model.layers.1.block_sparse_moe",
        tensors: &[
            GATE,
            BIAS,
            &[
                "experts.{e}.w1.weight 4 6",
                "experts.{e}.w3.weight 4 6",
                "experts.{e}.w2.weight 6 4",
            ],
            SHARED,
            &["routed_expert_down_proj.weight 6 8", "routed_expert_up_proj.weight 8 6"],
            &["routed_expert_norm.weight 6"],
        ],
        expect: |s| {
            v3_shared(s, 1.5);
            let situ = Activation::Situ { beta: 4.0, lambda: Some(25.0) };
            s.expert.activation = situ;
            s.shared.as_mut().unwrap().activation = situ;
            s.dims.routed_hidden = 6;
            s.input_transform = Transform { steps: vec![TransformStep::Linear { width: 6 }] };
            s.output_transform.steps =
                vec![TransformStep::RmsNorm(norm(1e-5)), TransformStep::Linear { width: 8 }];
        },
    },
    Family {
        types: &["nemotron_h_omni", "nemo_speechlm"],
        config: r#"{"llm_config": {"model_type": "nemotron_h", "hidden_size": 8,
            "hybrid_override_pattern": "ME*", "num_experts_per_tok": 2, "n_group": 1,
            "n_routed_experts": 4, "moe_intermediate_size": 4, "topk_group": 1,
            "moe_shared_expert_intermediate_size": 12, "routed_scaling_factor": 2.5}}"#,
        moe: &[1],
        layer: 1,
        block: "language_model.backbone.layers.1.mixer",
        tensors: &[
            GATE,
            BIAS,
            &["experts.{e}.up_proj.weight 4 8", "experts.{e}.down_proj.weight 8 4"],
            &["shared_experts.up_proj.weight 12 8", "shared_experts.down_proj.weight 8 12"],
        ],
        expect: |s| {
            v3(s, 2.5);
            s.expert.gated = false;
            s.expert.activation = Activation::Relu2;
            let shared = shared(s);
            shared.gated = false;
            shared.activation = Activation::Relu2;
        },
    },
];

impl Family {
    pub(crate) fn model(&self, model_type: &str) -> Model {
        let mut model = Model { config: merged(BASE, self.config), ..Model::default() };
        model.config["model_type"] = model_type.into();
        let layer = self.block.split_inclusive(&format!("{}.", self.layer)).next();
        let layer = match self.block.ends_with(&self.layer.to_string()) {
            true => self.block,
            false => layer.unwrap().trim_end_matches('.'),
        };
        for line in self.tensors.iter().copied().flatten() {
            let (name, shape) = line.split_once(' ').unwrap();
            let shape: Vec<usize> = shape.split(' ').map(|n| n.parse().unwrap()).collect();
            let name = match name.strip_prefix("../") {
                Some(name) => format!("{layer}.{name}"),
                None => format!("{}.{name}", self.block),
            };
            match name.contains("{e}") {
                true => {
                    (0..4).for_each(|e| model.add(&name.replace("{e}", &e.to_string()), &shape))
                }
                false => model.add(&name, &shape),
            }
        }
        model
    }

    fn check(&self, model_type: &str) {
        let folder = tempfile::tempdir().unwrap();
        let model = self.model(model_type);
        let checkpoint = model.open(folder.path());
        let layers = architecture::layers(&checkpoint)
            .unwrap_or_else(|error| panic!("{model_type}: {error}"));
        assert_eq!(architecture::describe(&checkpoint).unwrap().architecture, model_type);
        let indices: Vec<usize> = layers.iter().map(|entry| entry.spec.index).collect();
        assert_eq!(indices, self.moe, "{model_type}");
        let mut expected = plain(self.block, self.layer);
        (self.expect)(&mut expected);
        let entry = layers.iter().find(|entry| entry.spec.index == self.layer).unwrap();
        assert_eq!(entry.spec, expected, "{model_type}");
        let accounting = account(&checkpoint, entry);
        assert!(accounting.is_complete(), "{model_type}: {accounting:?}");
        assert!(accounting.unexpected.is_empty(), "{model_type}: {accounting:?}");
        if model_type == self.types[0] {
            self.check_each_is_needed(&model);
        }
    }

    /// Without any one tensor the layer is not complete, and the account says which.
    fn check_each_is_needed(&self, model: &Model) {
        for name in model.tensors.keys() {
            let mut lacking = model.clone();
            lacking.tensors.remove(name);
            let folder = tempfile::tempdir().unwrap();
            let checkpoint = lacking.open(folder.path());
            let layers = architecture::layers(&checkpoint).unwrap();
            let entry: &LayerEntry =
                layers.iter().find(|entry| entry.spec.index == self.layer).unwrap();
            let accounting = account(&checkpoint, entry);
            // the stacks of some models are called `.weight`, of others not
            let bare = name.trim_end_matches(".weight");
            assert!(
                accounting.missing.iter().any(|name| name.trim_end_matches(".weight") == bare),
                "{name} is gone, but: {accounting:?}"
            );
        }
    }
}

#[test]
fn every_family() {
    let mut covered = BTreeSet::new();
    for family in FAMILIES {
        for model_type in family.types {
            family.check(model_type);
            covered.insert(*model_type);
        }
    }
    let known: BTreeSet<&str> = architecture::known().collect();
    assert_eq!(covered, known);
}

#[test]
fn the_first_layers_of_deepseek_v4_choose_by_token() {
    let family = FAMILIES.iter().find(|family| family.types[0] == "deepseek_v4").unwrap();
    let mut model = family.model("deepseek_v4");
    let folder = tempfile::tempdir().unwrap();
    model.tensors.insert("layers.0.ffn.gate.tid2eid".into(), (vec![5, 2], vec![0.0; 10]));
    let layers = architecture::layers(&model.open(folder.path())).unwrap();
    let router = &layers[0].spec.router;
    assert_eq!(router.selection, Selection::HashTable { vocabulary: 5 });
    assert_eq!(router.correction, Correction::None);
    assert_eq!(layers[0].tensors.hash_table.as_deref(), Some("layers.0.ffn.gate.tid2eid"));
    assert_eq!(layers[0].tensors.correction, None);
    assert_eq!(layers[1].tensors.hash_table, None);
}

/// The library's own save of hy_v4 renames every gate projection.
#[test]
fn renamed_shared_gate_of_hy_v4() {
    let family = FAMILIES.iter().find(|family| family.types[0] == "hy_v4").unwrap();
    let mut model = family.model("hy_v4");
    let tensor = model.tensors.remove("model.layers.1.mlp.shared_experts.gate_proj.weight");
    let renamed = "model.layers.1.mlp.shared_experts.linear_gate.weight";
    model.tensors.insert(renamed.into(), tensor.unwrap());
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = model.open(folder.path());
    let layers = architecture::layers(&checkpoint).unwrap();
    assert!(account(&checkpoint, &layers[0]).is_complete());
}

#[test]
fn no_experts_no_layers() {
    let family = FAMILIES.iter().find(|family| family.types[1..] == ["granitemoehybrid"]).unwrap();
    let mut model = family.model("granitemoehybrid");
    model.config["num_local_experts"] = 0.into();
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(architecture::layers(&model.open(folder.path())).unwrap(), []);
}

#[test]
fn limits_by_layer() {
    let family = FAMILIES.iter().find(|family| family.types[0] == "step3p7").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let layers = architecture::layers(&family.model("step3p7").open(folder.path())).unwrap();
    let activations: Vec<(Activation, Activation)> = layers
        .iter()
        .map(|entry| (entry.spec.expert.activation, entry.spec.shared.as_ref().unwrap().activation))
        .collect();
    assert_eq!(
        activations,
        [
            (Activation::SwigluStep { limit: 7.0 }, Activation::Silu),
            (Activation::Silu, Activation::SwigluStep { limit: 16.0 }),
        ]
    );
}

/// What is wrong with a config is an error that names the key; nothing is allocated for it.
#[test]
fn unusable_configs_are_refused() {
    let cases = [
        (r#"{"model_type": "bailing_moe", "num_experts": 4}"#, "moe_intermediate_size"),
        (
            r#"{"model_type": "deepseek_v2", "num_experts_per_tok": null}"#,
            "'num_experts_per_tok': is missing",
        ),
        (r#"{"model_type": "qwen3_moe", "hidden_act": null}"#, "'hidden_act': is null"),
        (r#"{"model_type": "llama"}"#, "model_type"),
        (r#"{"model_type": "doge", "num_experts": 4}"#, "product keys"),
        (r#"{"model_type": "switch_transformers"}"#, "capacity"),
        (r#"{"model_type": "ernie4_5_vl_moe"}"#, "two gates"),
        (
            r#"{"model_type": "qwen3_moe", "num_experts": 100000000, "moe_intermediate_size": 4}"#,
            "100000000 experts",
        ),
        (
            r#"{"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 2000000000}"#,
            "intermediate size",
        ),
        (
            r#"{"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 4,
                "num_hidden_layers": 2000000000}"#,
            "num_hidden_layers",
        ),
        (
            r#"{"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 4,
                "num_experts_per_tok": 5}"#,
            "top-k is 5",
        ),
        (
            r#"{"model_type": "qwen3_moe", "num_experts": -1, "moe_intermediate_size": 4}"#,
            "num_experts",
        ),
        (
            r#"{"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 4,
                "decoder_sparse_step": 0}"#,
            "decoder_sparse_step",
        ),
        (
            r#"{"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 4,
                "hidden_act": "mish"}"#,
            "hidden_act",
        ),
        (
            r#"{"model_type": "deepseek_v3", "n_routed_experts": 4, "moe_intermediate_size": 4,
                "first_k_dense_replace": 0, "n_group": 3, "topk_group": 1}"#,
            "3 groups",
        ),
        (
            r#"{"model_type": "deepseek_v3", "n_routed_experts": 4, "moe_intermediate_size": 4,
                "first_k_dense_replace": 0, "scoring_func": "tanh"}"#,
            "scoring_func",
        ),
        (
            r#"{"model_type": "deepseek_v3", "n_routed_experts": 4, "moe_intermediate_size": 4,
                "first_k_dense_replace": 0, "topk_method": "greedy"}"#,
            "topk_method",
        ),
        (
            r#"{"model_type": "mellum", "num_experts": 4, "moe_intermediate_size": 4,
                "mlp_layer_types": ["sparse"]}"#,
            "mlp_layer_types",
        ),
        (
            r#"{"model_type": "hunyuan_v1_moe", "num_experts": 4, "intermediate_size": 4,
                "num_experts_per_tok": null, "moe_topk": [2]}"#,
            "moe_topk",
        ),
    ];
    for (config, named) in cases {
        let folder = tempfile::tempdir().unwrap();
        let mut model = Model { config: merged(BASE, config), ..Model::default() };
        model.add("model.embed_tokens.weight", &[2, 2]);
        let error = architecture::layers(&model.open(folder.path())).unwrap_err().to_string();
        assert!(error.contains(named), "{config}: {error}");
    }
}

/// What cannot be run is not in the table too.
#[test]
fn refusals_are_not_rows() {
    let known: BTreeSet<&str> = architecture::known().collect();
    for (name, reason) in architecture::refused() {
        assert!(!known.contains(name) && !reason.is_empty());
    }
}
