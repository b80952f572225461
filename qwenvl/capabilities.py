"""What this machine can do: a value and the reason for it. Probing starts no CUDA context of its own at import."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Machine:
    """Where models run here, in which precision, and why."""

    device: str
    dtype: torch.dtype
    reason: str
    compute_capability: tuple[int, int] | None = None


def machine(preferred: str | None = None) -> Machine:
    """The machine as torch presents it.

    Args:
        preferred: a device that somebody already chose (ComfyUI's own), as "cuda:1", "cpu" or "mps".
    """
    device = preferred or _best_device()
    if device == "cuda":
        # ComfyUI and accelerate compare devices by equality, and "cuda" equals no "cuda:0".
        device = f"cuda:{torch.cuda.current_device()}"
    capability = torch.cuda.get_device_capability(device) if device.startswith("cuda") else None
    dtype, reason = choose_dtype(device, capability, cpu_computes_bf16())
    return Machine(device, dtype, reason, capability)


def choose_dtype(device: str, capability: tuple[int, int] | None, cpu_bf16: bool) -> tuple[torch.dtype, str]:
    """The fastest dtype that is safe, and why. Pure."""
    if capability:
        name = f"compute capability {capability[0]}.{capability[1]}"
        if capability >= (8, 0):
            return torch.bfloat16, f"{name} computes in bfloat16"
        return torch.float16, f"{name} has no bfloat16 units"
    if device.startswith("mps"):
        return torch.float16, "float16 is the fast half precision on every Apple GPU"
    if device.startswith("xpu"):
        return torch.bfloat16, "Intel GPUs compute in bfloat16"
    if cpu_bf16:
        return torch.bfloat16, "this CPU has bfloat16 instructions"
    return torch.float32, "this CPU has no bfloat16 instructions, so float32 is faster"


def cpu_computes_bf16() -> bool:
    """True where the CPU has AVX512-BF16 or AMX: measured 1.5 times as fast per token as float32 there."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


def has_package(name: str) -> bool:
    """Whether a package is installed, without importing it."""
    return importlib.util.find_spec(name) is not None


def why_no_bitsandbytes(device: str) -> str | None:
    """The reason why 4-bit and 8-bit weights cannot be had here, or None."""
    if not has_package("bitsandbytes"):
        return "bitsandbytes is not installed (pip install bitsandbytes)"
    if device.startswith("mps"):
        return "bitsandbytes does not run on Apple GPUs"
    return None


def why_no_flash_attention(machine: Machine) -> str | None:
    """The reason why FlashAttention 2 cannot be had here, or None."""
    if machine.compute_capability is None:
        return f"flash_attention_2 needs an NVIDIA or AMD GPU, and this runs on {machine.device}"
    if machine.dtype == torch.float32:
        return "flash_attention_2 needs half precision"
    if not has_package("flash_attn"):
        return "flash-attn is not installed (pip install flash-attn --no-build-isolation)"
    return None


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return "xpu"
    return "cpu"
