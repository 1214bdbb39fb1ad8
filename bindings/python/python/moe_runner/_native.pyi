import os
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

__version__: str

_Tensor = TypeVar("_Tensor")
_Dtype = Literal["auto", "f32", "bf16", "f16"]
_NonFinite = Literal["refuse", "pass"]

class Checkpoint:
    """A checkpoint that is open: a folder with config.json and *.safetensors, or a .gguf file.

    Headers are read, the files are mapped. Layers and Experts take one in place of a path, so that
    many of them open it once.
    """

    def __new__(cls, path: str | os.PathLike[str]) -> Checkpoint: ...
    @property
    def layers(self) -> list[int]:
        """Numbers of the MoE layers in the model, in order."""
    @property
    def architecture(self) -> str:
        """The model's type, such as "qwen3_moe"."""
    @property
    def path(self) -> os.PathLike[str]:
        """Where it is."""

class Layer:
    """A layer of a checkpoint, ready to run: router, experts, shared experts, everything.

    layer: its number in the model, as in the names of its tensors.
    dtype: of hidden states and outputs; "auto": that of the experts' weights where they are stored in
        one of these, else bf16. Hidden states in f32 are taken by every layer.
    threads: to run on; None: the physical cores that this process may use. Layers share them.
    kernel: a kernel by name, used or refused; None: the first that can.
    non_finite: what is done about rows that hold NaN or infinities: "refuse" (an error that says
        where), or let them "pass", without harm to other rows.
    device: what computes: "auto" and "cpu" are the processor; "cuda" or "cuda:N" an NVIDIA GPU, on
        which the layer's weights are kept. Rows come from host memory, and go back to it.
    """

    def __new__(
        cls,
        checkpoint: Checkpoint | str | os.PathLike[str],
        layer: int,
        *,
        dtype: _Dtype = "auto",
        threads: int | None = None,
        kernel: str | None = None,
        non_finite: _NonFinite = "refuse",
        device: str = "auto",
    ) -> Layer: ...
    def forward(
        self,
        hidden: _Tensor,
        out: _Tensor | None = None,
        *,
        ids: Any = None,
        weights: Any = None,
        router_logits: Any = None,
        input_ids: Any = None,
    ) -> _Tensor:
        """Runs the layer, and returns ``out``, or a new tensor like ``hidden``.

        hidden: [..., H], contiguous, on the CPU: f32, or the layer's dtype; 16-bit integers are the
            bits of bf16 for a layer of bf16, since numpy has none.
        out: of hidden's shape, in other memory.
        ids, weights: [..., k], for any k: a routing that was finished elsewhere. int64 or int32; an id
            that is negative, or no expert's, adds nothing. f32, bf16 or f16, with any factor of the
            router in them.
        router_logits: [..., E]: in place of the gate's.
        input_ids: [...]: ids of the tokens, for layers that route by them.
        """
    def explain(self) -> dict[str, Any]:
        """Which kernel runs the layer, why, and why no other."""
    def workspace_bytes(self, tokens: int) -> int:
        """Bytes of working memory for ``tokens`` tokens; layers share it."""
    @property
    def name(self) -> str:
        """The layer's name in the checkpoint."""
    @property
    def layer(self) -> int:
        """Its number in the model."""
    @property
    def hidden_size(self) -> int:
        """H, width of the rows."""
    @property
    def num_experts(self) -> int:
        """E, how many experts there are to choose from."""
    @property
    def top_k(self) -> int:
        """k, how many are chosen for a token."""
    @property
    def dtype(self) -> str:
        """Dtype of the activations: "f32", "bf16" or "f16"."""
    @property
    def formats(self) -> list[str]:
        """Number formats of the routed experts' weights, in words."""
    @property
    def nbytes(self) -> int:
        """Bytes of the routed experts' weights as they are stored."""
    @property
    def kernel(self) -> str:
        """Name of the kernel that runs."""
    @property
    def why(self) -> str:
        """Why this one."""

class Experts:
    """The routed experts of a layer, ready to run on rows that somebody else has routed.

    gate_up: [E, 2I, H], f32, bf16 or f16, contiguous, on the CPU; [E, I, H] with layout "up_only".
    down: [E, H, I].
    activation: the function between the products: "silu", "gelu", "gelu_tanh", "relu", "relu2",
        "clamped_swiglu" (alpha, beta, limit; gpt-oss: 1.702, 1, 7), "swiglu_step" (limit), "situ"
        (beta, lam).
    layout: whose rows are where in gate_up: "halves" (the gate's first), "up_first", "interleaved"
        (the gate's first), or "up_only".
    transposed: both are stored [E, in, out].
    gate_up_bias, down_bias: [E, 2I] and [E, H].
    weight_on: what a weight multiplies: an expert's "output", or its "input" (Llama 4).
    The rest as in Layer. The tensors are read where they lie, once, and kept no longer than that takes,
    unless a kernel is named that reads them in place.
    """

    def __new__(
        cls,
        gate_up: Any,
        down: Any,
        *,
        activation: str = "silu",
        layout: Literal["halves", "up_first", "interleaved", "up_only"] = "halves",
        transposed: bool = False,
        gate_up_bias: Any = None,
        down_bias: Any = None,
        weight_on: Literal["output", "input"] = "output",
        alpha: float = 1.0,
        beta: float = 0.0,
        limit: float = 0.0,
        lam: float = 0.0,
        dtype: _Dtype = "auto",
        threads: int | None = None,
        kernel: str | None = None,
        non_finite: _NonFinite = "refuse",
    ) -> Experts: ...
    @classmethod
    def open(
        cls,
        checkpoint: Checkpoint | str | os.PathLike[str],
        layer: int,
        *,
        dtype: _Dtype = "auto",
        threads: int | None = None,
        kernel: str | None = None,
        non_finite: _NonFinite = "refuse",
    ) -> Experts:
        """The routed experts of a checkpoint's layer, in the number format that they are stored in."""
    def forward(
        self, hidden: _Tensor, ids: Any, weights: Any, out: _Tensor | None = None
    ) -> _Tensor:
        """The sum over j of weights[t, j] * expert(ids[t, j])(hidden[t]), for every row t.

        hidden: [..., H], contiguous, on the CPU: f32, or the experts' dtype.
        ids: [..., k], int64 or int32, for any k; an id that is negative, or no expert's, adds nothing.
        weights: [..., k], f32, bf16 or f16.
        out: of hidden's shape, in other memory; else a new tensor. Returned.
        """
    def explain(self) -> dict[str, Any]:
        """Which kernel runs the experts, why, and why no other."""
    def workspace_bytes(self, tokens: int, top_k: int) -> int:
        """Bytes of working memory for ``tokens`` tokens of ``top_k`` experts; layers share it."""
    @property
    def hidden_size(self) -> int:
        """H, width of the rows."""
    @property
    def intermediate_size(self) -> int:
        """I, width between the two products."""
    @property
    def num_experts(self) -> int:
        """E, how many there are."""
    @property
    def dtype(self) -> str:
        """Dtype of the activations: "f32", "bf16" or "f16"."""
    @property
    def formats(self) -> list[str]:
        """Number formats of the weights, in words."""
    @property
    def nbytes(self) -> int:
        """Bytes of the weights as they are stored."""
    @property
    def kernel(self) -> str:
        """Name of the kernel that runs."""
    @property
    def why(self) -> str:
        """Why this one."""

def report(args: Sequence[str]) -> str:
    """Runs the command as a function; returns the JSON text of its report."""

def main(args: Sequence[str]) -> int:
    """Runs the command as a program, its name first; returns the exit status."""
