"""Records what the configuration classes of transformers say where config.json says nothing.

    python record.py > ../../crates/moe-runner/src/checkpoint/architecture/classes.json

One entry a class of a model with routed experts, by `model_type`:

    values   the value of each key that touches the MoE block, where config.json leaves it out
    aliases  other spellings that the class accepts, and the key that they stand for
    null     what a key that is written as null becomes, where it is not None
    refused  keys that must not be null
    dense    how many layers are dense before the first with experts, in classes without a key for it
    as       another entry counts: of a model with several parts, the class of its text part

Run by hand against a newer library; the difference to the recorded file is what has changed. Needs
`pip install torch transformers`.
"""

import json
import os
import sys
import warnings

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
warnings.filterwarnings("ignore")

import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

# What the table of architectures reads.
KEYS = """
num_hidden_layers num_layers n_layers hidden_size d_model intermediate_size moe_intermediate_size expert_ffn_hidden_size
num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num zero_expert_type
num_experts_per_tok num_experts_per_token experts_per_token moe_topk moe_k moe_top_k top_k_experts
n_shared_experts num_shared_experts moe_num_shared_experts shared_expert_intermediate_size shared_intermediate_size
moe_shared_expert_intermediate_size shared_experts_intermediate_size share_expert_dim share_expert_dims
n_group num_expert_group topk_group norm_topk_prob moe_renormalize moe_norm_min
routed_scaling_factor route_scale router_scaling_factor moe_router_scaling_factor moe_routed_scaling_factor
scoring_func topk_method expert_selection_fn shared_expert_combination_strategy use_expert_bias
hidden_act hidden_activation mlp_hidden_act activation_function mlp_bias use_bias
swiglu_limit swiglu_limits swiglu_limits_shared swiglu_alpha mlp_gate_softcap mlp_up_softcap
moe_router_logit_softcapping router_jitter_noise output_multiplier moe_hidden_size moe_latent_size post_norm_eps
rms_norm_eps norm_eps first_k_dense_replace num_dense_layers dense_mlp_idx moe_layer_freq mlp_only_layers
decoder_sparse_step expert_layer_period expert_layer_offset moe_layer_start_index moe_layer_end_index
moe_layer_interval interleave_moe_layer_step moe_layers moe_layers_enum enable_moe_block
hybrid_override_pattern layers_block_type shared_expert_sink vocab_size ffn_config
routed_expert_hidden_size activation_beta activation_lambda residual_multiplier
""".split()
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "ffn_config")

# Models whose code stands in their repositories: what their own classes say.
OTHERS = {
    "kimi_k2": {"as": "deepseek_v3"},
    "kimi_k3": {"as": "kimi_linear"},
    "minimax_text_01": {"as": "minimax"},
    "deepseek": {
        "values": dict(moe_intermediate_size=1407, moe_layer_freq=1, first_k_dense_replace=0, norm_topk_prob=False,
                       scoring_func="softmax", hidden_act="silu"),
    },
    "bailing_moe": {
        "values": dict(num_experts=16, num_shared_experts=0, num_experts_per_tok=2, norm_topk_prob=True,
                       first_k_dense_replace=0, hidden_act="silu"),
    },
    # Ling 2.0's own class; that of Ming-flash-omni, of the same model_type, has a factor of 2.5
    "bailing_moe_v2": {
        "values": dict(num_experts=256, num_shared_experts=1, num_experts_per_tok=8, n_group=8, topk_group=4,
                       moe_intermediate_size=512, first_k_dense_replace=1, norm_topk_prob=True,
                       routed_scaling_factor=1.0, score_function="sigmoid", hidden_act="silu"),
    },
    "bailing_moe_linear": {"as": "bailing_moe_v2"},
    "hunyuan": {
        "values": dict(num_experts=1, num_shared_expert=1, moe_topk=1, use_mixed_mlp_moe=False, hidden_act="silu"),
    },
}


def get(config, key):
    try:
        return getattr(config, key)
    except Exception:
        return None


def plain(value):
    """The value as JSON has it; `None` also for what no configuration file can hold."""
    if hasattr(value, "to_dict"):
        return {k: v for k, v in value.to_dict().items() if k.startswith(("moe_", "ffn_"))}
    if isinstance(value, (list, tuple)):
        return list(value)
    return value if isinstance(value, (bool, int, float, str)) else None


def record(cls):
    default = cls()
    names = {k for k in KEYS if hasattr_safe(default, k)}
    # by layer, made from the number of layers: that is a rule, no value
    derived = {k for k in names if isinstance(plain(get(default, k)), list) and plain(get(default, k))}
    values = {k: plain(get(default, k)) for k in sorted(names - derived)}
    aliases = {k: v for k, v in getattr(cls, "attribute_map", {}).items() if k in KEYS or v in KEYS}
    entry = {"values": {k: v for k, v in values.items() if v is not None}}
    if aliases:
        entry["aliases"] = dict(sorted(aliases.items()))
    null, refused = {}, []
    for key in sorted(names):
        try:
            value = plain(get(cls.from_dict({key: None}), key))
        except Exception:
            refused.append(key)
            continue
        if value is not None and key not in derived:
            null[key] = value
    if null:
        entry["null"] = null
    if refused:
        entry["refused"] = refused
    kinds = get(default, "mlp_layer_types")
    if isinstance(kinds, list) and "dense" in kinds[:1]:
        entry["dense"] = next((i for i, kind in enumerate(kinds) if kind != "dense"), len(kinds))
    return entry


def hasattr_safe(config, key):
    try:
        return hasattr(config, key)
    except Exception:
        return True


def main():
    classes = {}
    for name in sorted(CONFIG_MAPPING_NAMES):
        try:
            cls = CONFIG_MAPPING[name]
            default = cls()
            text = default.get_text_config()
        except Exception:
            continue
        kind = getattr(text, "model_type", None)
        if type(text) is not cls and any(hasattr_safe(text, k) for k in EXPERTS):
            classes[name] = {"as": kind}
            classes.setdefault(kind, record(type(text)))
        elif any(hasattr_safe(default, k) for k in EXPERTS):
            classes[name] = record(cls)
    for name, entry in OTHERS.items():
        classes.setdefault(name, entry)
    document = {"library": f"transformers {transformers.__version__}", "classes": classes}
    # one key a line is readable in a difference
    json.dump(document, sys.stdout, indent=1, sort_keys=True)
    print()


if __name__ == "__main__":
    main()
