"""vLLM's experts inside moe-runner, on CPUs: a plugin that vLLM finds by itself.

Installed beside vLLM, this package takes over the experts of every MoE model that vLLM serves on a
CPU: unquantised ones as vLLM loaded them, quantised ones from the checkpoint, as they are stored, also
where vLLM has no kernel for them on this processor. ``MOE_RUNNER=off`` in the environment leaves vLLM
alone.

It stands on two of vLLM's seams, the class that executes unquantised experts and the class that owns
their weights, both replaced by name. Their names and arguments were compared in the versions below;
with another version the plugin stays out and says so, unless ``MOE_RUNNER=on`` insists.
"""

from __future__ import annotations

import logging
import os
import re
from typing import Any

logger = logging.getLogger("vllm.plugins.moe_runner")

_DTYPES: dict[str, Any] = {"torch.float32": "f32", "torch.bfloat16": "bf16", "torch.float16": "f16"}

#: Versions of vLLM whose seams are those that this file knows.
KNOWN = ("0.32", "0.33")


def register() -> None:
    """vLLM's entry point: called in every process, and more than once."""
    wish = os.environ.get("MOE_RUNNER", "").lower()
    if wish == "off":
        return
    import vllm
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    version = ".".join(vllm.__version__.split(".")[:2])
    if version not in KNOWN and wish != "on":
        logger.warning(
            "moe-runner stays out: it knows vLLM %s, this is %s; MOE_RUNNER=on has it try",
            " and ".join(KNOWN),
            vllm.__version__,
        )
        return
    from vllm.model_executor.custom_op import op_registry_oot

    if "UnquantizedFusedMoEMethod" not in op_registry_oot:
        _register_unquantised()
    if "RoutedExperts" not in op_registry_oot:
        _register_quantised()


def _refuse_what_is_not_supported(moe: Any) -> None:
    parallel = getattr(moe, "moe_parallel_config", None)
    for what, size in (
        ("expert parallelism", getattr(parallel, "ep_size", 1)),
        ("tensor parallelism", getattr(parallel, "tp_size", 1)),
    ):
        if (size or 1) > 1:
            raise NotImplementedError(
                f"moe-runner inside vLLM runs all experts in one process; {what} of {size} does not: "
                "MOE_RUNNER=off leaves vLLM's own experts"
            )


def _function(activation: Any) -> dict[str, str]:
    """vLLM's activation, by its name."""
    name = str(getattr(activation, "value", activation)).lower()
    known = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_tanh"}
    if name not in known:
        raise NotImplementedError(f"moe-runner inside vLLM has no activation '{name}'")
    return {"activation": known[name]}


def _register_unquantised() -> None:
    from vllm.model_executor.custom_op import CustomOp
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
        UnquantizedFusedMoEMethod,
    )

    import moe_runner
    from moe_runner import torch as ops

    @CustomOp.register_oot(name="UnquantizedFusedMoEMethod")
    class MoeRunnerMethod(UnquantizedFusedMoEMethod):
        """Executes the weights that vLLM loaded: w13 [E, 2I, H], w2 [E, H, I]."""

        @property
        def is_monolithic(self) -> bool:
            return False

        def process_weights_after_loading(self, layer: Any) -> None:
            _refuse_what_is_not_supported(self.moe)
            self.moe_quant_config = self.get_fused_moe_quant_config(layer)
            bias = {}
            if getattr(self.moe, "has_bias", False):
                bias = {"gate_up_bias": layer.w13_bias.data, "down_bias": layer.w2_bias.data}
            native = moe_runner.Experts(
                layer.w13_weight.data,
                layer.w2_weight.data,
                non_finite="pass",
                **_function(layer.activation),
                **bias,
            )
            self.held = ops.Held(native)
            # packed: vLLM's own copy is not needed any more
            for name in ("w13_weight", "w2_weight"):
                weight = getattr(layer, name)
                weight.data = weight.data.new_empty(0)
            logger.info("moe-runner took %s: %r", getattr(layer, "layer_name", "experts"), native)

        def apply(
            self,
            layer: Any,
            x: Any,
            topk_weights: Any,
            topk_ids: Any,
            *shared: Any,
            **more: Any,
        ) -> Any:
            return ops.torch.ops.moe_runner.experts(x, topk_ids, topk_weights, self.held.key)


def _register_quantised() -> None:
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.custom_op import PluggableLayer
    from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
    from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    import moe_runner
    from moe_runner import torch as ops

    opened: dict[str, moe_runner.Checkpoint] = {}

    class FromCheckpoint(FusedMoEMethodBase):
        """Executes a layer's experts as the checkpoint stores them; vLLM holds no weights."""

        def __init__(self, moe: Any, path: str, index: int) -> None:
            super().__init__(moe)
            _refuse_what_is_not_supported(moe)
            if path not in opened:
                opened[path] = moe_runner.Checkpoint(path)
            dtype = _DTYPES[str(get_current_vllm_config().model_config.dtype)]
            native = moe_runner.Experts.open(opened[path], index, dtype=dtype, non_finite="pass")
            self.held = ops.Held(native)
            logger.info("moe-runner opened layer %d: %r", index, native)

        def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
            pass

        def get_fused_moe_quant_config(self, layer: Any) -> Any:
            return FusedMoEQuantConfig.make()

        def apply(
            self,
            layer: Any,
            x: Any,
            topk_weights: Any,
            topk_ids: Any,
            *shared: Any,
            **more: Any,
        ) -> Any:
            return ops.torch.ops.moe_runner.experts(x, topk_ids, topk_weights, self.held.key)

    @PluggableLayer.register_oot(name="RoutedExperts")
    class MoeRunnerExperts(RoutedExperts):
        """Owns no weights where the model is quantised; else as ever."""

        def _get_quant_method(self, prefix: str, quant_config: Any, moe_config: Any) -> Any:
            if quant_config is None:
                return super()._get_quant_method(prefix, quant_config, moe_config)
            number = re.findall(r"\.(\d+)\.", prefix)
            if not number:
                raise NotImplementedError(f"moe-runner: which layer '{prefix}' is cannot be told")
            self.from_checkpoint = True
            path = get_current_vllm_config().model_config.model
            return FromCheckpoint(moe_config, path, int(number[-1]))

        def load_weights(self, weights: Any) -> Any:
            if not getattr(self, "from_checkpoint", False):
                return (yield from super().load_weights(weights))
            for name, _ in weights:
                yield name
