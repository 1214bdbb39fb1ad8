"""How fast a model of transformers is with its own experts, and with moe-runner's: beside each other.

    pip install moe-runner torch transformers compressed-tensors
    python speed.py                       # the small model of this repository
    python speed.py ./OLMoE-1B-7B         # a checkpoint of your own
    python speed.py --random 2            # random weights in two layers of Qwen3-30B-A3B's shapes

Tokens a second for a prompt (prefill) and for one token after another (decode), in bf16 and in 4 bits: a
copy by ``moe_runner.quantize``, which transformers unpacks to bf16 (compressed-tensors does that for it).
The models take turns, and the fastest of the rounds counts, so that a busy machine is busy for all.
"""

import argparse
import tempfile
import time
import warnings
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM, logging

import moe_runner
import moe_runner.transformers as moe

TINY = Path(__file__).resolve().parents[2] / "models/tiny-moe"


def random_model(layers: int, folder: Path) -> Path:
    """Qwen3-30B-A3B with few layers and a small vocabulary: what is not experts weighs little."""
    config = Qwen3MoeConfig(
        vocab_size=4096, hidden_size=2048, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
        moe_intermediate_size=768, norm_topk_prob=True, decoder_sparse_step=1, dtype="bfloat16",
        bos_token_id=None, eos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    values = torch.randn(1 << 20).mul_(0.02).bfloat16()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1)
                continue
            # random numbers again and again, each time begun elsewhere
            for part in parameter.view(-1, parameter.shape[-1]).split(512):
                start = torch.randint(len(values), ()).item()
                many = values.roll(start).repeat(-(-part.numel() // len(values)))
                part.copy_(many[: part.numel()].view_as(part))
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            fresh = type(module)(config)
            module.inv_freq = fresh.inv_freq
            module.original_inv_freq = fresh.original_inv_freq
    model.save_pretrained(folder)
    return folder


@torch.inference_mode()
def round_of(model: torch.nn.Module, prompt: torch.Tensor, tokens: int) -> tuple[float, float]:
    """Seconds of the prompt, and of the tokens after it."""
    begun = time.perf_counter()
    out = model(prompt, use_cache=True, logits_to_keep=1)
    first = time.perf_counter() - begun
    begun = time.perf_counter()
    for _ in range(tokens):
        last = out.logits[:, -1:].argmax(-1)
        out = model(last, past_key_values=out.past_key_values, use_cache=True)
    return first, time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", default=TINY, type=Path)
    parser.add_argument("--random", type=int, metavar="LAYERS")
    parser.add_argument("--format", default="w4a16", help="of the quantised copy; none: no copy")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens after it")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # transformers 5.24 has another name for past_key_values; earlier ones have this
    warnings.simplefilter("ignore", FutureWarning)

    with tempfile.TemporaryDirectory() as scratch:
        path = args.checkpoint
        if args.random:
            path = random_model(args.random, Path(scratch) / "random")
        paths = {"bf16": path}
        if args.format != "none":
            paths[args.format] = Path(scratch) / args.format
            moe_runner.quantize(path, paths[args.format], args.format)
        models = {}
        for name, folder in paths.items():
            try:
                alone = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
                models[name, "transformers"] = alone
            except ImportError as error:
                print(f"{name}, transformers alone: {error}")
            ours, report = moe.load(AutoModelForCausalLM, folder, dtype=torch.bfloat16)
            models[name, f"moe-runner, {report.modules[0].kernel}"] = ours

        prompt = torch.arange(5, 5 + args.prompt)[None] * 13 % 4096
        best = {}
        for turn in range(args.rounds + 1):
            for key, model in models.items():
                seconds = round_of(model, prompt, args.tokens)
                if turn:  # the first one warms up
                    best[key] = [min(a, b) for a, b in zip(best.get(key, seconds), seconds)]

    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; tokens/s")
    print(f"| experts | run by | prefill of {args.prompt} | decode |\n|---|---|---|---|")
    for (name, who), (first, after) in best.items():
        print(f"| {name} | {who} | {args.prompt / first:.0f} | {args.tokens / after:.1f} |")


if __name__ == "__main__":
    main()
