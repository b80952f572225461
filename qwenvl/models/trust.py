"""What a model folder may not hold: what would have transformers read or load something that is not the model.

Standard library only. transformers is told to run no code of a folder and to open no pickles; its files can also name
others, which it would open. Which of these it still follows depends on its version, so none is left to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..paths import is_plain_name, real
from .checkpoint import LARGEST, UnreadableError, read_json_object

# A subfolder that tokenizers read from.
_TEMPLATES = "additional_chat_templates"
_ADAPTER = "adapter_config.json"
# Some versions run what lies in it as soon as the weights are read, although told to run no code of a folder.
_CODE = "custom_generate"
# A processor's: another model, by any path or name.
_SPEECH, _SPEECH_FILE = "audio_tokenizer", "audio_tokenizer_config.json"
_MODEL, _PROCESSOR, _TOKENIZER = "config.json", "processor_config.json", "tokenizer_config.json"


def why_unsafe(folder: Path) -> str | None:
    """The reason why nothing in the folder should be read, or None."""
    return next(_reasons(folder), None)


def _reasons(folder: Path) -> Iterator[str]:
    for file in [*folder.iterdir(), *_inside(folder / _TEMPLATES)]:
        target = real(file)
        if target is None:
            yield f"{file.name} is a link that leads back to itself. Take it out"
        elif file.is_symlink() and not _stays(target, folder):
            yield f"{file.name} is a link that leads out of it. Put the file itself there, or link the whole folder"
    for file in (folder / name for name in (_MODEL, _PROCESSOR, _TOKENIZER)):
        # Others would read what is not looked at here.
        if file.is_file() and file.stat().st_size > LARGEST:
            yield f"{file.name} is larger than {LARGEST:,} bytes, as no model's is"
    if (folder / _CODE).exists():
        yield f"{_CODE} is code that would be run. Take it out"
    if (folder / _ADAPTER).exists():
        yield f"{_ADAPTER} makes it an adapter, which names another model. Merge it into that one first"
    if (folder / _SPEECH_FILE).exists() or _settings(folder / _PROCESSOR).get(_SPEECH):
        yield f"its processor names another model, as {_SPEECH}. Qwen's models for text and pictures have none"
    if _settings(folder / _MODEL).get("transformers_weights"):
        yield "config.json names its weights itself (transformers_weights). Use the usual names and take it out"
    yield from _from_tokenizer(_settings(folder / _TOKENIZER))


def _from_tokenizer(settings: dict[str, Any]) -> Iterator[str]:
    if settings.get("init_inputs"):
        yield "tokenizer_config.json names the tokenizer's files itself (init_inputs). Take it out"
    for key, value in settings.items():
        if key.endswith("_file") and isinstance(value, str) and not is_plain_name(value, windows=True):
            yield f"tokenizer_config.json names a file elsewhere ({key}: {value!r}). Take it out"


def _stays(target: Path, folder: Path) -> bool:
    """Whether a file is in the folder, or in a store of Hugging Face's cache, to which all files there are links."""
    store = target.parent
    is_blob = store.name == "blobs" and store.parent.name.startswith("models--")
    return is_blob or target.is_relative_to(folder.resolve())


def _inside(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _settings(path: Path) -> dict[str, Any]:
    """What a file of settings holds; nothing where it cannot be read, of which whoever needs it will complain."""
    try:
        return read_json_object(path)
    except UnreadableError:
        return {}
