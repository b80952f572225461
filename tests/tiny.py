"""Tiny random models of every family, saved as model folders like those on the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from qwenvl import catalog

DEMO_FOLDER = catalog.PACK / "demo" / "model"
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    # Larger than usual, so that random models react to what they read and say more than one token.
    "initializer_range": 0.2,
}
_VISION_OLD = {"depth": 2, "num_heads": 2, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2}


def _vocabulary() -> dict[str, int]:
    demo = json.loads((DEMO_FOLDER / "config.json").read_text())
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return {name: demo[name] for name in names}


def _sizes() -> dict[str, int]:
    demo = json.loads((DEMO_FOLDER / "config.json").read_text())["text_config"]
    return {
        "vocab_size": demo["vocab_size"],
        "eos_token_id": demo["eos_token_id"],
        "bos_token_id": demo["bos_token_id"],
    }


def config(family: str) -> Any:
    """A configuration of that family (its model_type) with the demo model's vocabulary."""
    t, text, ids = transformers, {**_TEXT, **_sizes()}, _vocabulary()
    if family == "qwen2":
        return t.Qwen2Config(**text)
    if family == "qwen3":
        return t.Qwen3Config(**text, head_dim=8)
    if family == "qwen2_vl":
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
        vision = {**_VISION_OLD, "embed_dim": 32, "hidden_size": 32}
        return t.Qwen2VLConfig(
            text_config={**text, "rope_scaling": rope}, vision_config=vision, tie_word_embeddings=False, **ids
        )
    if family == "qwen2_5_vl":
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
        vision = {**_VISION_OLD, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32}
        vision |= {"fullatt_block_indexes": [1], "window_size": 64}
        return t.Qwen2_5_VLConfig(
            text_config={**text, "rope_scaling": rope}, vision_config=vision, tie_word_embeddings=False, **ids
        )
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    vision = {**_VISION_OLD, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32}
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 64}
    return t.Qwen3VLConfig(
        text_config={**text, "head_dim": 8, "rope_scaling": rope},
        vision_config=vision,
        tie_word_embeddings=False,
        **ids,
    )


def save(family: str, folder: Path, seed: int = 0, **generation: Any) -> Path:
    """Random weights of that family in the folder, with the demo model's tokenizer and processor beside them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = config(family)
        auto = AutoModelForImageTextToText if "vl" in family else AutoModelForCausalLM
        model = auto.from_config(made)
    model.generation_config.update(eos_token_id=_sizes()["eos_token_id"], pad_token_id=_sizes()["bos_token_id"])
    model.generation_config.update(**generation)
    model.save_pretrained(folder)
    for file in DEMO_FOLDER.iterdir():
        if file.name.startswith(("tokenizer", "chat_template")) or ("vl" in family and "processor" in file.name):
            shutil.copy(file, folder)
    if family in ("qwen2_vl", "qwen2_5_vl"):
        _use_processors_of(family, folder)
    return folder


def _use_processors_of(family: str, folder: Path) -> None:
    """Qwen2-VL and Qwen2.5-VL have processors of their own, with the same image processor."""
    name = "Qwen2VLProcessor" if family == "qwen2_vl" else "Qwen2_5_VLProcessor"
    for file, changes in {
        "preprocessor_config.json": {"processor_class": name},
        "video_preprocessor_config.json": {"processor_class": name, "video_processor_type": "Qwen2VLVideoProcessor"},
    }.items():
        content = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps(content))
