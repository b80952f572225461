"""Brings the linear layers of a loaded model into the form that this CPU reads fastest, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .choice import EIGHT, FOUR, HALF, PLAIN, Build, Choices
from .int4 import GROUPS, Int4Linear
from .linear import CpuLinear

# Columns that share a scale in 4 bits.
GROUP = 32
# Weights of fewer numbers stay as they are in 16 bits: the time of their product is that of the call.
SMALLEST = 1 << 20


def pack(model: Any, quantization: str, choices: Choices, keep: tuple[str, ...], spare: int) -> int:
    """Replace the linear layers of the language model and its head. The vision tower stays as it is.

    Each weight is read, converted and let go before the next one is, so that a model that is mapped from its files
    never is in memory as a whole.

    Args:
        quantization: "none", "8bit" or "4bit".
        keep: last names of layers that are not quantized: routers, and decays of linear attention.
        spare: bytes that a second form of a weight may take: a head that is also the embedding stays plain otherwise.

    Returns:
        The number of layers that were replaced.
    """
    replaced = 0
    for name, layer in list(_layers(model, keep)):
        build = _form(layer, quantization, choices, head=layer is model.get_output_embeddings())
        if build is None or (_is_shared(model, layer) and layer.weight.nbytes > spare):
            continue
        bias = None if layer.bias is None else layer.bias.data
        with torch.inference_mode(False), torch.no_grad():
            model.set_submodule(name, build(layer.weight.data, bias))
        replaced += 1
    return replaced


def _layers(model: Any, keep: tuple[str, ...]) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        *path, last = name.split(".")
        if type(module) is nn.Linear and "visual" not in path and last not in keep:
            yield name, module


def _is_shared(model: Any, layer: nn.Linear) -> bool:
    return layer.weight is model.get_input_embeddings().weight


def _form(layer: nn.Linear, quantization: str, choices: Choices, head: bool) -> Build | None:
    """Return what builds the layer's new form, or None if it stays as it is."""
    rows, columns = layer.weight.shape
    dtype = layer.weight.dtype
    if quantization == "none":
        if dtype != torch.bfloat16 or rows * columns < SMALLEST:
            return None
        way = choices.fastest(HALF, rows, columns, dtype)
        return None if way == PLAIN else HALF[way]
    if quantization == "4bit" and not head:
        return _int4(columns)
    return EIGHT.get(choices.fastest(EIGHT, 2048, 2048, dtype))


def _int4(columns: int) -> Build | None:
    group = next((size for size in GROUPS if size <= GROUP and columns % size == 0), None)
    return None if group is None else lambda weight, bias: Int4Linear(weight, bias, group)


def why_no_form(quantization: str, dtype: torch.dtype, choices: Choices) -> str | None:
    """Return why this torch cannot compute with weights of 8 or 4 bits fast on this CPU, or None."""
    ways = EIGHT if quantization == "8bit" else FOUR
    if choices.fastest(ways, 2048, 2048, dtype) == PLAIN:
        return f"torch {torch.__version__} has no product for {quantization} weights that is fast on this CPU"
    return None


def packed_bytes(model: nn.Module) -> int:
    """Return the bytes of all weights, those in another form included."""
    forms = sum(module.nbytes for module in model.modules() if isinstance(module, CpuLinear))
    return forms + sum(weight.nbytes for weight in model.parameters())
