//! Scores, a bias that only chooses, no groups: the later kin of the DeepSeek family.

use super::build::is_hash_layer;
use super::row::{Architecture, Names, Renorm, Shared};
use super::rules::LayerRule;
use super::sigmoid::{SHARED_W123, biased_shared, both, clamped};
use super::softmax::WHOLE_WIDTH;
use super::tensors::Form;
use super::variants::ExpertNames;
use crate::spec::{
    Activation, Correction, RmsNorm, ScaleOn, Score, Selection, SharedCombine, TransformStep,
    WeightFrom,
};

/// No groups, no scale, no shared experts; Mixtral's names.
const MINIMAX_M2: Architecture = Architecture {
    model_types: &["minimax_m2"],
    classes: &["MiniMaxM2ForCausalLM"],
    intermediate: WHOLE_WIDTH,
    moe_layers: LayerRule::Every,
    groups: None,
    renormalise: Renorm::Always(0.0),
    scale: &[],
    shared: Shared::No,
    names: &[Names { correction: "e_score_correction_bias", ..Names::MIXTRAL }],
    ..Architecture::SIGMOID
};

const MINIMAX_M3: Architecture = Architecture {
    model_types: &["minimax_m3_vl", "minimax_m3_vl_text"],
    classes: &["MiniMaxM3VLForConditionalGeneration"],
    moe_layers: LayerRule::AfterDense(&["first_k_dense_replace"]),
    scale: &["routed_scaling_factor"],
    scale_on: ScaleOn::Output,
    shared: Shared::Width(&["shared_intermediate_size"]),
    // whatever `hidden_act` says
    activation: (&[], Activation::Silu),
    adjust: |settings, _, spec| {
        let activation = Activation::ClampedSwiglu {
            alpha: settings.need_number(&["swiglu_alpha"])?,
            beta: 1.0,
            limit: settings.need_number(&["swiglu_limit"])?,
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

/// `w13_weight`, rows of gate and up alternating.
const W13: ExpertNames = ExpertNames {
    form: Form::Stacked,
    interleaved: true,
    ..ExpertNames::mlp("experts.w13_weight", "experts.w13_weight", "experts.w2_weight")
};

pub(super) const ROWS: &[Architecture] = &[
    Architecture {
        model_types: &["afmoe"],
        classes: &["AfmoeForCausalLM"],
        moe_layers: LayerRule::AfterDense(&["num_dense_layers"]),
        groups: None,
        renormalise: Renorm::Always(1e-20),
        scale: &["route_scale"],
        shared: Shared::Times(&["num_shared_experts"]),
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
        scale: &["moe_router_scaling_factor"],
        shared: Shared::Width(&["share_expert_dim", "share_expert_dims"]),
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
            biased_shared(settings, spec)
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
        moe_layers: LayerRule::AfterDense(&["first_k_dense_replace"]),
        groups: None,
        renormalise: Renorm::Always(1e-20),
        scale: &["router_scaling_factor"],
        adjust: |settings, _, spec| biased_shared(settings, spec),
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
        moe_layers: LayerRule::AfterDense(&["num_dense_layers"]),
        groups: None,
        renormalise: Renorm::If(&["norm_topk_prob"], 1e-6),
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
        moe_layers: LayerRule::AfterDense(&["first_k_dense_replace"]),
        groups: None,
        renormalise: Renorm::Always(0.0),
        scale: &["moe_routed_scaling_factor"],
        scale_on: ScaleOn::Output,
        shared: Shared::Width(&["shared_expert_intermediate_size"]),
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
        renormalise: Renorm::If(&["norm_topk_prob"], 0.0),
        scale: &[],
        shared: Shared::Width(&["shared_expert_intermediate_size"]),
        names: &[Names { shared_gate: "", ..Names::QWEN2 }],
        ..Architecture::SIGMOID
    },
    // the first layers choose by token id and have no bias
    Architecture {
        model_types: &["deepseek_v4"],
        classes: &["DeepseekV4ForCausalLM"],
        renormalise: Renorm::Always(1e-20),
        shared: Shared::Same,
        moe_layers: LayerRule::Every,
        score: Score::SqrtSoftplus,
        groups: None,
        scale: &["routed_scaling_factor"],
        adjust: |settings, layer, spec| {
            let activation = clamped(settings, spec.expert.activation)?;
            both(spec, activation);
            biased_shared(settings, spec)?;
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
        moe_layers: LayerRule::AfterDense(&["first_k_dense_replace"]),
        groups: None,
        renormalise: Renorm::Always(1e-15),
        shared: Shared::No,
        adjust: |settings, _, spec| {
            let eps = settings.need_number(&["rms_norm_eps"])?;
            let latent = settings.need_size(&["moe_hidden_size"], 0)?;
            spec.router.logit_multiplier = settings.need_number(&["output_multiplier"])?;
            spec.dims.routed_hidden = latent;
            spec.input_transform.steps = vec![
                TransformStep::Linear { width: latent },
                TransformStep::RmsNorm(RmsNorm { eps, unit_offset: true, scale_first: false }),
            ];
            spec.output_transform.steps = vec![TransformStep::Linear { width: spec.dims.hidden }];
            spec.expert.norm = Some(RmsNorm {
                eps: settings.need_number(&["post_norm_eps"])?,
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
        moe_layers: LayerRule::AfterDense(&["dense_mlp_idx"]),
        groups: None,
        renormalise: Renorm::Never,
        scale: &["route_scale"],
        shared: Shared::Same,
        combine: SharedCombine::RouterWeighted,
        adjust: |settings, _, spec| {
            const SINK: &[&str] = &["shared_expert_sink"];
            if !settings.flag(SINK, true)? {
                return Err(settings.error(SINK, "is false; only true is known"));
            }
            // beside a width for dense layers, the other one is that of experts
            let beside = settings.stated(&["dense_intermediate_size"]).is_some();
            if beside {
                spec.dims.intermediate = settings.need_size(&["intermediate_size"], 0)?;
            }
            let count = settings.need_size(&["n_shared_experts"], 0)?;
            spec.router.weight_from = WeightFrom::JointSoftmax { shared: count };
            if let Some(shared) = &mut spec.shared {
                shared.count = count;
                shared.intermediate = spec.dims.intermediate;
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
        model_types: &["inkling2", "inkling2_text", "inkling2_loop", "inkling2_loop_text"],
        classes: &["Inkling2ForConditionalGeneration", "Inkling2LoopForConditionalGeneration"],
        activation: (&[], Activation::Silu),
        moe_layers: LayerRule::Every,
        groups: None,
        renormalise: Renorm::Always(1e-20),
        scale: &["route_scale"],
        shared: Shared::No,
        adjust: |settings, _, spec| {
            spec.expert.activation = Activation::Situ {
                beta: settings.need_number(&["mlp_gate_softcap"])?,
                lambda: Some(settings.need_number(&["mlp_up_softcap"])?),
            };
            Ok(())
        },
        names: &[Names { correction: "gate.bias", experts: &[W13], ..Names::MLP }],
        ..Architecture::SIGMOID
    },
];
