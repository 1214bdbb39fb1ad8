"""The mixture-of-experts layer of language models.

``Layer`` is a layer of a checkpoint: router, experts, shared experts. ``Experts`` are routed experts
alone, of a checkpoint or over tensors where they lie, for engines that route by themselves. Both take
tensors of PyTorch, numpy, or any library that speaks DLPack, without a copy, and let other Python
threads run meanwhile.

>>> import moe_runner, numpy
>>> layer = moe_runner.Layer("./OLMoE-1B-7B", 0, dtype="f32")          # doctest: +SKIP
>>> layer.forward(numpy.zeros((4, layer.hidden_size), numpy.float32))  # doctest: +SKIP

``check``, ``inspect``, ``explain``, ``bench``, ``plan``, ``report`` and ``quantize`` are the commands of
``moe-runner`` as functions. ``moe_runner.transformers`` has the experts run inside transformers.
"""

from ._command import bench, check, explain, inspect, main, plan, quantize, report
from ._errors import CheckpointError, Error, InputError, NoKernelError
from ._native import Checkpoint, Experts, Layer, __version__

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Error",
    "Experts",
    "InputError",
    "Layer",
    "NoKernelError",
    "__version__",
    "bench",
    "check",
    "explain",
    "inspect",
    "main",
    "plan",
    "quantize",
    "report",
]
