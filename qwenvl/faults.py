"""What goes wrong on a device and is nobody's mistake: memory runs out, or the device itself fails."""

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
# Of torch itself from 2.5 on.
OUT_OF_MEMORY: type[RuntimeError] = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)
# RAM, for which torch has no type of its own: on Windows, and elsewhere; a GPU's memory by its driver's own words, and
# by those of NVIDIA's libraries; Apple's.
_RAN_OUT = re.compile(
    r"DefaultCPUAllocator: (not enough|can't allocate) memory|(CUDA|HIP) error: out of memory|_STATUS_ALLOC_FAILED"
    r"|MPS backend out of memory"
)
# A GPU whose context is gone, with everything that was on it.
_LOST = re.compile(r"\b(CUDA|HIP|XPU) error: |_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR|NOT_INITIALIZED)")
# Errors that are told in the same words and leave the GPU as it was.
_REFUSED = re.compile(
    r"no kernel image is available|invalid device ordinal|when stream is capturing|during capture|not supported"
)


class DeviceLostError(RuntimeError):
    """The GPU failed in the middle of the work."""


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU, or of RAM."""
    return isinstance(error, (OUT_OF_MEMORY, MemoryError)) or bool(_RAN_OUT.search(str(error)))


def is_lost_device(error: RuntimeError) -> bool:
    """Whether the GPU can no longer be used by this process."""
    lost = _LOST.search(str(error)) and not _REFUSED.search(str(error))
    return bool(lost) and not is_out_of_memory(error)


def ran_out(error: BaseException) -> bool:
    """Whether memory ran out. What was made until then is given back: it is still in the frames of the error."""
    if not is_out_of_memory(error):
        return False
    log.warning("out of memory: %s", _first_line(error))
    traceback.clear_frames(error.__traceback__)
    return True


def unless_out_of_memory(work: Callable[[], Made]) -> Made | None:
    """What work() gives, or None where memory ran out, with everything that it made given back."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
    return None


def retry_with_memory(
    work: Callable[[], Made], drop_buffers: Callable[[], None], free_memory: Callable[[bool], None]
) -> Made:
    """What work() gives; where memory runs out, once more with the buffers gone and room made.

    Args:
        free_memory: called with whether it was tried again; makes room, or raises.
    """
    again = False
    while (made := unless_out_of_memory(work)) is None:
        drop_buffers()
        free_memory(again)
        again = True
    return made


def why_lost(model: str, error: RuntimeError) -> DeviceLostError:
    """The error that says what happened, what is gone, and what to do."""
    return DeviceLostError(
        f"The GPU failed while {model} was used ({_first_line(error)}). The model was unloaded, for "
        "what it held there is lost. Run it again; if the error stays, restart ComfyUI, since no process can use a GPU "
        "again after it. If it comes back after that, look at the GPU's driver, power and heat, or set device to cpu."
    )


@contextmanager
def running_out_at_once() -> Iterator[None]:
    """For reading weights: within the block, an operator that runs out of memory ends it with that error.

    From version 5 on, transformers catches whatever goes wrong while it converts or quantizes a weight, reads all the
    others, and raises an error of its own, by which nobody would know that memory is what is missing.
    """
    try:
        with _Watch():
            yield
    except _RanOutError as error:
        raise OUT_OF_MEMORY(str(error)) from None


class _RanOutError(BaseException):
    """No Exception, so that it passes by those who catch all of them."""


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
