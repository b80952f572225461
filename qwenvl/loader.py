"""LoadSpec -> ModelHandle: model class, precision, quantization, attention, device. Imports transformers late."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .capabilities import Machine, why_no_bitsandbytes, why_no_flash_attention
from .dense import release_fused
from .log import log
from .request import LoadSpec

# What Qwen pictures are scaled to, in pixels: as the older packs had it.
PICTURE_PIXELS = (256 * 28 * 28, 1024 * 28 * 28)
# A model is kept in RAM only where this many times its size is free.
PARK_SHARE = 1.5


class LoadError(RuntimeError):
    """A model folder is there but cannot be loaded."""


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What will be loaded: the request, less what this machine lacks, and a sentence for each thing it lacks."""

    quantization: str
    attention: str
    fallbacks: tuple[str, ...] = ()


@dataclass(slots=True)
class ModelHandle:
    """A loaded model and what belongs to it. `processor` is None for a model without vision."""

    spec: LoadSpec
    plan: LoadPlan
    machine: Machine
    model: Any
    tokenizer: Any
    processor: Any
    load_s: float
    # Set by the pipeline: what generates with the model, and goes with it.
    decoder: Any = None


def plan_load(spec: LoadSpec, machine: Machine) -> LoadPlan:
    """Resolve "auto" and every fallback before weights are read. Pure."""
    plan = LoadPlan(spec.quantization, "sdpa" if spec.attention == "auto" else spec.attention)
    if spec.quantization != "none" and (reason := why_no_bitsandbytes(machine.device)):
        plan = _fall_back(plan, f"{spec.quantization} is not possible here: {reason}", quantization="none")
    if spec.attention == "flash_attention_2" and (reason := why_no_flash_attention(machine)):
        plan = _fall_back(plan, reason, attention="sdpa")
    return plan


def load_options(plan: LoadPlan, machine: Machine) -> dict[str, Any]:
    """from_pretrained keywords. Pure, so a test can check every case without weights."""
    options: dict[str, Any] = {
        "dtype": machine.dtype,
        "attn_implementation": plan.attention,
        # One named device: "auto" may put layers on the CPU, and every token would wait for them.
        "device_map": {"": machine.device},
    }
    if plan.quantization != "none":
        options["quantization_config"] = _bitsandbytes(plan.quantization, machine.dtype)
    return options


def load(spec: LoadSpec, folder: Path, machine: Machine) -> ModelHandle:
    """Read the model in the folder onto the machine's device.

    Raises:
        LoadError: the folder holds a model that the installed transformers cannot load; it says why.
    """
    import transformers

    start = time.perf_counter()
    plan = plan_load(spec, machine)
    for reason in plan.fallbacks:
        log.warning("%s", reason)
    config = _config(folder)
    sees = type(config) in transformers.AutoModelForImageTextToText._model_mapping
    auto = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
    if not sees and type(config) not in transformers.AutoModelForCausalLM._model_mapping:
        raise LoadError(f"{folder} holds a {config.model_type!r} model, which does not generate text.")
    processor = _processor(folder) if sees else None
    tokenizer = processor.tokenizer if processor else transformers.AutoTokenizer.from_pretrained(folder, **_LOCAL)
    options = load_options(plan, machine)
    model = auto.from_pretrained(folder, config=config, use_safetensors=True, **_LOCAL, **options).eval()
    patch_embedding_as_matmul(model)
    _keep_only_token_ids(model)
    seconds = time.perf_counter() - start
    log.info(
        "loaded %s (%s, %s, %s) in %.1f s",
        spec.model,
        plan.quantization,
        plan.attention,
        machine.device,
        seconds,
    )
    return ModelHandle(spec, plan, machine, model, tokenizer, processor, seconds)


def park(handle: ModelHandle, free_ram: int) -> Callable[[], ModelHandle] | None:
    """Move a model's weights to RAM, which reads back many times faster than a disk.

    Args:
        free_ram: bytes.

    Returns:
        What brings it back to its device, or None where it must be dropped instead: bitsandbytes' weights cannot be
        moved, a model on the CPU is in RAM already, and RAM that is short is left to others.
    """
    size = sum(weight.numel() * weight.element_size() for weight in handle.model.parameters())
    if handle.plan.quantization != "none" or handle.machine.device == "cpu" or free_ram < PARK_SHARE * size:
        return None
    # Its buffers and captured steps point to where the weights were.
    handle.decoder = None
    release_fused(handle.model)
    handle.model.to("cpu")

    def bring_back() -> ModelHandle:
        start = time.perf_counter()
        handle.model.to(handle.machine.device)
        log.info("%s brought back from RAM in %.1f s", handle.spec.model, time.perf_counter() - start)
        return handle

    return bring_back


_LOCAL = {"local_files_only": True, "trust_remote_code": False}


class PatchLinear(torch.nn.Module):
    """A convolution whose stride is its kernel size, computed as the matrix product that it is."""

    def __init__(self, conv: torch.nn.Conv3d) -> None:
        super().__init__()
        # A view: no second copy of the weights.
        self.weight = torch.nn.Parameter(conv.weight.detach().flatten(1), requires_grad=False)
        self.bias = conv.bias

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(N, channels, frames, height, width), one patch each -> (N, out channels)."""
        return torch.nn.functional.linear(patches.flatten(1), self.weight, self.bias)


def patch_embedding_as_matmul(model: torch.nn.Module) -> None:
    """Replace the vision patch embedding's Conv3d, which some torch and cuDNN builds run 10 to 20 times too slow.

    transformers can do the same (`fusion_config`), but only from 5.6 on and by changing the class for
    every other user of it in the process.
    """
    for name, module in list(model.named_modules()):
        conv = getattr(module, "proj", None)
        if name.endswith("patch_embed") and isinstance(conv, torch.nn.Conv3d) and conv.stride == conv.kernel_size:
            module.proj = PatchLinear(conv)


def _fall_back(plan: LoadPlan, reason: str, **changes: str) -> LoadPlan:
    instead = ", ".join(changes.values())
    return replace(plan, fallbacks=(*plan.fallbacks, f"{reason}; using {instead} instead"), **changes)


def _bitsandbytes(quantization: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        # It warns at every matrix product of every token that it casts to float16, which is how LLM.int8 works.
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_no_cast_warning)
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _is_no_cast_warning(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("MatMul8bitLt: inputs will be cast")


def _config(folder: Path) -> Any:
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(folder, **_LOCAL)
    except (ValueError, OSError) as error:
        raise LoadError(
            f"{folder / 'config.json'} is not understood by transformers {transformers.__version__} ({error})."
        ) from error


def _processor(folder: Path) -> Any:
    """The processor, with its picture size set to ours. What differs between transformers 4 and 5 is hidden here."""
    import transformers

    # Version 5 takes the torchvision backend by itself and warns about the old name for it.
    fast = {"use_fast": True} if transformers.__version__.startswith("4.") else {}
    processor = transformers.AutoProcessor.from_pretrained(folder, **_LOCAL, **fast)
    images = processor.image_processor
    low, high = PICTURE_PIXELS
    # A model trained on smaller pictures than ours keeps its own size.
    if images.size["longest_edge"] >= high:
        images.size = {"shortest_edge": low, "longest_edge": high}
        if getattr(images, "max_pixels", None):
            images.min_pixels, images.max_pixels = low, high
    return processor


def _keep_only_token_ids(model: Any) -> None:
    """Take the checkpoint's sampling defaults away: generate() would mix them into what the user set."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id
    )
