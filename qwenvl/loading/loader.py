"""Loading of a model, from LoadSpec to ModelHandle: class, precision, attention, device. Imports transformers late."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..decoding.decoder import Decoder
from ..decoding.own_step import release_fused
from ..decoding.patch_embedding import patch_embedding_as_matmul
from ..errors import LoadError, WrappedErrors
from ..faults import running_out_at_once
from ..log import log
from ..models.checkpoint import Checkpoint, read_checkpoint, why_too_old
from ..packages import require
from ..request import LoadSpec
from ..settings import ALL_GPUS_AND_CPU
from . import precision
from .attention import plan_attention
from .capabilities import Machine, why_no_accelerate
from .consistency import (
    indexed,
    require_backing,
    require_claims,
    require_described,
    require_used,
    tie_as_declared,
    why_unfit,
)
from .devices import own_random_numbers, placement, strays, without_bar
from .template import have_template, turn_ends

# Smallest and largest size of a picture for Qwen models, in pixels, as in the older packs.
PICTURE_PIXELS = (256 * 28 * 28, 1024 * 28 * 28)
# A model is kept in RAM only where this many times its size is free.
PARK_SHARE = 1.5


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What will be loaded: the settings asked for, or what this machine can do instead.

    Attributes:
        quantization: the one that was asked for, or that of the checkpoint.
        attention: transformers' name of it.
        fallbacks: a sentence for each setting that could not be used.
        expands: the format of quantized weights that become plain numbers when they are read; "" if none do.
        hint: a known problem that the attention may have; "" if none is known.
        packed: True if the layers are quantized for this CPU's own products, not by bitsandbytes.
    """

    quantization: str
    attention: str
    fallbacks: tuple[str, ...] = ()
    expands: str = ""
    hint: str = ""
    packed: bool = False


@dataclass(slots=True)
class ModelHandle:
    """A loaded model with its tokenizer, processor and decoder. `processor` is None for a model without vision."""

    spec: LoadSpec
    plan: LoadPlan
    machine: Machine
    model: Any
    tokenizer: Any
    processor: Any
    load_s: float
    # The model_type in its folder's config.json.
    family: str = ""
    # The model's token loop. Set by source.py as soon as the model is on its device.
    decoder: Decoder = field(default=None)  # type: ignore[assignment]


def plan_load(spec: LoadSpec, machine: Machine, checkpoint: Checkpoint) -> LoadPlan:
    """Resolve "auto" and every fallback before weights are read.

    Raises:
        LoadError: this machine, or the installed transformers, cannot load the checkpoint at all.
    """
    if reason := why_too_old(checkpoint.family, version("transformers")):
        raise LoadError(f"{spec.model} cannot be loaded. {reason}")
    if machine.spreads and (lack := why_no_accelerate()):
        raise LoadError(f"{spec.model} cannot be spread over GPUs: {lack}")
    try:
        stored = precision.plan_precision(spec.quantization, checkpoint, machine)
    except precision.PrecisionError as error:
        raise LoadError(f"{spec.model} cannot be loaded. {error}") from error
    attention = plan_attention(spec.attention, checkpoint, machine)
    fallbacks = [plan.reason for plan in (stored, attention) if plan.reason]
    if machine.offloads and not _can_offload(stored.name):
        fallbacks.append(f"{stored.name} weights cannot wait in RAM, so all layers have to fit on the GPUs")
    return LoadPlan(stored.name, attention.name, tuple(fallbacks), stored.expands, attention.hint, stored.packed)


def load_options(plan: LoadPlan, machine: Machine) -> dict[str, Any]:
    """Return the keywords of from_pretrained."""
    return {
        "dtype": machine.dtype,
        "attn_implementation": plan.attention,
        **placement(machine),
        **precision.precision_options(plan.quantization, machine.dtype, plan.packed),
    }


def load(spec: LoadSpec, folder: Path, machine: Machine) -> ModelHandle:
    """Read the model in the folder onto the machine's devices.

    Raises:
        LoadError: the model in the folder cannot be loaded here; the message says why.
        UnreadableError: config.json cannot be read.
    """
    start = time.perf_counter()
    precision.quiet_others()
    checkpoint = read_checkpoint(folder)
    require("transformers", "tokenizers", "safetensors", *(("torchvision",) if checkpoint.has_vision else ()))
    plan = plan_load(spec, machine, checkpoint)
    for reason in plan.fallbacks:
        log.warning("%s: %s", spec.model, reason)
    if plan.hint:
        log.warning("%s: %s", spec.model, plan.hint)
    machine = replace(machine, offloads=machine.offloads and _can_offload(plan.quantization))
    require_claims(folder)
    config = _config(folder)
    with WrappedErrors(f"{folder} cannot be loaded, because of its tokenizer's or processor's files"):
        processor = _processor(folder, config) if checkpoint.has_vision else None
        tokenizer = processor.tokenizer if processor else _tokenizer(folder)
        have_template(folder, processor or tokenizer, tokenizer)
        ends = turn_ends(processor or tokenizer, tokenizer, parts=processor is not None)
    model = _read(checkpoint, config, plan, machine)
    if checkpoint.quantized:
        # Some quantized formats can be computed in one precision only.
        machine = replace(machine, dtype=model.config.dtype)
        precision.in_one_dtype(model, machine.dtype)
    # transformers may have replaced a missing package by a kernel of the hub, under another name.
    plan = replace(plan, attention=model.config._attn_implementation)
    patch_embedding_as_matmul(model)
    _keep_only_token_ids(model, ends)
    if machine.device == "cpu" and (plan.packed or plan.quantization == "none"):
        precision.pack_for_cpu(model, plan.quantization)
    seconds = time.perf_counter() - start
    where = ", ".join(machine.devices)
    log.info("loaded %s (%s, %s, %s) in %.1f s", spec.model, plan.quantization, plan.attention, where, seconds)
    return ModelHandle(spec, plan, machine, model, tokenizer, processor, seconds, checkpoint.family)


def park(handle: ModelHandle, free_ram: int) -> Callable[[], ModelHandle] | None:
    """Move a model's weights to RAM, from where they come back many times faster than from a disk.

    Args:
        free_ram: free RAM in bytes.

    Returns:
        A function that brings it back to its device; or None if it has to be unloaded instead: quantized weights and
        layers on several devices cannot be moved, a model on the CPU is in RAM already, or too little RAM is free.
    """
    size = sum(weight.numel() * weight.element_size() for weight in handle.model.parameters())
    where = handle.machine
    stays = handle.plan.quantization != "none" or where.device == "cpu" or where.spreads
    if stays or free_ram < PARK_SHARE * size:
        return None
    # The decoder's captured steps use the addresses at which the weights are now.
    handle.decoder = None  # type: ignore[assignment]
    release_fused(handle.model)
    handle.model.to("cpu")

    def bring_back() -> ModelHandle:
        start = time.perf_counter()
        handle.model.to(handle.machine.device)
        log.info("%s brought back from RAM in %.1f s", handle.spec.model, time.perf_counter() - start)
        return handle

    return bring_back


_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_LOCAL = {"local_files_only": True, "trust_remote_code": False}


def _read(checkpoint: Checkpoint, config: Any, plan: LoadPlan, machine: Machine) -> Any:
    """Return the model with its weights, in transformers' class for it.

    Raises:
        LoadError: transformers has no class for this family, a package or a part of the weights is missing, or the
            weights fit nowhere.
    """
    import transformers

    folder = checkpoint.folder
    auto: Any = transformers.AutoModelForImageTextToText if checkpoint.has_vision else transformers.AutoModelForCausalLM
    if type(config) not in auto._model_mapping:
        raise LoadError(f"{folder} holds a {config.model_type!r} model, which does not generate text.")
    if plan.expands:
        precision.have_expanded(config)
    options = {**_LOCAL, **load_options(plan, machine), "use_safetensors": True, "output_loading_info": True}
    # Wrong shapes are then in the report, and the error below names them.
    options["ignore_mismatched_sizes"] = True
    with WrappedErrors(f"{folder} cannot be loaded"), own_random_numbers(machine):
        require_described(checkpoint, config)
        tie_as_declared(folder, config)
        # With eager attention, because config.json may name a kernel that would be downloaded.
        require_backing(folder, lambda: auto.from_config(config, attn_implementation="eager"))
        with running_out_at_once(), without_bar(), indexed(folder) as given:
            model, report = auto.from_pretrained(given, config=config, **options)
        model.name_or_path = model.config._name_or_path = str(folder)
    # transformers fills missing weights with random numbers, without an error.
    if missing := sorted(report["missing_keys"]):
        raise LoadError(
            f"{folder} cannot be loaded: its files lack {len(missing)} of the weights that a {config.model_type!r} "
            f"model has, {missing[0]} among them. Download it again, or ask for another version of it."
        )
    if wrong := sorted(map(str, report["mismatched_keys"])):
        raise LoadError(
            f"{folder} cannot be loaded: {len(wrong)} of its weights have another shape than config.json says, "
            f"{wrong[0]} among them. Download it again."
        )
    require_used(checkpoint, report["unexpected_keys"])
    if strays(model, machine):
        raise LoadError(
            f"{folder} does not fit in what is free on {', '.join(machine.devices)}. Pick a quantization, "
            f"device {ALL_GPUS_AND_CPU!r} (slow), or a smaller model."
        )
    if not options.get("device_map"):
        model.to(machine.device)
    return model.eval()


def _can_offload(quantization: str) -> bool:
    """Return True if weights of that precision can stay in RAM and be computed on a GPU."""
    return not quantization.endswith(("4bit", "8bit"))


def _config(folder: Path) -> Any:
    import transformers

    with WrappedErrors(f"{folder / 'config.json'} is not understood by transformers {transformers.__version__}"):
        return transformers.AutoConfig.from_pretrained(folder, **_LOCAL)


def _tokenizer(folder: Path) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder, **_LOCAL)


def _processor(folder: Path, config: Any) -> Any:
    """Return the processor with our picture sizes, the same with transformers 4 and 5."""
    import transformers

    # Version 5 uses torchvision by default, and warns about use_fast, which version 4 needs for it.
    fast = {"use_fast": True} if transformers.__version__.startswith("4.") else {}
    processor = transformers.AutoProcessor.from_pretrained(folder, **_LOCAL, **fast)
    images = processor.image_processor
    if reason := why_unfit(images, config.vision_config):
        raise LoadError(f"{folder} cannot be loaded: {reason}. Download it again.")
    low, high = PICTURE_PIXELS
    # A model trained on smaller pictures than ours keeps its own size.
    if images.size["longest_edge"] >= high:
        images.size = {"shortest_edge": low, "longest_edge": high}
        if getattr(images, "max_pixels", None):
            images.min_pixels, images.max_pixels = low, high
    return processor


def _keep_only_token_ids(model: Any, ends: list[int]) -> None:
    """Remove the checkpoint's sampling defaults, which generate() would mix into the user's settings.

    Args:
        ends: ids of further tokens that end an answer.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    vocabulary = model.get_output_embeddings().out_features
    given = {name: getattr(own, name) for name in _TOKEN_IDS}
    first = given["eos_token_id"]
    first = first if isinstance(first, list) else [] if first is None else [first]
    given["eos_token_id"] = [*first, *(token for token in ends if token not in first)] or None
    model.generation_config = GenerationConfig(**{name: _token_ids(name, given[name], vocabulary) for name in given})


def _token_ids(name: str, given: Any, vocabulary: int) -> Any:
    """Keep only ids of tokens that the model has: an index beyond its tables may break a GPU for the whole process."""
    if given is None:
        return None
    listed = given if isinstance(given, list) else [given]
    sound = [token for token in listed if isinstance(token, int) and 0 <= token < vocabulary]
    if len(sound) < len(listed):
        log.warning("the model's files name a token that it does not have: %s is %.99r", name, given)
    return (sound or None) if isinstance(given, list) else next(iter(sound), None)
