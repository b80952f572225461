"""Whether a model folder is sound: its description held against its weights and its processor; and what is needed to
read weights that lie there in another way than transformers expects."""

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

# Numbers of a model for each byte on disk: two where they have four bits each, and as much again to be safe.
_MOST_PER_BYTE = 8
_LAYERS = ("num_hidden_layers", "depth", "num_experts", "num_local_experts")
# What transformers counts to while it makes a model, and more than any has.
_MOST = {
    **dict.fromkeys(("num_hidden_layers", "depth"), 1 << 10),
    **dict.fromkeys(("num_experts", "num_local_experts"), 1 << 12),
    # Of Qwen4-Exp, which looks for prime numbers.
    **dict.fromkeys(("ngram_size", "heads_per_ngram"), 1 << 6),
    "ngram_vocab_size_base": 1 << 28,
}
# What a processor calls the sides of a patch, and what config.json calls them.
_PATCHES = {
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "merge_size": "spatial_merge_size",
}
# No number of a configuration is as large.
_LARGEST = (1 << 48) - 1
# Pixels to which anything may be enlarged: two frames of 8 million.
_MOST_ENLARGED = 1 << 24
_SETTINGS = "generation_config.json"
# What lies beside weights that are no plain numbers -> what such a folder seems to be.
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
# Of tensors with two sides; of others, counters and the like are whole numbers.
_PLAIN = {"F64", "F32", "F16", "BF16", "I64", "BOOL"}
# Parts of other models, and heads for several tokens at once, which transformers leaves on disk.
_EXTRA = re.compile(r"(^|\.)(mtp|talker|token2wav|code2wav|audio_tower)\.")
_TOWER = re.compile(r"(^|\.)(visual|vision_tower|vision_model)\.")
# What is computed anew, and scales for a cache of keys and values in FP8, which ours is not.
_NEEDLESS = re.compile(r"inv_freq$|rotary_emb\.|\.masked_bias$|\.([qkv]|kv|prob)_(scale|zero_point)$")
_NUMBERED = re.compile(r"(?:^|\.)(layers|blocks|experts|\w+_list)\.(\d+)\.")


def require_claims(folder: Path) -> None:
    """Raise LoadError where config.json claims more parts of a model than the weights can hold, or than any has.

    To be asked before anything is made of config.json, because a list of all layers may be made with it.
    """
    config = read_json_object(folder / "config.json")
    for name, value in _numbers(config):
        if isinstance(value, int) and abs(value) > _MOST.get(name, _LARGEST):
            raise LoadError(_unlike(folder, f"{name[:99]} is more than any model has"))
    tensors = weight_headers(folder).values()
    most = len(tensors) + max((side for tensor in tensors for side in tensor["shape"]), default=0)
    for section in (config, part(config, "text_config"), part(config, "vision_config")):
        claimed = [name for name, value in section.items() if _amount(name, value) > most]
        if tensors and claimed:  # without any there is nothing to load, which is said elsewhere
            raise LoadError(_unlike(folder, f"{claimed[0]} is more than they can hold"))


def require_backing(folder: Path, build: Callable[[], torch.nn.Module]) -> None:
    """Raise LoadError where config.json claims a model that the weights are far too small for.

    It would fill the memory before anybody noticed, because what is not on disk is made up.

    Args:
        build: makes the model of the configuration; called where its numbers take no memory.
    """
    tensors = weight_headers(folder).values()
    if not tensors:
        return
    with torch.device("meta"):
        model = build()
    count = sum(each.numel() for each in (*model.parameters(), *model.buffers()))
    stored = sum(tensor["data_offsets"][1] - tensor["data_offsets"][0] for tensor in tensors)
    if count > _MOST_PER_BYTE * stored:
        raise LoadError(_unlike(folder, f"it has {count:.1e} numbers, and they have {stored:.1e} bytes"))


def why_unfit(processor: Any, vision: Any) -> str | None:
    """Why an image or video processor cannot serve the model, or None.

    It may cut into other patches than the vision tower takes, or enlarge what is small beyond all measure.

    Args:
        processor: transformers'.
        vision: the model's vision_config.
    """
    for setting, expected in _PATCHES.items():
        has, wants = getattr(processor, setting, None), getattr(vision, expected, None)
        if None not in (has, wants) and has != wants:
            return f"its processor has {setting} {has!r:.99}, and config.json has {expected} {wants!r:.99}"
    smallest, largest = processor.size["shortest_edge"], processor.size["longest_edge"]
    if not 0 < smallest <= min(largest, _MOST_ENLARGED):
        return f"its processor makes {smallest!r:.99} to {largest!r:.99} pixels of whatever it is shown"
    return None


@contextmanager
def indexed(folder: Path) -> Iterator[Path]:
    """What to give to transformers as the model's folder: where its files have no index that is of use, another with
    one that names them. Nothing is written into the folder, which need not be ours."""
    # An absolute path stays one when it is joined to that of a folder.
    places = {} if has_own_index(folder) else {name: str(path.absolute()) for name, path in weight_map(folder).items()}
    if not places:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="qwenvl-") as made:
        (Path(made) / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")
        if (folder / _SETTINGS).is_file():
            shutil.copy(folder / _SETTINGS, made)
        yield Path(made)


def tie_as_said(folder: Path, config: Any) -> None:
    """Where any part of config.json says that the output head is the embeddings, it is so unless a head is stored and
    another part denies it: which part is looked at depends on the version of transformers."""
    written = read_json_object(folder / "config.json")
    flag = "tie_word_embeddings"
    said = {bool(each[flag]) for each in (written, part(written, "text_config")) if flag in each}
    if True not in said:
        return
    stored = any(name.endswith("lm_head.weight") for name in weight_map(folder))
    if len(said) > 1 or not stored:
        for each in (config, config.get_text_config()):
            each.tie_word_embeddings = not stored


def require_described(checkpoint: Checkpoint, config: Any) -> None:
    """Raise LoadError where the files hold what config.json does not say: quantized weights, or more layers.

    transformers would drop scales and layers, and what is left talks rubbish.
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
    """Raise LoadError where weights within the layers have no place in the model: it would compute something else.

    Args:
        unexpected: names of what transformers did not read.
    """
    if checkpoint.quantized is not None:
        return  # what belongs to the quantization is known to whoever reads it
    names = [each for each in unexpected if not _is_extra(each, checkpoint.has_vision) and not _NEEDLESS.search(each)]
    if left := sorted(each for each in names if _NUMBERED.search(each)):
        raise LoadError(
            f"{checkpoint.folder} cannot be loaded: a model of its config.json has no place for {len(left)} of its "
            f"weights, {left[0]} among them. Put the config.json there that belongs to them, or, where they are an "
            "adapter's, merge it first."
        )


def _is_extra(name: str, has_vision: bool) -> bool:
    """Whether it belongs to no part of the model that answers."""
    return bool(_EXTRA.search(name) or (not has_vision and _TOWER.search(name)))


def _quantized(headers: dict[str, dict[str, Any]]) -> tuple[str, str] | None:
    """A tensor that only quantized weights have, and what it seems to be of; None where all are plain."""
    for pattern, kind in _BESIDE.items():
        if name := next(filter(re.compile(pattern).search, headers), None):
            return name, kind
    packed = ((name, each["dtype"]) for name, each in headers.items() if len(each["shape"]) > 1)
    return next(((name, f"stored as {dtype}") for name, dtype in packed if dtype not in _PLAIN), None)


def _numbers(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each value of a configuration that is no container, at any depth, by the name that it, or its list, has."""
    waiting: list[tuple[str, Any]] = list(config.items())
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += [(name, each) for each in value]
        else:
            yield name, value


def _amount(name: str, value: Any) -> int:
    """How many parts of a model a setting asks for."""
    if isinstance(value, list):
        return len(value)
    return value if name in _LAYERS and isinstance(value, int) else 0


def _unlike(folder: Path, why: str) -> str:
    return f"{folder} cannot be loaded: config.json describes another model than its weights are of: {why}."
