"""The commands of ``moe-runner`` as functions: each returns what the command prints with ``--json``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from . import _native

Path = str | os.PathLike[str]
Layers = int | str | Iterable[int] | None


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
    timing: bool = True,
    dtype: str | None = None,
    kernel: str | None = None,
    threads: int | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """Is every layer right, and how fast is it on this machine?

    Loads each layer, compares its kernel with the float64 reference (and with recorded outputs or
    another checkpoint, ``against``), and times it unless ``timing`` is False. Without a checkpoint it
    checks a small one that is part of the package. ``ok`` of the result is the verdict, ``layers`` say
    what is wrong in ``problems``.
    """
    against = [against] if isinstance(against, (str, os.PathLike)) else against
    return _report(
        "check",
        checkpoint,
        *_flag("--layers", _layers(layers)),
        *_flag("--tokens", tokens),
        *(word for path in against for word in _flag("--against", path)),
        *([] if timing else ["--no-timing"]),
        *_kernel(dtype, kernel),
        *_flag("--threads", threads),
        *_flag("--seed", seed),
    )


def inspect(checkpoint: Path, *, layers: Layers = None) -> dict[str, Any]:
    """What a checkpoint holds: layers, routing, number formats, bytes, what is missing.

    Reads headers only; before the files are fetched, ``config.json`` will do.
    """
    return _report("inspect", checkpoint, *_flag("--layers", _layers(layers)))


def explain(
    checkpoint: Path,
    *,
    layers: Layers = None,
    machine: str | None = None,
    dtype: str | None = None,
    kernel: str | None = None,
) -> dict[str, Any]:
    """Which kernel runs each layer, why, and why not the others.

    ``machine`` asks for another one: "portable", "avx2", "avx512", or "sm90" and its like.
    """
    return _report(
        "explain",
        checkpoint,
        *_flag("--layers", _layers(layers)),
        *_flag("--machine", machine),
        *_kernel(dtype, kernel),
    )


def plan(
    checkpoint: Path,
    ranks: int,
    *,
    redundant: int | None = None,
    nodes: int | None = None,
    trace: Path | None = None,
    tokens: int | None = None,
    layers: Layers = None,
    dtype: str | None = None,
) -> dict[str, Any]:
    """What splitting the layers over ranks would cost: memory, traffic, balance.

    ``trace`` is a recorded routing, to take the load of the experts from.
    """
    return _report(
        "plan",
        checkpoint,
        *_flag("--ranks", ranks),
        *_flag("--redundant", redundant),
        *_flag("--nodes", nodes),
        *_flag("--trace", trace),
        *_flag("--tokens", tokens),
        *_flag("--layers", _layers(layers)),
        *_flag("--dtype", dtype),
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
        *(word for pattern in ignore for word in _flag("--ignore", pattern)),
        *_flag("--max-shard-size", max_shard_size),
        *(["--overwrite"] if overwrite else []),
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


def _kernel(dtype: str | None, kernel: str | None) -> list[str]:
    return [*_flag("--dtype", dtype), *_flag("--kernel", kernel)]


def _layers(layers: Layers) -> str | None:
    if layers is None or isinstance(layers, str):
        return layers
    if isinstance(layers, int):
        return str(layers)
    return ",".join(str(layer) for layer in layers)
