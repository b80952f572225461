"""Makes tiny random models of every family, saved as model folders like those on the hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pictures import draw
from safetensors.torch import load_file, save_file

from qwenvl.decoding.decoder import Decoder
from qwenvl.decoding.rows import OnTokens
from qwenvl.loading.loader import ModelHandle
from qwenvl.loading.precision import UNQUANTIZED
from qwenvl.models import catalog
from qwenvl.models.families import family_of

DEMO_FOLDER = catalog.PACK / "demo" / "model"
# Family, which is config.json's model_type -> the class of its configuration.
CLASSES = {
    "qwen2": "Qwen2Config",
    "qwen2_moe": "Qwen2MoeConfig",
    "qwen3": "Qwen3Config",
    "qwen3_moe": "Qwen3MoeConfig",
    "qwen3_next": "Qwen3NextConfig",
    "qwen3_5_text": "Qwen3_5TextConfig",
    "qwen3_5_moe_text": "Qwen3_5MoeTextConfig",
    "qwen4_exp_text": "Qwen4ExpTextConfig",
    "qwen2_vl": "Qwen2VLConfig",
    "qwen2_5_vl": "Qwen2_5_VLConfig",
    "qwen3_vl": "Qwen3VLConfig",
    "qwen3_vl_moe": "Qwen3VLMoeConfig",
    "qwen3_5": "Qwen3_5Config",
    "qwen3_5_moe": "Qwen3_5MoeConfig",
    "qwen4_exp": "Qwen4ExpConfig",
}
SEEING = tuple(family for family in CLASSES if family_of(family).has_vision)
# Those that our own step covers, and the others.
DENSE = tuple(family for family in CLASSES if family_of(family).decode == "dense")
OTHERS = tuple(family for family in CLASSES if family not in DENSE)

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
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "decoder_sparse_step": 1,
}
_WIDE = {"hidden_size": 256, "head_dim": 64, "moe_intermediate_size": 256, "num_experts": 8}
_LINEAR = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
# Embeddings of word sequences, and attention to a part of the keys.
_INDEXED = {
    "ple_layer_ids": [1],
    "ngram_vocab_size_base": 50,
    "heads_per_ngram": 2,
    "split_ngram_parts": 2,
    "hc_lowrank": 8,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}
_VISION = {"depth": 2, "num_heads": 2, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2}
# The vision towers from Qwen2.5-VL on.
_NEWER_VISION = {**_VISION, "hidden_size": 32, "intermediate_size": 48}
# Natively vision-language, with linear attention.
_LATER = ("qwen3_5", "qwen4")
_INTERLEAVED = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True}


def known(family: str) -> bool:
    """Tell if the installed transformers has the family."""
    return hasattr(transformers, CLASSES[family])


def families(*names: str) -> list[Any]:
    """Return the named families as parameters of a test; those that the installed transformers lacks are skipped."""
    lacks = pytest.mark.skipif(True, reason=f"transformers {transformers.__version__} has no such family")
    return [name if known(name) else pytest.param(name, marks=lacks) for name in names]


def config(family: str, wide: bool = False) -> Any:
    """Configure a model of that family with the demo model's vocabulary; in a wide one experts outweigh the rest."""
    kind = getattr(transformers, CLASSES[family])
    text = {**_TEXT, **_sizes(), **_text(family), **(_WIDE if wide else {})}
    if family not in SEEING:
        return kind(**text)
    vision = {**_vision(family), "out_hidden_size": text["hidden_size"]}
    return kind(text_config=text, vision_config=vision, tie_word_embeddings=False, **_tokens())


def random_model(family: str, seed: int = 0, wide: bool = False) -> Any:
    """Build a model of that family with random weights."""
    auto = transformers.AutoModelForImageTextToText if family in SEEING else transformers.AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return auto.from_config(config(family, wide))


def random_prompt(model: Any, length: int = 24) -> dict[str, torch.Tensor]:
    """Return generate()'s keywords for random words and, if the model reads pictures, one of 4 by 4 patches. This needs
    no tokenizer, no processor, and none of their packages."""
    random, device = torch.Generator().manual_seed(0), model.device
    ids = torch.randint(20, 200, (length,), generator=random)
    inputs = {}
    if hasattr(model.config, "vision_config"):
        names = ("vision_start_token_id", *["image_token_id"] * 4, "vision_end_token_id")
        ids = torch.cat([ids[:4], torch.tensor([_tokens()[name] for name in names]), ids[4:]])
        pixels = torch.randn(16, 3 * 2 * 16 * 16, generator=random)
        inputs = {"pixel_values": pixels.to(model.dtype), "image_grid_thw": torch.tensor([[1, 4, 4]])}
        if not transformers.__version__.startswith("4."):
            inputs["mm_token_type_ids"] = (ids == _tokens()["image_token_id"]).int()[None]
    inputs |= {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
    return {name: value.to(device) for name, value in inputs.items()}


def save(family: str, folder: Path, seed: int = 0, wide: bool = False, **generation: Any) -> Path:
    """Save a model of that family with random weights and the demo model's tokenizer and processor."""
    model, sees = random_model(family, seed, wide), family in SEEING
    model.generation_config.update(eos_token_id=_sizes()["eos_token_id"], pad_token_id=_sizes()["bos_token_id"])
    model.generation_config.update(**generation)
    model.save_pretrained(folder)
    for file in DEMO_FOLDER.iterdir():
        if file.name.startswith(("tokenizer", "chat_template")) or (sees and "processor" in file.name):
            shutil.copy(file, folder)
    if family in ("qwen2_vl", "qwen2_5_vl"):
        _use_processors_of(family, folder)
    return folder


def decode_of(model: Any) -> str:
    """Return our own decode step that fits the model's family."""
    return family_of(type(model.config).model_type).decode


def decoder(model: Any, attention: str = "sdpa") -> Decoder:
    """Return the pack's decoder, by default of the fastest tier that fits."""
    return Decoder(model, attention, decode=decode_of(model))


def rewrite(folder: Path, **changes: Any) -> Path:
    """Change the folder's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def by_transformers(
    model: Any, inputs: dict[str, Any], max_new_tokens: int = 48, **how: Any
) -> tuple[tuple[int, ...], ...]:
    """Return what generate() itself answers, per row, without end token and padding."""
    result = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens, **how)
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    rows = []
    for row in result[:, inputs["input_ids"].shape[1] :].tolist():
        stop = next((i for i, token in enumerate(row) if token in ends), len(row))
        rows.append(tuple(row[:stop]))
    return tuple(rows)


def batch_of(handle: ModelHandle) -> dict[str, Any]:
    """Return three prompts of different lengths, padded on the left, with a picture each if the family reads them."""
    texts = ["Hi.", "What is on this picture?", "Tell me at length what you can see here, please."]
    shapes = ("circle", "square", "triangle")
    if handle.processor is None:
        handle.tokenizer.padding_side = "left"
        return dict(handle.tokenizer(texts, padding=True, return_tensors="pt"))
    rendered = [
        handle.processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for text in texts
    ]
    handle.processor.tokenizer.padding_side = "left"
    pictures = [[draw(shape, "red", "blue", (96, 64 + 64 * i))] for i, shape in enumerate(shapes)]
    return dict(handle.processor(text=rendered, images=pictures, padding=True, return_tensors="pt"))


def _demo() -> dict[str, Any]:
    return json.loads((DEMO_FOLDER / "config.json").read_text())


def _tokens() -> dict[str, int]:
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return {name: _demo()[name] for name in names}


def _sizes() -> dict[str, int]:
    return {name: _demo()["text_config"][name] for name in ("vocab_size", "eos_token_id", "bos_token_id")}


def _text(family: str) -> dict[str, Any]:
    """Return the further settings of the family's text part."""
    if family in ("qwen2", "qwen2_moe"):
        return _EXPERTS if "moe" in family else {}
    if family in ("qwen2_vl", "qwen2_5_vl"):
        return {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
    extra: dict[str, Any] = {"head_dim": 8}
    if "_vl" in family:
        extra |= {"rope_scaling": _INTERLEAVED}
    if family.startswith(_LATER) or family == "qwen3_next":
        extra |= _LINEAR
    if family.startswith(_LATER):
        extra |= {"rope_parameters": {**_INTERLEAVED, "rope_theta": 1e6, "partial_rotary_factor": 0.5}}
    if "moe" in family or family.startswith(("qwen3_next", "qwen4")):
        extra |= _EXPERTS
    if family.startswith("qwen4"):
        extra |= _INDEXED
    return extra


def _vision(family: str) -> dict[str, Any]:
    if family == "qwen2_vl":
        return {**_VISION, "embed_dim": 32, "hidden_size": 32}
    if family == "qwen2_5_vl":
        return {**_NEWER_VISION, "fullatt_block_indexes": [1], "window_size": 64}
    newer = {**_NEWER_VISION, "num_position_embeddings": 64}
    return newer if family.startswith(_LATER) else {**newer, "deepstack_visual_indexes": [0]}


def _use_processors_of(family: str, folder: Path) -> None:
    """Name the processor of Qwen2-VL or Qwen2.5-VL, which have their own, with the same image processor."""
    name = "Qwen2VLProcessor" if family == "qwen2_vl" else "Qwen2_5_VLProcessor"
    for file, changes in {
        "preprocessor_config.json": {"processor_class": name},
        "video_preprocessor_config.json": {"processor_class": name, "video_processor_type": "Qwen2VLVideoProcessor"},
    }.items():
        content = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps(content))


def save_demo(folder: Path, stored: str) -> Path:
    """Save the demo model as a quantized checkpoint, in one of the layouts that the hub has.

    Args:
        stored: "fp8", "compressed-tensors" (in 4 bits), "bitsandbytes-4bit" or "bitsandbytes-8bit".
    """
    shutil.copytree(DEMO_FOLDER, folder)
    if stored.startswith("bitsandbytes"):
        _save_by_bitsandbytes(folder, stored.removeprefix("bitsandbytes-"))
        return folder
    weights = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        # Qwen leaves all but the language model's projections as they are.
        replaced = name.endswith("_proj.weight") and "visual" not in name
        weights |= (_in_fp8 if stored == "fp8" else _in_4_bits)(name, weight) if replaced else {name: weight}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return rewrite(folder, quantization_config=_FP8 if stored == "fp8" else _4_BITS)


# Weights in a row, or in a square, that share a scale.
_BLOCK = 32
_FP8 = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [_BLOCK, _BLOCK],
    "modules_to_not_convert": ["lm_head", "model.visual"],
}
_4_BITS = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head", "re:.*visual.*"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "strategy": "group",
                "group_size": _BLOCK,
                "symmetric": True,
                "dynamic": False,
            },
        }
    },
}


def _save_by_bitsandbytes(folder: Path, bits: str) -> None:
    settings = transformers.BitsAndBytesConfig(**{f"load_in_{bits}": True}, llm_int8_skip_modules=list(UNQUANTIZED))
    auto: Any = transformers.AutoModelForImageTextToText
    auto.from_pretrained(DEMO_FOLDER, quantization_config=settings, device_map={"": "cpu"}).save_pretrained(folder)


def _in_fp8(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    rows, columns = weight.shape
    blocks = weight.float().view(rows // _BLOCK, _BLOCK, columns // _BLOCK, _BLOCK)
    scale = blocks.abs().amax((1, 3), keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    stored = (blocks / scale).to(torch.float8_e4m3fn).view(rows, columns)
    return {name: stored, f"{name}_scale_inv": scale[:, 0, :, 0].clone()}


def _in_4_bits(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    rows, columns = weight.shape
    groups = weight.float().view(rows, columns // _BLOCK, _BLOCK)
    scale = groups.abs().amax(-1, keepdim=True) / 7.5
    # Eight to a 32-bit number, the first in the lowest bits, counted from -8.
    numbers = (groups / scale).round().clamp(-8, 7).view(rows, -1, 8).to(torch.int64) + 8
    packed = (numbers << torch.arange(0, 32, 4)).sum(-1)
    return {
        f"{name}_packed": torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32),
        f"{name}_scale": scale[..., 0].to(weight.dtype).clone(),
        f"{name}_shape": torch.tensor([rows, columns]),
    }


def cancelled(generate: Callable[[OnTokens], Any], token: int) -> tuple[int, ...]:
    """Return what is reported of a single row's answer before its listener cancels at that token."""
    told: list[int] = []

    def stop(rows: Sequence[Sequence[int]]) -> None:
        told.extend(rows[0])
        if len(told) == token:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(stop)
    return tuple(told)
