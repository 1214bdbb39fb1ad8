"""The experts of transformers' models inside moe-runner.

>>> from transformers import AutoModelForCausalLM
>>> import moe_runner.transformers as moe
>>> model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")  # doctest: +SKIP
>>> print(moe.attach(model))                                          # doctest: +SKIP

``load`` is the same for checkpoints with quantised experts, which stay as they are stored. Importing
this module also registers ``experts_implementation="moe_runner"`` for ``from_pretrained`` and
``set_experts_implementation``: it takes experts at their first forward pass, and leaves the model's own
weights where they are.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import json
import os
import re
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from . import torch as ops
from ._activation import recognise
from ._errors import Error, InputError
from ._native import Checkpoint, Experts, Layer

__all__ = ["NAME", "Report", "Taken", "attach", "load"]

NAME = "moe_runner"

_DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclass
class Taken:
    """What became of one module.

    name: of the module in the model.
    source: where its weights come from: "parameters", or the layer's name in the checkpoint.
    kernel, why: what runs it, and why that.
    formats: number formats of its weights.
    nbytes: of them, as they are stored.
    """

    name: str
    source: str
    kernel: str
    why: str
    formats: list[str]
    nbytes: int
    held: ops.Held = field(repr=False)

    @property
    def calls(self) -> int:
        """How often it ran."""
        return self.held.calls


@dataclass
class Report:
    """What ``attach`` did.

    modules: those that were taken.
    released: bytes of the model's own expert weights that were let go of.
    """

    modules: list[Taken]
    released: int

    @property
    def calls(self) -> int:
        """How often their experts ran, all together."""
        return sum(taken.calls for taken in self.modules)

    def __str__(self) -> str:
        count, total = len(self.modules), sum(taken.nbytes for taken in self.modules)
        lines = [f"moe-runner runs {count} MoE modules, {total / 1e6:.1f} MB of experts"]
        groups: dict[tuple[str, str, str], list[str]] = {}
        for taken in self.modules:
            key = (", ".join(taken.formats), taken.kernel, taken.why)
            groups.setdefault(key, []).append(taken.name)
        for (formats, kernel, why), names in groups.items():
            modules = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} ({len(names)})"
            lines += [f"  {modules}", f"    {formats}", f"    {kernel}: {why}"]
        if self.released:
            lines.append(f"  the model's own copy is let go of, {self.released / 1e6:.1f} MB")
        return "\n".join(lines)


def attach(
    model: torch.nn.Module,
    checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
    *,
    router: bool = False,
    keep: bool = False,
    threads: int | None = None,
    kernel: str | None = None,
) -> Report:
    """Has the experts of every MoE layer of ``model`` run inside moe-runner, and tells what it did.

    checkpoint: take the weights from there, as they are stored (4 bits stay 4 bits), in place of the
        model's parameters.
    router: with a checkpoint: the whole block, with its router and shared experts.
    keep: leave the model's own expert weights where they are, so that
        ``model.set_experts_implementation("eager")`` goes back. Else they are let go of layer by
        layer, and the model cannot be saved any more.
    threads, kernel: as in ``Experts``.

    Raises where it took no module, and under gradients: there is no backward pass.
    """
    if router and checkpoint is None:
        raise InputError("router: the whole block comes from a checkpoint; give one")
    if checkpoint is not None and not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint(checkpoint)
    found = [(name, module) for name, module in model.named_modules() if _holds_experts(module)]
    if not found:
        raise Error(
            f"attach: {type(model).__name__} has no MoE layer whose experts moe-runner could take "
            "(transformers' experts interface, and Llama 4)"
        )
    settings: dict[str, Any] = {"threads": threads, "kernel": kernel}
    # before weights are let go of
    dtypes = [_dtype(module, model) for _, module in found]
    report = Report([], 0)
    for (name, module), dtype in zip(found, dtypes):
        settings["dtype"] = dtype
        try:
            source = None if checkpoint is None else (checkpoint, _layer(name, checkpoint))
            if router:
                taken = _take_block(model, name, source, settings)
            else:
                taken = _take(module, name, source, settings)
                if "Llama4" in type(module).__name__:
                    _replace_llama4_block(model, name, taken.held)
        except Error as error:
            raise type(error)(f"attach: {name}: {error}") from None
        report.modules.append(taken)
        if not keep:
            report.released += _release(module)
    if not router:
        _switch_on(model, [module for _, module in found])
    return report


def load(
    auto: Any,
    path: str | os.PathLike[str],
    *,
    router: bool = False,
    threads: int | None = None,
    kernel: str | None = None,
    **kwargs: Any,
) -> tuple[PreTrainedModel, Report]:
    """A model whose experts are never loaded into PyTorch, but by moe-runner, as they are stored.

    auto: ``AutoModelForCausalLM`` or another class with ``from_pretrained``.
    path: a folder; for the name of a repository, give what ``huggingface_hub.snapshot_download``
        returns.
    The rest goes to ``from_pretrained`` and to ``attach``.
    """
    if "config" not in kwargs and _only_experts_are_quantised(path):
        # nothing else is: what transformers would do about it is not needed
        kwargs["config"] = AutoConfig.from_pretrained(path)
        del kwargs["config"].quantization_config
    with _experts_without_weights():
        model = auto.from_pretrained(path, **kwargs)
    report = attach(model, path, router=router, threads=threads, kernel=kernel)
    return model.eval(), report


def _forward(
    self: torch.nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The experts' forward pass, as transformers' interface has it. Ids of experts that are not here
    are the number of experts; such slots add nothing."""
    held = self.__dict__.get("_moe_runner")
    if held is None:
        held = _take(self, type(self).__name__, None, {}).held
    return ops.experts(held, hidden_states, top_k_index, top_k_weights)


ExpertsInterface.register(NAME, _forward)


def _holds_experts(module: torch.nn.Module) -> bool:
    """A module of the experts interface, or Llama 4's, which is none."""
    decorated = hasattr(module, "is_concatenated") and hasattr(module, "has_gate")
    return decorated or type(module).__name__ == "Llama4TextExperts"


def _layer(name: str, checkpoint: Checkpoint) -> int:
    """The layer's number, from the module's name."""
    numbers = re.findall(r"\.(\d+)\.", name)
    if not numbers:
        raise InputError("which layer of the checkpoint it is cannot be told from its name")
    number = int(numbers[-1])
    if number not in checkpoint.layers:
        raise InputError(f"the checkpoint has no MoE layer {number}; it has {checkpoint.layers}")
    return number


def _dtype(module: torch.nn.Module, model: torch.nn.Module) -> str:
    """Of the hidden states that the module gets: its weights', else those of the rest of the model."""
    for holder in (module, model):
        for tensor in holder.parameters():
            if tensor.dtype in _DTYPES:
                return _DTYPES[tensor.dtype]
    return "f32"


def _take(
    module: torch.nn.Module,
    name: str,
    source: tuple[Checkpoint, int] | None,
    settings: dict[str, Any],
) -> Taken:
    """Makes a module's experts ready, and leaves them with it."""
    if source is None:
        native, origin = _from_parameters(module, settings), "parameters"
    else:
        checkpoint, number = source
        native = Experts.open(checkpoint, number, **settings)
        expected = getattr(module, "num_experts", native.num_experts)
        if native.num_experts != expected:
            raise InputError(
                f"the checkpoint has {native.num_experts} experts, the model {expected}"
            )
        origin = f"layer {number} of {checkpoint.path}"
    held = ops.Held(native)
    module.__dict__["_moe_runner"] = held
    return Taken(name, origin, native.kernel, native.why, native.formats, native.nbytes, held)


def _from_parameters(module: torch.nn.Module, settings: dict[str, Any]) -> Experts:
    """Experts over a module's own parameters, where they lie."""
    if getattr(module, "has_post_expert_norm", False):
        raise InputError("its experts end in a norm; give the checkpoint")
    gate_up = getattr(module, "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj")
    down = module.down_proj
    for what, tensor in (("gate_up", gate_up), ("down", down)):
        if tensor is None or tensor.device.type == "meta":
            raise InputError(f"{what}: the model holds no weights; give the checkpoint")
        if tensor.dtype not in _DTYPES:
            raise InputError(f"{what}: {tensor.dtype} parameters; give the checkpoint")
    llama4 = "Llama4" in type(module).__name__
    transposed = llama4 or module.is_transposed
    bias = {}
    if getattr(module, "has_bias", False):
        first = module.gate_up_proj_bias if module.has_gate else module.up_proj_bias
        bias = {"gate_up_bias": first.detach(), "down_bias": module.down_proj_bias.detach()}
    return Experts(
        gate_up.detach().contiguous(),
        down.detach().contiguous(),
        transposed=transposed,
        weight_on="input" if llama4 else "output",
        **recognise(module, down.shape[1] if transposed else down.shape[2]),
        **bias,
        **settings,
    )


def _release(module: torch.nn.Module) -> int:
    """Lets go of a module's own weights; returns their bytes."""
    released = 0
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.device.type != "meta":
            released += parameter.nbytes
            empty = torch.empty_like(parameter, device="meta")
            setattr(module, name, torch.nn.Parameter(empty, requires_grad=False))
    return released


def _switch_on(model: torch.nn.Module, modules: list[torch.nn.Module]) -> None:
    """Sends the modules' forward passes here: by transformers' own setting, else one by one."""
    if isinstance(model, PreTrainedModel) and model._can_set_experts_implementation():
        model.set_experts_implementation(NAME)
    for module in modules:
        if getattr(getattr(module, "config", None), "_experts_implementation", None) != NAME:
            module.forward = types.MethodType(_forward, module)


class _Block(torch.nn.Module):
    """A whole MoE block: router, experts, shared experts.

    tuple_out: the block that it replaces returns its logits, too; those are not needed to run.
    """

    def __init__(self, held: ops.Held, tuple_out: bool) -> None:
        super().__init__()
        self.__dict__["_moe_runner"] = held
        self.tuple_out = tuple_out

    def forward(
        self, hidden_states: torch.Tensor, *_: Any, input_ids: torch.Tensor | None = None, **__: Any
    ) -> Any:
        out = ops.layer(self.__dict__["_moe_runner"], hidden_states, input_ids)
        return (out, None) if self.tuple_out else out


def _take_block(
    model: torch.nn.Module,
    name: str,
    source: tuple[Checkpoint, int] | None,
    settings: dict[str, Any],
) -> Taken:
    """Puts a whole layer in the place of the block that the module ``name`` is the experts of."""
    assert source is not None
    checkpoint, number = source
    block_name = name.rpartition(".")[0]
    block = model.get_submodule(block_name)
    if "DecoderLayer" in type(block).__name__ or not hasattr(block, "forward"):
        raise InputError("its router stands outside of a block; attach without router=True")
    parent_name, _, child = block_name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if any("shared" in beside for beside, module in parent.named_children() if module is not block):
        # a layer of the checkpoint has them inside
        raise InputError("its shared experts stand outside of its block; attach without router=True")
    native = Layer(checkpoint, number, **settings)
    held = ops.Held(native)
    setattr(parent, child, _Block(held, _returns_a_tuple(block)))
    origin = f"layer {number} of {checkpoint.path}"
    formats, nbytes = native.formats, native.nbytes
    return Taken(block_name, origin, native.kernel, native.why, formats, nbytes, held)


def _returns_a_tuple(block: torch.nn.Module) -> bool:
    """Whether a block returns its logits beside its output: by its code, since what is written of its
    type is wrong in some families."""
    forward = type(block).forward
    try:
        code = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):  # its source is not here
        return "tuple" in str(forward.__annotations__.get("return", "")).lower()
    returned = [node.value for node in ast.walk(code) if isinstance(node, ast.Return)]
    return any(isinstance(value, ast.Tuple) for value in returned)


class _Llama4Block(torch.nn.Module):
    """Llama 4's block: its experts get every token, weighed by zero where it is not theirs; here they
    get their own."""

    def __init__(self, block: torch.nn.Module, held: ops.Held) -> None:
        super().__init__()
        self.top_k, self.hidden_dim = block.top_k, block.hidden_dim
        self.router, self.shared_expert, self.experts = (
            block.router,
            block.shared_expert,
            block.experts,
        )
        self.__dict__["_moe_runner"] = held

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_states = hidden_states.reshape(-1, self.hidden_dim)
        _, logits = self.router(hidden_states)
        chosen, ids = torch.topk(logits, self.top_k, dim=1)
        weights = torch.sigmoid(chosen.float()).to(chosen.dtype)
        out = ops.experts(self.__dict__["_moe_runner"], hidden_states, ids, weights)
        return out + self.shared_expert(hidden_states), logits


def _replace_llama4_block(model: torch.nn.Module, name: str, held: ops.Held) -> None:
    block_name = name.rpartition(".")[0]
    parent, _, child = block_name.rpartition(".")
    block = model.get_submodule(block_name)
    setattr(model.get_submodule(parent), child, _Llama4Block(block, held))


def _only_experts_are_quantised(path: str | os.PathLike[str]) -> bool:
    """By the names of the tensors: what belongs to quantised weights belongs to experts."""
    config = Path(path) / "config.json"
    if not config.exists() or "quantization_config" not in json.loads(config.read_text()):
        return False
    parts = re.compile(r"\.(weight_\w+|qweight|qzeros|scales|g_idx)$|_(scale|scales|blocks)$")
    for file in Path(path).glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            if any(".experts." not in name and parts.search(name) for name in tensors.keys()):
                return False
    return True


@contextlib.contextmanager
def _experts_without_weights() -> Iterator[None]:
    """Models that are made meanwhile have experts without parameters: what a checkpoint holds for
    them is not loaded."""
    original = PreTrainedModel.post_init

    def post_init(self: PreTrainedModel) -> None:
        for module in self.modules():
            if _holds_experts(module):
                for name, _ in list(module.named_parameters(recurse=False)):
                    setattr(module, name, None)
                module._is_hf_initialized = True  # there is nothing to initialise
        original(self)
        # not loaded here is no mistake to be told of
        ignored = self._keys_to_ignore_on_load_unexpected or ()
        self._keys_to_ignore_on_load_unexpected = {*ignored, r"\.experts\."}

    PreTrainedModel.post_init = post_init  # type: ignore[method-assign]
    try:
        yield
    finally:
        PreTrainedModel.post_init = original  # type: ignore[method-assign]
