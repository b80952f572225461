"""A model that computes NaN or infinity: what is loaded in its place, and what is said where nothing can be."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..comfyui import host
from ..errors import NotFiniteError
from .cache import ModelCache
from .loader import ModelHandle
from .source import ModelSource

# Precisions of weights beside which float32 can be computed in.
_WIDENED = ("none", "4bit")


def in_float32(source: ModelSource, handle: ModelHandle) -> ModelSource | None:
    """The same model in float32, which holds what float16 does not; None where it was not float16 that overflowed, or
    where the weights' own precision leaves no choice."""
    if handle.machine.dtype != torch.float16 or handle.plan.quantization not in _WIDENED:
        return None
    reason = f"{source.spec.model} overflows in float16, so it is computed in float32, which takes more memory and time"
    machine = replace(source.machine, dtype=torch.float32, reason=reason)
    return replace(source, machine=machine, fallback=reason)


def has_room(models: ModelCache, before: ModelSource, after: ModelSource, request_bytes: int) -> bool:
    """Whether the one model, with a request, fits where the other is now, once others have made room."""
    models.free_memory(before.spec, after.size() - before.size() + request_bytes)
    free = sum(host.free_bytes(device) for device in before.devices)
    return after.size() + request_bytes <= free + before.size()


def why_not_finite(handle: ModelHandle, error: NotFiniteError, rows: int) -> list[NotFiniteError]:
    """For each row that the error is of, one that says which answer it was, what it was computed with, and what helps.

    Args:
        rows: how many the batch has.
    """
    return [_told(handle, error, row, rows) for row in error.rows]


def _told(handle: ModelHandle, error: NotFiniteError, row: int, rows: int) -> NotFiniteError:
    plan, machine = handle.plan, handle.machine
    told = NotFiniteError([row], error.token)
    dtype = str(machine.dtype).removeprefix("torch.")
    which = f" of answer {row + 1} of {rows} that were made together" if rows > 1 else ""
    stored = "" if plan.quantization == "none" else f", {plan.quantization}"
    told.args = (
        f"{handle.spec.model} computes no numbers (NaN or infinity) for token {error.token + 1}{which}, in {dtype} on "
        f"{machine.device} with attention {plan.attention}{stored}. What may help: {'; '.join(_advice(handle))}.",
    )
    return told


def _advice(handle: ModelHandle) -> list[str]:
    plan, machine = handle.plan, handle.machine
    advice = []
    if machine.dtype == torch.float16:
        advice.append("a GPU that computes in bfloat16, since float16 overflows with some models")
    if machine.device != "cpu":
        advice.append("device cpu, which computes in bfloat16 or float32")
    advice.append(f"attention_mode {'sdpa' if plan.attention == 'eager' else 'eager'}")
    if plan.quantization != "none":
        advice.append(f"the same model not stored as {plan.quantization}")
    advice.append("downloading it again, for its weights may be damaged")
    return advice
