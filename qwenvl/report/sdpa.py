"""Which of torch's attention kernels are allowed, and which one ran: seen at work, in one layer of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..decoding.step_attention import allowed_kernels, without_cudnn

# The operator that scaled_dot_product_attention ends in, and what the kernel is called.
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
    """The kernels that torch may choose from on a GPU while the pack computes."""
    with without_cudnn():
        return allowed_kernels()


@contextmanager
def observed(model: Any) -> Iterator[dict[str, str]]:
    """Within the block, the first layer of the vision tower and of the text part are looked at, once each.

    Yields:
        "vision_tower" and "prefill" -> the kernel, as soon as it ran; nothing where no such kernel did.
    """
    kernels: dict[str, str] = {}
    # Others have no such kernel, and some of their operators cannot be watched.
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
    """The first with attention of this kind: newer families begin with linear attention."""
    for name, module in model.named_modules():
        of_part = ("visual" in name.split(".")) == (part == "vision_tower")
        attends = hasattr(module, "self_attn") or hasattr(module, "attn")
        # An instance that has its own forward belongs to accelerate, which spreads it over devices.
        if of_part and attends and "forward" not in vars(module):
            return module
    return None


class _LookOnce:
    """A layer's forward, watched the first time. No function within a function: in the traceback of an error its frame
    would hold the layer by what it closes over."""

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
            with self:  # one level down is where torch has chosen
                return func.decompose(*args, **(kwargs or {}))
        if kernel := KERNELS.get(func.__name__.split(".")[0]):
            self._kernels[self._part] = kernel
        return func(*args, **(kwargs or {}))
