"""Asks transformers: the log-probabilities of every probe, as `moe-runner acid read` takes them.

    moe-runner acid write acid
    python ask_transformers.py acid/mixtral-bf16 [--dtype bfloat16] > mixtral.json
    moe-runner acid read mixtral.json
"""

import argparse
import json
import math

import torch
import transformers


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("checkpoint", help="a folder that `moe-runner acid write` wrote")
    arguments.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    arguments.add_argument("--experts", help="transformers' experts_implementation")
    arguments = arguments.parse_args()
    with open(f"{arguments.checkpoint}/probes.json") as file:
        probes = json.load(file)
    options = {"experts_implementation": arguments.experts} if arguments.experts else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        arguments.checkpoint, dtype=arguments.dtype, attn_implementation="eager", **options
    ).eval()
    with torch.no_grad():
        logits = model(torch.tensor([probes["prompt"]])).logits[0].float()
    rows = torch.log_softmax(logits, -1).tolist()
    print(
        json.dumps(
            {
                "family": probes["family"],
                "engine": f"transformers {transformers.__version__}, {model.dtype}, {probes['form']}",
                "log_probabilities": [[v if math.isfinite(v) else None for v in row] for row in rows],
            }
        )
    )


if __name__ == "__main__":
    main()
