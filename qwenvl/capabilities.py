"""What this machine can do: a value and the reason for it. Probing starts no CUDA context of its own at import."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from .versions import release


@dataclass(frozen=True, slots=True)
class Machine:
    """Where models run here, in which precision, and why.

    Attributes:
        device: where a model is, or its first layer.
        others: further GPUs over which its layers are spread.
        offloads: layers for which the GPUs have no room stay in RAM.
    """

    device: str
    dtype: torch.dtype
    reason: str
    compute_capability: tuple[int, int] | None = None
    others: tuple[str, ...] = ()
    offloads: bool = False

    @property
    def devices(self) -> tuple[str, ...]:
        """All of them."""
        return (self.device, *self.others)

    @property
    def spreads(self) -> bool:
        """Whether a model may be in several places."""
        return bool(self.others) or self.offloads


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


def why_no_bitsandbytes(
    device: str, quantization: str = "4bit", capability: tuple[int, int] | None = None
) -> str | None:
    """The reason why 4-bit or 8-bit weights cannot be had here, or None."""
    for package in ("bitsandbytes", "accelerate"):
        if not has_package(package):
            return f"{package} is not installed (pip install {package})"
    installed = importlib.metadata.version("bitsandbytes")
    if device.startswith("mps"):
        return "bitsandbytes does not run on Apple GPUs"
    oldest = _oldest_bitsandbytes(device)
    if release(installed) < release(oldest):
        return f"bitsandbytes {oldest} or later is needed, and {installed} is installed (pip install -U bitsandbytes)"
    needed = (7, 5) if quantization == "8bit" else (6, 0)
    if capability and not torch.version.hip and capability < needed:
        return "bitsandbytes needs compute capability {}.{}, and this GPU has {}.{}".format(*needed, *capability)
    return _why_not_loaded(installed) if device.startswith("cuda") else None


def _oldest_bitsandbytes(device: str) -> str:
    """The first version that runs there, and that the installed transformers takes."""
    from transformers.utils import import_utils

    return "0.49" if device == "cpu" else getattr(import_utils, "BITSANDBYTES_MIN_VERSION", "0.43.1")


def _why_not_loaded(installed: str) -> str | None:
    """bitsandbytes goes on without its library where none was built for this torch, and fails at the first product."""
    from bitsandbytes import cextension

    if "error_msg" not in vars(cextension.lib):
        return None
    built_for = torch.version.cuda or torch.version.hip
    return f"bitsandbytes {installed} has no kernels for CUDA or ROCm {built_for} (pip install -U bitsandbytes)"


# Attention -> the package that has it, its module, the oldest compute capability for it, and how to get it.
_FLASH = {
    "flash_attention_2": ("flash-attn", "flash_attn", (0, 0), "pip install flash-attn --no-build-isolation"),
    "flash_attention_3": ("flash-attn-3", "flash_attn_interface", (8, 0), "build it from flash-attention/hopper"),
    "flash_attention_4": ("flash-attn-4", "flash_attn.cute", (9, 0), "pip install --pre flash-attn-4"),
}


def why_no_flash_attention(machine: Machine, name: str = "flash_attention_2", kernel: str = "") -> str | None:
    """The reason why a FlashAttention cannot be had here, or None.

    Args:
        kernel: a kernel of the hub that may stand in for the package, where it is on disk already.
    """
    package, module, oldest, command = _FLASH[name]
    if machine.compute_capability is None and not machine.device.startswith("xpu"):
        return f"{name} needs an NVIDIA or AMD GPU, and this runs on {machine.device}"
    if machine.dtype == torch.float32:
        return f"{name} needs half precision"
    if machine.compute_capability and machine.compute_capability < oldest:
        have = machine.compute_capability
        return f"{name} needs compute capability {oldest[0]}.{oldest[1]}, and this GPU has {have[0]}.{have[1]}"
    if _has_distribution(package):
        return _why_not_imported(package, module, command)
    if kernel and has_package("kernels") and kernel_on_disk(kernel):
        return None
    return f"{package} is not installed ({command})"


def _has_distribution(name: str) -> bool:
    """By its name for pip: two versions of FlashAttention have modules of one name."""
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _why_not_imported(package: str, module: str, command: str) -> str | None:
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:
        problem = str(error).splitlines()[0]
        return f"{package} does not load, as it was built for another torch: {problem} ({command} --force-reinstall)"
    return None


def kernel_on_disk(repo_id: str) -> bool:
    """Whether a kernel of the hub was downloaded before: nothing is fetched without being asked for."""
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
