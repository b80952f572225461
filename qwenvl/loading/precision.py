"""The choice of how weights are stored in memory: by the setting, the checkpoint, and what this machine can do."""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..comfyui import host
from ..cpu.choice import Choices
from ..cpu.packing import pack, why_no_form
from ..models.checkpoint import Checkpoint
from . import capabilities
from .capabilities import Machine, why_no_bitsandbytes

# Modules that bitsandbytes leaves in the machine's precision: the output head and the vision tower, as in the
# checkpoints that Qwen quantizes itself, and small weights with a large effect: the router of a mixture, the
# decay of linear attention. Versions of transformers match these names differently, hence several for one module.
UNQUANTIZED = (
    "lm_head",
    "visual",
    "model.visual",
    "gate",
    "shared_expert_gate",
    "in_proj_a",
    "in_proj_b",
    "in_proj_ba",
)
# A checkpoint's quantization -> the packages that read it: pip's name -> name of the module.
_PACKAGES = {
    "awq": {"gptqmodel": "gptqmodel"},
    "gptq": {"optimum": "optimum", "gptqmodel": "gptqmodel"},
    "compressed-tensors": {"compressed-tensors": "compressed_tensors"},
}
_AWQ_OF_TRANSFORMERS_4 = {"autoawq": "awq"}
# Warnings to drop: logger -> beginning of the line.
_NOISE = {
    # Logged at every matrix product of every token of LLM.int8, which is meant to work like this.
    "bitsandbytes.autograd._functions": "MatMul8bitLt: inputs will be cast",
    # Logged at its import about an optional package; bitsandbytes has kernels of its own.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # Logged with an older torch for a model on the CPU, or for layers in RAM, which `device` asked for.
    "accelerate.big_modeling": "Some parameters are on the meta device",
}
_PLAIN = (torch.float32, torch.bfloat16, torch.float16)
# Share of the free RAM that a head may take which is the embedding as well, and so is stored twice.
_SPARE = 0.25
_FP8_KERNEL = "kernels-community/finegrained-fp8"


class PrecisionError(RuntimeError):
    """A checkpoint stores its weights in a way that cannot be read here."""


@dataclass(frozen=True, slots=True)
class Precision:
    """How the weights will be stored.

    Attributes:
        name: "none", "4bit" or "8bit"; or the checkpoint's own quantization, as checkpoint.py names it.
        expands: the format of quantized weights that become plain numbers when they are read; "" if none do.
        reason: why it is not what was asked for; "" if it is.
        packed: True if the layers are quantized for this CPU's own products after they were read, not by bitsandbytes.
    """

    name: str
    expands: str = ""
    reason: str = ""
    packed: bool = False


def plan_precision(asked: str, checkpoint: Checkpoint, machine: Machine) -> Precision:
    """Choose the precision: the checkpoint's own if it is quantized, else the one asked for, else none.

    Raises:
        PrecisionError: the checkpoint's own quantization cannot be read here.
    """
    if checkpoint.quantized:
        own = _as_stored(checkpoint.quantized, machine)
        if asked != "none" and not checkpoint.quantized.endswith(asked):
            stored = f"{asked} has no effect: the checkpoint's weights are stored as {checkpoint.quantized}"
            return Precision(own.name, own.expands, f"{stored}; {own.reason}" if own.reason else stored)
        return own
    if asked == "none":
        return Precision("none")
    if machine.device == "cpu" and not why_no_form(asked, machine.dtype, Choices(measurements())):
        return Precision(asked, reason=_leaves_experts(asked, checkpoint), packed=True)
    if reason := why_no_bitsandbytes(machine.device, asked, machine.compute_capability):
        return Precision("none", reason=f"{asked} is not possible here: {reason}; using none instead")
    return Precision(asked, reason=_leaves_experts(asked, checkpoint))


def _leaves_experts(asked: str, checkpoint: Checkpoint) -> str:
    if checkpoint.moe and experts_are_fused():
        return f"{asked} leaves the experts of this model as they are: {_FUSED}"
    return ""


def precision_options(precision: str, dtype: torch.dtype, packed: bool = False) -> dict[str, Any]:
    """Return the keywords of from_pretrained. {} for a quantized checkpoint: transformers reads its config.json.

    Args:
        packed: True if the layers are quantized after they were read.
    """
    by_bitsandbytes = precision in ("4bit", "8bit") and not packed
    return {"quantization_config": _bitsandbytes(precision, dtype)} if by_bitsandbytes else {}


def measurements() -> Path:
    """Return the file that keeps which products are the fastest on this CPU."""
    return host.user_folder() / "cpu.json"


def pack_for_cpu(model: Any, quantization: str) -> int:
    """Bring a loaded model's layers into the form that this CPU reads fastest; returns how many were changed."""
    routers = tuple(name for name in UNQUANTIZED if name != "lm_head" and "visual" not in name)
    spare = round(_SPARE * host.free_ram())
    return pack(model, quantization, Choices(measurements()), routers, spare)


def quiet_others() -> None:
    """Drop warnings of bitsandbytes and accelerate about things that are as they should be."""
    for name, beginning in _NOISE.items():
        logger = logging.getLogger(name)
        if not any(isinstance(present, _Without) for present in logger.filters):
            logger.addFilter(_Without(beginning))


def have_expanded(config: Any) -> None:
    """Let transformers turn a checkpoint's quantized weights into plain numbers while it reads them.

    Args:
        config: the model's config; its quantization_config is changed.
    """
    # A keyword of from_pretrained would do the same, but with a warning that the checkpoint's own settings win.
    if config.quantization_config["quant_method"] == "fp8" or _can_expand("CompressedTensorsConfig"):
        config.quantization_config["dequantize"] = True
    else:
        config.quantization_config["run_compressed"] = False


def in_one_dtype(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Convert weights that are not quantized to the dtype: transformers 5 leaves them as they are stored."""
    for name, weight in model.named_parameters():
        if name.endswith((".weight", ".bias")) and weight.dtype in _PLAIN and weight.dtype != dtype:
            weight.data = weight.data.to(dtype)


def experts_are_fused() -> bool:
    """Return True if all experts of a layer are one tensor, as in transformers 5; bitsandbytes cannot quantize that."""
    return not version("transformers").startswith("4.")


def why_no_fp8(machine: Machine) -> str | None:
    """Return the reason why FP8 weights cannot be used here without making them plain, or None."""
    if not machine.device.startswith(("cuda", "xpu")):
        return f"FP8 is computed on GPUs only, and this runs on {machine.device}"
    if machine.compute_capability and machine.compute_capability < (8, 9):
        return "FP8 needs compute capability 8.9, and this GPU has {}.{}".format(*machine.compute_capability)
    if not capabilities.has_package("triton"):
        return "its kernel needs Triton (pip install triton; on Windows, pip install triton-windows)"
    if not _fp8_comes_from_the_hub():
        return None
    if not capabilities.has_package("kernels"):
        return "its kernel needs the package kernels (pip install kernels)"
    if not capabilities.kernel_on_disk(_FP8_KERNEL):
        return f"its kernel is not on disk (hf download {_FP8_KERNEL} --repo-type kernel)"
    return None


_FUSED = (
    "transformers keeps them in one tensor per layer, which bitsandbytes does not quantize; a checkpoint that is "
    "stored as FP8 needs half of the memory"
)


def _as_stored(stored: str, machine: Machine) -> Precision:
    """Return the checkpoint's own precision; PrecisionError if it cannot be read here."""
    if stored.startswith("bitsandbytes"):
        bits = "8bit" if stored.endswith("8bit") else "4bit"
        missing = why_no_bitsandbytes(machine.device, bits, machine.compute_capability)
    else:
        missing = _why_no_package(stored)
    if missing:
        raise PrecisionError(f"The weights are stored as {stored}, which cannot be read here: {missing}.")
    if stored == "fp8" and (reason := why_no_fp8(machine)):
        return _expanded_fp8(reason, machine.dtype)
    if stored == "compressed-tensors":
        return Precision("none", stored, "its compressed weights are made plain when they are read")
    return Precision(stored)


def _expanded_fp8(reason: str, dtype: torch.dtype) -> Precision:
    if not _can_expand("FineGrainedFP8Config"):
        raise PrecisionError(
            f"The weights are stored as fp8, which cannot be read here: {reason}. transformers 5 can make them "
            f"plain, and {version('transformers')} is installed: pip install -U transformers"
        )
    name = str(dtype).removeprefix("torch.")
    return Precision("none", "fp8", f"its fp8 weights are made {name}, which takes more memory: {reason}")


def _can_expand(config_class: str) -> bool:
    """Return True if transformers' settings class of that name can turn quantized weights into plain numbers."""
    import transformers

    return "dequantize" in inspect.signature(getattr(transformers, config_class)).parameters


def _why_no_package(stored: str) -> str | None:
    packages = _PACKAGES.get(stored, {})
    if stored == "awq" and not experts_are_fused():
        packages = _AWQ_OF_TRANSFORMERS_4
    missing = [name for name, module in packages.items() if not capabilities.has_package(module)]
    return f"it needs what is not installed (pip install {' '.join(missing)})" if missing else _why_unknown(stored)


def _why_unknown(stored: str) -> str | None:
    """Return why transformers cannot read that quantization, or None. It would only warn, and load wrong weights."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    if stored in AUTO_QUANTIZER_MAPPING:
        return None
    return f"transformers {version('transformers')} does not know it (pip install -U transformers)"


def _fp8_comes_from_the_hub() -> bool:
    """Return True if transformers takes its FP8 kernel from the hub; older versions contain it."""
    from transformers.integrations import hub_kernels

    return _FP8_KERNEL.split("/")[1] in getattr(hub_kernels, "_HUB_KERNEL_MAPPING", {})


def _bitsandbytes(quantization: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(UNQUANTIZED))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(UNQUANTIZED),
    )


class _Without(logging.Filter):
    """A log filter that drops lines with the given beginning."""

    def __init__(self, beginning: str) -> None:
        super().__init__()
        self._beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self._beginning)
