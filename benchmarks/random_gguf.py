"""Writes a GGUF file of a text model in a real shape with random weights, on which llama.cpp's speed does not depend.

The blocks are filled with random bits and small scales; nothing is quantized, so a file of any size takes seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy

from benchmarks.models import Shape

# The largest weight, as in benchmarks/models.py.
LARGEST = 0.05
# Weights in a block of each type.
IN_BLOCK = {"BF16": 1, "Q8_0": 32, "Q4_K": 256, "Q6_K": 256}
KINDS = ("bf16", "Q8_0", "Q4_K_M")
PLACES = (
    ("attn_q", "heads", "hidden"),
    ("attn_k", "kv_heads", "hidden"),
    ("attn_v", "kv_heads", "hidden"),
    ("attn_output", "hidden", "heads"),
    ("ffn_gate", "intermediate", "hidden"),
    ("ffn_up", "intermediate", "hidden"),
    ("ffn_down", "hidden", "intermediate"),
)
NORMS = ("attn_norm", "ffn_norm", "attn_q_norm", "attn_k_norm")


def write(path: Path, shape: Shape, kind: str, context: int = 32768) -> None:
    """Write the file.

    Args:
        kind: "bf16", "Q8_0" or "Q4_K_M", which mixes types as llama.cpp's own program does.
        context: how many tokens the model says that it was trained on.

    Raises:
        ValueError: a row of the shape is no whole number of the type's blocks.
    """
    tensors = [*norms(shape), *matrices(shape, kind)]
    for name, (_, columns), type_ in (tensor for tensor in tensors if len(tensor[1]) == 2):
        if columns % IN_BLOCK[type_]:
            raise ValueError(
                f"{name} has rows of {columns} weights, and a block of {type_} holds {IN_BLOCK[type_]}: "
                "take another shape or another quantization."
            )
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "qwen3")
    _describe(writer, shape, context)
    _vocabulary(writer, shape.vocabulary)
    _fill(writer, tensors)


def norms(shape: Shape) -> list[tuple[str, tuple[int, ...], str]]:
    """Return name, sizes and type of every norm."""
    sizes = {"attn_norm": shape.hidden, "ffn_norm": shape.hidden}
    names = [(f"blk.{i}.{name}", sizes.get(name, shape.head_dim)) for i in range(shape.layers) for name in NORMS]
    return [(f"{name}.weight", (size,), "F32") for name, size in [*names, ("output_norm", shape.hidden)]]


def matrices(shape: Shape, kind: str) -> list[tuple[str, tuple[int, ...], str]]:
    """Return name, (rows, columns) and type of every matrix."""
    sizes = {
        "hidden": shape.hidden,
        "intermediate": shape.intermediate,
        "heads": shape.heads * shape.head_dim,
        "kv_heads": shape.kv_heads * shape.head_dim,
    }
    found = [
        (f"blk.{i}.{name}.weight", (sizes[rows], sizes[columns]), type_of(name, kind, i, shape.layers))
        for i in range(shape.layers)
        for name, rows, columns in PLACES
    ]
    # The last of these is the head: what both share is stored as the head is.
    ends = ["token_embd"] if shape.tied else ["token_embd", "output"]
    for name in ends:
        type_ = type_of("output" if name == ends[-1] else name, kind)
        found.append((f"{name}.weight", (shape.vocabulary, shape.hidden), type_))
    return found


def type_of(name: str, kind: str, layer: int = 0, layers: int = 1) -> str:
    """Return the type of a matrix as llama.cpp's llama-quantize chooses it (llama-quant.cpp)."""
    if kind != "Q4_K_M":
        return kind.upper()
    eighth = layers // 8
    more_bits = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
    return "Q6_K" if name == "output" or (name in ("attn_v", "ffn_down") and more_bits) else "Q4_K"


def blocks(type_: str, count: int, random: numpy.random.Generator) -> numpy.ndarray:
    """Return count blocks of random weights of at most LARGEST, as bytes (count, bytes of a block)."""

    def scale(value: float) -> numpy.ndarray:
        return numpy.full((count, 1), value, dtype="<f2").view("u1")

    def noise(size: int) -> numpy.ndarray:
        return numpy.frombuffer(random.bytes(count * size), dtype="u1").reshape(count, size)

    if type_ == "BF16":
        values = (random.random(count, dtype="f4") * 2 - 1) * LARGEST
        return (values.view("<u4") >> 16).astype("<u2")[:, None].view("u1")
    if type_ == "Q8_0":  # scale, 32 numbers of 8 bits
        return numpy.concatenate([scale(LARGEST / 128), noise(32)], 1)
    if type_ == "Q4_K":  # scale of scales, scale of minima, 8 of each of 6 bits, 256 numbers of 4 bits
        return numpy.concatenate([scale(LARGEST / (63 * 15)), scale(LARGEST / 63), noise(12), noise(128)], 1)
    if type_ == "Q6_K":  # 256 numbers of 4 bits, two more of each, 16 scales of 8 bits, scale of scales
        return numpy.concatenate([noise(128), noise(64), noise(16), scale(LARGEST / (128 * 32))], 1)
    raise ValueError(f"No blocks of type {type_!r} are made here, only of: {', '.join(IN_BLOCK)}.")


def _describe(writer: Any, shape: Shape, context: int) -> None:
    writer.add_context_length(context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_block_count(shape.layers)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(5e6)


def _vocabulary(writer: Any, size: int) -> None:
    """Add the bytes, which llama.cpp looks for, and made-up words; the prompt is given in tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    words = [*letters, *(f"word{i}" for i in range(size - len(letters)))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(words)
    writer.add_token_types([1] * size)
    writer.add_token_merges([f"{letters[0]} {letters[1]}"])
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)


def _fill(writer: Any, tensors: list[tuple[str, tuple[int, ...], str]]) -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    for name, sizes, type_ in tensors:
        in_block, bytes_ = GGML_QUANT_SIZES[GGMLQuantizationType[type_]]
        stored = (*sizes[:-1], sizes[-1] // in_block * bytes_)
        numbers = numpy.dtype("f4" if type_ == "F32" else "u1")
        writer.add_tensor_info(
            name,
            sizes if type_ == "F32" else stored,
            numbers,
            int(numpy.prod(stored)),
            raw_dtype=GGMLQuantizationType[type_],
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = numpy.random.default_rng(0)
    for _, sizes, type_ in tensors:
        # One tensor at a time: a large model is not held in memory.
        writer.write_tensor_data(_values(sizes, type_, random))
    writer.close()


def _values(sizes: tuple[int, ...], type_: str, random: numpy.random.Generator) -> numpy.ndarray:
    if type_ == "F32":
        return numpy.ones(sizes, dtype="<f4")
    return blocks(type_, int(numpy.prod(sizes)) // IN_BLOCK[type_], random).reshape(-1)
