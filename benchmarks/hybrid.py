"""A model with random weights and mostly linear attention, in the shape of Qwen3.5-4B and in a small one.

Three layers of four keep a state of fixed size instead of keys and values. Without special kernels transformers
computes them in many small steps.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.models import VISION_IDS, randomized

_INTERLEAVED = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_interleaved": True}
_TEXT = {
    "4b": {
        "hidden_size": 2560,
        "intermediate_size": 9216,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "vocab_size": 248320,
        "rope_parameters": {**_INTERLEAVED, "mrope_section": [11, 11, 10]},
    },
    "nano": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "vocab_size": 2048,
        "rope_parameters": {**_INTERLEAVED, "mrope_section": [3, 3, 2]},
    },
}
_VISION = {
    "4b": {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16},
    "nano": {"depth": 4, "hidden_size": 64, "intermediate_size": 256, "num_heads": 4},
}


def why_not_hybrid() -> str | None:
    """Return why the installed transformers cannot build such a model, or None."""
    import transformers

    if hasattr(transformers, "Qwen3_5Config"):
        return None
    return f"transformers {transformers.__version__} does not know Qwen3.5, whose shape the hybrid has"


def build_hybrid(shape: str, device: str, dtype: torch.dtype) -> Any:
    """Build the model, "4b" or "nano", with random weights on the device. It never ends a text by itself."""
    from transformers import Qwen3_5Config

    text = {**_TEXT[shape], "max_position_embeddings": 65536, "tie_word_embeddings": True}
    vision = {**_VISION[shape], "out_hidden_size": text["hidden_size"], "num_position_embeddings": 2304}
    config = Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=True, **VISION_IDS)
    return randomized(config, device, dtype)


def hybrid_bytes_per_token(model: Any, context: int) -> int:
    """Return the bytes that one step moves: weights, head, keys and values of full attention, states in and out."""
    config = model.config.text_config
    full = sum(kind == "full_attention" for kind in config.layer_types)
    weights = [*model.model.language_model.layers.parameters(), model.get_output_embeddings().weight]
    kept = 2 * full * config.num_key_value_heads * config.head_dim * context * model.dtype.itemsize
    state = config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
    # States are kept in single precision.
    states = 2 * 4 * state * (config.num_hidden_layers - full)
    return sum(weight.numel() * weight.element_size() for weight in weights) + kept + states
