"""The devices of this machine, the placement of a model's layers on them, and the most memory that was used there."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..checks import InvalidSettingError, shown
from ..comfyui import host
from ..settings import ALL_GPUS, ALL_GPUS_AND_CPU, AUTO
from .capabilities import Machine, machine, why_no_accelerate

# Share of a GPU's free memory for weights; the rest is for a prompt's activations, and for keys and values.
SHARE_FOR_WEIGHTS = 0.85
# Least time between two checks for a cancel.
LOOK_EVERY_S = 0.02
# torch's names of the kinds of GPU that are numbered. ROCm's GPUs are called cuda.
_NUMBERED = ("cuda", "xpu")


def gpus() -> tuple[str, ...]:
    """Return the names of all GPUs, as torch has them. Counting them starts no CUDA context."""
    counts = {kind: getattr(torch, kind).device_count() for kind in _NUMBERED if hasattr(torch, kind)}
    numbered = tuple(f"{kind}:{number}" for kind, count in counts.items() for number in range(count))
    return numbered + (("mps",) if torch.backends.mps.is_available() else ())


def device_choices() -> tuple[str, ...]:
    """Return the values of the setting `device` that this machine offers."""
    found = gpus()
    spreads = (*((ALL_GPUS,) if len(found) > 1 else ()), *((ALL_GPUS_AND_CPU,) if found and found != ("mps",) else ()))
    return (AUTO, *found, "cpu", *spreads)


def require_device(asked: str) -> None:
    """Raise InvalidSettingError if this machine has no such device; the message names those that it has."""
    if asked not in device_choices():
        raise InvalidSettingError(
            f"device {shown(asked)} does not exist on this machine. Pick one of: {', '.join(device_choices())}."
        )


def machine_for(asked: str, own: str | None) -> Machine:
    """Return the machine for a value of the setting `device`.

    Args:
        asked: one of device_choices().
        own: the device that ComfyUI runs models on, taken for AUTO; None for the best device.

    Raises:
        InvalidSettingError: this machine has no such device.
    """
    require_device(asked)
    if asked == AUTO:
        return machine(own)
    if asked not in (ALL_GPUS, ALL_GPUS_AND_CPU):
        return machine(asked)
    # accelerate begins with the first GPU, even if ComfyUI uses another. All layers have the precision that fits the
    # GPU with the lowest compute capability.
    first, *others = gpus()
    weakest = min((machine(gpu) for gpu in (first, *others)), key=lambda gpu: gpu.compute_capability or (0, 0))
    return replace(weakest, device=first, others=tuple(others), offloads=asked == ALL_GPUS_AND_CPU)


def placement(where: Machine) -> dict[str, Any]:
    """Return from_pretrained keywords that place the layers. {} without accelerate: all is read into RAM first."""
    if why_no_accelerate():
        return {}
    if not where.spreads:
        # The device by name, because "auto" may put layers on the CPU, and every token would wait for them.
        return {"device_map": {"": where.device}}
    # accelerate takes GPUs by number. If max_memory has no "cpu", no layer is put there.
    limits: dict[Any, int] = {int(gpu.split(":")[1]): round(SHARE_FOR_WEIGHTS * _free(gpu)) for gpu in where.devices}
    if where.offloads:
        import psutil

        limits["cpu"] = round(SHARE_FOR_WEIGHTS * psutil.virtual_memory().available)
    return {"device_map": "auto" if where.offloads else "balanced", "max_memory": limits}


def strays(model: Any, where: Machine) -> list[str]:
    """Return names of the parts of a model that found no room on the devices that were asked for."""
    if not where.spreads:
        return []
    allowed = {"cpu"} if where.offloads else set()
    placed = getattr(model, "hf_device_map", None) or {}
    return [name for name, device in placed.items() if str(device) in {"cpu", "disk"} - allowed]


@contextmanager
def current(device: str) -> Iterator[None]:
    """Make the device torch's current one within the block: captures, and kernels that name no device, run there."""
    kind = device.split(":")[0]
    if kind in _NUMBERED:
        with getattr(torch, kind).device(device):
            yield
    else:
        yield


def cancellable(check: Callable[[], None]) -> AbstractContextManager[Any]:
    """Call check between torch operations of this thread within the block; an exception that it raises ends the block.

    transformers reads gigabytes in one call of ours. Imports are not interrupted: torchvision and others cannot be
    imported a second time.
    """
    return _Cancellable(check)


class _Cancellable(TorchFunctionMode):
    def __init__(self, check: Callable[[], None]) -> None:
        super().__init__()
        self._check = check
        self._looked_at = 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        now = time.monotonic()
        if now - self._looked_at > LOOK_EVERY_S and not _imports():
            self._looked_at = now
            self._check()
        return func(*args, **(kwargs or {}))


def _imports() -> bool:
    """Return True if this thread is in the middle of an import."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__") != "importlib._bootstrap":
        frame = frame.f_back
    return frame is not None


def own_random_numbers(where: Machine) -> AbstractContextManager[None]:
    """Restore torch's random generators after the block: transformers draws random numbers for weights it lacks."""
    kind = where.device.split(":")[0]
    if kind in _NUMBERED:
        return torch.random.fork_rng(where.devices, device_type=kind)
    return torch.random.fork_rng([])


@contextmanager
def without_bar() -> Iterator[None]:
    """Switch off transformers' own progress bars within the block, except in ComfyUI or if a variable sets them."""
    from huggingface_hub import constants
    from transformers.utils import logging

    if host.is_there() or constants.HF_HUB_DISABLE_PROGRESS_BARS is not None or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def reset_peak(device: str) -> None:
    """Begin to measure the most memory in use, on a device that counts it."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: str) -> int:
    """Return the most bytes in use since reset_peak() on a CUDA GPU; elsewhere the most RAM the process ever used."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    import psutil

    used = psutil.Process().memory_info()
    if hasattr(used, "peak_wset"):  # Windows
        return used.peak_wset
    import resource

    # ru_maxrss is in kilobytes, but in bytes on a Mac.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _free(gpu: str) -> int:
    return getattr(torch, gpu.split(":")[0]).mem_get_info(gpu)[0]
