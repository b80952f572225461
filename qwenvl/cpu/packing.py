"""Brings the linear layers of a loaded model into the form that this CPU reads fastest, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .choice import EIGHT, FOUR, HALF, PLAIN, Build, Choices
from .int4 import GROUPS, Int4Linear
from .linear import CpuLinear, Joined

# Columns that share a scale in 4 bits.
GROUP = 32
# Names of layers that have the same input in every family, in the order in which they are called.
_JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
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
    head = model.get_output_embeddings()
    replaced = 0
    for names in _groups(model, keep):
        layers = [model.get_submodule(name) for name in names]
        build = _form(layers, quantization, choices, head=layers[0] is head)
        if build is None or (_is_shared(model, layers[0]) and layers[0].weight.nbytes > spare):
            continue
        with torch.inference_mode(False), torch.no_grad():
            for name, form in zip(names, _built(build, layers), strict=True):
                model.set_submodule(name, form)
        replaced += len(names)
    return replaced


def _groups(model: Any, keep: tuple[str, ...]) -> list[list[str]]:
    """Return the names of all layers to pack; those that have the same input stand together."""
    found: dict[str, list[str]] = {}
    for name, layer in _layers(model, keep):
        parent, _, last = name.rpartition(".")
        kin = next((index for index, names in enumerate(_JOINED) if last in names), None)
        key = name if kin is None else f"{parent} {kin} {layer.bias is None} {layer.in_features}"
        found.setdefault(key, []).append(name)
    return list(found.values())


def _built(build: Build, layers: list[nn.Linear]) -> list[nn.Module]:
    """Return the new form of each layer."""
    weights = [layer.weight.data for layer in layers]
    biases = [layer.bias.data for layer in layers if layer.bias is not None]
    if len(layers) == 1:
        return [build(weights[0], biases[0] if biases else None)]
    whole = build(torch.cat(weights), torch.cat(biases) if biases else None)
    return list(Joined(whole, [len(weight) for weight in weights]).parts())


def _layers(model: Any, keep: tuple[str, ...]) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        *path, last = name.split(".")
        if type(module) is nn.Linear and "visual" not in path and last not in keep:
            yield name, module


def _is_shared(model: Any, layer: nn.Linear) -> bool:
    return layer.weight is model.get_input_embeddings().weight


def _form(layers: list[nn.Linear], quantization: str, choices: Choices, head: bool) -> Build | None:
    """Return what builds the new form of layers with the same input, or None if they stay as they are."""
    rows, columns = sum(layer.out_features for layer in layers), layers[0].in_features
    dtype = layers[0].weight.dtype
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
