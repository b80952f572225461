"""Writes the model folder: weights, configuration and processor files, as in a Qwen3-VL folder of the hub."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import torch
from markup import TEXT_END
from transformers import PreTrainedTokenizerBase, Qwen3VLForConditionalGeneration

# Pixel counts. A picture is at most 64 tokens, all frames of a video together at most 128 (in pairs).
_IMAGE_SIZE = {"shortest_edge": 64 * 64, "longest_edge": 256 * 256}
_VIDEO_SIZE = {"shortest_edge": 64 * 64, "longest_edge": 16 * 128 * 128}

_COMMON = {
    "processor_class": "Qwen3VLProcessor",
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "rescale_factor": 1 / 255,
    "resample": 3,
}


def write_model(model: Qwen3VLForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors (bfloat16). The model itself does not change."""
    saved = copy.deepcopy(model).to(torch.bfloat16)
    saved.config.dtype = torch.bfloat16
    end_of_text = tokenizer.convert_tokens_to_ids(TEXT_END)
    saved.generation_config.update(
        bos_token_id=end_of_text,
        pad_token_id=end_of_text,
        eos_token_id=[tokenizer.eos_token_id, end_of_text],
        do_sample=False,
        max_new_tokens=None,
        max_length=None,
    )
    saved.save_pretrained(folder)
    _rewrite(folder / "config.json", _hub_layout)
    (folder / "model.safetensors").chmod(0o644)


def write_processor(folder: Path) -> None:
    image = {"size": _IMAGE_SIZE, "image_processor_type": "Qwen2VLImageProcessorFast", **_COMMON}
    video = {
        "size": _VIDEO_SIZE,
        "video_processor_type": "Qwen3VLVideoProcessor",
        "fps": 2,
        "min_frames": 4,
        "max_frames": 64,
        "do_sample_frames": True,
        "cap_pixels_per_frame": False,
        **_COMMON,
    }
    _write_json(folder / "preprocessor_config.json", image)
    _write_json(folder / "video_preprocessor_config.json", video)


def _hub_layout(config: dict) -> dict:
    """Write rope_theta beside rope_scaling, as Qwen does: transformers 4.57 cannot read the rope_parameters of 5."""
    text = config["text_config"]
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = rope
    text["dtype"] = config["dtype"]
    config["vision_config"].pop("rope_parameters", None)
    return config


def _rewrite(path: Path, change: Callable[[dict], dict]) -> None:
    _write_json(path, change(json.loads(path.read_text(encoding="utf-8"))))


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
