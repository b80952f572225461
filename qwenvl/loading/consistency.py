"""Checks that config.json, weights and processor of a model folder agree; and adjustments that let transformers read
folders that are laid out in another way than it expects."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import LoadError
from ..files.bounded_json import read_json_object
from ..files.headers import INDEX, has_own_index, weight_headers, weight_map
from ..models.checkpoint import Checkpoint, part

# Most numbers of a model for each byte on disk: two at four bits each, times four for safety.
_MOST_PER_BYTE = 8
_LAYERS = ("num_hidden_layers", "depth", "num_experts", "num_local_experts")
# Largest values, above those of any model, of settings that decide how long transformers takes to build one.
_MOST = {
    **dict.fromkeys(("num_hidden_layers", "depth"), 1 << 10),
    **dict.fromkeys(("num_experts", "num_local_experts"), 1 << 12),
    # Qwen4-Exp searches for prime numbers with these.
    **dict.fromkeys(("ngram_size", "heads_per_ngram"), 1 << 6),
    "ngram_vocab_size_base": 1 << 28,
}
# A processor's names for the sides of a patch -> the names in config.json.
_PATCHES = {
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "merge_size": "spatial_merge_size",
}
# Larger whole numbers in a config.json are an error.
_LARGEST = (1 << 48) - 1
# Most pixels to which a processor may enlarge a small picture or video: two frames of 8 million.
_MOST_ENLARGED = 1 << 24
_SETTINGS = "generation_config.json"
# Names of tensors that only quantized checkpoints have -> the kind of quantization.
_BESIDE = {
    r"\.(absmax|quant_map|nested_absmax|nested_quant_map)$|\.quant_state\.": "bitsandbytes in 4 bits",
    r"\.(SCB|weight_format)$": "bitsandbytes in 8 bits",
    r"\.(qweight|qzeros|g_idx|scales)$": "GPTQ or AWQ",
    r"(^|\.)(scaled_fp8|scale_weight|scale_input|comfy_quant)$": "scaled FP8, as ComfyUI's own loaders read it",
    r"\.weight_(packed|shape|zero_point|g_idx|global_scale)$": "compressed-tensors",
    r"\.\w+_scale_inv$": "FP8 in blocks, as Qwen publishes it",
    r"\.(weight|input|output|activation)_(scales?|scale_2|global_scale)$": "FP8, INT8 or FP4 with scales",
    r"\.(W_q|_data|_scale|\w*qdata|\w+_quantizer\.\w+)$": "some quantization",
}
# Types of plain weights, for tensors with two or more sides; smaller ones may be counters and the like.
_PLAIN = {"F64", "F32", "F16", "BF16", "I64", "BOOL"}
# Parts of other models, and weights for predicting several tokens at once, which transformers does not read.
_EXTRA = re.compile(r"(^|\.)(mtp|talker|token2wav|code2wav|audio_tower)\.")
_TOWER = re.compile(r"(^|\.)(visual|vision_tower|vision_model)\.")
# Tensors that are computed when a model is built, and scales for an FP8 cache of keys and values, which ours is not.
_NEEDLESS = re.compile(r"inv_freq$|rotary_emb\.|\.masked_bias$|\.([qkv]|kv|prob)_(scale|zero_point)$")
_NUMBERED = re.compile(r"(?:^|\.)(layers|blocks|experts|\w+_list)\.(\d+)\.")


def require_claims(folder: Path) -> None:
    """Raise LoadError if config.json claims more layers or experts than the weights can hold, or too large numbers.

    Call it before transformers reads config.json, which may build a list of all layers.
    """
    config = read_json_object(folder / "config.json")
    for name, value in _numbers(config):
        if isinstance(value, int) and abs(value) > _MOST.get(name, _LARGEST):
            raise LoadError(_unlike(folder, f"{name[:99]} is more than any model has"))
    tensors = weight_headers(folder).values()
    most = len(tensors) + max((side for tensor in tensors for side in tensor["shape"]), default=0)
    for section in (config, part(config, "text_config"), part(config, "vision_config")):
        claimed = [name for name, value in section.items() if _amount(name, value) > most]
        if tensors and claimed:  # a folder without weights gets another error
            raise LoadError(_unlike(folder, f"{claimed[0]} is more than they can hold"))


def require_backing(folder: Path, build: Callable[[], torch.nn.Module]) -> None:
    """Raise LoadError if the model of config.json is far larger than the weights on disk.

    transformers would fill the memory with random numbers for weights that are missing on disk.

    Args:
        build: builds the model of the configuration; called on the meta device, where it takes no memory.
    """
    tensors = weight_headers(folder).values()
    if not tensors:
        return
    with torch.device("meta"):
        model = build()
    count = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    stored = sum(tensor["data_offsets"][1] - tensor["data_offsets"][0] for tensor in tensors)
    if count > _MOST_PER_BYTE * stored:
        raise LoadError(_unlike(folder, f"it has {count:.1e} numbers, and they have {stored:.1e} bytes"))


def why_unfit(processor: Any, vision: Any) -> str | None:
    """Return the reason why an image or video processor does not fit the model, or None.

    It may cut other patches than the vision tower takes, or enlarge small pictures too much.

    Args:
        processor: an image or video processor of transformers.
        vision: the model's vision_config.
    """
    for setting, expected in _PATCHES.items():
        has, wants = getattr(processor, setting, None), getattr(vision, expected, None)
        if None not in (has, wants) and has != wants:
            return f"its processor has {setting} {has!r:.99}, and config.json has {expected} {wants!r:.99}"
    smallest, largest = processor.size["shortest_edge"], processor.size["longest_edge"]
    if not 0 < smallest <= min(largest, _MOST_ENLARGED):
        return f"its processor makes {smallest!r:.99} to {largest!r:.99} pixels of every picture"
    return None


@contextmanager
def indexed(folder: Path) -> Iterator[Path]:
    """Yield a folder that transformers can load the weights from: the folder itself, or, if it has no usable index of
    its files, a temporary one with such an index. Nothing is written into the folder, which may belong to others."""
    # transformers joins the names in an index to the folder's path, which leaves an absolute path as it is.
    places = {} if has_own_index(folder) else {name: str(path.absolute()) for name, path in weight_map(folder).items()}
    if not places:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="qwenvl-") as temporary:
        (Path(temporary) / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")
        if (folder / _SETTINGS).is_file():
            shutil.copy(folder / _SETTINGS, temporary)
        yield Path(temporary)


def tie_as_declared(folder: Path, config: Any) -> None:
    """Set tie_word_embeddings in all parts of the config, if any part of config.json sets it to true: to true, unless
    an output head is stored and another part says false. Versions of transformers read different parts."""
    written = read_json_object(folder / "config.json")
    flag = "tie_word_embeddings"
    declared = {bool(section[flag]) for section in (written, part(written, "text_config")) if flag in section}
    if True not in declared:
        return
    stored = any(name.endswith("lm_head.weight") for name in weight_map(folder))
    if len(declared) > 1 or not stored:
        for section in (config, config.get_text_config()):
            section.tie_word_embeddings = not stored


def require_described(checkpoint: Checkpoint, config: Any) -> None:
    """Raise LoadError if the weights are quantized, or have more layers, and config.json does not say so.

    transformers would leave out scales and layers, and the model would answer nonsense.
    """
    headers = weight_headers(checkpoint.folder)
    if checkpoint.quantized is None and (seems := _quantized(headers)):
        name, kind = seems
        raise LoadError(
            f"{checkpoint.folder} cannot be loaded: its weights seem to be quantized ({kind}: {name} is among them), "
            "and its config.json has no quantization_config, so that they would be taken for plain numbers. Put the "
            "config.json there that belongs to them, or use a folder with plain weights, which quantization quantizes."
        )
    limits = {"layers": getattr(config.get_text_config(), "num_hidden_layers", None)}
    if checkpoint.has_vision:
        limits["blocks"] = getattr(config.vision_config, "depth", None)
    for name in headers:
        found = None if _is_extra(name, checkpoint.has_vision) else _NUMBERED.search(name)
        most = limits.get(found[1]) if found else None
        if found and isinstance(most, int) and int(found[2]) >= most:
            raise LoadError(
                f"{checkpoint.folder} cannot be loaded: config.json says that the model has {most} {found[1]}, and its "
                f"weights have more ({name} is among them). Put the config.json there that belongs to them, or "
                "download it again."
            )


def require_used(checkpoint: Checkpoint, unexpected: Iterable[str]) -> None:
    """Raise LoadError if weights within the layers have no place in the model, which would then compute other answers.

    Args:
        unexpected: names of the tensors that transformers did not read.
    """
    if checkpoint.quantized is not None:
        return  # the package that reads the quantization knows which tensors belong to it
    names = [name for name in unexpected if not _is_extra(name, checkpoint.has_vision) and not _NEEDLESS.search(name)]
    if left := sorted(name for name in names if _NUMBERED.search(name)):
        raise LoadError(
            f"{checkpoint.folder} cannot be loaded: a model of its config.json has no place for {len(left)} of its "
            f"weights, {left[0]} among them. Put the config.json there that belongs to them, or, where they are an "
            "adapter's, merge it first."
        )


def _is_extra(name: str, has_vision: bool) -> bool:
    """Return True if the tensor belongs to no part of the model that is used to answer."""
    return bool(_EXTRA.search(name) or (not has_vision and _TOWER.search(name)))


def _quantized(headers: dict[str, dict[str, Any]]) -> tuple[str, str] | None:
    """Return the name of a tensor of quantized weights, and the kind of quantization; None if all weights are plain."""
    for pattern, kind in _BESIDE.items():
        if name := next(filter(re.compile(pattern).search, headers), None):
            return name, kind
    packed = ((name, tensor["dtype"]) for name, tensor in headers.items() if len(tensor["shape"]) > 1)
    return next(((name, f"stored as {dtype}") for name, dtype in packed if dtype not in _PLAIN), None)


def _numbers(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield every value of a configuration that is no container, at any depth, with its own or its list's name."""
    waiting: list[tuple[str, Any]] = list(config.items())
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += [(name, item) for item in value]
        else:
            yield name, value


def _amount(name: str, value: Any) -> int:
    """Return how many layers or experts a setting asks for; 0 if it asks for none."""
    if isinstance(value, list):
        return len(value)
    return value if name in _LAYERS and isinstance(value, int) else 0


def _unlike(folder: Path, why: str) -> str:
    return f"{folder} cannot be loaded: config.json describes another model than its weights are of: {why}."
