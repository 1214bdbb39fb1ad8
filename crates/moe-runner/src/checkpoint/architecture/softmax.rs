//! Softmax over all experts, then top-k: Mixtral, Qwen, OLMoE and their kin.

use super::row::{Architecture, Names, Renorm, Shared};
use super::rules::LayerRule;
use super::settings::Keys;
use super::tensors::Form;
use super::variants::ExpertNames;
use crate::spec::{
    Activation, Correction, IdleExperts, Renormalise, RmsNorm, Transform, TransformStep,
};

/// I where all layers are MoE and there is no narrower width for experts.
pub(super) const WHOLE_WIDTH: Keys = &["intermediate_size"];

const MIXTRAL: Architecture = Architecture {
    model_types: &["mixtral", "minimax", "minimax_text_01"],
    classes: &["MixtralForCausalLM", "MiniMaxForCausalLM", "MiniMaxText01ForCausalLM"],
    intermediate: WHOLE_WIDTH,
    renormalise: Renorm::Always(0.0),
    names: &[Names::MIXTRAL, Names::MLP],
    ..Architecture::SOFTMAX
};

const QWEN2: Architecture = Architecture {
    model_types: &["qwen2_moe"],
    classes: &["Qwen2MoeForCausalLM"],
    moe_layers: LayerRule::SparseStep(&[]),
    shared: Shared::Width(&["shared_expert_intermediate_size"]),
    names: &[Names::QWEN2],
    ..Architecture::SOFTMAX
};

const QWEN3: Architecture = Architecture {
    model_types: &["qwen3_moe"],
    classes: &["Qwen3MoeForCausalLM"],
    moe_layers: LayerRule::SparseStep(&[]),
    ..Architecture::SOFTMAX
};

const OLMOE: Architecture = Architecture {
    model_types: &["olmoe", "flex_olmo"],
    classes: &["OlmoeForCausalLM", "FlexOlmoForCausalLM"],
    intermediate: WHOLE_WIDTH,
    ..Architecture::SOFTMAX
};

/// Every MoE layer has a dense branch beside the experts, with norms of its own; both see the
/// residual stream.
const GEMMA4: Architecture = Architecture {
    model_types: &["gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"],
    classes: &["Gemma4ForCausalLM", "Gemma4ForConditionalGeneration"],
    moe_layers: LayerRule::Enabled,
    renormalise: Renorm::Always(0.0),
    activation: (&["hidden_activation", "hidden_act"], Activation::GeluTanh),
    shared: Shared::Width(&["intermediate_size"]),
    adjust: |settings, _, spec| {
        let eps = settings.need_number(&["rms_norm_eps"])?;
        let norm = RmsNorm { eps, unit_offset: false, scale_first: false };
        spec.gate.scaled_rms_eps = Some(eps);
        spec.router.per_expert_scale = true;
        spec.input_transform = Transform { steps: vec![TransformStep::RmsNorm(norm)] };
        spec.output_transform = Transform { steps: vec![TransformStep::RmsNorm(norm)] };
        spec.output.norm = Some(norm);
        if let Some(shared) = &mut spec.shared {
            shared.input_norm = Some(norm);
            shared.output_norm = Some(norm);
        }
        Ok(())
    },
    names: &[Names {
        block: "",
        gate: "router.proj",
        per_expert_scale: "router.per_expert_scale",
        gate_input_scale: "router.scale",
        experts: &[ExpertNames::STACKED, ExpertNames::EACH],
        shared: ExpertNames::mlp("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        shared_norms: ["pre_feedforward_layernorm.weight", "post_feedforward_layernorm_1.weight"],
        input_transform: &["pre_feedforward_layernorm_2.weight"],
        output_transform: &["post_feedforward_layernorm_2.weight"],
        output_norm: "post_feedforward_layernorm.weight",
        scopes: &["router.", "experts.", "mlp."],
        ..Names::MLP
    }],
    ..Architecture::SOFTMAX
};

const HUNYUAN: Architecture = Architecture {
    model_types: &["hunyuan_v1_moe"],
    classes: &["HunYuanMoEV1ForCausalLM"],
    intermediate: WHOLE_WIDTH,
    renormalise: Renorm::Always(0.0),
    shared: Shared::Same,
    names: &[Names {
        gate: "gate.wg",
        shared: ExpertNames::mlp(
            "shared_mlp.gate_proj",
            "shared_mlp.up_proj",
            "shared_mlp.down_proj",
        ),
        ..Names::MLP
    }],
    ..Architecture::SOFTMAX
};

pub(super) const ROWS: &[Architecture] = &[
    MIXTRAL,
    QWEN2,
    Architecture {
        model_types: &["qwen3_next"],
        classes: &["Qwen3NextForCausalLM"],
        renormalise: Renorm::If(&["norm_topk_prob"], 0.0),
        ..QWEN2
    },
    // the shared expert has no gate
    Architecture {
        model_types: &["lara_mini"],
        classes: &["LaraMiniForCausalLM"],
        moe_layers: LayerRule::Every,
        names: &[Names { shared_gate: "", ..Names::QWEN2 }],
        ..QWEN2
    },
    Architecture {
        model_types: &["qwen4_exp", "qwen4_exp_text"],
        classes: &["Qwen4ExpForCausalLM", "Qwen4ExpForConditionalGeneration"],
        moe_layers: LayerRule::Every,
        renormalise: Renorm::If(&["norm_topk_prob"], 0.0),
        ..QWEN2
    },
    Architecture {
        model_types: &["qwen3_5_moe", "qwen3_5_moe_text"],
        classes: &["Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"],
        moe_layers: LayerRule::Every,
        renormalise: Renorm::Always(0.0),
        ..QWEN2
    },
    QWEN3,
    Architecture {
        model_types: &["mellum"],
        classes: &["MellumForCausalLM"],
        moe_layers: LayerRule::Every,
        renormalise: Renorm::If(&["norm_topk_prob"], 0.0),
        ..QWEN3
    },
    // the thinker; the talker is a model of its own in the same files
    Architecture {
        model_types: &["qwen3_omni_moe", "qwen3_omni_moe_thinker", "qwen3_omni_moe_text"],
        classes: &["Qwen3OmniMoeForConditionalGeneration"],
        renormalise: Renorm::If(&["norm_topk_prob"], 0.0),
        ..QWEN3
    },
    Architecture {
        model_types: &["qwen3_vl_moe", "qwen3_vl_moe_text", "cosmos3_omni"],
        classes: &["Qwen3VLMoeForConditionalGeneration"],
        renormalise: Renorm::Always(0.0),
        names: &[Names {
            experts: &[ExpertNames::STACKED_TRANSPOSED, ExpertNames::STACKED, ExpertNames::EACH],
            ..Names::MLP
        }],
        ..QWEN3
    },
    OLMOE,
    Architecture {
        model_types: &["jamba"],
        classes: &["JambaForCausalLM"],
        intermediate: WHOLE_WIDTH,
        moe_layers: LayerRule::Period,
        renormalise: Renorm::Never,
        names: &[Names { block: "feed_forward", gate: "router", ..Names::MLP }],
        ..Architecture::SOFTMAX
    },
    HUNYUAN,
    // the first: a narrower width for routed experts, layer by layer; one expert keeps its score
    Architecture {
        model_types: &["hunyuan"],
        classes: &["HunYuanForCausalLM", "HunYuanMoEForCausalLM"],
        intermediate: &["moe_intermediate_size", "intermediate_size"],
        adjust: |settings, layer, spec| {
            if spec.router.top_k == 1 {
                spec.router.renormalise = Renormalise::None;
            }
            let mixed = settings.flag(&["use_mixed_mlp_moe"], false)?;
            let count = settings.size(&["num_shared_expert"], layer)?.filter(|_| mixed);
            let width = settings.need_size(WHOLE_WIDTH, layer)?;
            match (count.unwrap_or(0).saturating_mul(width), &mut spec.shared) {
                (width @ 1.., Some(shared)) => shared.intermediate = width,
                _ => spec.shared = None,
            }
            Ok(())
        },
        ..HUNYUAN
    },
    Architecture {
        model_types: &["dbrx"],
        classes: &["DbrxForCausalLM"],
        layers: &["n_layers", "num_hidden_layers"],
        hidden: &["d_model", "hidden_size"],
        experts: &["ffn_config.moe_num_experts"],
        top_k: &["ffn_config.moe_top_k"],
        intermediate: &["ffn_config.ffn_hidden_size"],
        activation: (&["ffn_config.ffn_act_fn.name"], Activation::Silu),
        adjust: |settings, _, spec| {
            const KEY: Keys = &["ffn_config.moe_normalize_expert_weights"];
            spec.router.renormalise = match settings.number(KEY, 0)? {
                _ if settings.states_null(KEY) => Renormalise::None,
                p => Renormalise::PNorm { p: p.unwrap_or(1.0) },
            };
            Ok(())
        },
        stems: &["transformer.blocks."],
        names: &[Names {
            block: "ffn",
            gate: "router.layer",
            experts: &[ExpertNames {
                form: Form::Flat,
                ..ExpertNames::mlp("experts.mlp.w1", "experts.mlp.v1", "experts.mlp.w2")
            }],
            ..Names::MLP
        }],
        ..Architecture::SOFTMAX
    },
    GEMMA4,
    Architecture {
        model_types: &["diffusion_gemma", "diffusion_gemma_text"],
        classes: &[],
        moe_layers: LayerRule::Every,
        ..GEMMA4
    },
    Architecture {
        model_types: &["ernie4_5_moe"],
        classes: &["Ernie4_5_MoeForCausalLM"],
        experts: &["moe_num_experts"],
        top_k: &["moe_k"],
        moe_layers: LayerRule::Interval,
        correction: Correction::OnScore,
        shared: Shared::Times(&["moe_num_shared_experts"]),
        adjust: |settings, _, spec| {
            let floor = settings.need_number(&["moe_norm_min"])?;
            spec.router.renormalise = Renormalise::SumFloor { floor };
            // routed experts have none
            if let Some(shared) = &mut spec.shared {
                shared.bias = settings.flag(&["use_bias"], false)?;
            }
            Ok(())
        },
        names: &[Names { correction: "moe_statics.e_score_correction_bias", ..Names::DEEPSEEK }],
        ..Architecture::SOFTMAX
    },
    // `num_layers` decoder layers, each with two attentions and two dense MLPs; the MoE block is
    // one, beside them
    Architecture {
        model_types: &["longcat_flash"],
        classes: &["LongcatFlashForCausalLM"],
        layers: &["num_layers"],
        experts: &["n_routed_experts"],
        intermediate: &["expert_ffn_hidden_size"],
        correction: Correction::OnScore,
        renormalise: Renorm::Never,
        scale: &["routed_scaling_factor"],
        adjust: |settings, _, spec| {
            match settings.text(&["zero_expert_type"])? {
                None | Some("identity") => {}
                Some(other) => {
                    let reason = format!("is '{other}'; only 'identity' is known");
                    return Err(settings.error(&["zero_expert_type"], reason));
                }
            }
            let count = settings.need_size(&["zero_expert_num"], 0)?;
            spec.router.idle = (count > 0).then_some(IdleExperts::Identity { count });
            Ok(())
        },
        names: &[Names {
            gate: "router.classifier",
            correction: "router.e_score_correction_bias",
            ..Names::MLP
        }],
        ..Architecture::SOFTMAX
    },
];
