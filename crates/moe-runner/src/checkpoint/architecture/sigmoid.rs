//! The DeepSeek family: scores, a bias that only chooses, groups, renormalised and scaled weights.

use super::row::{Architecture, Names, Renorm, Shared};
use super::rules::LayerRule;
use super::settings::Settings;
use super::tensors::Form;
use super::variants::ExpertNames;
use crate::Result;
use crate::spec::{
    Activation, Correction, GroupFill, GroupScore, LayerSpec, RmsNorm, ScaleOn, Score, Transform,
    TransformStep,
};

const V3: Architecture = Architecture {
    model_types: &["deepseek_v3", "deepseek_v32", "kimi_k2", "kimi_k25", "glm_moe_dsa"],
    classes: &["DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"],
    moe_layers: LayerRule::AfterDense(&["first_k_dense_replace"]),
    scale: &["routed_scaling_factor"],
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
    moe_layers: LayerRule::AfterDense(&["first_k_dense_replace"]),
    score: Score::Softmax,
    correction: Correction::None,
    groups: Some((GroupScore::Max, GroupFill::Zero)),
    renormalise: Renorm::Never,
    shared: Shared::Times(&["n_shared_experts"]),
    adjust: |settings, _, spec| {
        check_method(settings, &["greedy", "group_limited_greedy"])?;
        if settings.text(&["topk_method"])?.unwrap_or("greedy") == "greedy" {
            spec.router.groups = None;
        }
        biased_shared(settings, spec)
    },
    ..Architecture::SIGMOID
};

const GLM4: Architecture = Architecture {
    model_types: &["glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm4v_moe_text"],
    classes: &["Glm4MoeForCausalLM", "Glm4MoeLiteForCausalLM", "Glm4vMoeForConditionalGeneration"],
    moe_layers: LayerRule::AfterDense(&["first_k_dense_replace"]),
    ..Architecture::SIGMOID
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
    moe_layers: LayerRule::AfterDense(&["first_k_dense_replace"]),
    scale: &["routed_scaling_factor"],
    adjust: |settings, _, spec| {
        let activation = clamped(settings, spec.expert.activation)?;
        both(spec, activation);
        Ok(())
    },
    ..Architecture::SIGMOID
};

/// `w1` (gate), `w3` (up), `w2` (down) everywhere; shared experts too.
pub(super) const SHARED_W123: ExpertNames =
    ExpertNames::mlp("shared_experts.w1", "shared_experts.w3", "shared_experts.w2");

pub(super) const ROWS: &[Architecture] = &[
    V3,
    V2,
    // the first one, and those that follow it
    Architecture {
        model_types: &["deepseek", "bailing_moe"],
        classes: &["DeepseekForCausalLM", "BailingMoeForCausalLM"],
        score: Score::Softmax,
        correction: Correction::None,
        groups: None,
        renormalise: Renorm::If(&["norm_topk_prob"], 1e-20),
        scale: &[],
        adjust: |settings, _, _| check_method(settings, &["greedy"]),
        ..Architecture::SIGMOID
    },
    GLM4,
    Architecture {
        model_types: &["solar_open"],
        classes: &["SolarOpenForCausalLM"],
        moe_layers: LayerRule::AfterDense(&["first_k_dense_replace"]),
        ..GLM4
    },
    Architecture {
        model_types: &["dots1"],
        classes: &["Dots1ForCausalLM"],
        moe_layers: LayerRule::AfterDense(&["first_k_dense_replace"]),
        renormalise: Renorm::If(&["norm_topk_prob"], 1e-20),
        shared: Shared::Times(&["n_shared_experts"]),
        ..GLM4
    },
    Architecture {
        model_types: &["dots3_note", "dots3_note_text"],
        classes: &["Dots3NoteForConditionalGeneration"],
        moe_layers: LayerRule::AfterDense(&["first_k_dense_replace"]),
        shared: Shared::Width(&[
            "shared_experts_intermediate_size",
            "moe_shared_expert_intermediate_size",
        ]),
        ..Architecture::SIGMOID
    },
    Architecture {
        model_types: &["exaone_moe"],
        classes: &["ExaoneMoeForCausalLM"],
        moe_layers: LayerRule::AfterDense(&["first_k_dense_replace"]),
        scale: &["routed_scaling_factor"],
        names: &[Names { correction: "e_score_correction_bias", ..Names::DEEPSEEK }],
        ..Architecture::SIGMOID
    },
    Architecture {
        model_types: &["kimi_linear", "kimi_k3"],
        classes: &["KimiLinearForCausalLM", "KimiK3ForConditionalGeneration"],
        moe_layers: LayerRule::AfterDense(&["first_k_dense_replace"]),
        scale: &["routed_scaling_factor"],
        adjust: |settings, _, spec| {
            // Kimi-K3: the routed experts stand between projections to a narrower width
            let Some(latent) = settings.size(&["routed_expert_hidden_size"], 0)? else {
                return Ok(());
            };
            const NORM: &[&str] = &["latent_moe_use_norm"];
            if !settings.flag(NORM, true)? {
                return Err(settings.error(NORM, "is false; only true is known"));
            }
            let eps = settings.need_number(&["rms_norm_eps"])?;
            spec.input_transform.steps = vec![TransformStep::Linear { width: latent }];
            spec.output_transform.steps = vec![
                TransformStep::RmsNorm(RmsNorm { eps, unit_offset: false, scale_first: false }),
                TransformStep::Linear { width: spec.dims.hidden },
            ];
            spec.dims.routed_hidden = latent;
            Ok(())
        },
        names: &[
            Names {
                block: "block_sparse_moe",
                experts: &[ExpertNames::W123, ExpertNames::EACH, ExpertNames::STACKED],
                input_transform: &["routed_expert_down_proj"],
                output_transform: &["routed_expert_norm.weight", "routed_expert_up_proj"],
                ..Names::DEEPSEEK
            },
            Names::DEEPSEEK,
        ],
        ..Architecture::SIGMOID
    },
    Architecture {
        model_types: &[
            "bailing_hybrid",
            "bailing_moe_v2",
            "bailing_moe_linear",
            "sarvam_moe",
            "sarvam_mla",
        ],
        classes: &[
            "BailingHybridForCausalLM",
            "BailingMoeV2_5ForCausalLM",
            "BailingMoeV2ForCausalLM",
            "BailingMoeLinearForCausalLM",
            "BailingMoeLinearV2ForCausalLM",
            "SarvamMoEForCausalLM",
            "SarvamMLAForCausalLM",
        ],
        moe_layers: LayerRule::AfterDense(&["first_k_dense_replace"]),
        scale: &["routed_scaling_factor"],
        names: &[Names { correction: "gate.expert_bias", ..Names::DEEPSEEK }],
        ..Architecture::SIGMOID
    },
    Architecture {
        model_types: &["mimo_v2_flash"],
        classes: &["MiMoV2FlashForCausalLM"],
        moe_layers: LayerRule::AfterDense(&["first_k_dense_replace"]),
        shared: Shared::No,
        ..Architecture::SIGMOID
    },
    Architecture {
        model_types: &["nemotron_h", "nemotron_h_omni", "nemo_speechlm"],
        classes: &["NemotronHForCausalLM"],
        moe_layers: LayerRule::Pattern,
        activation: (&["mlp_hidden_act"], Activation::Relu2),
        shared: Shared::Width(&["moe_shared_expert_intermediate_size"]),
        adjust: |settings, _, spec| {
            spec.expert.gated = false;
            biased_shared(settings, spec)?;
            if let Some(shared) = &mut spec.shared {
                shared.gated = false;
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
        moe_layers: LayerRule::AfterDense(&["first_k_dense_replace"]),
        scale: &["routed_scaling_factor"],
        scale_on: ScaleOn::Output,
        shared: Shared::No,
        ..Architecture::SIGMOID
    },
    Architecture {
        model_types: &["axk1"],
        classes: &["AXK1ForCausalLM"],
        moe_layers: LayerRule::AfterDense(&["first_k_dense_replace"]),
        scale: &["routed_scaling_factor"],
        adjust: |settings, _, spec| {
            let eps = settings.need_number(&["rms_norm_eps"])?;
            spec.output.norm = Some(RmsNorm { eps, unit_offset: false, scale_first: false });
            Ok(())
        },
        names: &[Names { output_norm: "../post_mlp_layernorm.weight", ..Names::DEEPSEEK }],
        ..Architecture::SIGMOID
    },
    Architecture {
        model_types: &["axk2"],
        classes: &["AXK2ForCausalLM"],
        moe_layers: LayerRule::AfterDense(&["first_k_dense_replace"]),
        scale: &["routed_scaling_factor"],
        groups: Some((GroupScore::TopTwoSum, GroupFill::Zero)),
        ..Architecture::SIGMOID
    },
    // only the routed experts are clamped; a save by the library renames `gate_proj`
    Architecture {
        model_types: &["hy_v4", "hy_v4_vl", "hy_v4_vl_text"],
        classes: &["HYV4ForCausalLM", "HYV4VLForConditionalGeneration"],
        moe_layers: LayerRule::AfterDense(&["first_k_dense_replace"]),
        scale: &["routed_scaling_factor"],
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
        moe_layers: LayerRule::AfterDense(&["first_k_dense_replace"]),
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

/// `silu(min(g, limit)) · clamp(u, ±limit)` by `swiglu_limit`; zero or less: `plain`.
pub(super) fn clamped(settings: &Settings, plain: Activation) -> Result<Activation> {
    let limit = settings.need_number(&["swiglu_limit"])?;
    match limit > 0.0 {
        true if plain == Activation::Silu => {
            Ok(Activation::ClampedSwiglu { alpha: 1.0, beta: 0.0, limit })
        }
        true => Err(settings.error(
            &["hidden_act"],
            "is clamped by swiglu_limit in this model; with that only silu is known",
        )),
        false => Ok(plain),
    }
}

/// Biases of the shared experts, where `mlp_bias` says so: routed ones have none.
pub(super) fn biased_shared(settings: &Settings, spec: &mut LayerSpec) -> Result<()> {
    if let Some(shared) = &mut spec.shared {
        shared.bias = settings.flag(&["mlp_bias"], false)?;
    }
    Ok(())
}

/// Routed and shared experts alike.
pub(super) fn both(spec: &mut LayerSpec, activation: Activation) {
    spec.expert.activation = activation;
    if let Some(shared) = &mut spec.shared {
        shared.activation = activation;
    }
}
