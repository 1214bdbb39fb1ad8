"""Which architectures with experts the `gguf` package knows and `docs/checkpoints.md` does not list.

    pip install gguf; python gguf_names.py

Exits with 1 if there is any. Run by hand, with a new version of the package.
"""

import re
import sys
from importlib.metadata import version
from pathlib import Path

from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, MODEL_TENSOR, MODEL_TENSORS

# its tensors are those of llama, of which it has no experts
DENSE = {"deci"}
PAGE = Path(__file__).resolve().parents[2] / "docs/checkpoints.md"

of_experts = {MODEL_TENSOR.FFN_GATE_INP, MODEL_TENSOR.FFN_UP_EXP, MODEL_TENSOR.FFN_DOWN_EXP}
theirs = {MODEL_ARCH_NAMES[arch] for arch in MODEL_ARCH if of_experts & set(MODEL_TENSORS.get(arch, ()))} - DENSE
part = re.search(r"<!-- architectures in GGUF.*?-->\n(.*?)<!-- end", PAGE.read_text(), re.S).group(1)
known, refused = part.split("\n\n", 1)
ours = set(known.strip(" .\n").replace("\n", " ").split(", ")) | set(re.findall(r"^\* ([^:]+): no", refused, re.M))
print(f"gguf {version('gguf')}: {len(theirs)} architectures with experts, {len(ours)} listed")
print("not listed:", ", ".join(sorted(theirs - ours)) or "none")
print("newer than the package:", ", ".join(sorted(ours - set(MODEL_ARCH_NAMES.values()))) or "none")
sys.exit(bool(theirs - ours))
