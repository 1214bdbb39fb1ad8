"""The commands of ``moe-runner`` as functions: each returns what the command prints with ``--json``."""

from __future__ import annotations

import json
import operator
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, SupportsIndex

from . import _native

Path = str | os.PathLike[str]
Layers = SupportsIndex | str | Iterable[SupportsIndex] | None


def main() -> NoReturn:
    """The command itself, with the arguments of this process."""
    sys.stdout.flush()
    sys.exit(_native.main(["moe-runner", *sys.argv[1:]]))


def check(
    checkpoint: Path | None = None,
    *,
    layers: Layers = None,
    tokens: int | None = None,
    against: Path | Sequence[Path] = (),
    input: Path | None = None,
    input_name: str | None = None,
    timing: bool = True,
    strict: bool = False,
    dtype: str | None = None,
    kernel: str | None = None,
    int8_activations: bool = False,
    device: str | None = None,
    threads: int | None = None,
    pin_threads: bool = False,
    pack_cache: Path | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """Is every layer right, and how fast is it on this machine?

    Loads each layer, compares its kernel with the float64 reference (and with recorded outputs or
    another checkpoint, ``against``), and times it unless ``timing`` is False. Without a checkpoint it
    checks a small one that is part of the package. ``ok`` of the result is the verdict, ``layers`` say
    what is wrong in ``problems``; ``strict``: warnings are wrong, too.

    input: a safetensors file with the hidden states, in its tensor ``input_name``; else recorded or
        random ones.
    device: "cpu", "cuda" or "cuda:N".
    int8_activations: rows are quantised to INT8 before they are multiplied, in the reference, too.
    pack_cache: a folder to keep packed weights in from one start to the next.
    """
    return _report(
        "check",
        checkpoint,
        *_flag("--layers", _numbers(layers)),
        *_flag("--tokens", tokens),
        *_each("--against", against),
        *_flag("--input", input),
        *_flag("--input-name", input_name),
        *_switch("--no-timing", not timing),
        *_switch("--strict", strict),
        *_kernel(dtype, kernel, int8_activations, device),
        *_host(threads, pin_threads, pack_cache),
        *_flag("--seed", seed),
    )


def inspect(
    checkpoint: Path,
    *,
    layers: Layers = None,
    doctor: bool = False,
    strict: bool = False,
    threads: int | None = None,
) -> dict[str, Any]:
    """What a checkpoint holds: layers, routing, number formats, bytes, what is missing.

    Reads headers only; before the files are fetched, ``config.json`` will do. ``doctor``: reads every
    weight, on ``threads``, and finds what is hardly meant; ``strict``: its warnings make ``ok`` False.
    """
    return _report(
        "inspect",
        checkpoint,
        *_flag("--layers", _numbers(layers)),
        *_switch("--doctor", doctor),
        *_switch("--strict", strict),
        *_flag("--threads", threads),
    )


def explain(
    checkpoint: Path,
    *,
    layers: Layers = None,
    machine: str | None = None,
    dtype: str | None = None,
    kernel: str | None = None,
    int8_activations: bool = False,
    device: str | None = None,
) -> dict[str, Any]:
    """Which kernel runs each layer, why, and why not the others.

    ``machine`` asks for another one: "portable", "avx2", "avx512", or "sm90" and its like;
    ``device``, what is to run it there: "cpu" or "cuda".
    """
    return _report(
        "explain",
        checkpoint,
        *_flag("--layers", _numbers(layers)),
        *_flag("--machine", machine),
        *_kernel(dtype, kernel, int8_activations, device),
    )


def bench(
    checkpoint: Path | None = None,
    *,
    preset: str | None = None,
    format: str | None = None,
    layer: int | None = None,
    tokens: int | Iterable[int] | None = None,
    compare: Path | None = None,
    svg: Path | None = None,
    dtype: str | None = None,
    kernel: str | None = None,
    int8_activations: bool = False,
    device: str | None = None,
    threads: int | None = None,
    pin_threads: bool = False,
    pack_cache: Path | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """The time of a layer, for each batch size of ``tokens``, beside this machine's limits.

    The layer is one of a checkpoint (its first, or ``layer``), or has the shapes of a well-known model,
    ``preset``, with random weights in ``format``. ``compare`` is a file that this was written to as
    JSON; ``svg`` a picture to write.
    """
    return _report(
        "bench",
        checkpoint,
        *_flag("--preset", preset),
        *_flag("--format", format),
        *_flag("--layers", layer),
        *_flag("--tokens", _numbers(tokens)),
        *_flag("--compare", compare),
        *_flag("--svg", svg),
        *_kernel(dtype, kernel, int8_activations, device),
        *_host(threads, pin_threads, pack_cache),
        *_flag("--seed", seed),
    )


def plan(
    checkpoint: Path,
    ranks: int,
    *,
    redundant: int | None = None,
    nodes: int | None = None,
    trace: Path | None = None,
    measure: bool = False,
    link: tuple[float, float] | None = None,
    tokens: int | None = None,
    layers: Layers = None,
    device: str | None = None,
    machine: str | None = None,
    dtype: str | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """What splitting the layers over ranks would cost: memory, traffic, balance.

    trace: a recorded routing, to take the load of the experts from.
    link: how fast ranks reach each other, for the time that their exchanges take: 10⁹ bytes a second
        that one sends, and microseconds of an exchange without content. ``measure``: as threads of this
        process do.
    device: "cuda": each rank is an NVIDIA GPU, like this machine's, or of the architecture ``machine``,
        such as "sm90".
    """
    return _report(
        "plan",
        checkpoint,
        *_flag("--ranks", ranks),
        *_flag("--redundant", redundant),
        *_flag("--nodes", nodes),
        *_flag("--trace", trace),
        *_switch("--measure", measure),
        *_flag("--link", None if link is None else ",".join(str(one) for one in link)),
        *_flag("--tokens", tokens),
        *_flag("--layers", _numbers(layers)),
        *_flag("--device", device),
        *_flag("--machine", machine),
        *_flag("--dtype", dtype),
        *_flag("--seed", seed),
    )


def report(
    checkpoint: Path,
    output: Path,
    *,
    layers: Layers = None,
    trace: Path | None = None,
    bench: Path | Sequence[Path] = (),
    against: Path | Sequence[Path] = (),
    input: Path | None = None,
    tokens: int | None = None,
    timing: bool = True,
    ranks: int | None = None,
    redundant: int | None = None,
    dtype: str | None = None,
    kernel: str | None = None,
    int8_activations: bool = False,
    device: str | None = None,
    threads: int | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """Writes a page with pictures of all that is known of the layers, and returns their numbers.

    trace: a recorded routing, for the load of the experts and its balance over ``ranks``.
    bench: files that ``bench`` was written to as JSON, for the roofline.
    The rest as in ``check`` and ``plan``.
    """
    return _report(
        "report",
        checkpoint,
        *_flag("--output", output),
        *_flag("--layers", _numbers(layers)),
        *_flag("--trace", trace),
        *_each("--bench", bench),
        *_each("--against", against),
        *_flag("--input", input),
        *_flag("--tokens", tokens),
        *_switch("--no-timing", not timing),
        *_flag("--ranks", ranks),
        *_flag("--redundant", redundant),
        *_kernel(dtype, kernel, int8_activations, device),
        *_flag("--threads", threads),
        *_flag("--seed", seed),
    )


def quantize(
    checkpoint: Path,
    output: Path,
    format: str,
    *,
    group_size: int | None = None,
    ignore: Sequence[str] = (),
    max_shard_size: str | int | None = None,
    overwrite: bool = False,
    threads: int | None = None,
) -> dict[str, Any]:
    """Writes a copy of a checkpoint with quantised experts, in the layout of compressed-tensors.

    ``format`` is "fp8", "fp8-block", "int8", "w4a16" (with ``group_size``), "nvfp4a16" or "mxfp4".
    """
    return _report(
        "quantize",
        checkpoint,
        *_flag("--output", output),
        *_flag("--format", format),
        *_flag("--group-size", group_size),
        *_each("--ignore", ignore),
        *_flag("--max-shard-size", max_shard_size),
        *_switch("--overwrite", overwrite),
        *_flag("--threads", threads),
    )


def _report(command: str, checkpoint: Path | None, *flags: str) -> dict[str, Any]:
    # a path that looks like a flag is a path all the same
    place = [] if checkpoint is None else ["--", os.fspath(checkpoint)]
    return json.loads(_native.report([command, *flags, *place]))


def _flag(name: str, value: object) -> list[str]:
    if value is None:
        return []
    text = os.fspath(value) if isinstance(value, os.PathLike) else str(value)
    return [f"{name}={text}"]


def _each(name: str, values: Path | Sequence[Path]) -> list[str]:
    values = [values] if isinstance(values, (str, os.PathLike)) else values
    return [word for value in values for word in _flag(name, value)]


def _switch(name: str, on: bool) -> list[str]:
    return [name] if on else []


def _kernel(
    dtype: str | None, kernel: str | None, int8_activations: bool, device: str | None
) -> list[str]:
    return [
        *_flag("--dtype", dtype),
        *_flag("--kernel", kernel),
        *_switch("--int8-activations", int8_activations),
        *_flag("--device", device),
    ]


def _host(threads: int | None, pin_threads: bool, pack_cache: Path | None) -> list[str]:
    return [
        *_flag("--threads", threads),
        *_switch("--pin-threads", pin_threads),
        *_flag("--pack-cache", pack_cache),
    ]


def _numbers(numbers: Layers) -> str | None:
    """One or several integers of any kind, as the command takes them."""
    if numbers is None or isinstance(numbers, str):
        return numbers
    try:
        return str(operator.index(numbers))
    except TypeError:
        return ",".join(str(operator.index(number)) for number in numbers)
