"""What the package costs, measured: of a call, of weights in memory, and of a model that is attached.

    pip install moe-runner torch transformers
    python bindings/python/tests/measure.py [call] [copy] [attach]

Tables go to docs/engines.md. Each measurement of memory is a process of its own; memory is what it holds
itself (RssAnon), sampled every two milliseconds, so files that are mapped do not count.
"""

import argparse
import gc
import multiprocessing
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

import moe_runner

MB = 1e6


def held() -> float:
    """Megabytes of memory of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024 / MB
    raise SystemExit("/proc/self/status has no RssAnon: this needs Linux")


class Peak:
    """The most that this process held meanwhile, above what it held before."""

    def __enter__(self) -> "Peak":
        gc.collect()
        self.before = self.most = held()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.done.wait(0.002):
            self.most = max(self.most, held())

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        gc.collect()
        self.after = held() - self.before
        self.peak = max(self.most - self.before, self.after)


def call() -> None:
    """A call from Python over the same call from Rust, in one process, one after the other."""
    print("\n| experts | rows | a call from Rust, µs | from Python, µs | through PyTorch's operator, µs |")
    print("|---|---|---|---|---|")
    from moe_runner import torch as ops

    for experts, hidden, intermediate in ((16, 64, 32), (16, 256, 128)):
        gate_up = torch.randn(experts, 2 * intermediate, hidden).bfloat16()
        down = torch.randn(experts, hidden, intermediate).bfloat16()
        native = moe_runner.Experts(gate_up, down, threads=1)
        taken = ops.Held(native)
        for rows in (1, 4):
            x = torch.randn(rows, hidden).bfloat16()
            out = torch.empty_like(x)
            ids = torch.arange(rows * 4).view(rows, 4) % experts
            weights = torch.rand(rows, 4)
            calls, best = 500, [float("inf")] * 3
            for _ in range(200):
                inside = native._seconds(x, ids, weights, out, calls)
                begun = time.perf_counter()
                for _ in range(calls):
                    native.forward(x, ids, weights, out)
                python = time.perf_counter() - begun
                with torch.inference_mode():
                    begun = time.perf_counter()
                    for _ in range(calls):
                        ops.experts(taken, x, ids, weights)
                    operator = time.perf_counter() - begun
                best = [min(a, b) for a, b in zip(best, (inside, python, operator))]
            rust, *more = (1e6 * seconds / calls for seconds in best)
            beside = " | ".join(f"{one:.2f} (+{one - rust:.2f})" for one in more)
            shape = f"{experts} of {intermediate} × {hidden}, 4 of them"
            print(f"| {shape} | {rows} | {rust:.2f} | {beside} |")


def stack(layers: int = 1) -> torch.nn.Module:
    """Experts in the shapes of Qwen3-30B-A3B's: 128 of 768 × 2048 in bf16, 1208 MB a layer."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=2048, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768
    )
    made = torch.nn.ModuleDict()
    values = torch.randn(1 << 20).mul_(0.02).bfloat16()
    for n in range(layers):
        with torch.device("meta"):
            experts = Qwen3MoeExperts(config).bfloat16()
        experts.to_empty(device="cpu").requires_grad_(False)
        for parameter in experts.parameters():
            for part in parameter.view(-1).split(len(values)):
                part.copy_(values[: len(part)])
        made[f"layer{n}"] = experts
    return made


def copy() -> None:
    """What becomes of parameters of PyTorch."""
    module = stack()["layer0"]
    weights = module.gate_up_proj, module.down_proj
    size = sum(tensor.nbytes for tensor in weights) / MB
    print(f"\n{size:.0f} MB of PyTorch's parameters, bf16\n")
    print("| kernel | seconds | held more while it is made, MB | and after it, MB |\n|---|---|---|---|")
    for kernel in (None, "reference"):
        with Peak() as memory:
            begun = time.perf_counter()
            native = moe_runner.Experts(*weights, kernel=kernel)
            seconds = time.perf_counter() - begun
        print(f"| {native.kernel} | {seconds:.2f} | {memory.peak:.0f} | {memory.after:.0f} |")
        del native


def attach() -> None:
    """Models that are attached, and loaded."""
    import moe_runner.transformers as moe

    print("\n| what | its experts, MB | held more at most, MB | after it, MB |\n|---|---|---|---|")
    layers = 3
    model = stack(layers)
    size = sum(parameter.nbytes for parameter in model.parameters()) / MB
    with Peak() as memory:
        report = moe.attach(model)
    print(f"| `attach(model)`, {layers} layers in bf16 | {size:.0f} | {memory.peak:.0f} | {memory.after:.0f} |")
    del model, report


def load(path: Path, what: str) -> None:
    """A checkpoint that is loaded; ``what`` is "alone" or "ours"."""
    from transformers import AutoModelForCausalLM, logging

    import moe_runner.transformers as moe

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with Peak() as memory:
        if what == "alone":
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
            size = sum(p.nbytes for name, p in model.named_parameters() if "experts" in name)
        else:
            model, report = moe.load(AutoModelForCausalLM, path, dtype=torch.bfloat16)
            size = sum(taken.nbytes for taken in report.modules)
    name = {"alone": "`from_pretrained`, transformers alone", "ours": "`load`"}[what]
    print(
        f"| {name}, {path.name} | {size / MB:.0f} | {memory.peak:.0f} | {memory.after:.0f} |", flush=True
    )


def loads() -> None:
    """The same model in bf16 and in 4 bits."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "examples/python"))
    from speed import random_model

    with tempfile.TemporaryDirectory() as scratch:
        plain, small = Path(scratch) / "bf16", Path(scratch) / "w4a16"
        apart(random_model, 3, plain)
        moe_runner.quantize(plain, small, "w4a16")
        for path, what in ((plain, "alone"), (plain, "ours"), (small, "ours")):
            apart(load, path, what)


def apart(function, *arguments) -> None:
    """Calls it in a process of its own."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{function.__name__}: exit status {process.exitcode}")


def main() -> None:
    measurements = {"call": [call], "copy": [copy], "attach": [attach, loads]}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", help=", ".join(measurements))
    wanted = parser.parse_args().what or list(measurements)
    if unknown := set(wanted) - set(measurements):
        parser.error(f"{', '.join(unknown)}: there are {', '.join(measurements)}")
    versions = f"moe-runner {moe_runner.__version__}, torch {torch.__version__}"
    print(f"{versions}, {torch.get_num_threads()} threads", flush=True)
    for function in (function for name in wanted for function in measurements[name]):
        function() if function is loads else apart(function)


if __name__ == "__main__":
    main()
