"""Records what the MoE block of every family computes, by the library that defines it.

    python blocks.py [MODEL_TYPE ...] > ../../crates/moe-runner/tests/architectures/recorded.json

For each model type: a tiny model of the library, saved as the library saves it. The values of its tensors are made
from their names (see `values`), so only names and shapes are recorded, and the library reads the same file again
before it computes. One entry a model type:

    config   config.json
    tensors  names, `#` for each number in them; the numbers; the shape; and for integers the bound below which they are
    moe      the layers with experts
    layers   for the first and the last of them: what the block adds to the residual stream for rows made from the name
             `hidden_states`, of the token ids 0, 1, 2, ..., in float64
    implied  keys of `config` that the class has the same values for where they are left out, all of them at once
    changed  keys with other values, and what the first block adds then

Run by hand against a newer library; the difference to the recorded file is what has changed. Needs
`pip install torch transformers`.
"""

import copy
import itertools
import json
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from compare import OWN, blocks, classes, model_of, output, tiny
from safetensors.torch import load_file, save_file

TOKENS = 4
# options that leave the shapes of tensors alone
CHANGES = dict(
    num_experts_per_tok=3, norm_topk_prob=False, moe_renormalize=False, routed_scaling_factor=1.7, route_scale=1.9,
    router_scaling_factor=1.3, moe_routed_scaling_factor=1.7, n_group=4, topk_group=2, scoring_func="softmax",
    use_expert_bias=False, hidden_act="gelu", swiglu_limit=0.5, swiglu_alpha=1.3, moe_router_logit_softcapping=2.0,
)
# larger ones are of embeddings and heads
LARGEST = 1 << 17
ATTENTION = re.compile(r"attn|attention|mamba|conv|rotary|indexer|compressor")


def hashes(name, count):
    """splitmix64 of the FNV-1a hash of the name plus the index."""
    seed = 0xCBF29CE484222325
    for byte in name.encode():
        seed = (seed ^ byte) * 0x100000001B3 % 2**64
    z = np.uint64(seed) + np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def values(name, shape):
    """Uniform in [-0.35, 0.35), about 1 for norms: 24 bits of a hash, each step exact or rounded to f32 once."""
    unit = (hashes(name, int(np.prod(shape))) >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)
    centred = (unit - np.float32(0.5)) * np.float32(0.7)
    mean = np.float32(1 if name.endswith("norm.weight") else 0)
    return torch.from_numpy((centred + mean).reshape(shape))


def experts_of_tokens(shape, bound):
    """A table of distinct experts a token."""
    rows, columns = np.meshgrid(np.arange(shape[0]), np.arange(shape[1]), indexing="ij")
    return torch.from_numpy((rows * 7 + columns * 5) % bound)


def grouped(tensors):
    """[[name with #, [numbers at each #], shape, bound]]; what is no product of ranges stands one by one."""
    patterns = {}
    for name, (shape, bound) in tensors.items():
        numbers = tuple(int(part) for part in re.findall(r"(?<=\.)\d+(?=\.|$)", name))
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "#", name)
        patterns.setdefault((pattern, tuple(shape), bound), []).append(numbers)
    for (pattern, shape, bound), found in sorted(patterns.items(), key=str):
        ranges = [sorted(set(column)) for column in zip(*found)]
        whole = sorted(found) == list(itertools.product(*ranges))
        for numbers in [ranges] if whole else [[[n] for n in one] for one in sorted(found)]:
            yield [pattern, numbers, list(shape), *([bound] if bound else [])]


def rewrite(folder, experts):
    """Gives the tensors of layers their values; returns their shapes."""
    made = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(str(file))
        for name, tensor in tensors.items():
            if not re.search(r"\.\d+\.", name) or tensor.numel() > LARGEST or ATTENTION.search(name):
                continue
            if tensor.is_floating_point():
                tensors[name] = values(name, tensor.shape)
                made[name] = (tensor.shape, None)
            elif tensor.dim() == 2:
                tensors[name] = experts_of_tokens(tensor.shape, experts).to(tensor.dtype)
                made[name] = (tensor.shape, experts)
        save_file(tensors, str(file), {"format": "pt"})
    return made


def finite(config):
    """Infinity as the library writes it: JSON has none."""
    if isinstance(config, list):
        return [finite(value) for value in config]
    if isinstance(config, dict):
        return {key: finite(value) for key, value in config.items()}
    return {"__float__": "Infinity"} if config == float("inf") else config


def computed(model):
    """What the first and the last block add, by layer."""
    modules, found = dict(model.named_modules()), list(blocks(model))
    text = model.config.get_text_config()
    x = values("hidden_states", (1, TOKENS, getattr(text, "hidden_size", None) or text.d_model)) * 4
    x, layers = x.to(model.dtype), {}
    for layer, path, block in dict.fromkeys([found[0], found[-1]]):
        with torch.no_grad():
            y = output(block, modules.get(path.rpartition(".")[0]), x, torch.arange(TOKENS))
        layers[layer] = [float(f"{v:.8g}") for v in y.double().flatten().tolist()]
    return layers


def answer(model_class, cls, config, folder):
    """What blocks add, of the model in `folder` under another configuration."""
    config = cls.from_dict(copy.deepcopy(config))
    model, info = model_class.from_pretrained(
        folder, config=config, dtype=torch.float32, experts_implementation="eager", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    try:
        return computed(model.double().eval())
    except RuntimeError:  # a step of it has a dtype of its own
        return computed(model.float().eval())


def implied(cls, config):
    """Keys that can be left out together."""
    whole, left = cls.from_dict(copy.deepcopy(config)).to_dict(), dict(config)
    for key in sorted(set(config) - {"model_type"}):
        less = {k: v for k, v in left.items() if k != key}
        try:
            same = cls.from_dict(copy.deepcopy(less)).to_dict() == whole
        except Exception:
            continue
        left = less if same else left
    return sorted(set(config) - set(left))


def changed(model_class, cls, config, layers, folder):
    """As many of `CHANGES` as the library takes together and obeys, and what the first block adds with them."""
    first = next(iter(layers))
    keys, now = {}, layers[first]
    for key, value in CHANGES.items():
        if key not in config or config[key] == value:
            continue
        if key == "hidden_act" and "swiglu_limit" in config:  # clamped, there is nothing published but SiLU
            continue
        try:
            outputs = answer(model_class, cls, {**config, **keys, key: value}, folder)[first]
        except Exception:
            continue
        if outputs != now and all(map(np.isfinite, outputs)):
            keys, now = {**keys, key: value}, outputs
    return [keys, now] if keys else None


def record(name, cls):
    config = tiny(name, cls)
    model = model_of(cls.from_dict(copy.deepcopy(config))).float().eval()
    found = list(blocks(model))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model.save_pretrained(folder)
        tensors = rewrite(folder, 16)
        layers = answer(type(model), cls, config, folder)
        change = changed(type(model), cls, config, layers, folder)
    written = {"model_type": name, **config, "dtype": "float32", "architectures": [type(model).__name__]}
    return {
        "config": finite(json.loads(json.dumps(written, default=str))),
        "implied": implied(cls, config),
        "tensors": list(grouped(tensors)),
        "moe": sorted({layer for layer, _, _ in found}),
        "layers": layers,
        **({"changed": change} if change else {}),
    }


def main():
    only, families = set(sys.argv[1:]), []
    for name, cls in classes():
        if (only and name not in only) or (name in OWN and OWN[name] is None):
            continue
        try:
            families.append(f"{json.dumps(name)}: {json.dumps(record(name, cls), separators=(',', ':'))}")
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}"[:300], file=sys.stderr, flush=True)
    print("{" + f'"transformers": "{transformers.__version__}",\n"families": {{\n' + ",\n".join(families) + "\n}}")


if __name__ == "__main__":
    main()
