"""Compares every family of models with routed experts with the library that defines it.

    MOE_RUNNER=../../target/release/moe-runner python compare.py [MODEL_TYPE ...] [--keys | --add | --fields]

For each model type: a tiny random model, saved as the library saves it; its MoE block computes random rows, and so does
`moe-runner run`. With `--keys`, each key of config.json that touches the block is deleted, set to null, and set to
something else, in turn; with `--add`, keys of other families are added, which the library ignores. What differs is
printed; what the library itself refuses is passed over. Run by hand; needs `pip install torch transformers`.

With `--fields`, each of those keys is deleted and set to null, and what both make of it is compared: where the library
reads the same configuration as before, the layers must be the same ones; else outputs are compared. `compared.json` then
says, for each family, with how many keys that was done; a test reads it.
"""

import copy
import importlib
import inspect
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
warnings.filterwarnings("ignore")

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

PROGRAM = os.environ.get("MOE_RUNNER", "moe-runner")
BOUND = 1e-9
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "ffn_config")

TINY = dict(
    hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=4, head_dim=8, vocab_size=64, max_position_embeddings=64, n_routed_experts=16, num_experts=16,
    num_local_experts=16, moe_num_experts=16, shared_expert_intermediate_size=24, shared_intermediate_size=24,
    moe_shared_expert_intermediate_size=24, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
    v_head_dim=8, index_head_dim=8, index_n_heads=2, index_topk=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, mamba_d_state=8,
    mamba_n_heads=4, mamba_num_heads=4, mamba_head_dim=16, mamba_d_head=16, mamba_expand=2, mamba_n_groups=1, n_groups=1,
    ssm_state_size=8, mamba_d_conv=4, chunk_size=8, first_k_dense_replace=1, num_dense_layers=1, dense_mlp_idx=1,
    moe_layer_start_index=1, expert_ffn_hidden_size=16, ffn_hidden_size=48, num_layers=2, zero_expert_num=2,
    moe_latent_size=None, moe_hidden_size=24,
)
FULL = ["full_attention"] * 4
OWN = {
    "dbrx": dict(d_model=32, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=64,
                 ffn_config=dict(ffn_hidden_size=16, moe_num_experts=8, moe_top_k=2),
                 attn_config=dict(kv_n_heads=2, rope_theta=10000.0, clip_qkv=8.0)),
    "longcat_flash": dict(num_layers=2, n_routed_experts=16, zero_expert_num=4, moe_topk=4),
    "nemotron_h": dict(layers_block_type=["mamba", "moe", "attention", "moe"], num_hidden_layers=4, n_group=1,
                       topk_group=1, num_experts_per_tok=2),
    "jamba": dict(num_experts=8, expert_layer_period=2, expert_layer_offset=1, attn_layer_period=2, attn_layer_offset=1,
                  mamba_dt_rank=4, use_mamba_kernels=False),
    "jetmoe": dict(num_local_experts=4, kv_channels=8, num_key_value_heads=2, num_experts_per_tok=2),
    "gpt_oss": dict(num_key_value_heads=2, layer_types=FULL),
    "minimax": dict(layer_types=FULL),
    "llama4_text": dict(intermediate_size_mlp=40, intermediate_size=16, interleave_moe_layer_step=2, moe_layers=None,
                        no_rope_layers=None, layer_types=None),
    "granitemoehybrid": dict(layers_block_type=["attention"] * 2, num_hidden_layers=2),
    "deepseek_v2": dict(num_experts_per_tok=4),
    "bailing_hybrid": dict(num_experts_per_tok=4),
    "dots1": dict(n_shared_experts=2, num_experts_per_tok=4, n_routed_experts=16, n_group=1, topk_group=1),
    "deepseek_ocr2_text": dict(num_experts_per_tok=4, mlp_layer_types=["dense"] + ["sparse"] * 3),
    "glm5_next_text": dict(index_topk=32, index_kpool=16, qk_rope_head_dim=0),
    "hy_v4_vl_text": dict(qk_rope_head_dim=64),
    "inkling_text": dict(unpadded_vocab_size=60),
    "inkling2_text": dict(unpadded_vocab_size=60),
    "inkling2_loop_text": dict(unpadded_vocab_size=60, num_hidden_layers=6, n_layers_per_attn_res_block=2,
                               loop_layer_index_start=2, loop_layer_index_end=4,
                               layer_types=["hybrid_sliding"] * 5 + ["hybrid"]),
    "lfm2_moe": dict(layer_types=FULL),
    "step3p5": dict(num_hidden_layers=5, mlp_layer_types=None),
    "gemma4_text": dict(enable_moe_block=True, num_experts=8, top_k_experts=2, layer_types=FULL, num_kv_shared_layers=0,
                        hidden_size_per_layer_input=0, vocab_size_per_layer_input=64),
    "diffusion_gemma_text": dict(num_experts=8, top_k_experts=2, layer_types=FULL),
    "deepseek_v4": dict(mlp_layer_types=["hash_moe"] * 2 + ["moe"] * 2),
    "qwen4_exp_text": dict(layer_types=["linear_attention"] * 4),
    # what does not fit a layer; an encoder of images; one whose class lacks a key that its model reads
    "ernie4_5_vl_moe_text": None, "dots3_note_vision_encoder": None, "qwen3_omni_moe_talker_text": None,
    "zaya": None, "doge": None, "switch_transformers": None, "nllb-moe": None, "vitpose_backbone": None,
}
TOUCH = """expert moe topk top_k group scal renorm norm_topk dense sparse interleave swiglu act scor route shared limit alpha beta
    softcap latent mlp_layer layers_block pattern bias eps multiplier hash intermediate""".split()
LEAVE = """dropout aux loss jitter rope attn attention conv mamba ssm dtype index_ token_id qk_ kv_ kda indexer vision audio hc_
    query linear_ floor pad eos bos key_value output_router initial embedding group_size logits_scaling""".split()
OTHER = dict(
    scoring_func="softmax", n_group=4, topk_group=2, norm_topk_prob=False, routed_scaling_factor=1.7,
    first_k_dense_replace=2, moe_layer_freq=2, mlp_bias=True, use_bias=True, swiglu_limit=0.5, swiglu_alpha=1.3,
    hidden_act="gelu", n_shared_experts=2, num_shared_experts=2, moe_shared_expert_intermediate_size=20,
    shared_expert_intermediate_size=20, decoder_sparse_step=2, use_expert_bias=False, moe_intermediate_size=24,
    num_local_experts=12, num_experts=12, n_routed_experts=12, num_experts_per_tok=3, route_scale=1.9,
)


def has(config, key):
    try:
        return hasattr(config, key)
    except Exception:
        return True


def classes():
    for name in CONFIG_MAPPING_NAMES:
        try:
            cls = CONFIG_MAPPING[name]
            default = cls()
        except Exception:
            continue
        if any(has(default, key) for key in COUNTS):
            yield name, cls


def tiny(name, cls):
    """The explicit config of a tiny model."""
    default = cls().to_dict()
    over = {k: v for k, v in TINY.items() if k in default}
    layers = over.get("num_hidden_layers", 4)
    for key, value in default.items():
        if isinstance(value, list) and len(value) > layers and ("layer" in key or "types" in key or "limits" in key):
            over[key] = value[-layers:] if "limits" in key else None
    config = cls(**{**over, **(OWN.get(name) or {})}).to_dict()
    return {k: v for k, v in config.items() if not k.startswith("_") and k != "transformers_version"}


def model_of(config):
    for auto in (AutoModelForCausalLM, AutoModel):
        try:
            return auto.from_config(config)
        except ValueError as error:
            if "nrecognized configuration" not in str(error):
                raise
    module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    found = [m for m in vars(module).values() if isinstance(m, type) and issubclass(m, transformers.PreTrainedModel)]
    found = [m for m in found if m.config_class is type(config) and not m.__name__.endswith("PreTrainedModel")]
    found.sort(key=lambda m: ("CausalLM" in m.__name__, m.__name__.endswith("Model")), reverse=True)
    return found[0](config)


def blocks(model):
    """(layer, name, module) of each MoE block."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        index = [part for part in name.split(".") if part.isdigit()]
        beside = hasattr(module, "post_feedforward_layernorm_2") and hasattr(module, "router")
        inside = hasattr(module, "experts") and (hasattr(module, "gate") or hasattr(module, "router"))
        inside = inside and "Attention" not in kind and "DecoderLayer" not in kind
        if index and (beside or inside or kind == "JetMoeMoE"):
            yield int(index[0]), name, module


def randomise(model):
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "tid2eid" in name:
                rows = [torch.randperm(16, generator=random)[: tensor.shape[1]] for _ in range(tensor.shape[0])]
                tensor.copy_(torch.stack(rows))
            elif tensor.is_floating_point() and "inv_freq" not in name and "rotary" not in name:
                mean = 1 if name.endswith("norm.weight") else 0
                tensor.copy_(torch.randn(tensor.shape, generator=random) * 0.2 + mean)


def output(block, layer, x, ids):
    """What the block adds to the residual stream."""
    if hasattr(block, "post_feedforward_layernorm_2"):
        dense = block.post_feedforward_layernorm_1(block.mlp(block.pre_feedforward_layernorm(x)))
        flat = x.reshape(-1, x.shape[-1])
        _, weights, chosen = block.router(flat)
        routed = block.experts(block.pre_feedforward_layernorm_2(flat), chosen, weights).reshape(x.shape)
        y = block.post_feedforward_layernorm(dense + block.post_feedforward_layernorm_2(routed))
        return y.reshape(-1, x.shape[-1])
    wants = inspect.signature(block.forward).parameters
    y = block(x, **({"input_ids": ids[None]} if "input_ids" in wants else {}))
    y = y[0] if isinstance(y, tuple) else y
    if hasattr(layer, "shared_mlp"):
        y = y + layer.shared_mlp(x)
    if type(block).__name__.startswith("AXK1") and hasattr(layer, "post_mlp_layernorm"):
        y = layer.post_mlp_layernorm(y)
    return y.reshape(-1, x.shape[-1])


def run(folder, layer, x, ids):
    with tempfile.TemporaryDirectory() as temporary:
        source, target = (Path(temporary) / name for name in ("in.safetensors", "out.safetensors"))
        save_file({"hidden_states": x.contiguous(), "input_ids": ids}, str(source))
        command = [PROGRAM, "run", folder, "--layer", layer, "--input", source, "--output", target]
        command += ["--dtype", "f32", "--output-dtype", "f32"]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        if done.returncode:
            return done.stderr.strip()
        return load_file(str(target))["output"]


def case(name, cls, config):
    """`None` where both agree or the library refuses, else what differs."""
    try:
        model = model_of(cls.from_dict(copy.deepcopy(config))).float().eval()
    except Exception:
        return None
    randomise(model)
    found = list(blocks(model))
    if not found:
        return None
    modules = dict(model.named_modules())
    width = config.get("hidden_size") or config["d_model"]
    x = torch.randn(1, 23, width, generator=torch.Generator().manual_seed(5))
    ids = torch.arange(23) % (config.get("vocab_size") or 64)
    wanted = []
    for layer, path, block in found if len(found) < 3 else [found[0], found[-1]]:
        try:
            with torch.no_grad():
                wanted.append((layer, output(block, modules.get(path.rpartition(".")[0]), x, ids)))
        except Exception:
            return None
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / name
        model.save_pretrained(folder)
        written = {"model_type": name, **config, "dtype": "float32", "architectures": [type(model).__name__]}
        (folder / "config.json").write_text(json.dumps(written, default=str))
        report = subprocess.run([PROGRAM, "inspect", str(folder), "--json"], capture_output=True, text=True)
        try:
            report = json.loads(report.stdout)
            layers = report["moe_layers"]
        except (ValueError, KeyError):
            return f"refused: {(report.stderr if hasattr(report, 'stderr') else report)}"[:300]
        if layers != sorted({layer for layer, _, _ in found}):
            return f"MoE layers {layers}, the library's {sorted({layer for layer, _, _ in found})}"
        for layer, want in wanted:
            got = run(folder, layer, x[0], ids)
            if isinstance(got, str):
                return f"layer {layer}: {got[:300]}"
            error = float(((got - want) ** 2).sum() / (want**2).sum().clamp_min(1e-30))
            if not error <= BOUND:
                return f"layer {layer}: NMSE {error:.1e}"
    return None


def layers_of(config):
    """What the program makes of a config before there are weights: the layers, or its refusal."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config, default=str))
        done = subprocess.run([PROGRAM, "inspect", folder, "--json"], capture_output=True, text=True)
    try:
        return [layer["spec"] for layer in json.loads(done.stdout)["layers"]]
    except (ValueError, KeyError):
        return done.stderr.strip()[:200]


def fields(name, cls, config):
    """How many keys were compared as absent and as null, how many of those cases the library refuses, and what
    differs."""

    def read(config):
        read = cls.from_dict(copy.deepcopy(config)).to_dict()
        return json.dumps({k: v for k, v in read.items() if k != "transformers_version"}, sort_keys=True, default=str)

    whole = {"model_type": name, **config}
    usual, ours = read(config), layers_of(whole)
    keys, refused, different = 0, 0, []
    for key in sorted(config):
        if not any(word in key for word in TOUCH) or any(word in key for word in LEAVE):
            continue
        keys += 1
        without = {k: v for k, v in config.items() if k != key}
        for what, changed in ((f"delete {key}", without), (f"null {key}", {**config, key: None})):
            try:
                same = read(changed) == usual
            except Exception:
                refused += 1
                continue
            if same:
                now = layers_of({"model_type": name, **changed})
                if now != ours:
                    different.append(f"{what}: {now if isinstance(now, str) else 'other layers'}"[:200])
            elif problem := case(name, cls, changed):
                different.append(f"{what}: {problem}"[:200])
    return dict(keys=keys, refused_by_the_library=refused, different=different)


def another(key, value):
    """Another value of a key's type; `None` where there is none to try."""
    if key in OTHER and OTHER[key] != value and not isinstance(value, list):
        return OTHER[key]
    if isinstance(value, bool):
        return not value
    if key.startswith("num_hidden") or key in ("num_layers", "n_layers", "hidden_size", "d_model", "rms_norm_eps"):
        return None
    if isinstance(value, int):
        return value + (1 if value < 16 else 8)
    return value * 1.5 + 0.1 if isinstance(value, float) else None


def changes(config, add):
    if add:
        for key, value in OTHER.items():
            if key not in config:
                yield f"add {key}", {**config, key: value}
        return
    for key in sorted(config):
        if not any(word in key for word in TOUCH) or any(word in key for word in LEAVE):
            continue
        yield f"delete {key}", {k: v for k, v in config.items() if k != key}
        if config[key] is not None:
            yield f"null {key}", {**config, key: None}
        if (value := another(key, config[key])) is not None:
            yield f"{key} = {value}", {**config, key: value}


def main():
    only = {word for word in sys.argv[1:] if not word.startswith("--")}
    different = 0
    for name, cls in classes():
        if (only and name not in only) or (name in OWN and OWN[name] is None):
            continue
        try:
            config = tiny(name, cls)
        except Exception as error:
            print(f"{name}: no tiny model ({error})"[:200])
            continue
        if "--fields" in sys.argv:
            record = Path(__file__).parents[2] / "crates/moe-runner/tests/architectures/compared.json"
            known = json.loads(record.read_text())["families"] if record.exists() else {}
            if problem := case(name, cls, config):
                found = dict(keys=0, refused_by_the_library=0, different=[f"as it is: {problem}"])
            else:
                found = fields(name, cls, config)
            known[name] = found
            lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(known.items()))
            library = json.dumps(f"transformers {transformers.__version__}")
            record.write_text(f'{{\n "library": {library},\n "families": {{\n{lines}\n }}\n}}\n')
            different += len(found["different"])
            print(name, found, flush=True)
            continue
        cases = [("as it is", config)]
        if "--keys" in sys.argv or "--add" in sys.argv:
            cases += changes(config, "--add" in sys.argv)
        for what, changed in cases:
            if problem := case(name, cls, changed):
                different += 1
                print(f"{name}: {what}: {problem}", flush=True)
    print(f"transformers {transformers.__version__}: {different} differences")
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
