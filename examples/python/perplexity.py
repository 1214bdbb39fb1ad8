"""What a number format costs, on real text: format × perplexity × kernel × time.

    pip install moe-runner torch transformers
    python perplexity.py                  # every format, on the small model of this repository
    python perplexity.py --formats bf16 mxfp4

Each format is a copy that ``moe_runner.quantize`` writes, and runs inside transformers as it is stored.
The text is that of models/tiny-moe/eval.json: passages of 512 tokens in three domains; the perplexity
is exp of the mean loss over all of them.
"""

import argparse
import json
import math
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, logging

import moe_runner
import moe_runner.transformers as moe

TINY = Path(__file__).resolve().parents[2] / "models/tiny-moe"

FORMATS = {
    "bf16": None,
    "int8": {"format": "int8"},
    "fp8": {"format": "fp8"},
    "fp8-block": {"format": "fp8-block"},
    "w4a16 g32": {"format": "w4a16", "group_size": 32},
    "w4a16 g128": {"format": "w4a16"},
    "nvfp4a16": {"format": "nvfp4a16"},
    "mxfp4": {"format": "mxfp4"},
}


def passages(folder: Path) -> list[torch.Tensor]:
    """All passages [1, 512] of all domains."""
    domains = json.loads((folder / "eval.json").read_text())["domains"]
    return [torch.tensor([ids]) for domain in domains.values() for ids in domain["passages"]]


def perplexity(model: torch.nn.Module, texts: list[torch.Tensor]) -> tuple[float, float]:
    """The perplexity over all texts, and seconds a text."""
    loss, begun = 0.0, time.perf_counter()
    with torch.inference_mode():
        for ids in texts:
            logits = model(ids).logits[0, :-1].double()
            loss += torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()
    seconds = (time.perf_counter() - begun) / len(texts)
    return math.exp(loss / len(texts)), seconds


def measure(name: str, folder: Path, texts: list[torch.Tensor], scratch: Path) -> dict:
    """One row of the table."""
    options, path = FORMATS[name], folder
    if options is not None:
        path = scratch / name.replace(" ", "-")
        moe_runner.quantize(folder, path, **options)
    model, report = moe.load(AutoModelForCausalLM, path, dtype=torch.float32)
    value, seconds = perplexity(model, texts)
    if report.calls != len(report.modules) * len(texts):
        raise SystemExit(f"{report.calls} calls: moe-runner's experts did not run")
    first = report.modules[0]
    size = sum(taken.nbytes for taken in report.modules)
    return {
        "format": name,
        "perplexity": value,
        "kernel": first.kernel,
        "megabytes": size / 1e6,
        "milliseconds": seconds * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", default=TINY, type=Path)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--alone", action="store_true", help="transformers' own experts, too")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    texts, rows = passages(TINY), []
    if args.alone:
        model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32).eval()
        value, seconds = perplexity(model, texts)
        size = sum(p.numel() for name, p in model.named_parameters() if "experts" in name)
        rows.append({
            "format": "transformers",
            "perplexity": value,
            "kernel": "grouped_mm",
            "megabytes": size * 4 / 1e6,
            "milliseconds": seconds * 1e3,
        })
    with tempfile.TemporaryDirectory() as scratch:
        rows += [measure(name, args.checkpoint, texts, Path(scratch)) for name in args.formats]
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    print("| format | perplexity | experts, MB | kernel | ms for 512 tokens |")
    print("|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['format']} | {row['perplexity']:.3f} | {row['megabytes']:.1f} "
            f"| {row['kernel']} | {row['milliseconds']:.0f} |"
        )


if __name__ == "__main__":
    main()
