"""Which devices there are, what a choice of them means, where a model's layers go, and the most that was held there."""

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

# Of each GPU's free memory; the rest is for a prompt's activations, and for keys and values.
SHARE_FOR_WEIGHTS = 0.85
# Between two looks for a cancel.
LOOK_EVERY_S = 0.02
# What torch calls the GPUs that come numbered. ROCm's are called cuda.
_NUMBERED = ("cuda", "xpu")


def gpus() -> tuple[str, ...]:
    """Every GPU, by torch's name. Counting them starts no CUDA context."""
    counts = {kind: getattr(torch, kind).device_count() for kind in _NUMBERED if hasattr(torch, kind)}
    numbered = tuple(f"{kind}:{number}" for kind, count in counts.items() for number in range(count))
    return numbered + (("mps",) if torch.backends.mps.is_available() else ())


def device_choices() -> tuple[str, ...]:
    """What can be asked for on this machine."""
    found = gpus()
    spreads = (*((ALL_GPUS,) if len(found) > 1 else ()), *((ALL_GPUS_AND_CPU,) if found and found != ("mps",) else ()))
    return (AUTO, *found, "cpu", *spreads)


def require_device(asked: str) -> None:
    """Raise InvalidSettingError, which names those that exist, where this machine has no such device."""
    if asked not in device_choices():
        raise InvalidSettingError(
            f"device {shown(asked)} does not exist on this machine. Pick one of: {', '.join(device_choices())}."
        )


def machine_for(asked: str, own: str | None) -> Machine:
    """The machine that a choice means.

    Args:
        asked: one of device_choices().
        own: the device that ComfyUI runs models on; None to choose one.
    """
    require_device(asked)
    if asked == AUTO:
        return machine(own)
    if asked not in (ALL_GPUS, ALL_GPUS_AND_CPU):
        return machine(asked)
    # accelerate begins with the first, whichever ComfyUI uses. All layers have one precision: the oldest GPU decides.
    first, *others = gpus()
    weakest = min((machine(gpu) for gpu in (first, *others)), key=lambda one: one.compute_capability or (0, 0))
    return replace(weakest, device=first, others=tuple(others), offloads=asked == ALL_GPUS_AND_CPU)


def placement(where: Machine) -> dict[str, Any]:
    """from_pretrained keywords that say which layer goes where. None without accelerate: all is read into RAM."""
    if why_no_accelerate():
        return {}
    if not where.spreads:
        # One named device: "auto" may put layers on the CPU, and every token would wait for them.
        return {"device_map": {"": where.device}}
    # accelerate knows GPUs by number. Without the CPU among them, nothing can go there.
    limits: dict[Any, int] = {int(gpu.split(":")[1]): round(SHARE_FOR_WEIGHTS * _free(gpu)) for gpu in where.devices}
    if where.offloads:
        import psutil

        limits["cpu"] = round(SHARE_FOR_WEIGHTS * psutil.virtual_memory().available)
    return {"device_map": "auto" if where.offloads else "balanced", "max_memory": limits}


def strays(model: Any, where: Machine) -> list[str]:
    """Names of the parts of a model that found no place where it should be."""
    if not where.spreads:
        return []
    allowed = {"cpu"} if where.offloads else set()
    placed = getattr(model, "hf_device_map", None) or {}
    return [name for name, device in placed.items() if str(device) in {"cpu", "disk"} - allowed]


@contextmanager
def current(device: str) -> Iterator[None]:
    """Kernels that name no device, and captures, run on torch's current one: within the block, that is this one."""
    kind = device.split(":")[0]
    if kind in _NUMBERED:
        with getattr(torch, kind).device(device):
            yield
    else:
        yield


def cancellable(check: Callable[[], None]) -> AbstractContextManager[Any]:
    """Within the block, check is called between torch operations of this thread; raising in it ends the work.

    transformers reads gigabytes in one call, with nothing of ours in between. Imports are left alone: torchvision and
    others cannot be imported a second time.
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
    """Whether this thread is in the middle of importing something."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__") != "importlib._bootstrap":
        frame = frame.f_back
    return frame is not None


def own_random_numbers(where: Machine) -> AbstractContextManager[None]:
    """Within the block, random numbers that are drawn move nobody's seed: transformers draws weights that it lacks."""
    kind = where.device.split(":")[0]
    if kind in _NUMBERED:
        return torch.random.fork_rng(where.devices, device_type=kind)
    return torch.random.fork_rng([])


@contextmanager
def without_bar() -> Iterator[None]:
    """Within the block, transformers draws no bar of its own before the answer, but in ComfyUI's terminal."""
    from huggingface_hub import constants
    from transformers.utils import logging

    # Somebody may have said by a variable what is wanted.
    if host.is_there() or constants.HF_HUB_DISABLE_PROGRESS_BARS is not None or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def reset_peak(device: str) -> None:
    """Begin to look for the most memory that is held, where a device counts it."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: str) -> int:
    """The most that was held since reset_peak on a GPU; elsewhere the most RAM that the process has ever had."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    import psutil

    used = psutil.Process().memory_info()
    if hasattr(used, "peak_wset"):  # Windows
        return used.peak_wset
    import resource

    # Kilobytes, but bytes on a Mac.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _free(gpu: str) -> int:
    return getattr(torch, gpu.split(":")[0]).mem_get_info(gpu)[0]
