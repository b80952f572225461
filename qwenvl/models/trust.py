"""Refuses model folders with which transformers would read or load something that is not the model.

Standard library only. transformers runs no code of a folder and opens no pickles here, but the folder's files can also
name other files, which it would open. Which of these it still follows depends on its version, so all are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..checks import shown
from ..files.bounded_json import OversizeError, UnreadableError, content_of, limit_of, read_json_object
from ..paths import is_plain_name, real
from .families import FAMILIES

# A subfolder from which tokenizers read.
_TEMPLATES = "additional_chat_templates"
_ADAPTER = "adapter_config.json"
# Some versions run the code in it when the weights are read, although no code of a folder is allowed.
_CODE = "custom_generate"
# A key and a file of a processor that name another model, by any path or name.
_SPEECH, _SPEECH_FILE = "audio_tokenizer", "audio_tokenizer_config.json"
_MODEL, _PROCESSOR, _TOKENIZER = "config.json", "processor_config.json", "tokenizer_config.json"
_IMAGES = {"Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil", "Qwen2_5_VLImageProcessor"}
# Key -> the classes it may name: those of Qwen's models, and the plain ones that finetunes were saved with. Other
# classes of transformers open files, or ask the hub, as the folder demands.
_CLASSES = {
    "processor_class": {"Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor"},
    "image_processor_type": _IMAGES,
    "feature_extractor_type": _IMAGES,
    "video_processor_type": {"Qwen2VLVideoProcessor", "Qwen3VLVideoProcessor"},
    "tokenizer_class": {
        *("Qwen2Tokenizer", "Qwen2TokenizerFast", "Qwen3_5Tokenizer", "Qwen3_5TokenizerFast"),
        *("PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend"),
        # Distillations of other models, and finetunes that were saved with the tokenizer on which Qwen's is based.
        *("LlamaTokenizer", "LlamaTokenizerFast", "GPT2Tokenizer", "GPT2TokenizerFast"),
    },
}
# Endings that the model_type of a model's parts has after its family.
_PARTS = ("", "_text", "_vision")
# Allowed ways to store weights. For any other, transformers would load packages and kernels that were not tested.
METHODS = ("awq", "bitsandbytes", "compressed-tensors", "fp8", "gptq")
_STORED = ("quantization_config", "compression_config")
# Keys with names of layers, which may be patterns. Any other value that is not a plain word may name a file, whose code
# compressed-tensors would run.
_LAYERS = ("ignore", "targets")
_WORD = re.compile(r"[\w .+-]*")
# Keys by which transformers chooses how attention and experts are computed.
_WAYS = {
    f"{begin}_implementation{end}" for begin in ("attn", "_attn", "experts", "_experts") for end in ("", "_internal")
}
# Ways to compute experts that transformers has itself; for others it downloads a kernel.
_EXPERTS = ("eager", "grouped_mm", "batched_mm")
# File -> the key of its list of other files, of which transformers picks one by its version.
_VERSIONS = {_MODEL: "configuration_files", _TOKENIZER: "fast_tokenizer_files"}
_TOKENS = "tokenizer.json"
# Files that are read to their end: settings, indices, templates, and the parts of a tokenizer.
_READ = (
    *("*config.json", "*.index.json", "*.jinja", "chat_template*", "tokenizer*", "vocab*", "merges*", "*.model"),
    *("added_tokens.json", "special_tokens_map.json", "*.tiktoken", "tekken.json"),
)
_MENDED = "Put the file there that belongs to the model, or download it again"


def why_unsafe(folder: Path) -> str | None:
    """Return why nothing in the folder should be read, or None."""
    try:
        return next(_reasons(folder), None)
    except OversizeError as error:  # refused, because transformers may be able to read it, and follow it
        return f"{error.path.name} cannot be read: {error.reason}, as no model's is"


def links_out(folder: Path) -> dict[str, str]:
    """Find the links that lead out of the folder, or to themselves: {name: what is wrong}. No link is opened."""
    found = {}
    for file in [*_inside(folder), *_inside(folder / _TEMPLATES)]:
        target = real(file)
        if target is None:
            found[file.name] = f"{file.name} is a link that leads back to itself. Take it out"
        elif file.is_symlink() and not _stays(target, folder):
            found[file.name] = (
                f"{file.name} is a link that leads out of it. Put the file itself there, or link the whole folder"
            )
    return found


def _reasons(folder: Path) -> Iterator[str]:
    yield from _of_files(folder)
    if (folder / _SPEECH_FILE).exists() or _settings(folder / _PROCESSOR).get(_SPEECH):
        yield f"its processor names another model, as {_SPEECH}. Qwen's models for text and pictures have none"
    if _settings(folder / _MODEL).get("transformers_weights"):
        yield "config.json names its weights itself (transformers_weights). Use the usual names and take it out"
    for name, key in _VERSIONS.items():
        if _settings(folder / name).get(key):
            yield f"{name} names other files that are to be read instead ({key}). Take it out"
    yield from _from_tokenizer(_settings(folder / _TOKENIZER), (folder / _TOKENS).is_file())
    for file in sorted(folder.glob("*config.json")):
        yield from _chosen(file.name, _settings(file))


def _of_files(folder: Path) -> Iterator[str]:
    """Yield what is wrong with files, before any of them is read."""
    yield from links_out(folder).values()
    for file in [*folder.iterdir(), *_inside(folder / _TEMPLATES)]:
        if is_read(file.name):
            yield from _unreadable(file)
    if (folder / _CODE).exists():
        yield f"{_CODE} is code that would be run. Take it out"
    if (folder / _ADAPTER).exists():
        yield f"{_ADAPTER} makes it an adapter, which names another model. Merge it into that one first"


def is_read(name: str) -> bool:
    """Tell if a file of that name may be read to its end. Of weights, only the headers are read."""
    return any(fnmatch(name.lower(), pattern) for pattern in _READ)


def _unreadable(file: Path) -> Iterator[str]:
    """Yield why the file must not be read: other readers do not check, and would wait for a pipe or fill the memory."""
    if not file.is_file():
        if file.exists() and not file.is_dir():
            yield f"{file.name} is not a regular file. Put one there"
        return
    state, most = file.stat(), limit_of(file.name).size
    if state.st_size > most:
        yield f"{file.name} is larger than {most:,} bytes, as no model's is"
    elif file.suffix.lower() == ".json" and (reason := _why_too_much(file, state.st_mtime_ns, state.st_size)):
        yield f"{file.name} cannot be read: {reason}, as no model's does"


# Cached by time and size, so that a changed file is read again.
@lru_cache(maxsize=64)
def _why_too_much(file: Path, modified: int, size: int) -> str | None:
    try:
        content_of(file)
    except OversizeError as error:
        return error.reason
    return None


def _from_tokenizer(settings: dict[str, Any], is_whole: bool) -> Iterator[str]:
    """Yield the settings of a tokenizer that would make it read other files.

    Args:
        is_whole: the folder has the whole tokenizer in one file, so that vocab_file and merges_file are not read.
    """
    if settings.get("init_inputs"):
        yield "tokenizer_config.json names the tokenizer's files itself (init_inputs). Take it out"
    for key, value in settings.items():
        if not (key.endswith("_file") and isinstance(value, str)):
            continue
        # transformers looks for a plain name in the folder where the program was started.
        unread = is_whole and key in ("vocab_file", "merges_file")
        if not (unread and is_plain_name(value, windows=True)):
            yield f"tokenizer_config.json names a file elsewhere ({key}: {shown(value)}). Take it out"


def _chosen(name: str, settings: dict[str, Any]) -> Iterator[str]:
    """Yield values in a file of settings, at any depth, that would make transformers use code that is not Qwen's."""
    for key, value in _below(settings):
        if value is not None and _is_foreign(name, key, value):
            yield f"{name} names {shown(value)} as {key}, which is not one of Qwen's. {_MENDED}"
        if key in _STORED and isinstance(value, dict):
            yield from _of_stored(name, value)
        if key in _WAYS and not _is_own_way(key, value):
            yield f"{name} names {shown(value)} as {key}, a kernel that transformers would fetch. Take it out"


def _below(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield key and value of every object at any depth; values in a list have the list's key."""
    waiting: list[tuple[str, Any]] = [("", settings)]
    while waiting:
        above, part = waiting.pop()
        for key, value in part.items() if isinstance(part, dict) else [(above, item) for item in part]:
            if isinstance(part, dict) or not isinstance(value, dict | list):
                yield key, value
            if isinstance(value, dict | list):
                waiting.append((key, value))


def _of_stored(name: str, stored: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the way in which the weights are stored."""
    method = stored.get("quant_method")
    bits = any(stored.get(f"load_in_{bits}") for bits in ("4bit", "8bit"))
    if (method not in METHODS and not (method is None and bits)) or (bits and method not in (None, "bitsandbytes")):
        stored_as = f"{shown(method)}{' and bitsandbytes' if bits else ''}"
        yield f"{name} says that its weights are stored as {stored_as}. Known are {', '.join(METHODS)}"
    if method != "compressed-tensors":
        return
    for key, value in _below(stored):
        if isinstance(value, str) and key not in _LAYERS and not _WORD.fullmatch(value):
            yield f"{name} names {shown(value)} as {key} of its weights, which is not a plain name. {_MENDED}"


def _is_own_way(key: str, value: Any) -> bool:
    """Tell if a way to compute attention or experts is that of torch or a package, and not a kernel from the hub."""
    ways = value.values() if isinstance(value, dict) else [value]
    if "experts" in key:
        return all(way is None or way in _EXPERTS for way in ways)
    return all(way is None or (isinstance(way, str) and "/" not in way) for way in ways)


def _is_foreign(name: str, key: str, value: Any) -> bool:
    if key == "model_type" and name == _MODEL:
        known = {family + part for family in FAMILIES for part in _PARTS}
        return not (isinstance(value, str) and value in known)
    return key in _CLASSES and not (isinstance(value, str) and value in _CLASSES[key])


def _stays(target: Path, folder: Path) -> bool:
    """Tell if a file is in the folder, or in the blobs of Hugging Face's cache, to which all files there are links."""
    store = target.parent
    is_blob = store.name == "blobs" and store.parent.name.startswith("models--")
    return is_blob or target.is_relative_to(folder.resolve())


def _inside(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _settings(path: Path) -> dict[str, Any]:
    """Read a file of settings; {} if it cannot be read, which is reported when the file is needed."""
    try:
        return read_json_object(path)
    except OversizeError:
        raise
    except UnreadableError:
        return {}
