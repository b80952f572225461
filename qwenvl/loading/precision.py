"""How the weights are stored in memory: what was asked for, what the checkpoint brings, what this machine can do."""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from ..models.checkpoint import Checkpoint
from . import capabilities
from .capabilities import Machine, why_no_bitsandbytes

# What stays in the machine's precision when bitsandbytes quantizes: the output head and the vision tower, as in the
# checkpoints that Qwen quantizes itself, and what weighs nothing and decides much: the router of a mixture, the
# decay of linear attention. Each version of transformers matches these names in a way of its own.
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
# How a checkpoint stores its weights -> the packages that read it, by what pip calls them, and by module.
_PACKAGES = {
    "awq": {"gptqmodel": "gptqmodel"},
    "gptq": {"optimum": "optimum", "gptqmodel": "gptqmodel"},
    "compressed-tensors": {"compressed-tensors": "compressed_tensors"},
}
_AWQ_OF_TRANSFORMERS_4 = {"autoawq": "awq"}
# Logger -> how the line begins.
_NOISE = {
    # At every matrix product of every token of LLM.int8, which works so.
    "bitsandbytes.autograd._functions": "MatMul8bitLt: inputs will be cast",
    # When it is imported: it has kernels of its own, and others are a package that nobody asked for.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # With an older torch on the CPU, where a model is meant to be; otherwise `device` asked for it.
    "accelerate.big_modeling": "Some parameters are on the meta device",
}
_PLAIN = (torch.float32, torch.bfloat16, torch.float16)
_FP8_KERNEL = "kernels-community/finegrained-fp8"


class PrecisionError(RuntimeError):
    """A checkpoint stores its weights in a way that cannot be read here."""


@dataclass(frozen=True, slots=True)
class Precision:
    """How the weights will be stored.

    Attributes:
        name: "none", "4bit" or "8bit"; or what the checkpoint brings, as checkpoint.py names it.
        expands: how the checkpoint stores weights that are made plain while they are read; "" where none are.
        reason: why this is not what was asked for; "" where it is.
    """

    name: str
    expands: str = ""
    reason: str = ""


def plan_precision(asked: str, checkpoint: Checkpoint, machine: Machine) -> Precision:
    """What can be had of what was asked for.

    Raises:
        PrecisionError: the checkpoint's own way cannot be had, and there is no other.
    """
    if checkpoint.quantized:
        own = _as_stored(checkpoint.quantized, machine)
        if asked != "none" and not checkpoint.quantized.endswith(asked):
            stored = f"{asked} has no effect: the checkpoint's weights are stored as {checkpoint.quantized}"
            return Precision(own.name, own.expands, f"{stored}; {own.reason}" if own.reason else stored)
        return own
    if asked == "none":
        return Precision("none")
    if reason := why_no_bitsandbytes(machine.device, asked, machine.compute_capability):
        return Precision("none", reason=f"{asked} is not possible here: {reason}; using none instead")
    if checkpoint.moe and experts_are_fused():
        return Precision(asked, reason=f"{asked} leaves the experts of this model as they are: {_FUSED}")
    return Precision(asked)


def precision_options(precision: str, dtype: torch.dtype) -> dict[str, Any]:
    """from_pretrained keywords. What a checkpoint brings needs none: transformers reads it from config.json."""
    return {"quantization_config": _bitsandbytes(precision, dtype)} if precision in ("4bit", "8bit") else {}


def quiet_others() -> None:
    """Leave out of the log what bitsandbytes and accelerate warn of where all is well."""
    for name, beginning in _NOISE.items():
        logger = logging.getLogger(name)
        if not any(isinstance(each, _Without) for each in logger.filters):
            logger.addFilter(_Without(beginning))


def have_expanded(config: Any) -> None:
    """Let transformers make a checkpoint's stored weights plain while it reads them.

    Args:
        config: the model's; what it says of quantization is changed.
    """
    # As a keyword of from_pretrained the same would give a warning that the checkpoint's own settings win.
    if config.quantization_config["quant_method"] == "fp8" or _can_expand("CompressedTensorsConfig"):
        config.quantization_config["dequantize"] = True
    else:
        config.quantization_config["run_compressed"] = False


def in_one_dtype(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Convert what is not quantized: beside quantized weights, transformers 5 leaves it in whatever was stored."""
    for name, weight in model.named_parameters():
        if name.endswith((".weight", ".bias")) and weight.dtype in _PLAIN and weight.dtype != dtype:
            weight.data = weight.data.to(dtype)


def experts_are_fused() -> bool:
    """Whether all experts of a layer are one tensor, as in transformers 5: bitsandbytes only knows linear layers."""
    return not version("transformers").startswith("4.")


def why_no_fp8(machine: Machine) -> str | None:
    """The reason why weights that are stored as FP8 cannot be computed with as they are, or None."""
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
    """The checkpoint's own precision; raises PrecisionError where it cannot be read."""
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
        return Precision("none", stored, "its compressed weights are made plain before they are computed with")
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
    """Whether the settings of that class know how to have stored weights made plain."""
    import transformers

    return "dequantize" in inspect.signature(getattr(transformers, config_class)).parameters


def _why_no_package(stored: str) -> str | None:
    packages = _PACKAGES.get(stored, {})
    if stored == "awq" and not experts_are_fused():
        packages = _AWQ_OF_TRANSFORMERS_4
    missing = [name for name, module in packages.items() if not capabilities.has_package(module)]
    return f"it needs what is not installed (pip install {' '.join(missing)})" if missing else _why_unknown(stored)


def _why_unknown(stored: str) -> str | None:
    """transformers itself only warns, and then takes the stored numbers for the weights."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    if stored in AUTO_QUANTIZER_MAPPING:
        return None
    return f"transformers {version('transformers')} does not know it (pip install -U transformers)"


def _fp8_comes_from_the_hub() -> bool:
    """Older versions of transformers have the kernel in themselves."""
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
    """Lets everything pass but what begins so."""

    def __init__(self, beginning: str) -> None:
        super().__init__()
        self._beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self._beginning)
