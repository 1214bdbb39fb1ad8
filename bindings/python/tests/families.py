"""Tiny random models of every family of transformers whose experts go through its interface."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from pathlib import Path
from typing import Any

import torch
import transformers.models

# by the names that configs have for them; a config takes those that it knows
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 48,
    "moe_intermediate_size": 32,
    "moe_ffn_hidden_size": 32,
    "moe_hidden_size": 64,
    "expert_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 3,
    "num_experts_per_token": 3,
    "moe_topk": 3,
    "top_k_experts": 3,
    "moe_k": 3,
    "n_group": 2,
    "topk_group": 1,
    "num_expert_group": 2,
    "topk_groups": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "max_position_embeddings": 128,
    "sliding_window": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
    "init_std": 0.3,
    "tie_word_embeddings": False,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 1,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "index_topk": 16,
    "hidden_size_per_layer_input": 0,
    # of towers that see or hear, which no text goes through
    "depth": 1,
    "out_hidden_size": 64,
    "vocab_size_per_layer_input": 128,
}

# what the sizes alone do not make consistent
EXTRA: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "beam": {"num_hidden_layers": 4},
    "dots1": {"n_shared_experts": 1},
    "ernie4_5_vl_moe": {"moe_intermediate_size": [32, 32]},
    "flint": {"mlp_only_layers": []},
    "gemma4": {"enable_moe_block": True},
    "glm4v_moe": {"head_dim": 128},
    "glm5_next": {"qk_rope_head_dim": 0},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hy_v4_vl": {"qk_rope_head_dim": 64},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"num_hidden_layers": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "qwen3_5_moe": {"num_hidden_layers": 4},
    "qwen3_next": {"num_hidden_layers": 4},
    "qwen4_exp": {"num_hidden_layers": 4},
    "zaya": {"num_experts_per_tok": 1},
}

# families whose whole model is not made tiny here (towers, options that no size makes consistent);
# their experts are tested all the same
LEFT_OUT: dict[str, str] = {
    "diffusion_gemma": "does not write from left to right",
    **dict.fromkeys(
        [
            "deepseek_ocr2",
            "dots3_note",
            "ernie4_5_vl_moe",
            "glm4v_moe",
            "glm5_next",
            "hy_v4_vl",
            "kimi_linear",
            "mistral_large4",
            "muse_spark",
            "qwen3_omni_moe",
            "qwen4_exp",
            "unlimited_ocr",
        ],
        "its whole model is not made tiny here",
    ),
}

# families whose function between the products moe-runner does not have: refused, in words
UNKNOWN_FUNCTION = ("inkling2", "inkling2_loop")

# families whose checkpoint is refused, and what is said
REFUSED_CHECKPOINT = {
    "phimoe": "sparsemixer chooses exactly two experts",
    "zaya": "the router is a small network",
}

# families that have a part of the layer outside of the block: their experts alone can be taken
OUTSIDE = {
    "gemma4": "its router stands outside of a block",
    **dict.fromkeys(
        ["granitemoe_swa", "granitemoehybrid", "granitemoeshared"],
        "its shared experts stand outside of its block",
    ),
}


def names() -> list[str]:
    """The families, by their folders in transformers."""
    found = []
    for module in pkgutil.iter_modules(transformers.models.__path__):
        folder = Path(transformers.models.__path__[0]) / module.name
        source = folder / f"modeling_{module.name}.py"
        if source.exists() and "@use_experts_implementation" in source.read_text():
            found.append(module.name)
    return sorted(found)


def model_class(family: str) -> type | None:
    """The family's language model, or what else of it generates text."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    classes = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and value.__module__ == module.__name__
    ]
    for ending in ("ForCausalLM", "ForConditionalGeneration", "ForTokenClassification"):
        for value in classes:
            if value.__name__.endswith(ending) and getattr(value, "config_class", None):
                return value
    return None


def tiny(family: str) -> torch.nn.Module:
    """A random model of that family, in f32."""
    made = model_class(family)
    if made is None:
        raise LookupError(f"{family} has no language model")
    torch.manual_seed(0)
    config = _config(made.config_class, EXTRA.get(family, {}))
    config._attn_implementation = "eager"
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in made(config).parameters())
    if size > 20e6:
        raise LookupError(f"{family}: {size / 1e6:.0f} million parameters are not tiny")
    model = made(config).float().eval()
    # what is initialised with zeros or ones is none of a trained model's
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and parameter.std() < 1e-3 or "expert" in name:
                parameter.normal_(0, 0.1)
    return model


def experts_classes(family: str) -> list[type]:
    """The classes of experts that go through the interface."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    found = []
    for value in vars(module).values():
        own = inspect.isclass(value) and value.__module__ == module.__name__
        if own and hasattr(value, "_apply_gate") and hasattr(value.forward, "__wrapped__"):
            found.append(value)
    return found


def tiny_experts(family: str, experts_class: type) -> torch.nn.Module:
    """Random experts of that class, in f32."""
    configuration = importlib.import_module(
        f"transformers.models.{family}.configuration_{family}"
    )
    candidates = [
        value
        for value in vars(configuration).values()
        if inspect.isclass(value) and value.__module__ == configuration.__name__
    ]
    errors = []
    # the text's config has what experts need
    for config_class in sorted(candidates, key=lambda one: "Text" not in one.__name__):
        try:
            config = _config(config_class, EXTRA.get(family, {}))
            with torch.device("meta"):
                made = experts_class(config)
            break
        except Exception as error:  # not the config of this class
            errors.append(f"{config_class.__name__}: {error}")
    else:
        raise LookupError("; ".join(errors))
    if sum(parameter.numel() for parameter in made.parameters()) > 1e6:
        raise LookupError(f"{experts_class.__name__} is not tiny")
    made = made.to_empty(device="cpu").float()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.2)
    made.config._experts_implementation_internal = "eager"
    return made


def _config(config_class: type, extra: dict[str, Any]) -> Any:
    known = set(inspect.signature(config_class.__init__).parameters)
    for base in config_class.__mro__:
        known |= set(getattr(base, "__annotations__", {}))
    chosen = {name: value for name, value in {**SIZES, **extra}.items() if name in known}
    if "qk_rope_head_dim" in known and "head_dim" not in extra:
        chosen.pop("head_dim", None)  # there it is another name for that
    if "kv_lora_rank" in known:
        chosen["num_key_value_heads"] = chosen.get("num_attention_heads")
    for name, sub in getattr(config_class, "sub_configs", {}).items():
        if inspect.isclass(sub) and hasattr(sub, "__mro__"):
            try:
                chosen[name] = _config(sub, extra).to_dict()
            except Exception:  # a part that is not text; its own defaults do
                pass
    return config_class(**chosen)
