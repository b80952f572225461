"""Which of torch's attention kernels are allowed, and which one ran: seen at work, in one layer of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

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
    """The kernels that torch may choose from on a GPU."""
    asked = torch.backends.cuda
    each = {
        "flash": asked.flash_sdp_enabled,
        "memory-efficient": asked.mem_efficient_sdp_enabled,
        "cuDNN": getattr(asked, "cudnn_sdp_enabled", bool),
        "math": asked.math_sdp_enabled,
    }
    return [name for name, enabled in each.items() if enabled()]


@contextmanager
def seen(model: torch.nn.Module) -> Iterator[dict[str, str]]:
    """Within the block, the first layer of the vision tower and of the text part are looked at, once each.

    Yields:
        "vision_tower" and "prefill" -> the kernel, as soon as it ran; nothing where no such kernel did.
    """
    kernels: dict[str, str] = {}
    layers = {part: layer for part in ("vision_tower", "prefill") if (layer := _first_layer(model, part))}
    for part, layer in layers.items():
        _look_once(layer, part, kernels)
    try:
        yield kernels
    finally:
        for layer in layers.values():
            vars(layer).pop("forward", None)


def _first_layer(model: torch.nn.Module, part: str) -> torch.nn.Module | None:
    for name, module in model.named_modules():
        of_part = ("visual" in name.split(".")) == (part == "vision_tower")
        # An instance that has its own forward belongs to accelerate, which spreads it over devices.
        if of_part and name.endswith((".layers.0", ".blocks.0")) and "forward" not in vars(module):
            return module
    return None


def _look_once(layer: torch.nn.Module, part: str, kernels: dict[str, str]) -> None:
    def forward(*args: Any, **kwargs: Any) -> Any:
        vars(layer).pop("forward", None)
        with _Seeing(part, kernels):
            return layer.forward(*args, **kwargs)

    vars(layer)["forward"] = forward


class _Seeing(TorchDispatchMode):
    def __init__(self, part: str, kernels: dict[str, str]) -> None:
        super().__init__()
        self._part, self._kernels = part, kernels

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.scaled_dot_product_attention.default:
            with self:  # one level down is where torch has chosen
                return func.decompose(*args, **(kwargs or {}))
        if kernel := KERNELS.get(func.overloadpacket.__name__):
            self._kernels[self._part] = kernel
        return func(*args, **(kwargs or {}))
