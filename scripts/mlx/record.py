"""Records what MLX computes with experts in its own quantisation.

    python record.py ../../crates/moe-runner/tests/quantised/mlx

A tiny qwen2_moe of mlx-lm, a layer for each of some modes, with router, shared expert and its gate quantised too,
saved as mlx-lm saves it (the tensors of the MoE blocks alone); and for each layer rows, and what its block makes of
them. The configuration names modules of the first layers only: mlx-lm reads what the others are from their tensors.
Run by hand; needs `pip install "mlx[cpu]" mlx-lm`.
"""

import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.qwen2_moe import Model, ModelArgs
from mlx_lm.utils import save_config

AFFINE = {"group_size": 32, "bits": 4}
LAYERS = [
    ({"group_size": 32, "bits": 3}, mx.float16),
    (AFFINE, mx.bfloat16),
    ({"group_size": 32, "bits": 5}, mx.float32),
    ({"group_size": 32, "bits": 6}, mx.bfloat16),
    ({"group_size": 32, "bits": 8}, mx.bfloat16),
    ({"group_size": 32, "bits": 8, "mode": "mxfp8"}, mx.bfloat16),
    ({"group_size": 16, "bits": 4, "mode": "nvfp4"}, mx.bfloat16),
]
NAMED = 2
ROWS = 4

if len(sys.argv) > 2:
    # all modes, to look at once
    LAYERS += [({"group_size": 32, "bits": bits}, mx.float16) for bits in (1, 2)]
    LAYERS += [({"group_size": 32, "bits": 4, "mode": "mxfp4"}, mx.float32)]
    LAYERS += [({"group_size": 16, "bits": 4, "mode": "nvfp4", "global_scale": True}, mx.float32)]

mx.set_default_device(mx.cpu)
mx.random.seed(1)
config = dict(
    model_type="qwen2_moe", hidden_size=32, num_hidden_layers=len(LAYERS), intermediate_size=32, num_attention_heads=2,
    num_key_value_heads=2, num_experts_per_tok=1, num_experts=2, moe_intermediate_size=32,
    shared_expert_intermediate_size=32, rms_norm_eps=1e-6, vocab_size=32, hidden_act="silu",
)
model = Model(ModelArgs.from_dict(config))
config["quantization"] = dict(AFFINE)
tensors, recorded = {}, {}
for index, (options, dtype) in enumerate(LAYERS):
    block = model.model.layers[index].mlp
    # a router that tells experts apart
    block.gate.weight = block.gate.weight * 8
    block.set_dtype(dtype)

    def choose(path, module):
        if not hasattr(module, "to_quantized"):
            return False
        # mlx-lm keeps routers in 8 bits
        chosen = {"group_size": 32, "bits": 8} if path == "gate" else dict(options)
        if not path.startswith("switch_mlp"):
            chosen.pop("global_scale", None)
        if index < NAMED and chosen != AFFINE:
            config["quantization"][f"model.layers.{index}.mlp.{path}"] = chosen
        return chosen

    nn.quantize(block, class_predicate=choose)
    x = mx.random.normal((1, ROWS, 32)).astype(mx.bfloat16).astype(mx.float32)
    out = block(x)
    assert out.dtype == mx.float32, out.dtype
    recorded[f"layers.{index}.x"], recorded[f"layers.{index}.out"] = x[0], out[0]
    for name, value in tree_flatten(block.parameters()):
        tensors[f"model.layers.{index}.mlp.{name}"] = value
to = Path(sys.argv[1])
to.mkdir(parents=True, exist_ok=True)
save_config(config, to / "config.json")
mx.save_safetensors(str(to / "model.safetensors"), tensors, metadata={"format": "mlx"})
mx.save_safetensors(str(to / "recorded.safetensors"), recorded, metadata={"mlx": mx.__version__})
