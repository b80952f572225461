"""Facts about this machine, found without starting a CUDA context."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch

from ..packages import version_of, why_not_imported
from . import nvml

# Package -> the names of the distributions that provide it.
PACKAGES = {
    "transformers": ("transformers",),
    "accelerate": ("accelerate",),
    "bitsandbytes": ("bitsandbytes",),
    "flash-attn": ("flash-attn",),
    "flash-linear-attention": ("flash-linear-attention", "fla-core"),
    "causal-conv1d": ("causal-conv1d",),
    "triton": ("triton", "triton-windows", "pytorch-triton-rocm", "triton-rocm"),
    "torchvision": ("torchvision",),
    "nvidia-ml-py": ("nvidia-ml-py", "pynvml"),
}


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU: its name and its architecture, such as sm_120 (NVIDIA) or gfx942 (AMD)."""

    name: str
    arch: str

    @property
    def capability(self) -> tuple[int, int] | None:
        """The compute capability of a GPU of NVIDIA's, else None."""
        return capability_of(self.arch)


@dataclass(frozen=True, slots=True)
class Facts:
    """Facts about a machine: torch, GPUs, driver and packages."""

    torch: str
    # What torch was built for: CUDA, HIP, and the architectures whose kernels it holds.
    cuda: str | None = None
    hip: str | None = None
    archs: tuple[str, ...] = ()
    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    # "mps" or "xpu" if torch offers it.
    other_device: str = ""
    packages: Mapping[str, str] = field(default_factory=dict)
    # As in "cuda128", "rocm64", "cpu".
    bitsandbytes_builds: tuple[str, ...] = ()
    # Why the compiled part of flash-attn cannot be imported; "" if it can, or if it was not tried.
    flash_attn_error: str = ""
    python: str = "3.12.0"
    system: str = "Linux x86_64"
    pip: str = "pip"

    @property
    def on_gpu(self) -> bool:
        """True if there are GPUs and torch was built with CUDA or ROCm."""
        return bool(self.gpus and (self.cuda or self.hip))

    def has(self, package: str) -> bool:
        return package in self.packages


def probe(thorough: bool = False) -> Facts:
    """Collect the facts of this machine.

    Args:
        thorough: also import the compiled part of flash-attn, which takes a second and shows if it fits torch.
    """
    portable = Path(sys.executable).parent.name == "python_embeded"
    return Facts(
        torch=torch.__version__,
        cuda=torch.version.cuda,
        hip=torch.version.hip,
        archs=_archs(),
        gpus=_gpus(),
        driver=None if torch.version.hip else nvml.driver(),
        other_device=_other_device(),
        packages=_packages(),
        bitsandbytes_builds=_bitsandbytes_builds(),
        flash_attn_error=_flash_attn_error() if thorough else "",
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        pip=r"python_embeded\python.exe -m pip" if portable else "pip",
    )


def capability_of(arch: str) -> tuple[int, int] | None:
    """Parse an architecture: sm_120 -> (12, 0); None if it is not NVIDIA's."""
    found = re.fullmatch(r"sm_(\d+)(\d)[af]?", arch)
    return (int(found[1]), int(found[2])) if found else None


def _archs() -> tuple[str, ...]:
    # In older versions of torch, torch.cuda.get_arch_list() is empty if CUDA does not start.
    flags = getattr(torch._C, "_cuda_getArchFlags", None)
    return tuple((flags() or "").split()) if flags else ()


def _gpus() -> tuple[Gpu, ...]:
    # Asking torch would start a context, so it is asked only if one exists.
    if torch.cuda.is_initialized():
        found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return tuple(
            Gpu(gpu.name, gpu.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{gpu.major}{gpu.minor}")
            for gpu in found
        )
    if torch.version.hip:
        return ()
    return tuple(Gpu(name, f"sm_{major}{minor}") for name, (major, minor) in nvml.gpus())


def _other_device() -> str:
    if torch.backends.mps.is_available():
        return "mps"
    return "xpu" if hasattr(torch, "xpu") and torch.xpu.is_available() else ""


def _packages() -> dict[str, str]:
    found = {name: version_of(*distributions) for name, distributions in PACKAGES.items()}
    return {name: version for name, version in found.items() if version}


def _bitsandbytes_builds() -> tuple[str, ...]:
    try:
        files = metadata.files("bitsandbytes") or []
    except metadata.PackageNotFoundError:
        return ()
    matches = (re.fullmatch(r"libbitsandbytes_(\w+)\.\w+", file.name) for file in files)
    return tuple(sorted(match[1] for match in matches if match))


def _flash_attn_error() -> str:
    # Without a spec it is not installed, or it is the build for AMD, whose module has another name.
    return why_not_imported("flash_attn_2_cuda") if find_spec("flash_attn_2_cuda") else ""
