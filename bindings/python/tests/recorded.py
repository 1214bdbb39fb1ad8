"""Recorded cases, read with nothing but numpy."""

import json
from pathlib import Path

import numpy as np

_TYPES = {"F32": "<f4", "I64": "<i8", "BF16": "<u2", "F16": "<f2"}


def tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file; bf16 as its bits."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        if entry["dtype"] in _TYPES:
            part = data[8 + size + first : 8 + size + last]
            found[name] = np.frombuffer(part, _TYPES[entry["dtype"]]).reshape(entry["shape"])
    return found


def widen(bits: np.ndarray) -> np.ndarray:
    """bf16's bits as f32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def nmse(got: np.ndarray, want: np.ndarray) -> float:
    got, want = got.astype(np.float64), want.astype(np.float64)
    return float(((got - want) ** 2).sum() / (want**2).sum())
