"""Device failures that neither the user nor the model's folder causes: out of memory, or a lost GPU."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .log import log

Made = TypeVar("Made")
# torch.OutOfMemoryError exists from torch 2.5 on.
OUT_OF_MEMORY: type[RuntimeError] = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)
# Out of memory without an error type of torch's: RAM on Windows and elsewhere; GPU memory as the driver and NVIDIA's
# libraries report it; Apple's GPUs.
_RAN_OUT = re.compile(
    r"DefaultCPUAllocator: (not enough|can't allocate) memory|(CUDA|HIP) error: out of memory|_STATUS_ALLOC_FAILED"
    r"|MPS backend out of memory"
)
# The GPU's context is gone, with everything that was in its memory.
_LOST = re.compile(r"\b(CUDA|HIP|XPU) error: |_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR|NOT_INITIALIZED)")
# Errors with similar messages that leave the GPU usable.
_REFUSED = re.compile(
    r"no kernel image is available|invalid device ordinal|when stream is capturing|during capture|not supported"
)


class DeviceLostError(RuntimeError):
    """The GPU failed during a run."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if GPU memory or RAM ran out."""
    return isinstance(error, (OUT_OF_MEMORY, MemoryError)) or bool(_RAN_OUT.search(str(error)))


def is_lost_device(error: RuntimeError) -> bool:
    """Return True if this process can no longer use the GPU."""
    lost = _LOST.search(str(error)) and not _REFUSED.search(str(error))
    return bool(lost) and not is_out_of_memory(error)


def ran_out(error: BaseException) -> bool:
    """Return True if memory ran out; log it and free the tensors that the frames of the error still hold."""
    if not is_out_of_memory(error):
        return False
    log.warning("out of memory: %s", _first_line(error))
    traceback.clear_frames(error.__traceback__)
    return True


def unless_out_of_memory(work: Callable[[], Made]) -> Made | None:
    """Return work()'s result, or None if memory ran out; then everything that it allocated is freed."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
    return None


def retry_with_memory(
    work: Callable[[], Made], drop_buffers: Callable[[], None], free_memory: Callable[[bool], None]
) -> Made:
    """Return work()'s result; if memory runs out, drop the buffers, free memory and try again.

    Args:
        free_memory: called with False the first time, then with True; frees memory, or raises.
    """
    again = False
    while (result := unless_out_of_memory(work)) is None:
        drop_buffers()
        free_memory(again)
        again = True
    return result


def why_lost(model: str, error: RuntimeError) -> DeviceLostError:
    """Build the error that says what happened, what was lost, and what to do."""
    return DeviceLostError(
        f"The GPU failed while {model} was used ({_first_line(error)}). The model was unloaded, for "
        "what it held there is lost. Run it again; if the error stays, restart ComfyUI, since no process can use a GPU "
        "again after it. If it comes back after that, look at the GPU's driver, power and heat, or set device to cpu."
    )


@contextmanager
def running_out_at_once() -> Iterator[None]:
    """Context manager for reading weights that ends the block as soon as an operator runs out of memory.

    From version 5 on, transformers catches every error while it converts or quantizes a weight, reads all the others,
    and then raises an error of its own that does not mention memory.
    """
    try:
        with _Watch():
            yield
    except _RanOutError as error:
        raise OUT_OF_MEMORY(str(error)) from None


class _RanOutError(BaseException):
    """Derived from BaseException, so that `except Exception` does not catch it."""


class _Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Callable[..., Made], types: Any, args: Any = (), kwargs: Any = None) -> Made:
        try:
            return func(*args, **(kwargs or {}))
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise _RanOutError(str(error)) from None
            raise


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
