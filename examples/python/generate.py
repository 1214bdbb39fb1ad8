"""Text from a mixture-of-experts model in transformers, its experts in moe-runner.

    pip install moe-runner torch transformers
    python generate.py                                   # the small model of this repository
    python generate.py ./OLMoE-1B-7B --prompt "To be"    # a checkpoint of your own, quantised or not
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_runner.transformers as moe

TINY = Path(__file__).resolve().parents[2] / "models/tiny-moe"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", default=TINY, type=Path)
    parser.add_argument("--prompt", default="And the LORD said unto Moses,")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--dtype", default="auto", help="of the model: auto, float32, bfloat16")
    parser.add_argument("--router", action="store_true", help="the whole block, router and all")
    parser.add_argument("--alone", action="store_true", help="transformers' own experts")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    if args.alone:
        model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=args.dtype).eval()
    else:
        # the experts go from the checkpoint to moe-runner, as they are stored
        model, report = moe.load(
            AutoModelForCausalLM, args.checkpoint, router=args.router, dtype=args.dtype
        )
        print(report, "\n")

    prompt = tokenizer(args.prompt, return_tensors="pt")
    begun = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(**prompt, max_new_tokens=args.tokens, do_sample=False)
    seconds = time.perf_counter() - begun
    new = output.shape[1] - prompt.input_ids.shape[1]
    print(tokenizer.decode(output[0], skip_special_tokens=True))
    print(f"\n{new} tokens in {seconds:.2f} s, {new / seconds:.1f} tokens/s")


if __name__ == "__main__":
    main()
