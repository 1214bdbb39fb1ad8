//! Top-k on the logits themselves; the weights are a softmax or a sigmoid over the chosen ones.

use super::row::{Architecture, Names, Renorm, Shared};
use super::rules::LayerRule;
use super::sigmoid::biased_shared;
use super::softmax::WHOLE_WIDTH;
use super::tensors::Form;
use super::variants::ExpertNames;
use crate::spec::{
    Activation, Correction, Renormalise, Score, Selection, SharedCombine, WeightFrom, WeightOn,
};

const CHOSEN: Architecture = Architecture {
    intermediate: WHOLE_WIDTH,
    score: Score::Logits,
    weight_from: WeightFrom::SoftmaxChosen,
    renormalise: Renorm::Never,
    ..Architecture::SOFTMAX
};

/// `input_linear` [E, 2I, H], `output_linear` [E, H, I].
const LINEARS: ExpertNames = ExpertNames {
    form: Form::Stacked,
    ..ExpertNames::mlp("input_linear", "input_linear", "output_linear")
};

const GRANITE: Architecture = Architecture {
    model_types: &["granitemoe", "granitemoe_swa"],
    classes: &["GraniteMoeForCausalLM", "GraniteMoeSWAForCausalLM"],
    shared: Shared::Width(&["shared_intermediate_size"]),
    names: &[Names {
        block: "block_sparse_moe",
        gate: "router.layer",
        experts: &[LINEARS],
        shared: ExpertNames::mlp(
            "../shared_mlp.input_linear",
            "../shared_mlp.input_linear",
            "../shared_mlp.output_linear",
        ),
        scopes: &["", "../shared_mlp."],
        ..Names::MLP
    }],
    ..CHOSEN
};

/// Biases everywhere, clamped SwiGLU; stacks are `[E, in, out]`, but MXFP4 blocks stand by output
/// features.
const GPT_OSS: Architecture = Architecture {
    model_types: &["gpt_oss"],
    classes: &["GptOssForCausalLM"],
    expert_bias: true,
    activation: (&[], Activation::Silu),
    adjust: |settings, _, spec| {
        spec.gate.bias = true;
        spec.expert.activation = Activation::ClampedSwiglu {
            alpha: settings.need_number(&["swiglu_alpha"])?,
            beta: 1.0,
            limit: settings.need_number(&["swiglu_limit"])?,
        };
        Ok(())
    },
    names: &[Names {
        gate: "router",
        gate_bias: "router.bias",
        experts: &[
            ExpertNames { interleaved: true, marker: "_blocks", ..ExpertNames::STACKED },
            ExpertNames { interleaved: true, ..ExpertNames::STACKED_TRANSPOSED },
            ExpertNames { interleaved: true, ..ExpertNames::STACKED },
            ExpertNames::EACH,
            ExpertNames { interleaved: true, ..ExpertNames::EACH_FUSED },
        ],
        ..Names::MLP
    }],
    ..CHOSEN
};

pub(super) const ROWS: &[Architecture] = &[
    GRANITE,
    Architecture {
        model_types: &["granitemoeshared"],
        classes: &["GraniteMoeSharedForCausalLM"],
        ..GRANITE
    },
    Architecture {
        model_types: &["granitemoehybrid"],
        classes: &["GraniteMoeHybridForCausalLM"],
        shared: Shared::Width(&["shared_intermediate_size"]),
        ..GRANITE
    },
    GPT_OSS,
    // divides the weights by k and multiplies the sum by k, which cancels
    Architecture {
        model_types: &["openai_privacy_filter"],
        classes: &["OpenAIPrivacyFilterForTokenClassification"],
        names: &[Names {
            gate: "router",
            gate_bias: "router.bias",
            experts: &[ExpertNames::STACKED_TRANSPOSED],
            ..Names::MLP
        }],
        ..GPT_OSS
    },
    // the routed experts are SiLU whatever `hidden_act` says; the shared ones follow it
    Architecture {
        model_types: &["aria", "aria_text"],
        classes: &["AriaForConditionalGeneration", "AriaTextForCausalLM"],
        shared: Shared::Times(&["moe_num_shared_experts"]),
        adjust: |settings, _, spec| {
            spec.expert.activation = Activation::Silu;
            biased_shared(settings, spec)
        },
        names: &[Names {
            gate: "router",
            experts: &[ExpertNames {
                form: Form::StackedTransposed,
                ..ExpertNames::mlp("experts.fc1", "experts.fc1", "experts.fc2")
            }],
            ..Names::DEEPSEEK
        }],
        ..CHOSEN
    },
    Architecture {
        model_types: &["jetmoe"],
        classes: &["JetMoeForCausalLM"],
        activation: (&["activation_function"], Activation::Silu),
        adjust: |_, _, spec| {
            spec.output.bias = true;
            Ok(())
        },
        names: &[Names {
            gate: "router.layer",
            experts: &[LINEARS],
            output_bias: "bias",
            ..Names::MLP
        }],
        ..CHOSEN
    },
    Architecture {
        model_types: &["cohere2_moe"],
        classes: &["Cohere2MoeForCausalLM"],
        moe_layers: LayerRule::AfterDense(&["first_k_dense_replace"]),
        shared: Shared::Times(&["num_shared_experts"]),
        adjust: |settings, _, spec| {
            match settings.text(&["expert_selection_fn"])? {
                None | Some("softmax") => {}
                Some("sigmoid") => {
                    spec.router.weight_from = WeightFrom::SigmoidChosen;
                    if settings.flag(&["norm_topk_prob"], true)? {
                        spec.router.renormalise = Renormalise::Sum { eps: 0.0 };
                    }
                }
                Some(other) => {
                    let reason = format!("is '{other}'; known are softmax and sigmoid");
                    return Err(settings.error(&["expert_selection_fn"], reason));
                }
            }
            const COMBINE: &[&str] = &["shared_expert_combination_strategy"];
            let combine = match settings.text(COMBINE)? {
                None | Some("average") => SharedCombine::Average,
                Some("sum") => SharedCombine::Add,
                Some(other) => {
                    let reason = format!("is '{other}'; known are average and sum");
                    return Err(settings.error(COMBINE, reason));
                }
            };
            if let Some(shared) = &mut spec.shared {
                shared.combine = combine;
            }
            Ok(())
        },
        names: &[Names { correction: "", ..Names::DEEPSEEK }],
        ..CHOSEN
    },
    Architecture {
        model_types: &["llama4", "llama4_text"],
        classes: &["Llama4ForCausalLM", "Llama4ForConditionalGeneration"],
        moe_layers: LayerRule::Interleave,
        weight_from: WeightFrom::SigmoidChosen,
        weight_on: WeightOn::Input,
        shared: Shared::Same,
        names: &[Names {
            block: "feed_forward",
            gate: "router",
            experts: &[ExpertNames::STACKED_TRANSPOSED, ExpertNames::EACH],
            shared_gate: "",
            ..Names::QWEN2
        }],
        ..CHOSEN
    },
    Architecture {
        model_types: &["phimoe"],
        classes: &["PhimoeForCausalLM", "PhiMoEForCausalLM"],
        weight_from: WeightFrom::Score,
        adjust: |settings, _, spec| {
            let eps = settings.need_number(&["router_jitter_noise"])?;
            spec.router.selection = Selection::SparseMixer { eps };
            Ok(())
        },
        names: &[Names::MIXTRAL, Names { gate: "router", ..Names::MLP }, Names::MLP],
        ..CHOSEN
    },
    Architecture {
        model_types: &["kolibri1"],
        classes: &["Kolibri1ForCausalLM"],
        intermediate: &["moe_intermediate_size"],
        correction: Correction::OnLogits,
        weight_from: WeightFrom::SigmoidChosen,
        renormalise: Renorm::If(&["norm_topk_prob"], 0.0),
        shared: Shared::Width(&["shared_expert_intermediate_size"]),
        names: &[Names {
            correction: "../moe.router.expert_bias",
            scopes: &["", "../moe.router."],
            ..Names::DEEPSEEK
        }],
        ..CHOSEN
    },
];
