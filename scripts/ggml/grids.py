"""Makes the grids of the IQ types, and test vectors of random blocks, with the `gguf` Python package.

    python grids.py            # run in this folder; needs `pip install gguf numpy`
"""

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as T
from gguf import quants as q
from gguf.constants import GGML_QUANT_SIZES

KERNELS = Path(__file__).resolve().parents[2] / "crates/moe-kernels"


def grids():
    points = b""
    for kind in (q.IQ2_XXS, q.IQ2_XS, q.IQ2_S, q.IQ3_XXS, q.IQ3_S, q.IQ1_S):
        kind.init_grid()
        points += kind.grid.reshape(kind.grid_shape).astype(np.int8).tobytes()
    (KERNELS / "src/numerics/ggml/grids.bin").write_bytes(points)


def vectors():
    random = np.random.default_rng(3)
    for kind in (T.IQ1_S, T.IQ1_M, T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ3_XXS, T.IQ3_S, T.NVFP4):
        values, size = GGML_QUANT_SIZES[kind]
        count = 3 if values == 256 else 12
        blocks = random.integers(0, 256, (count, size)).astype(np.uint8)
        if kind == T.NVFP4:
            blocks[:, :4] = random.integers(0x28, 0x48, (count, 4))
        elif kind == T.IQ1_M:
            # the f16 scale lies in the high nibbles of the last four words
            for block in blocks:
                d = int(np.array([random.uniform(0.01, 0.1)], np.float16).view(np.uint16)[0])
                words = block[-8:].view(np.uint16).copy()
                for i in range(4):
                    words[i] = (int(words[i]) & 0x0FFF) | (((d >> (4 * i)) & 15) << 12)
                block[-8:] = words.view(np.uint8)
        else:
            d = np.array(random.uniform(0.01, 0.1, count), np.float16)
            blocks[:, :2] = d.view(np.uint8).reshape(count, 2)
        decoded = q.dequantize(blocks.reshape(1, -1), kind).astype(np.float32)
        folder = KERNELS / "tests/data/ggml"
        (folder / f"{kind.name.lower()}.blocks").write_bytes(blocks.tobytes())
        (folder / f"{kind.name.lower()}.values").write_bytes(decoded.tobytes())


if __name__ == "__main__":
    grids()
    vectors()
