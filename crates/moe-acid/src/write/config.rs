//! `config.json`, with the keys that published ones have and engines read.

use serde_json::{Value, json};

use super::form::Form;
use super::names::{HEAD, HEADS, LATENT, LATENT_HEAD};
use crate::Block;

pub(super) fn config(block: &Block, form: Form) -> Value {
    let family = block.family;
    let mut config = json!({
        "model_type": family.model_type,
        "vocab_size": block.vocabulary(),
        "hidden_size": family.hidden,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "num_experts_per_tok": family.top_k,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": false,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": true,
        "bos_token_id": null,
        "eos_token_id": null,
        "pad_token_id": null,
        "torch_dtype": if form == Form::F32 { "float32" } else { "bfloat16" },
    });
    let (architecture, more) = match family.model_type {
        "deepseek_v3" => (
            "DeepseekV3ForCausalLM",
            json!({
                "intermediate_size": 64,
                "moe_intermediate_size": family.intermediate,
                "n_routed_experts": family.experts,
                "n_shared_experts": 1,
                "n_group": family.groups.map(|(groups, _)| groups),
                "topk_group": family.groups.map(|(_, keep)| keep),
                "routed_scaling_factor": family.factor,
                "norm_topk_prob": family.renormalise,
                "topk_method": "noaux_tc",
                "scoring_func": "sigmoid",
                "first_k_dense_replace": 0,
                "moe_layer_freq": 1,
                "q_lora_rank": null,
                "kv_lora_rank": LATENT,
                "qk_rope_head_dim": LATENT_HEAD,
                "qk_nope_head_dim": LATENT_HEAD,
                "v_head_dim": LATENT_HEAD,
                "num_nextn_predict_layers": 0,
                "attention_bias": false,
            }),
        ),
        "gpt_oss" => (
            "GptOssForCausalLM",
            json!({
                "intermediate_size": family.intermediate,
                "num_local_experts": family.experts,
                "experts_per_token": family.top_k,
                "head_dim": HEAD,
                "attention_bias": true,
                "sliding_window": 128,
                "layer_types": ["full_attention"],
                "swiglu_limit": 7.0,
            }),
        ),
        "qwen2_moe" => (
            "Qwen2MoeForCausalLM",
            json!({
                "intermediate_size": 64,
                "moe_intermediate_size": family.intermediate,
                "shared_expert_intermediate_size": family.intermediate,
                "num_experts": family.experts,
                "norm_topk_prob": family.renormalise,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
                "use_sliding_window": false,
                "qkv_bias": true,
            }),
        ),
        "mixtral" => (
            "MixtralForCausalLM",
            json!({
                "intermediate_size": family.intermediate,
                "num_local_experts": family.experts,
                "head_dim": HEAD,
                "sliding_window": null,
            }),
        ),
        "llama4_text" => (
            "Llama4ForCausalLM",
            json!({
                "intermediate_size": family.intermediate,
                "intermediate_size_mlp": 64,
                "num_local_experts": family.experts,
                "interleave_moe_layer_step": 1,
                "moe_layers": [0],
                "head_dim": HEAD,
                "no_rope_layers": [1],
                "layer_types": ["full_attention"],
                "use_qk_norm": false,
                "attention_bias": false,
                "attn_temperature_tuning": false,
            }),
        ),
        _ => (
            "Ernie4_5_MoeForCausalLM",
            json!({
                "intermediate_size": 64,
                "moe_intermediate_size": family.intermediate,
                "moe_num_experts": family.experts,
                "moe_k": family.top_k,
                "moe_num_shared_experts": 1,
                "moe_layer_start_index": 0,
                "moe_layer_end_index": 0,
                "moe_layer_interval": 1,
                "moe_norm_min": 1e-12,
                "head_dim": HEAD,
                "use_bias": false,
            }),
        ),
    };
    config["architectures"] = json!([architecture]);
    let quantization = match (family.model_type, form) {
        ("gpt_oss", Form::Mxfp4) => json!({
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        }),
        _ => form.config(&[
            "lm_head",
            "re:.*self_attn.*",
            "re:.*mlp[.]gate$",
            "re:.*block_sparse_moe[.]gate$",
            "re:.*feed_forward[.]router$",
            "re:.*shared_expert_gate$",
        ]),
    };
    if let (Value::Object(config), Value::Object(more)) = (&mut config, more) {
        config.extend(more);
        if !quantization.is_null() {
            config.insert("quantization_config".into(), quantization);
        }
    }
    config
}
