"""Experts of a quantised copy as floats, decoded and run here: the truth for what runs packed.

Layouts are those of compressed-tensors; weights are [out, in] in f32.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.integrations.moe import ExpertsInterface

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})
    return found


def weight(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """A module's weight, by what is stored of it."""
    part = {
        name[len(module) + 1 :]: tensor
        for name, tensor in tensors.items()
        if name.startswith(module + ".")
    }
    if "weight_global_scale" in part:  # NVFP4: the global scale is the inverse of what multiplies
        scale = part["weight_scale"].float() / part["weight_global_scale"].float()
        return _small(part["weight_packed"], scale, 16)
    if "weight_scale" not in part:
        return part["weight"].float()
    if part["weight_scale"].dtype == torch.uint8:  # MXFP4: powers of two
        scale = torch.exp2(part["weight_scale"].float() - 127)
        return _small(part["weight_packed"], scale, 32)
    if "weight_packed" in part:  # INT4, eight codes a word
        words = part["weight_packed"].long() & 0xFFFF_FFFF
        codes = (words[..., None] >> (4 * torch.arange(8)) & 15).flatten(1) - 8
        scale = part["weight_scale"].float()
        return codes.float() * scale.repeat_interleave(codes.shape[1] // scale.shape[1], 1)
    codes, scale = part["weight"].float(), part["weight_scale"].float()
    if scale.shape[0] < codes.shape[0]:  # 128 × 128
        scale = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        scale = scale[: codes.shape[0], : codes.shape[1]]
    return codes * scale.reshape(codes.shape[0], -1)


def _small(packed: torch.Tensor, scale: torch.Tensor, block: int) -> torch.Tensor:
    """E2M1 codes, two a byte, the low one first; `scale` [out, in / block]."""
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(1).long()
    values = E2M1[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
    return values * scale.repeat_interleave(block, 1)


def _rounded(largest: float, to_codes: Callable[[torch.Tensor], torch.Tensor], group: int | None):
    """Rounds rows to codes of a scale for each row, or for each group of channels."""

    def round_rows(x: torch.Tensor) -> torch.Tensor:
        groups = x.unflatten(-1, (-1, group or x.shape[-1]))
        scale = groups.abs().amax(-1, keepdim=True) / largest
        scale[scale == 0] = 1
        return (to_codes(groups / scale) * scale).flatten(-2)

    return round_rows


def _e4m3(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float8_e4m3fn).float()


#: What a format does to the rows that enter a product.
ROWS = {
    "int8": _rounded(127, torch.round, None),
    "fp8": _rounded(448, _e4m3, None),
    "fp8-block": _rounded(448, _e4m3, 128),
}


def fill(model: torch.nn.Module, folder: Path, rows: str | None = None) -> None:
    """Puts the decoded experts in the place of a qwen3_moe model's own; `rows` are rounded as that
    format does it."""
    tensors, round_rows = stored(folder), ROWS.get(rows, lambda x: x)
    with torch.no_grad():
        for n, layer in enumerate(model.model.layers):
            for e in range(layer.mlp.experts.num_experts):
                prefix = f"model.layers.{n}.mlp.experts.{e}."
                both = [weight(tensors, prefix + part) for part in ("gate_proj", "up_proj")]
                layer.mlp.experts.gate_up_proj[e] = torch.cat(both)
                layer.mlp.experts.down_proj[e] = weight(tensors, prefix + "down_proj")

    def forward(self, hidden, ids, weights):
        out = torch.zeros_like(hidden)
        for e in ids.unique():
            row, slot = torch.where(ids == e)
            gate_up = round_rows(hidden[row]) @ self.gate_up_proj[e].T
            part = round_rows(self._apply_gate(gate_up)) @ self.down_proj[e].T
            out.index_add_(0, row, part * weights[row, slot, None])
        return out

    ExpertsInterface.register("decoded", forward)
    model.set_experts_implementation("decoded")
