"""The layer as operators of PyTorch, so that ``torch.compile`` takes them into its graph.

A graph holds no native objects: an operator gets the number of one, and looks it up.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch

from ._errors import Error

_NUMBERS = itertools.count(1)
_HELD: dict[int, "Held"] = weakref.WeakValueDictionary()  # type: ignore[assignment]


class Held:
    """Native experts, or a native layer, under the number that the operators know it by.

    native: the ``Experts`` or ``Layer``.
    calls: how often it ran.
    """

    def __init__(self, native: Any) -> None:
        self.native = native
        self.calls = 0
        self.key = next(_NUMBERS)
        _HELD[self.key] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Held":
        # weights do not change: copies of a model share them
        return self

    def __reduce__(self) -> Any:
        raise Error("experts inside moe-runner cannot be pickled; save the model before attaching")


_LIBRARY = torch.library.Library("moe_runner", "DEF")
_STRIDES = (torch.Tag.needs_fixed_stride_order,)
_LIBRARY.define("experts(Tensor hidden, Tensor ids, Tensor weights, int key) -> Tensor", tags=_STRIDES)
_LIBRARY.define("layer(Tensor hidden, int key, Tensor? input_ids=None) -> Tensor", tags=_STRIDES)


def _run_experts(
    hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, key: int
) -> torch.Tensor:
    held = _HELD[key]
    held.calls += 1
    # free where they are contiguous
    hidden = hidden.detach().contiguous()
    out = torch.empty_like(hidden)
    held.native.forward(hidden, ids.contiguous(), weights.detach().contiguous(), out)
    return out


def _run_layer(
    hidden: torch.Tensor, key: int, input_ids: torch.Tensor | None = None
) -> torch.Tensor:
    held = _HELD[key]
    held.calls += 1
    hidden = hidden.detach().contiguous()
    ids = None if input_ids is None else input_ids.contiguous()
    return held.native.forward(hidden, torch.empty_like(hidden), input_ids=ids)


_LIBRARY.impl("experts", _run_experts, "CPU")
_LIBRARY.impl("layer", _run_layer, "CPU")


@torch.library.register_fake("moe_runner::experts", lib=_LIBRARY)
def _experts_like(hidden: torch.Tensor, ids: Any, weights: Any, key: int) -> torch.Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


@torch.library.register_fake("moe_runner::layer", lib=_LIBRARY)
def _layer_like(hidden: torch.Tensor, key: int, input_ids: Any = None) -> torch.Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def experts(
    held: Held, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Runs experts on rows [T, H] that are routed: ids and weights [T, k]. No gradients."""
    _refuse_gradients(hidden, weights)
    return torch.ops.moe_runner.experts(hidden, ids, weights, held.key)


def layer(
    held: Held, hidden: torch.Tensor, input_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """Runs a whole layer on rows [..., H]; ``input_ids`` [...] for one that routes by them. No
    gradients."""
    _refuse_gradients(hidden)
    return torch.ops.moe_runner.layer(hidden, held.key, input_ids)


def _refuse_gradients(*tensors: torch.Tensor) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise Error(
            "moe-runner computes no gradients: run the model under torch.no_grad() or "
            "torch.inference_mode()"
        )
