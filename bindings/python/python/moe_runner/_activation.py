"""Which function stands between a module's two products: it is Python code of each model, so it is
recognised by what it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional as F

from ._errors import InputError

_PLAIN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda g: F.relu(g).square(),
}

_SPLIT: dict[str, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {
    "halves": lambda x: x.chunk(2, dim=-1),
    "interleaved": lambda x: (x[..., 0::2], x[..., 1::2]),
    "up_first": lambda x: tuple(reversed(x.chunk(2, dim=-1))),
}


def recognise(module: torch.nn.Module, intermediate: int) -> dict[str, Any]:
    """The arguments ``activation`` and ``layout`` of ``Experts``, with what parameters the function has.

    Raises ``InputError`` where the module computes none of the functions that there are.
    """
    if not getattr(module, "has_gate", True):
        x = _probe(intermediate)
        want = module.act_fn(x.clone())
        for name, function in _PLAIN.items():
            if _same(function(x.double()), want):
                return {"activation": name, "layout": "up_only"}
        raise _unknown(module)
    apply = getattr(module, "_apply_gate", None)
    x = _probe(2 * intermediate)
    if apply is None:
        gate, up = x.chunk(2, dim=-1)
        want = module.act_fn(gate) * up
    else:
        want = apply(x.clone())
    for layout, split in _SPLIT.items():
        gate, up = split(x.double())
        for arguments, function in _candidates(module):
            if _same(function(gate, up), want):
                return {**arguments, "layout": layout}
    raise _unknown(module)


def _probe(width: int) -> torch.Tensor:
    """Rows [48, width] of small, middling and large numbers: a clamp of any use is seen in them."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(48, width, generator=generator)
    return rows * torch.tensor([0.5, 4.0, 40.0]).repeat_interleave(16)[:, None]


def _same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    if ours.shape != theirs.shape:
        return False
    theirs = theirs.detach().double()
    return torch.allclose(ours, theirs, rtol=2e-5, atol=1e-5)


_Gated = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _candidates(module: torch.nn.Module) -> Iterator[tuple[dict[str, Any], _Gated]]:
    for name, function in _PLAIN.items():
        yield {"activation": name}, lambda g, u, f=function: f(g) * u
    limits, alphas = _numbers(module, "limit", "clamp"), _numbers(module, "alpha")
    for limit in limits:
        for alpha in [*alphas, 1.0, 1.702]:
            for beta in (0.0, 1.0):
                yield (
                    {"activation": "clamped_swiglu", "alpha": alpha, "beta": beta, "limit": limit},
                    lambda g, u, a=alpha, b=beta, m=limit: (
                        g.clamp(max=m) * torch.sigmoid(a * g.clamp(max=m)) * (u.clamp(-m, m) + b)
                    ),
                )
        yield (
            {"activation": "swiglu_step", "limit": limit},
            lambda g, u, m=limit: F.silu(g).clamp(max=m) * u.clamp(-m, m),
        )


def _numbers(module: torch.nn.Module, *words: str) -> list[float]:
    """Numbers that the module or its config has under names with one of these words."""
    config = getattr(module, "config", None)
    places = [vars(module), vars(config) if config is not None else {}]
    found = [
        float(value)
        for place in places
        for name, value in place.items()
        if any(word in name for word in words)
        and isinstance(value, (int, float))
        and not isinstance(value, bool)
    ]
    return sorted(set(found))


def _unknown(module: torch.nn.Module) -> InputError:
    return InputError(
        f"the function between {type(module).__name__}'s products is none that moe-runner has; give "
        "the checkpoint, if its architecture is known"
    )
