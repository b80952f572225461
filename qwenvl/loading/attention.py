"""The choice of the attention implementation: by the setting, the machine, the model and the installed transformers."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from ..models.checkpoint import Checkpoint
from . import capabilities
from .capabilities import Machine, why_no_flash_attention

# Implementations that need nothing but torch, for every model and device.
_PLAIN = ("sdpa", "eager")
_FLASH_2_IS_MADE_FOR = (8, 0)


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """The attention that will be used.

    Attributes:
        name: as transformers calls it.
        reason: why it is not the one that was asked for; "" if it is.
        hint: a known problem that it may have; "" if none is known.
    """

    name: str
    reason: str = ""
    hint: str = ""


def plan_attention(asked: str, checkpoint: Checkpoint, machine: Machine) -> AttentionPlan:
    """Choose the attention before weights are read: the one that was asked for, or sdpa if that cannot be used."""
    if asked == "auto":
        return AttentionPlan("sdpa")
    if asked not in _PLAIN and (reason := why_not(asked, checkpoint, machine)):
        return AttentionPlan("sdpa", f"{reason}; using sdpa instead")
    return AttentionPlan(asked, hint=_hint(asked, machine))


def why_not(name: str, checkpoint: Checkpoint, machine: Machine) -> str | None:
    """Return the reason why that attention cannot be used for that model here, or None."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        return f"transformers {version('transformers')} has no {name} (pip install -U transformers)"
    kind = name.split("_")[0]
    if not getattr(_model_class(checkpoint), f"_supports_{kind}_attn", False):
        return f"transformers offers no {name} for {checkpoint.family} models"
    if kind == "flash":
        return why_no_flash_attention(machine, name, _kernel_of(name))
    return _why_no_flex(machine)


def _hint(name: str, machine: Machine) -> str:
    ability = machine.compute_capability
    if name != "flash_attention_2" or ability is None or ability >= _FLASH_2_IS_MADE_FOR:
        return ""
    return (
        f"{name} is made for compute capability 8.0 and later, and this GPU has {ability[0]}.{ability[1]}: "
        "if it fails, take sdpa"
    )


def _why_no_flex(machine: Machine) -> str | None:
    if not machine.device.startswith(("cuda", "xpu")):
        return f"flex_attention is compiled for GPUs, and this runs on {machine.device}"
    if not capabilities.has_package("triton"):
        return "flex_attention needs Triton (pip install triton; on Windows, pip install triton-windows)"
    return None


def _kernel_of(name: str) -> str:
    """Return the hub's kernel that transformers uses if the package is missing; "" if it has none."""
    from transformers import modeling_flash_attention_utils as utils

    return getattr(utils, "FLASH_ATTN_KERNEL_FALLBACK", {}).get(name, "")


def _model_class(checkpoint: Checkpoint) -> Any:
    import transformers
    from transformers.models.auto import modeling_auto

    kind = "IMAGE_TEXT_TO_TEXT" if checkpoint.has_vision else "CAUSAL_LM"
    names = getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES")
    return getattr(transformers, names.get(checkpoint.family, ""), None)
