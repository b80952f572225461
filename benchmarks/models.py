"""Builds Qwen3-VL in real shapes with random weights, on which speed does not depend, and prompts for it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from qwenvl.cpu.packing import packed_bytes
from qwenvl.loading.precision import pack_for_cpu
from qwenvl.models.families import family_of

IMAGE, VIDEO, VISION_START, VISION_END = 5, 6, 7, 8
VISION_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
# The decode step of our own that fits them.
DECODE = family_of("qwen3_vl").decode


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the text stack and of the vision tower. 2b, 4b and 8b are Qwen3-VL's own.

    0.6b is Qwen3-0.6B, of which no Qwen3-VL exists, with a vision tower of a few thousand weights.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    vision_hidden: int
    vision_intermediate: int
    vision_layers: int
    vision_heads: int


SHAPES = {
    "nano": Shape(64, 128, 28, 2, 1, 64, 2048, True, 64, 256, 4, 4),
    "small": Shape(256, 768, 28, 4, 2, 64, 8192, True, 64, 256, 4, 4),
    "0.6b": Shape(1024, 3072, 28, 16, 8, 128, 151936, True, 64, 256, 4, 4),
    "2b": Shape(2048, 6144, 28, 16, 8, 128, 151936, True, 1024, 4096, 24, 16),
    "4b": Shape(2560, 9728, 36, 32, 8, 128, 151936, True, 1024, 4096, 24, 16),
    "8b": Shape(4096, 12288, 36, 32, 8, 128, 151936, False, 1152, 4304, 27, 16),
}


def build(shape: Shape, device: str, dtype: torch.dtype) -> Any:
    """Build the model with random weights on the device. It never ends a text by itself."""
    return randomized(_config(shape), device, dtype)


def randomized(config: Any, device: str, dtype: torch.dtype) -> Any:
    """Build a model of that configuration with random weights on the device."""
    from transformers import AutoModelForImageTextToText

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), _no_init():
            model = AutoModelForImageTextToText.from_config(config).eval()
    finally:
        torch.set_default_dtype(before)
    random = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.requires_grad_(False)
            if weight.ndim == 1:
                weight.fill_(1.0 if name.endswith("norm.weight") or "norm" in name else 0.0)
            else:
                weight.uniform_(-0.05, 0.05, generator=random)
    model.tie_weights()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def as_loaded(model: Any, how: str) -> Any:
    """Return the model as the pack loads it: with `how` "none", "4bit" or "8bit". On a CPU it is a copy."""
    if model.device.type != "cpu":
        return by_bitsandbytes(model, how)
    copied = copy.deepcopy(model)
    pack_for_cpu(copied, how)
    return copied


def by_bitsandbytes(model: Any, how: str) -> Any:
    """Return a copy with bitsandbytes' matrices, as transformers loads "4bit" and "8bit"; for "none" the model."""
    if how == "none":
        return model
    from bitsandbytes import nn

    copied = copy.deepcopy(model)
    for name, linear in list(copied.named_modules()):
        if type(linear) is not torch.nn.Linear or name.endswith("lm_head"):
            continue
        sizes = (linear.in_features, linear.out_features, linear.bias is not None)
        if how == "4bit":
            options = {"compress_statistics": True, "quant_type": "nf4"}
            quantized = nn.Linear4bit(*sizes, compute_dtype=model.dtype, **options, device="meta")
            weight = nn.Params4bit(linear.weight.data, requires_grad=False, **options)
        else:
            quantized = nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0, device="meta")
            weight = nn.Int8Params(linear.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
        quantized.weight, quantized.bias = weight, linear.bias
        copied.set_submodule(name, quantized.to(model.device))
    copied.is_loaded_in_8bit = how == "8bit"
    return copied


def prompt(model: Any, image_side: int, text_tokens: int) -> dict[str, torch.Tensor]:
    """Return generate()'s keywords for a square picture, image_side patches of 16 pixels wide, and random text."""
    random = torch.Generator().manual_seed(0)
    text = torch.randint(20, model.config.text_config.vocab_size, (text_tokens,), generator=random)
    picture = torch.full((image_side**2 // 4,), IMAGE)
    ids = torch.cat([text[:8], torch.tensor([VISION_START]), picture, torch.tensor([VISION_END]), text[8:]])[None]
    pixels = torch.randn(image_side**2, 3 * 2 * 16 * 16, generator=random)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels.to(model.dtype),
        "image_grid_thw": torch.tensor([[1, image_side, image_side]]),
    }
    if _wants_token_types():
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    return {name: value.to(model.device) for name, value in inputs.items()}


def text_prompt(model: Any, tokens: int) -> dict[str, torch.Tensor]:
    """Return generate()'s keywords for `tokens` tokens of random text, without a picture."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(20, model.config.text_config.vocab_size, (1, tokens), generator=random).to(model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**inputs, "mm_token_type_ids": torch.zeros_like(ids).int()} if _wants_token_types() else inputs


def prefill_flops(model: Any, inputs: dict[str, torch.Tensor]) -> int:
    """Count operations of the products with weights: text layers for each token, vision layers for each patch.

    Attention's own products are left out: a few percent at a thousand tokens.
    """
    stacks = [(model.model.language_model.layers, inputs["input_ids"].numel())]
    if "pixel_values" in inputs:
        stacks.append((model.model.visual.blocks, len(inputs["pixel_values"])))
    return sum(2 * weight.numel() * rows for stack, rows in stacks for weight in stack.parameters() if weight.ndim > 1)


def bytes_per_token(model: Any, context: int) -> int:
    """Return the bytes that one step reads: all weights of the text stack and the head, and the keys and values."""
    stack, config = model.model.language_model, model.config.text_config
    weights = packed_bytes(stack.layers) + packed_bytes(model.get_output_embeddings())
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * context
    return weights + cache * model.dtype.itemsize


def _config(shape: Shape) -> Any:
    from transformers import Qwen3VLConfig

    section = {64: [12, 10, 10], 128: [24, 20, 20]}[shape.head_dim]
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": section, "mrope_interleaved": True}
    text = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 65536,
        "rope_scaling": rope,
        "rope_theta": 5e6,
        "tie_word_embeddings": shape.tied,
    }
    vision = {
        "depth": shape.vision_layers,
        "hidden_size": shape.vision_hidden,
        "intermediate_size": shape.vision_intermediate,
        "num_heads": shape.vision_heads,
        "out_hidden_size": shape.hidden,
        "patch_size": 16,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [1, 2, 3] if shape.vision_layers < 24 else [5, 11, 17],
    }
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=shape.tied, **VISION_IDS)


def _no_init() -> Any:
    """Switch off transformers' own initialisation, which takes minutes for billions of weights."""
    from transformers import modeling_utils

    if hasattr(modeling_utils, "no_init_weights"):
        return modeling_utils.no_init_weights()
    from transformers.initialization import no_init_weights

    return no_init_weights()


def _wants_token_types() -> bool:
    import transformers

    return not transformers.__version__.startswith("4.")
