"""Records what transformers says of the acid checkpoints: as it is, and with faults put into its
own classes, written apart from the model of the block that decodes them.

    moe-runner acid write acid --form f32,bf16
    python make.py acid FOLDER

writes FOLDER/FAMILY-FORM[-FAULT].json. What is expected stands in the files' `expected`.
"""

import contextlib
import json
import math
import sys

import torch
import torch.nn.functional as F
import transformers

ROUND = 5


def say(model, probes, expected):
    with torch.no_grad():
        logits = model(torch.tensor([probes["prompt"]])).logits[0].float()
    rows = torch.log_softmax(logits, -1).tolist()
    return {
        "family": probes["family"],
        "engine": f"transformers {transformers.__version__}, {model.dtype}, {probes['form']}",
        "expected": expected,
        "log_probabilities": [[round(v, ROUND) if math.isfinite(v) else None for v in row] for row in rows],
    }


def experts(module, hidden, ids, weights, *, swap=False, on_output=False, act=None, clamp=True, alpha=1.702,
            plus=1.0, bias=True, up_bias=True, shift=0, mirror=False, half=False):
    """The experts of any family, one token and one expert at a time."""
    out = torch.zeros_like(hidden)
    gpt = hasattr(module, "gate_up_proj_bias")
    count = module.gate_up_proj.shape[0]
    for t in range(len(hidden)):
        for j in range(ids.shape[1]):
            e, w = (int(ids[t, j]) + shift) % count, weights[t, j]
            if mirror:
                e = count - 1 - e
            if gpt:
                both = hidden[t] @ module.gate_up_proj[e] + module.gate_up_proj_bias[e]
                gate, up = both[::2], both[1::2]
                if not up_bias:
                    up = up - module.gate_up_proj_bias[e][1::2]
            else:
                gate, up = (module.gate_up_proj[e] @ hidden[t]).chunk(2, -1)
            if swap:
                gate, up = up, gate
            if gpt:
                limit = 7.0 if clamp else math.inf
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
                h = gate * torch.sigmoid(gate * alpha) * (up + plus)
                y = h @ module.down_proj[e]
                y = y + module.down_proj_bias[e] if bias else y
            else:
                h = (act or F.silu)(gate) * up
                if half:
                    h = h.half().to(h.dtype)
                y = module.down_proj[e] @ h
            out[t] += (w * y).to(out.dtype)
    return out


def patches(family, block):
    """(fault, what the verdict must say, attribute owner, name, replacement)"""

    def ex(**how):
        return (block.experts, "forward", lambda h, i, w: experts(block.experts, h, i, w, **how))

    def reweighted(change):
        old = block.experts.forward
        return (block.experts, "forward", lambda h, i, w: old(h, i, change(w)))

    def scaled(module, factor):
        old = module.forward
        return (module, "forward", lambda *a, **k: old(*a, **k) * factor)

    if family == "mixtral":
        old = block.gate.forward

        def not_renormalised(x):
            logits, weights, ids = old(x)
            scores = logits.float().softmax(-1)
            return logits, scores.gather(1, ids).to(weights.dtype), ids

        yield "swap", "gate and up swapped", ex(swap=True)
        yield "norm", "renormalisation missing", (block.gate, "forward", not_renormalised)
        yield "gelu", "gelu for silu", ex(act=F.gelu)
        yield "shift", "experts shifted by one", ex(shift=1)
        yield "mirror", "experts in another order", ex(mirror=True)
        yield "relu2", "squared relu for silu", ex(act=lambda v: F.relu(v) ** 2)
        yield "sigmoid", "sigmoid for silu", ex(act=torch.sigmoid)
        yield "squares", "weight applied twice", reweighted(lambda w: w * w)
        yield "equal", "the same weight for all", reweighted(lambda w: w.mean(-1, keepdim=True).expand_as(w))
        yield "half", "16-bit overflow between the products", ex(half=True)
    if family == "gpt_oss":
        yield "clamp", "clamp missing", ex(clamp=False)
        yield "alpha", "alpha is 1", ex(alpha=1.0)
        yield "plus", "up + 1 missing", ex(plus=0.0)
        yield "bias", "down bias missing", ex(bias=False)
        yield "up", "up bias missing", ex(up_bias=False)
    if family == "deepseek_v3":
        last = torch.tensor([1.0, 1.0, 1.0, 0.0])
        yield "last", "the last of the chosen experts dropped", reweighted(lambda w: w * last)
        yield "shared", "shared expert multiplied (x2.0", scaled(block.shared_experts, 2.0)
        yield "twice", "scaling factor applied twice", scaled(block.experts, 2.5)
        yield "gelu", "shared expert: gelu for silu", (block.shared_experts, "act_fn", torch.nn.GELU())
        bias = block.gate.e_score_correction_bias
        yield "bias2", "correction bias added twice", (block.gate, "e_score_correction_bias", 2 * bias)
        yield "minus", "correction bias subtracted", (block.gate, "e_score_correction_bias", -bias)
    if family == "qwen2_moe":
        gate = block.shared_expert_gate
        yield "open", "shared gate ignored", (gate, "forward", lambda x: torch.full_like(x[..., :1], 99.0))


@contextlib.contextmanager
def patched(owner, name, replacement):
    old = getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, old)


def main():
    written, folder = sys.argv[1:3]
    torch.set_num_threads(1)
    for case in ("mixtral-f32", "gpt_oss-f32", "deepseek_v3-f32", "gpt_oss-bf16", "llama4-bf16", "qwen2_moe-f32", "ernie4_5_moe-bf16", "deepseek_v3_negative-bf16"):
        with open(f"{written}/{case}/probes.json") as file:
            probes = json.load(file)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            f"{written}/{case}", dtype="auto", attn_implementation="eager", experts_implementation="eager"
        ).eval()
        layer = model.model.layers[0]
        block = getattr(layer, "mlp", None) or getattr(layer, "block_sparse_moe", None) or layer.feed_forward

        def write(name, said):
            with open(f"{folder}/{name}.json", "w") as file:
                json.dump(said, file)
                file.write("\n")

        write(case, say(model, probes, "right"))
        for fault, expected, patch in patches(probes["family"], block) if case.endswith("f32") else ():
            with patched(*patch):
                write(f"{case}-{fault}", say(model, probes, expected))


if __name__ == "__main__":
    main()
