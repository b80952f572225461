"""The abilities of this machine, with reasons. Importing this module starts no CUDA context."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ..packages import (
    FLASH,
    Lack,
    lack_of_accelerate,
    lack_of_bitsandbytes,
    lack_of_flash,
    version_of,
    why_not_imported,
    without_kernels,
)


@dataclass(frozen=True, slots=True)
class Machine:
    """The devices that a model runs on, its precision, and the reason for the precision.

    Attributes:
        device: the device of the model, or of its first layer.
        others: further GPUs over which its layers are spread.
        offloads: True if layers for which the GPUs have no room stay in RAM.
    """

    device: str
    dtype: torch.dtype
    reason: str
    compute_capability: tuple[int, int] | None = None
    others: tuple[str, ...] = ()
    offloads: bool = False

    @property
    def devices(self) -> tuple[str, ...]:
        """All devices, the one of the first layer first."""
        return (self.device, *self.others)

    @property
    def spreads(self) -> bool:
        """True if a model may be on several devices, or partly in RAM."""
        return bool(self.others) or self.offloads


def machine(preferred: str | None = None) -> Machine:
    """Return the machine as torch reports it.

    Args:
        preferred: a device that was chosen already, such as ComfyUI's own: "cuda:1", "cpu" or "mps".
    """
    device = preferred or _best_device()
    if device == "cuda":
        # ComfyUI and accelerate compare devices by equality, and "cuda" does not equal "cuda:0".
        device = f"cuda:{torch.cuda.current_device()}"
    capability = torch.cuda.get_device_capability(device) if device.startswith("cuda") else None
    dtype, reason = choose_dtype(device, capability, cpu_computes_bf16())
    return Machine(device, dtype, reason, capability)


def choose_dtype(device: str, capability: tuple[int, int] | None, cpu_bf16: bool) -> tuple[torch.dtype, str]:
    """Return the fastest dtype that is safe, and the reason."""
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
    """Return True if the CPU has AVX512-BF16 or AMX: measured, bfloat16 is 1.5 times as fast as float32 there."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


def has_package(name: str) -> bool:
    """Return True if a package is installed; it is not imported."""
    return importlib.util.find_spec(name) is not None


def why_no_accelerate() -> Lack | None:
    """Return the reason why transformers cannot load with accelerate here, or None; it rejects old versions."""
    if not has_package("accelerate"):
        return lack_of_accelerate(None)
    from transformers.utils import is_accelerate_available

    return lack_of_accelerate(version_of("accelerate") or "unknown", taken=is_accelerate_available())


def why_no_bitsandbytes(
    device: str, quantization: str = "4bit", capability: tuple[int, int] | None = None
) -> str | None:
    """Return the reason why bitsandbytes cannot quantize to 4 or 8 bits here, or None."""
    version = (version_of("bitsandbytes") or "unknown") if has_package("bitsandbytes") else None
    oldest = _oldest_bitsandbytes() if version and not device.startswith("mps") else ""
    lack = lack_of_bitsandbytes(version, device, oldest)
    lack = lack or why_no_accelerate()
    if lack:
        return str(lack)
    needed = (7, 5) if quantization == "8bit" else (6, 0)
    if capability and not torch.version.hip and capability < needed:
        return "bitsandbytes needs compute capability {}.{}, and this GPU has {}.{}".format(*needed, *capability)
    if device.startswith("cuda") and _lacks_its_library():
        toolkit = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        return str(without_kernels(version or "", toolkit))
    return None


def _oldest_bitsandbytes() -> str:
    """Return the oldest version of bitsandbytes that the installed transformers accepts."""
    from transformers.utils import import_utils

    return getattr(import_utils, "BITSANDBYTES_MIN_VERSION", "0.43.1")


def _lacks_its_library() -> bool:
    """Return True if bitsandbytes has no library for this torch: it imports without one and fails at the first use."""
    from bitsandbytes import cextension

    return "error_msg" in vars(cextension.lib)


def why_no_flash_attention(machine: Machine, name: str = "flash_attention_2", kernel: str = "") -> str | None:
    """Return the reason why a FlashAttention cannot be used here, or None.

    Args:
        name: a key of packages.FLASH.
        kernel: a kernel of the hub that replaces the package if it is on disk already; "" if there is no such kernel.
    """
    flash = FLASH[name]
    if machine.compute_capability is None and not machine.device.startswith("xpu"):
        return f"{name} needs an NVIDIA or AMD GPU, and this runs on {machine.device}"
    if machine.dtype == torch.float32:
        return f"{name} needs half precision"
    if machine.compute_capability and machine.compute_capability < flash.oldest:
        both = (*flash.oldest, *machine.compute_capability)
        return "{} needs compute capability {}.{}, and this GPU has {}.{}".format(name, *both)
    version = version_of(flash.package)
    if version is None and kernel and has_package("kernels") and kernel_on_disk(kernel):
        return None
    lack = lack_of_flash(flash, version, why_not_imported(flash.module) if version else "")
    return str(lack) if lack else None


def kernel_on_disk(repo_id: str) -> bool:
    """Return True if a kernel of the hub is on disk: transformers would download it without asking."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(os.environ.get("KERNELS_CACHE") or HF_HUB_CACHE)
    folders = (cache / f"{kind}--{repo_id.replace('/', '--')}" / "snapshots" for kind in ("kernels", "models"))
    return any(any(folder.glob("*/build/*")) for folder in folders)


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return "xpu"
    return "cpu"
