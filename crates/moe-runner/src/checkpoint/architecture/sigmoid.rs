//! The DeepSeek family: scores, a bias that only chooses, groups, renormalised and scaled weights.

use super::build::is_hash_layer;
use super::row::{Architecture, ExpertNames, Names, Renorm, Shared};
use super::rules::LayerRule;
use super::settings::Settings;
use super::softmax::WHOLE_WIDTH;
use super::tensors::Form;
use crate::Result;
use crate::spec::{
    Activation, Correction, GroupFill, GroupScore, LayerSpec, RmsNorm, ScaleOn, Score, Selection,
    SharedCombine, Transform, TransformStep, WeightFrom,
};

const V3: Architecture = Architecture {
    model_types: &["deepseek_v3", "deepseek_v32", "kimi_k2", "kimi_k25", "glm_moe_dsa"],
    classes: &["DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"],
    moe_layers: LayerRule::AfterDense(&["first_k_dense_replace"], 3),
    scale: (&["routed_scaling_factor"], 2.5),
    adjust: |settings, _, _| check_method(settings, &["noaux_tc"]),
    ..Architecture::SIGMOID
};

/// Softmax, no bias, groups by their best. `norm_topk_prob` is not used: the library that defines
/// the reference outputs ignores it.
const V2: Architecture = Architecture {
    model_types: &[
        "deepseek_v2",
        "deepseek_ocr2_text",
        "deepseek_ocr2",
        "unlimited_ocr_text",
        "unlimited_ocr",
    ],
    classes: &["DeepseekV2ForCausalLM"],
    moe_layers: LayerRule::AfterDense(&["first_k_dense_replace"], 0),
    score: Score::Softmax,
    correction: Correction::None,
    groups: Some((GroupScore::Max, GroupFill::Zero)),
    renormalise: Renorm::Never,
    shared: Shared::Times(&["n_shared_experts"], 2),
    adjust: |settings, _, spec| {
        check_method(settings, &["greedy", "group_limited_greedy"])?;
        if settings.text(&["topk_method"])?.unwrap_or("greedy") == "greedy" {
            spec.router.groups = None;
        }
        Ok(())
    },
    ..Architecture::SIGMOID
};

const GLM4: Architecture = Architecture {
    model_types: &["glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm4v_moe_text"],
    classes: &["Glm4MoeForCausalLM", "Glm4MoeLiteForCausalLM", "Glm4vMoeForConditionalGeneration"],
    moe_layers: LayerRule::AfterDense(&["first_k_dense_replace"], 1),
    ..Architecture::SIGMOID
};

/// No groups, no scale, no shared experts; Mixtral's names.
const MINIMAX_M2: Architecture = Architecture {
    model_types: &["minimax_m2"],
    classes: &["MiniMaxM2ForCausalLM"],
    intermediate: WHOLE_WIDTH,
    moe_layers: LayerRule::Every,
    groups: None,
    renormalise: Renorm::Always(0.0),
    scale: (&[], 1.0),
    shared: Shared::No,
    names: &[Names { correction: "e_score_correction_bias", ..Names::MIXTRAL }],
    ..Architecture::SIGMOID
};

const MINIMAX_M3: Architecture = Architecture {
    model_types: &["minimax_m3_vl", "minimax_m3_vl_text"],
    classes: &["MiniMaxM3VLForConditionalGeneration"],
    moe_layers: LayerRule::AfterDense(&["first_k_dense_replace"], 0),
    scale: (&["routed_scaling_factor"], 2.0),
    scale_on: ScaleOn::Output,
    shared: Shared::Width(&["shared_intermediate_size"], None),
    adjust: |settings, _, spec| {
        let activation = Activation::ClampedSwiglu {
            alpha: settings.number(&["swiglu_alpha"], 0)?.unwrap_or(1.702),
            beta: 1.0,
            limit: settings.number(&["swiglu_limit"], 0)?.unwrap_or(7.0),
        };
        both(spec, activation);
        Ok(())
    },
    names: &[Names {
        correction: "e_score_correction_bias",
        shared: Names::DEEPSEEK.shared,
        ..Names::MIXTRAL
    }],
    ..MINIMAX_M2
};

/// Softmax, no bias, groups by their best two.
const MISTRAL4: Architecture = Architecture {
    model_types: &["mistral4"],
    classes: &["Mistral4ForCausalLM"],
    score: Score::Softmax,
    correction: Correction::None,
    groups: Some((GroupScore::TopTwoSum, GroupFill::Zero)),
    ..Architecture::SIGMOID
};

/// Clamped before the SiLU, in routed and shared experts.
const GLM5: Architecture = Architecture {
    model_types: &["glm5_next", "glm5_next_text"],
    classes: &["Glm5NextForConditionalGeneration"],
    moe_layers: LayerRule::AfterDense(&["first_k_dense_replace"], 3),
    scale: (&["routed_scaling_factor"], 2.5),
    adjust: |settings, _, spec| {
        let activation = clamped(settings, spec.expert.activation)?;
        both(spec, activation);
        Ok(())
    },
    ..Architecture::SIGMOID
};

/// `w1` (gate), `w3` (up), `w2` (down) everywhere; shared experts too.
const SHARED_W123: ExpertNames =
    ExpertNames::mlp("shared_experts.w1", "shared_experts.w3", "shared_experts.w2");

/// `w13_weight`, rows of gate and up alternating.
const W13: ExpertNames = ExpertNames {
    form: Form::Stacked,
    interleaved: true,
    ..ExpertNames::mlp("experts.w13_weight", "experts.w13_weight", "experts.w2_weight")
};

pub(super) const ROWS: &[Architecture] = &[
    V3,
    V2,
    GLM4,
    Architecture {
        model_types: &["solar_open"],
        classes: &["SolarOpenForCausalLM"],
        moe_layers: LayerRule::AfterDense(&["first_k_dense_replace"], 0),
        ..GLM4
    },
    Architecture {
        model_types: &["dots1"],
        classes: &["Dots1ForCausalLM"],
        moe_layers: LayerRule::AfterDense(&["first_k_dense_replace"], 0),
        renormalise: Renorm::If(&["norm_topk_prob"], false, 1e-20),
        shared: Shared::Times(&["n_shared_experts"], 0),
        ..GLM4
    },
    Architecture {
        model_types: &["dots3_note", "dots3_note_text"],
        classes: &["Dots3NoteForConditionalGeneration"],
        moe_layers: LayerRule::AfterDense(&["first_k_dense_replace"], 1),
        shared: Shared::Width(
            &["shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"],
            None,
        ),
        ..Architecture::SIGMOID
    },
    Architecture {
        model_types: &["exaone_moe"],
        classes: &["ExaoneMoeForCausalLM"],
        moe_layers: LayerRule::AfterDense(&["first_k_dense_replace"], 1),
        scale: (&["routed_scaling_factor"], 2.5),
        names: &[Names { correction: "e_score_correction_bias", ..Names::DEEPSEEK }],
        ..Architecture::SIGMOID
    },
    Architecture {
        model_types: &["kimi_linear"],
        classes: &["KimiLinearForCausalLM"],
        moe_layers: LayerRule::AfterDense(&["first_k_dense_replace"], 1),
        scale: (&["routed_scaling_factor"], 2.446),
        names: &[
            Names {
                block: "block_sparse_moe",
                experts: &[ExpertNames::W123, ExpertNames::EACH, ExpertNames::STACKED],
                ..Names::DEEPSEEK
            },
            Names::DEEPSEEK,
        ],
        ..Architecture::SIGMOID
    },
    Architecture {
        model_types: &["bailing_hybrid"],
        classes: &["BailingHybridForCausalLM", "BailingMoeV2_5ForCausalLM"],
        moe_layers: LayerRule::AfterDense(&["first_k_dense_replace"], 2),
        scale: (&["routed_scaling_factor"], 2.5),
        names: &[Names { correction: "gate.expert_bias", ..Names::DEEPSEEK }],
        ..Architecture::SIGMOID
    },
    Architecture {
        model_types: &["mimo_v2_flash"],
        classes: &["MiMoV2FlashForCausalLM"],
        moe_layers: LayerRule::AfterDense(&["first_k_dense_replace"], 1),
        shared: Shared::No,
        ..Architecture::SIGMOID
    },
    Architecture {
        model_types: &["nemotron_h"],
        classes: &["NemotronHForCausalLM"],
        moe_layers: LayerRule::Pattern,
        activation: (&["mlp_hidden_act"], Activation::Relu2),
        shared: Shared::Width(&["moe_shared_expert_intermediate_size"], None),
        adjust: |settings, _, spec| {
            spec.expert.gated = false;
            spec.expert.bias = settings.flag(&["mlp_bias"], false)?;
            if let Some(shared) = &mut spec.shared {
                shared.gated = false;
                shared.bias = spec.expert.bias;
            }
            if let Some(latent) = settings.size(&["moe_latent_size"], 0)? {
                let linear = |width| Transform { steps: vec![TransformStep::Linear { width }] };
                spec.input_transform = linear(latent);
                spec.output_transform = linear(spec.dims.hidden);
                spec.dims.routed_hidden = latent;
            }
            Ok(())
        },
        names: &[Names {
            block: "mixer",
            experts: &[
                ExpertNames::EACH,
                ExpertNames {
                    form: Form::StackedTransposed,
                    ..ExpertNames::mlp("", "experts.gate_and_up_projs", "experts.down_projs")
                },
                ExpertNames {
                    form: Form::Stacked,
                    ..ExpertNames::mlp("", "experts.up_proj", "experts.down_proj")
                },
            ],
            input_transform: &["fc1_latent_proj"],
            output_transform: &["fc2_latent_proj"],
            ..Names::DEEPSEEK
        }],
        ..Architecture::SIGMOID
    },
    Architecture {
        model_types: &["beam"],
        classes: &["BeamForCausalLM"],
        moe_layers: LayerRule::AfterDense(&["first_k_dense_replace"], 3),
        scale: (&["routed_scaling_factor"], 2.5),
        scale_on: ScaleOn::Output,
        shared: Shared::No,
        ..Architecture::SIGMOID
    },
    Architecture {
        model_types: &["axk1"],
        classes: &["AXK1ForCausalLM"],
        moe_layers: LayerRule::AfterDense(&["first_k_dense_replace"], 1),
        scale: (&["routed_scaling_factor"], 2.5),
        adjust: |settings, _, spec| {
            let eps = settings.number(&["rms_norm_eps"], 0)?.unwrap_or(1e-6);
            spec.output.norm = Some(RmsNorm { eps, unit_offset: false, scale_first: false });
            Ok(())
        },
        names: &[Names { output_norm: "../post_mlp_layernorm.weight", ..Names::DEEPSEEK }],
        ..Architecture::SIGMOID
    },
    Architecture {
        model_types: &["axk2"],
        classes: &["AXK2ForCausalLM"],
        moe_layers: LayerRule::AfterDense(&["first_k_dense_replace"], 1),
        scale: (&["routed_scaling_factor"], 2.5),
        groups: Some((GroupScore::TopTwoSum, GroupFill::Zero)),
        ..Architecture::SIGMOID
    },
    // only the routed experts are clamped; a save by the library renames `gate_proj`
    Architecture {
        model_types: &["hy_v4"],
        classes: &["HYV4ForCausalLM"],
        moe_layers: LayerRule::AfterDense(&["first_k_dense_replace"], 1),
        scale: (&["routed_scaling_factor"], 2.827),
        adjust: |settings, _, spec| {
            spec.expert.activation = clamped(settings, spec.expert.activation)?;
            Ok(())
        },
        names: &[
            Names { experts: &[ExpertNames::STACKED, ExpertNames::EACH], ..Names::DEEPSEEK },
            Names {
                experts: &[ExpertNames::STACKED],
                shared: ExpertNames {
                    gate: "shared_experts.linear_gate",
                    ..Names::DEEPSEEK.shared
                },
                ..Names::DEEPSEEK
            },
        ],
        ..Architecture::SIGMOID
    },
    GLM5,
    MISTRAL4,
    Architecture {
        model_types: &["mistral_large4", "mistral_large4_text"],
        classes: &["MistralLarge4ForConditionalGeneration"],
        moe_layers: LayerRule::AfterDense(&["first_k_dense_replace"], 1),
        renormalise: Renorm::Always(1e-20),
        names: &[
            Names {
                block: "",
                experts: &[ExpertNames::W123],
                shared: SHARED_W123,
                scopes: &["gate.", "experts.", "shared_experts."],
                ..Names::MLP
            },
            Names {
                block: "",
                experts: &[ExpertNames::W123],
                scopes: &["gate.", "experts.", "shared_experts."],
                ..Names::DEEPSEEK
            },
            Names::DEEPSEEK,
        ],
        ..MISTRAL4
    },
    Architecture {
        model_types: &["afmoe"],
        classes: &["AfmoeForCausalLM"],
        moe_layers: LayerRule::AfterDense(&["num_dense_layers"], 1),
        groups: None,
        renormalise: Renorm::Always(1e-20),
        scale: (&["route_scale"], 1.0),
        shared: Shared::Times(&["num_shared_experts"], 2),
        names: &[Names { gate: "router.gate", correction: "expert_bias", ..Names::DEEPSEEK }],
        ..Architecture::SIGMOID
    },
    MINIMAX_M2,
    MINIMAX_M3,
    // clamped after the SiLU, each layer by its own limit, zero for none
    Architecture {
        model_types: &["step3p7", "step3p5"],
        classes: &["Step3p7ForConditionalGeneration", "Step3p5ForCausalLM"],
        experts: &["n_routed_experts", "moe_num_experts", "num_experts"],
        top_k: &["num_experts_per_tok", "moe_top_k"],
        intermediate: &["moe_intermediate_size"],
        moe_layers: LayerRule::Enumerated,
        scale: (&["moe_router_scaling_factor"], 1.0),
        shared: Shared::Width(&["share_expert_dim", "share_expert_dims"], None),
        adjust: |settings, layer, spec| {
            let stepped = |keys| {
                let limit = settings.number(keys, layer)?.filter(|limit| *limit != 0.0);
                Ok::<_, crate::Error>(
                    limit.map_or(Activation::Silu, |limit| Activation::SwigluStep { limit }),
                )
            };
            spec.expert.activation = stepped(&["swiglu_limits"])?;
            if let Some(shared) = &mut spec.shared {
                shared.activation = stepped(&["swiglu_limits_shared"])?;
            }
            Ok(())
        },
        names: &[Names {
            block: "moe",
            correction: "router_bias",
            experts: &[ExpertNames {
                form: Form::Stacked,
                ..ExpertNames::mlp("gate_proj", "up_proj", "down_proj")
            }],
            shared: ExpertNames::mlp(
                "../share_expert.gate_proj",
                "../share_expert.up_proj",
                "../share_expert.down_proj",
            ),
            scopes: &["", "../share_expert."],
            ..Names::MLP
        }],
        ..MINIMAX_M3
    },
    Architecture {
        model_types: &["hy_v3"],
        classes: &["HYV3ForCausalLM"],
        moe_layers: LayerRule::AfterDense(&["first_k_dense_replace"], 1),
        groups: None,
        renormalise: Renorm::Always(1e-20),
        scale: (&["router_scaling_factor"], 2.826),
        names: &[Names {
            gate: "router.gate",
            correction: "expert_bias",
            shared: ExpertNames::mlp(
                "shared_mlp.gate_proj",
                "shared_mlp.up_proj",
                "shared_mlp.down_proj",
            ),
            ..Names::MLP
        }],
        ..Architecture::SIGMOID
    },
    Architecture {
        model_types: &["lfm2_moe"],
        classes: &["Lfm2MoeForCausalLM"],
        moe_layers: LayerRule::AfterDense(&["num_dense_layers"], 2),
        groups: None,
        renormalise: Renorm::If(&["norm_topk_prob"], true, 1e-6),
        shared: Shared::No,
        adjust: |settings, _, spec| {
            if !settings.flag(&["use_expert_bias"], true)? {
                spec.router.correction = Correction::None;
            }
            Ok(())
        },
        names: &[Names {
            block: "feed_forward",
            correction: "expert_bias",
            experts: &[ExpertNames::W123, ExpertNames::STACKED],
            ..Names::MLP
        }],
        ..Architecture::SIGMOID
    },
    Architecture {
        model_types: &["laguna"],
        classes: &["LagunaForCausalLM"],
        moe_layers: LayerRule::AfterDense(&["first_k_dense_replace"], 1),
        groups: None,
        renormalise: Renorm::Always(0.0),
        scale: (&["moe_routed_scaling_factor"], 1.0),
        scale_on: ScaleOn::Output,
        shared: Shared::Width(&["shared_expert_intermediate_size"], None),
        adjust: |settings, _, spec| {
            const ON_INPUT: &[&str] = &["moe_apply_router_weight_on_input"];
            if settings.flag(ON_INPUT, false)? {
                return Err(settings.error(ON_INPUT, "is true; the model defines only false"));
            }
            let cap = settings.number(&["moe_router_logit_softcapping"], 0)?;
            spec.router.soft_cap = cap.filter(|cap| *cap > 0.0);
            Ok(())
        },
        names: &[Names {
            correction: "experts.e_score_correction_bias",
            shared_gate: "",
            ..Names::QWEN2
        }],
        ..Architecture::SIGMOID
    },
    Architecture {
        model_types: &["flint"],
        classes: &["FlintForCausalLM"],
        moe_layers: LayerRule::SparseStep(&[0, 1]),
        correction: Correction::None,
        groups: None,
        renormalise: Renorm::If(&["norm_topk_prob"], true, 0.0),
        scale: (&[], 1.0),
        shared: Shared::Width(&["shared_expert_intermediate_size"], None),
        names: &[Names { shared_gate: "", ..Names::QWEN2 }],
        ..Architecture::SIGMOID
    },
    // the first layers choose by token id and have no bias
    Architecture {
        model_types: &["deepseek_v4"],
        classes: &["DeepseekV4ForCausalLM"],
        moe_layers: LayerRule::Every,
        score: Score::SqrtSoftplus,
        groups: None,
        scale: (&["routed_scaling_factor"], 1.5),
        adjust: |settings, layer, spec| {
            let activation = clamped(settings, spec.expert.activation)?;
            both(spec, activation);
            if is_hash_layer(settings, layer)? {
                let vocabulary = settings.need_size(&["vocab_size"], 0)?;
                spec.router.selection = Selection::HashTable { vocabulary };
                spec.router.correction = Correction::None;
            }
            Ok(())
        },
        names: &[Names {
            block: "ffn",
            correction: "gate.bias",
            hash_table: "gate.tid2eid",
            experts: &[ExpertNames::W123],
            shared: SHARED_W123,
            ..Names::MLP
        }],
        ..Architecture::SIGMOID
    },
    Architecture {
        model_types: &["muse_spark", "muse_spark_text"],
        classes: &["MuseSparkForConditionalGeneration"],
        moe_layers: LayerRule::AfterDense(&["first_k_dense_replace"], 0),
        groups: None,
        renormalise: Renorm::Always(1e-15),
        shared: Shared::No,
        adjust: |settings, _, spec| {
            let eps = settings.number(&["rms_norm_eps"], 0)?.unwrap_or(1e-5);
            let latent = settings.need_size(&["moe_hidden_size"], 0)?;
            spec.router.logit_multiplier =
                settings.number(&["output_multiplier"], 0)?.unwrap_or(0.176_776_7);
            spec.dims.routed_hidden = latent;
            spec.input_transform.steps = vec![
                TransformStep::Linear { width: latent },
                TransformStep::RmsNorm(RmsNorm { eps, unit_offset: true, scale_first: false }),
            ];
            spec.output_transform.steps = vec![TransformStep::Linear { width: spec.dims.hidden }];
            spec.expert.norm = Some(RmsNorm {
                eps: settings.number(&["post_norm_eps"], 0)?.unwrap_or(1e-8),
                unit_offset: true,
                scale_first: true,
            });
            Ok(())
        },
        names: &[Names {
            input_transform: &["pre_expert_proj", "pre_expert_norm.weight"],
            output_transform: &["post_expert_proj"],
            experts: &[
                ExpertNames { norm: "experts.post_expert_norm.weight", ..ExpertNames::STACKED },
                ExpertNames { norm: "experts.post_expert_norm.weight", ..ExpertNames::EACH },
            ],
            ..Names::DEEPSEEK
        }],
        ..Architecture::SIGMOID
    },
    // the router weighs the shared experts too
    Architecture {
        model_types: &["inkling", "inkling_text", "inkling_mm_model"],
        classes: &["InklingForConditionalGeneration"],
        intermediate: &["moe_intermediate_size", "intermediate_size"],
        moe_layers: LayerRule::AfterDense(&["dense_mlp_idx"], 0),
        groups: None,
        renormalise: Renorm::Never,
        scale: (&["route_scale"], 8.0),
        shared: Shared::Same,
        combine: SharedCombine::RouterWeighted,
        adjust: |settings, _, spec| {
            const SINK: &[&str] = &["shared_expert_sink"];
            if !settings.flag(SINK, true)? {
                return Err(settings.error(SINK, "is false; only true is known"));
            }
            let count = settings.need_size(&["n_shared_experts"], 0)?;
            spec.router.weight_from = WeightFrom::JointSoftmax { shared: count };
            if let Some(shared) = &mut spec.shared {
                shared.count = count;
            }
            Ok(())
        },
        names: &[Names {
            correction: "gate.bias",
            global_scale: "gate.global_scale",
            experts: &[W13],
            shared: ExpertNames {
                form: Form::Stacked,
                interleaved: true,
                ..ExpertNames::mlp(
                    "shared_experts.shared_w13_weight",
                    "shared_experts.shared_w13_weight",
                    "shared_experts.shared_w2_weight",
                )
            },
            ..Names::MLP
        }],
        ..Architecture::SIGMOID
    },
    Architecture {
        model_types: &["inkling2", "inkling2_text"],
        classes: &["Inkling2ForConditionalGeneration"],
        moe_layers: LayerRule::Every,
        groups: None,
        renormalise: Renorm::Always(1e-20),
        scale: (&["route_scale"], 8.0),
        shared: Shared::No,
        adjust: |settings, _, spec| {
            spec.expert.activation = Activation::Situ {
                beta: settings.number(&["mlp_gate_softcap"], 0)?.unwrap_or(4.0),
                lambda: Some(settings.number(&["mlp_up_softcap"], 0)?.unwrap_or(25.0)),
            };
            Ok(())
        },
        names: &[Names { correction: "gate.bias", experts: &[W13], ..Names::MLP }],
        ..Architecture::SIGMOID
    },
];

/// `topk_method`, where present, must be one of `known`.
fn check_method(settings: &Settings, known: &[&str]) -> Result<()> {
    match settings.text(&["topk_method"])? {
        Some(method) if !known.contains(&method) => Err(settings.error(
            &["topk_method"],
            format!("is '{method}'; for this model it can be {}", known.join(" or ")),
        )),
        _ => Ok(()),
    }
}

/// `silu(min(g, limit)) · clamp(u, ±limit)` by `swiglu_limit` (absent: 10); zero or less: `plain`.
fn clamped(settings: &Settings, plain: Activation) -> Result<Activation> {
    let limit = settings.number(&["swiglu_limit"], 0)?.unwrap_or(10.0);
    Ok(match limit > 0.0 {
        true => Activation::ClampedSwiglu { alpha: 1.0, beta: 0.0, limit },
        false => plain,
    })
}

/// Routed and shared experts alike.
fn both(spec: &mut LayerSpec, activation: Activation) {
    spec.expert.activation = activation;
    if let Some(shared) = &mut spec.shared {
        shared.activation = activation;
    }
}
