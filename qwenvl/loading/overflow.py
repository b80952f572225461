"""Models that compute NaN or infinity: the same model in float32 instead, or an error that says what may help."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..comfyui import host
from ..errors import NotFiniteError
from .cache import ModelCache
from .loader import ModelHandle
from .source import ModelSource

# Quantizations with which a model can be computed in float32.
_WIDENED = ("none", "4bit")


def in_float32(source: ModelSource, handle: ModelHandle) -> ModelSource | None:
    """Return the source of the same model in float32, which has a larger range than float16.

    None if the model was not computed in float16, or its quantization does not work with float32.
    """
    if handle.machine.dtype != torch.float16 or handle.plan.quantization not in _WIDENED:
        return None
    reason = f"{source.spec.model} overflows in float16, so it is computed in float32, which takes more memory and time"
    machine = replace(source.machine, dtype=torch.float32, reason=reason)
    return replace(source, machine=machine, fallback=reason)


def has_room(models: ModelCache, before: ModelSource, after: ModelSource, request_bytes: int) -> bool:
    """Free memory of other models; return True if `after` and a request then fit in the place of `before`."""
    models.free_memory(before.spec, after.size() - before.size() + request_bytes)
    free = sum(host.free_bytes(device) for device in before.devices)
    return after.size() + request_bytes <= free + before.size()


def why_not_finite(handle: ModelHandle, error: NotFiniteError, rows: int) -> list[NotFiniteError]:
    """Return an error for each row of the given one: which answer it was, how it was computed, and what may help.

    Args:
        rows: number of rows of the batch.
    """
    return [_explained(handle, error, row, rows) for row in error.rows]


def _explained(handle: ModelHandle, error: NotFiniteError, row: int, rows: int) -> NotFiniteError:
    plan, machine = handle.plan, handle.machine
    explained = NotFiniteError([row], error.token)
    dtype = str(machine.dtype).removeprefix("torch.")
    which = f" of answer {row + 1} of {rows} that were made together" if rows > 1 else ""
    stored = "" if plan.quantization == "none" else f", {plan.quantization}"
    explained.args = (
        f"{handle.spec.model} computes no numbers (NaN or infinity) for token {error.token + 1}{which}, in {dtype} on "
        f"{machine.device} with attention {plan.attention}{stored}. What may help: {'; '.join(_advice(handle))}.",
    )
    return explained


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
    advice.append("downloading it again, because its weights may be damaged")
    return advice
