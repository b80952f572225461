"""The chat template of a model: where its folder has it, and the tokens that end an answer by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import LoadError, WrappedErrors
from ..log import log
from ..models.checkpoint import UnreadableError, read_json_object

# What processors had their template in, before chat_template.jinja.
_OLDER = "chat_template.json"
_DEFAULT = "default"
# Said in a turn to find what ends it.
_QUESTION, _ANSWER = "question", "answer"


def have_template(folder: Path, renderer: Any, tokenizer: Any) -> None:
    """Let the one that renders prompts have the folder's chat template, in whichever of its files it stands.

    A processor looks into files of its own only, a tokenizer not into chat_template.json.

    Args:
        renderer: the processor, or the tokenizer of a model without one.
    """
    if not renderer.chat_template:
        renderer.chat_template = tokenizer.chat_template or _older(folder)
    named = renderer.chat_template
    if isinstance(named, dict) and _DEFAULT not in named and len(named) == 1:
        renderer.chat_template = next(iter(named.values()))


def turn_ends(renderer: Any, tokenizer: Any, parts: bool) -> list[int]:
    """The tokens that end an answer by the tokenizer and by the chat template, whatever config.json says: base models
    know of the end of a document only.

    Args:
        parts: whether the template takes a message as a list of parts.
    """
    ends = [tokenizer.eos_token_id, _end_of_turn(renderer, tokenizer, parts)]
    return [each for each in ends if each is not None]


def _older(folder: Path) -> str | None:
    try:
        template = read_json_object(folder / _OLDER).get("chat_template")
    except UnreadableError as error:
        if (folder / _OLDER).exists():
            log.warning("%s", error)
        return None
    return template if isinstance(template, str) else None


def _end_of_turn(renderer: Any, tokenizer: Any, parts: bool) -> int | None:
    """The control token that the template writes behind what the model has said; None where there is none."""
    said = {"user": _QUESTION, "assistant": _ANSWER}
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}] if parts else text} for role, text in said.items()
    ]
    try:
        with WrappedErrors("its chat template renders no turn of the model"):
            rendered = renderer.apply_chat_template(messages, tokenize=False)
            _, found, rest = rendered.rpartition(_ANSWER)
            ids = tokenizer.encode(rest.lstrip(), add_special_tokens=False) if found else []
            controls = set(tokenizer.get_added_vocab().values())
    except LoadError as error:
        # Whether it can be used at all is said where a question is put.
        log.debug("%s", error)
        return None
    return ids[0] if ids and ids[0] in controls else None
