"""Estimates of the bytes that a model and a question need, from headers and config.json, before weights are read."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..faults import OUT_OF_MEMORY
from ..files.bounded_json import read_json_object
from ..files.headers import is_count, weight_headers
from ..log import gigabytes
from ..media.media import Video
from ..models.checkpoint import part
from ..request import LoadSpec

# Bytes per weight that bitsandbytes stores, its scales included: NF4 with double quantization, and LLM.int8.
STORED = {"4bit": 0.52, "8bit": 1.01}
# The same for a CPU's own products: 4 bits with two numbers of 16 bits for 32 weights, and 8 bits.
PACKED = {"4bit": 0.63, "8bit": 1.01}
# Matrices that are left as they are: embeddings, the output head, and the vision tower. On a CPU the head has 8 bits.
_KEPT = re.compile(r"embed_tokens\.weight$|lm_head\.weight$|(^|\.)visual\.")
_EMBEDDING, _HEAD = re.compile(r"embed_tokens\.weight$"), re.compile(r"lm_head\.weight$")
_EXPERTS = re.compile(r"\.experts\.")
# Weights for predicting several tokens at once, which transformers does not read.
_UNREAD = re.compile(r"^(model\.)?mtp\.")
# Bits of a number of the safetensors types in which quantized weights are stored.
_NUMBER_BITS = {"I32": 32, "I16": 16, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8}
# Activations of the widest layer that are in memory at a time, for each token of a prompt.
_ALIVE = 6
# A number of layers, heads or sizes from here on is an error of config.json.
_NO_COUNT = 1 << 32


def model_bytes(
    folder: Path,
    dtype: torch.dtype,
    quantization: str,
    expands: str = "",
    fused_experts: bool = True,
    packed: bool = False,
) -> int:
    """Return the size of the loaded weights in bytes, from the headers of the safetensors files.

    Args:
        quantization: "4bit" and "8bit" are done while loading; any other leaves weights as they are stored.
        expands: the format of quantized weights that become plain numbers when they are read; "" if none do.
        fused_experts: True if the experts of a mixture are one tensor, which is not quantized.
        packed: True if the layers are quantized for a CPU's own products, not by bitsandbytes.
    """
    bits = _stored_bits(folder) if expands else 0
    total = 0.0
    headers = weight_headers(folder)
    per_weight = PACKED if packed else STORED
    for name, tensor in headers.items():
        count, number_bits = math.prod(tensor["shape"]), _NUMBER_BITS.get(tensor["dtype"], 0)
        if _UNREAD.match(name):
            continue
        if number_bits:
            total += count * number_bits / bits * dtype.itemsize if bits else count * number_bits / 8
        elif quantization in STORED and _is_replaced(name, tensor["shape"], fused_experts):
            total += count * per_weight[quantization]
        elif packed and _HEAD.search(name):
            total += count * PACKED["8bit"]
        else:
            total += count * dtype.itemsize
        if packed and _EMBEDDING.search(name) and not any(map(_HEAD.search, headers)):
            # The embedding is the head as well, which is stored in 8 bits beside it.
            total += count * PACKED["8bit"]
    return round(total)


def _is_replaced(name: str, shape: list[int], fused_experts: bool) -> bool:
    """Return True if that tensor is quantized while loading."""
    matrix = len(shape) == 2 and name.endswith(".weight") and not _KEPT.search(name)
    return matrix and not (fused_experts and _EXPERTS.search(name))


def _stored_bits(folder: Path) -> int:
    """Return how many bits a weight has in the checkpoint's own quantization; 8 if config.json names none."""
    config = read_json_object(folder / "config.json")
    settings = part(config, "quantization_config") or part(config, "compression_config")
    groups = part(settings, "config_groups")
    return next((bits for name in groups if (bits := _count(part(part(groups, name), "weights"), "num_bits"))), 8)


def request_bytes(folder: Path, dtype: torch.dtype, tokens: int, prompt_tokens: int) -> int:
    """Return the bytes needed beside the weights: keys and values of all tokens, and the activations of the prompt."""
    config = read_json_object(folder / "config.json")
    text = part(config, "text_config") or config
    hidden, heads = _count(text, "hidden_size"), _count(text, "num_attention_heads") or 1
    head_dim = _count(text, "head_dim") or hidden // heads
    cache = 2 * _count(text, "num_hidden_layers") * (_count(text, "num_key_value_heads") or heads) * head_dim
    widest = max(_count(text, "intermediate_size"), 2 * hidden)
    return dtype.itemsize * (cache * tokens + _ALIVE * widest * prompt_tokens)


def _count(settings: dict[str, Any], name: str) -> int:
    """Return a count from a config.json; 0 if it is missing or impossible, which the loader rejects."""
    value = settings.get(name)
    return value if is_count(value) and value < _NO_COUNT else 0


def prompt_tokens(text: str, pictures: Sequence[Image.Image], videos: Sequence[Video], largest_picture: int) -> int:
    """Estimate how many tokens a question has: one for three characters, or for 28 x 28 pixels.

    Args:
        largest_picture: pixels to which a larger picture is scaled down.
    """
    pixels = sum(min(picture.width * picture.height, largest_picture) for picture in pictures)
    for video in videos:
        frames, height, width, _ = video.frames.shape
        pixels += frames * height * width // 2
    return len(text) // 3 + pixels // (28 * 28) + 64


class OutOfMemoryError(OUT_OF_MEMORY):  # type: ignore[misc, valid-type]
    """Memory ran out. ComfyUI recognises it by its base class and unloads everything."""


def why_out_of_memory(spec: LoadSpec, doing: str, sizes: dict[str, int], request: int, free: int) -> OutOfMemoryError:
    """Return an error that names what was needed, what is free, and which settings would fit.

    Args:
        doing: "load" or "answer".
        sizes: bytes of the weights by quantization.
        request: bytes beside the weights.
        free: free bytes: for "load" without the model, for "answer" beside the loaded model.
    """
    needed, there = (sizes[spec.quantization] + request, free) if doing == "load" else (request, free)
    room = free if doing == "load" else free + sizes[spec.quantization]
    smaller = {name: size for name, size in sizes.items() if size < sizes[spec.quantization] and size + request < room}
    fits = [f"quantization {name} needs about {gigabytes(size)}" for name, size in smaller.items()]
    advice = [*fits, "a smaller model", "a lower max_new_tokens", "smaller pictures"]
    return OutOfMemoryError(
        f"Not enough memory to {doing} with {spec.model} ({spec.quantization}): it needs about {gigabytes(needed)}, "
        f"and {gigabytes(there)} are free. What may fit: {'; '.join(advice)}."
    )
