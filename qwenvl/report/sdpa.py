"""Which of torch's attention kernels are allowed, and which one ran, observed in one layer of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..decoding.step_attention import allowed_kernels, without_cudnn

# The operator that scaled_dot_product_attention dispatches to -> the kernel's name.
KERNELS = {
    "_scaled_dot_product_flash_attention": "flash",
    "_scaled_dot_product_flash_attention_for_cpu": "flash",
    "_scaled_dot_product_efficient_attention": "memory-efficient",
    "_scaled_dot_product_cudnn_attention": "cuDNN",
    "_scaled_dot_product_attention_math": "math",
    "_scaled_dot_product_attention_math_for_mps": "math",
    "_scaled_dot_product_fused_attention_overrideable": "the device's own",
}


def allowed() -> list[str]:
    """List the kernels that torch may choose from on a GPU while the pack computes."""
    with without_cudnn():
        return allowed_kernels()


@contextmanager
def observed(model: Any) -> Iterator[dict[str, str]]:
    """Context manager that watches the first call of the first layer of the vision tower and of the text part.

    Yields:
        "vision_tower" and "prefill" -> the kernel, once it ran; a part is missing if no known kernel ran in it.
    """
    kernels: dict[str, str] = {}
    # Other implementations use no such kernel, and some of their operators cannot be watched.
    parts = ("vision_tower", "prefill") if model.config._attn_implementation == "sdpa" else ()
    layers = {part: layer for part in parts if (layer := _first_layer(model, part))}
    for part, layer in layers.items():
        vars(layer)["forward"] = _LookOnce(layer, part, kernels)
    try:
        yield kernels
    finally:
        for layer in layers.values():
            vars(layer).pop("forward", None)


def _first_layer(model: torch.nn.Module, part: str) -> torch.nn.Module | None:
    """Find the part's first layer with softmax attention: newer families begin with linear attention."""
    for name, module in model.named_modules():
        of_part = ("visual" in name.split(".")) == (part == "vision_tower")
        attends = hasattr(module, "self_attn") or hasattr(module, "attn")
        # accelerate sets an own forward on instances that it spreads over devices: leave these alone.
        if of_part and attends and "forward" not in vars(module):
            return module
    return None


class _LookOnce:
    """A layer's forward whose first call is watched. A class, not a closure: in the traceback of an error, the frame
    of a closure would keep the layer alive."""

    def __init__(self, layer: torch.nn.Module, part: str, kernels: dict[str, str]) -> None:
        self._layer, self._part, self._kernels = layer, part, kernels

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        vars(self._layer).pop("forward", None)
        with _Seeing(self._part, self._kernels):
            return self._layer.forward(*args, **kwargs)


class _Seeing(TorchDispatchMode):
    def __init__(self, part: str, kernels: dict[str, str]) -> None:
        super().__init__()
        self._part, self._kernels = part, kernels

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.scaled_dot_product_attention.default:
            with self:  # torch chooses the kernel one level down
                return func.decompose(*args, **(kwargs or {}))
        if kernel := KERNELS.get(func.__name__.split(".")[0]):
            self._kernels[self._part] = kernel
        return func(*args, **(kwargs or {}))
