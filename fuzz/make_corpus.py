#!/usr/bin/env python3
"""Makes the corpus: small valid files of each kind. Needs nothing but Python.

The checkpoints are the recorded cases of crates/moe-runner/tests/golden, cut down to one layer
and two experts, without their weights (see fuzz_targets/checkpoint.rs).
"""
import json
import re
import struct
from pathlib import Path

HERE = Path(__file__).parent
GOLDEN = HERE / "../crates/moe-runner/tests/golden"
EXPERTS = 2


def save(target, name, content):
    folder = HERE / "corpus" / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)


def compact(document):
    return json.dumps(document, separators=(",", ":"))


def safetensors(header, data):
    text = compact(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def entry(dtype, shape, start, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def make_safetensors():
    save("safetensors", "empty", safetensors({}, []))
    save("safetensors", "dtypes", safetensors({
        "__metadata__": {"format": "pt"},
        "a": entry("F32", [2, 3], 0, 24),
        "b.weight": entry("BF16", [5], 24, 34),
        "c": entry("F8_E4M3", [2, 1], 34, 36),
        "d": entry("I64", [], 36, 44),
        "e": entry("F4", [4], 44, 46),
        "none": entry("F16", [0, 7], 46, 46),
    }, range(46)))


def make_index():
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    save("index", "right", compact({"metadata": {"total_size": 16}, "weight_map": {
        "a": one, "b": two, "c": two}}).encode())
    save("index", "misplaced", compact({"weight_map": {"a": two, "d": one}}).encode())


def string(text):
    return struct.pack("<Q", len(text)) + text.encode()


def gguf(name, pairs, tensors, alignment=32):
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs))
    for key, kind, value in pairs:
        out += string(key) + struct.pack("<I", kind) + value
    data = b""
    for tensor, dims, kind, size in tensors:
        data += bytes(-len(data) % alignment)
        out += string(tensor) + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims)
        out += struct.pack("<IQ", kind, len(data))
        data += b"\x3c" * size
    out += bytes(-len(out) % alignment)
    save("gguf", name, out + data)


def make_gguf():
    u32 = lambda value: struct.pack("<I", value)
    array = lambda kind, items: struct.pack("<IQ", kind, len(items)) + b"".join(items)
    size = {  # ggml type: (elements of a block, bytes of a block)
        0: (1, 4), 1: (1, 2), 2: (32, 18), 8: (32, 34), 30: (1, 2), 39: (32, 17)}

    def tensor(name, dims, kind):
        elements = 1
        for dim in dims:
            elements *= dim
        block, width = size[kind]
        return name, dims, kind, elements // block * width

    for name, kind in [("q4_0", 2), ("q8_0", 8), ("f16", 1), ("mxfp4", 39)]:
        model = "qwen3moe"
        gguf(name, [
            ("general.architecture", 8, string(model)),
            ("general.alignment", 4, u32(32)),
            (f"{model}.block_count", 4, u32(1)),
            (f"{model}.embedding_length", 4, u32(32)),
            (f"{model}.expert_feed_forward_length", 4, u32(32)),
            (f"{model}.expert_count", 4, u32(EXPERTS)),
            (f"{model}.expert_used_count", 4, u32(1)),
            (f"{model}.expert_weights_scale", 6, struct.pack("<f", 2.5)),
            ("tokens", 9, array(8, [string("a"), string("bc")])),
            ("nested", 9, array(9, [array(4, [u32(1), u32(2)])])),
            ("flag", 7, b"\1"),
        ], [
            tensor("blk.0.ffn_gate_inp.weight", [32, EXPERTS], 0),
            tensor("blk.0.ffn_gate_exps.weight", [32, 32, EXPERTS], kind),
            tensor("blk.0.ffn_up_exps.weight", [32, 32, EXPERTS], kind),
            tensor("blk.0.ffn_down_exps.weight", [32, 32, EXPERTS], kind),
        ])


def cut_config(config):
    """Two experts instead of as many as there are."""
    for key, value in list(config.items()):
        if isinstance(value, dict) and key.endswith("_config") and key != "quantization_config":
            cut_config(value)
        elif key in ("num_experts", "num_local_experts", "n_routed_experts"):
            config[key] = EXPERTS
        elif key in ("num_experts_per_tok", "moe_topk", "experts_per_token"):
            config[key] = 1
        elif key in ("n_group", "topk_group"):
            config[key] = 1
        elif key in ("architectures", "torch_dtype") or value is None or isinstance(value, float):
            del config[key]
    return config


def make_checkpoints():
    for case in sorted(path for path in GOLDEN.iterdir() if (path / "config.json").exists()):
        config = json.loads((case / "config.json").read_text())
        name = "model.safetensors"
        if not (case / name).exists():
            continue
        content = (case / name).read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        stored = json.loads(content[8:8 + length])
        stored.pop("__metadata__", None)
        experts = config.get("num_experts") or config.get("num_local_experts") \
            or config.get("n_routed_experts")
        layers = sorted({int(found) for key in stored for found in re.findall(r"layers\.(\d+)\.", key)})
        header, end = {}, 0
        for key, tensor in sorted(stored.items()):
            expert = re.search(r"experts\.(\d+)\.", key)
            if f"layers.{layers[0]}." not in key or expert and int(expert[1]) >= EXPERTS:
                continue
            shape = tensor["shape"]
            start, stop = tensor["data_offsets"]
            size = stop - start
            if experts and shape and shape[0] == experts and not expert:
                size = size // experts * EXPERTS
                shape = [EXPERTS] + shape[1:]
            header[key] = entry(tensor["dtype"], shape, end, end + size)
            end += size
        if end <= 1 << 20:
            document = compact(cut_config(config)) + "\n---\n" + compact(header)
            save("checkpoint", case.name, document.encode())
            weights = {key: name for key in header}
            index = compact({"weight_map": weights})
            save("outline", case.name, (compact(config) + "\n---\n" + index).encode())
            save("outline", case.name + "_alone", compact(config).encode())


make_safetensors()
make_index()
make_gguf()
make_checkpoints()
