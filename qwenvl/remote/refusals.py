"""Explains why an engine gave no answer, in one sentence with the engine's own words. Standard library only."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from typing import Any
from urllib.parse import urlsplit

from ..checks import whole_characters
from ..models.engines import Engine
from .incoming import LONGEST_WORDS, read_json

_LONGEST_QUOTE = 400
_LONGEST_HOST = 253
_UNKNOWN_FIELD = re.compile(
    r"unexpected|(?:un|not )recogni[sz]ed|unknown|unsupported|not (?:supported|permitted|allowed|a valid)|extra inputs|"
    r"cannot find field|(?:does not|doesn't|isn't|not) (?:support|know|accept)|no such|invalid (?:param|arg|field|prop)"
)
# The part of a refusal that names fields the engine knows: "did you mean 'top_p'?", "expected one of `seed`, `stop`".
_SUGGESTION = re.compile(
    r"\b(?:did you mean|(?:perhaps|maybe) you mean|expected(?: one of)?\b|must be one of|one of:)[^?.;]*|"
    r"\buse [^?.;]{0,80}\binstead\b|\binstead of [^?.;,]*|"
    r"\b(?<!not )(?:valid|supported|allowed|known|permitted|accepted|available) "
    r"(?:param\w*|arg\w*|field\w*|propert\w*|name\w*|ones)(?: are| is|:)[^?.;]*",
    re.IGNORECASE,
)
_UNKNOWN_MODEL = re.compile(
    r"\bmodel\b.{0,400}(?:not exist|n[o']t found|unknown|not available|n[o']t serv|n[o']t loaded)|"
    r"pinned to|not a valid model|(?:invalid|unknown|no such|no) model\b|unable to access model|"
    r"no models? (?:is |are )?loaded|no healthy deployments|"
    r"could not find .{0,400}handler for|llm provider not provided",
    re.S,
)
_NO_VALUE = r"unsupported|not support|n't support|not have|missing|mmproj|cannot|can't|unable|text-only"
# For a status of 500 or more, only these words show that the pictures are the reason.
_NO_PICTURES = re.compile(
    rf"(?:image|picture|multi-?modal|vision|video).{{0,80}}(?:{_NO_VALUE})|"
    rf"(?:{_NO_VALUE}).{{0,80}}(?:image|picture|multi-?modal|vision|video)",
    re.S,
)
_TOO_LONG = re.compile(
    r"context (?:length|window)|maximum (?:model|sequence|input|context|prompt)|too (?:long|many tokens)|"
    r"longer than|max_model_len|exceeds? .{0,400}(?:length|tokens|context)|too large to process"
)
_PICTURES = re.compile(r"image|picture|multi-?modal|\bmm\b|vision|video")


class EngineError(RuntimeError):
    """An engine cannot be used: every question would fail."""


class QuestionError(EngineError):
    """An engine did not answer this question; it may answer others."""


def words(body: str, hidden: Callable[[str], str] = str) -> str:
    """Return the message in an error response, which may have any of the usual forms, cut to a bounded length. Pure.

    Args:
        hidden: takes out what must stay secret, before the text is cut.
    """
    body = body[:LONGEST_WORDS]
    try:
        text = _message(read_json(body))
    except (ValueError, RecursionError):
        text = re.sub(r"<[^<>]*>", " ", body)
    text = hidden(legible(text[:LONGEST_WORDS]))
    return text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]} ..."


def legible(text: str) -> str:
    """Write the text in one line, without characters that control a terminal. Pure."""
    characters = (character if character.isprintable() else " " for character in whole_characters(text))
    return " ".join("".join(characters).split())


def _message(content: Any) -> str:
    """Find the message in an error response; a part of it if it has none of the usual forms."""
    if isinstance(content, dict):
        for name in ("error", "message", "detail", "msg"):
            if content.get(name):
                # FastAPI names the field beside the message.
                where = content.get("loc") or content.get("param")
                return f"{_message(content[name])}{f' ({_message(where)})' if where else ''}"
    if isinstance(content, list):
        return ", ".join(_message(item) for item in content)
    return content if isinstance(content, str) else json.dumps(content)


def status_in(event: dict[str, Any]) -> int:
    """Return the status in an error within a stream; 500 if it has none. Pure."""
    error = event.get("error")
    code = error.get("code") if isinstance(error, dict) else event.get("code")
    return code if isinstance(code, int) and 400 <= code < 600 else 500


def unknown_fields(words: str, candidates: Collection[str]) -> set[str]:
    """Return the candidates that a refusal names as unknown fields. Pure."""
    if not _UNKNOWN_FIELD.search(words.lower()):
        return set()
    named = _SUGGESTION.sub(" ", words)
    return {name for name in candidates if re.search(rf"\b{name}\b", named)}


def left_out(status: int, words: str, candidates: Collection[str]) -> set[str]:
    """Return the fields to leave out when the question is sent again. Pure.

    Answers are cut before a stop here too, so an engine that may have failed because of `stop` is sent none.
    """
    names = unknown_fields(words, candidates) if status in (400, 422, 500, 501) else set()
    fails_on_stop = status in (500, 501) or (status in (400, 422) and re.search(r"\bstop(?:\b|_)", words))
    return names or ({"stop"} & set(candidates) if fails_on_stop else set())


def refused(engine: Engine, status: int, quote: str) -> EngineError:
    """Return the error for a status other than 200, or for an error within a stream."""
    who, low = _who(engine), quote.lower()
    quote = quote or f"status {status}"
    if status in (401, 403):
        return EngineError(f"{who} refuses the key: {quote}. {_about_key(engine)}")
    if status == 404 and "model" not in low:
        return EngineError(f"{who} has nothing at its address: {quote}. base_url usually ends in /v1.")
    if status == 404 or (status < 500 and _UNKNOWN_MODEL.search(low)):
        return EngineError(f"{who} has no model {engine.model!r}: {quote}. Set model in its entry to what it serves.")
    if status == 413 or _TOO_LONG.search(low):
        return QuestionError(
            f"The question is too long for {_the(who)}: {quote}. "
            "Lower max_new_tokens, or show fewer or smaller pictures."
        )
    if (_PICTURES if status < 500 else _NO_PICTURES).search(low):
        return QuestionError(
            f"{who} refuses the pictures: {quote}. If its model cannot see, set vision to false in its entry."
        )
    doing = "refuses the question" if status < 500 else "failed"
    return QuestionError(f"{who} {doing}: {quote}.")


def busy(engine: Engine, quote: str) -> QuestionError:
    return QuestionError(f"{_who(engine)} is too busy: {quote or 'it gives no reason'}.")


def redirected(engine: Engine, target: str) -> EngineError:
    """Return the error for a redirect. It names only scheme and host of the target, as the rest may hold the key."""
    return EngineError(
        f"{_who(engine)} sends its callers on to {_origin(target)}, which is not followed, "
        "because the key would go there too. Set base_url to where the engine is."
    )


def _origin(address: str) -> str:
    """Return scheme, host and port of an address. Pure."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        return "an address that is not valid"
    if not host:
        return "another path of its own" if address else "an address it does not name"
    host = f"[{host}]" if ":" in host else host
    return legible(f"{parts.scheme}://{host[:_LONGEST_HOST]}{f':{port}' if port else ''}")


def unreachable(engine: Engine, quote: str) -> EngineError:
    return EngineError(f"{_who(engine)} cannot be reached: {quote}. Is it running, and is base_url right?")


def stalled(engine: Engine) -> QuestionError:
    return QuestionError(
        f"{_who(engine)} sent nothing for {engine.timeout_s:g} s, so the question was given up. "
        "Raise timeout_s in its entry if it needs longer."
    )


def broken_off(engine: Engine, why: str) -> QuestionError:
    return QuestionError(f"The answer of {_the(_who(engine))} broke off: {why}. What had come of it is not used.")


def garbage(engine: Engine, begin: str) -> QuestionError:
    """Return the error for something other than a chat completion; it quotes the beginning."""
    shown = begin if len(begin) <= 200 else f"{begin[:200]} ..."
    return QuestionError(f"{_who(engine)} answered with something that is not a chat completion: {shown!r}.")


def _who(engine: Engine) -> str:
    return f"Engine {engine.name!r} at {engine.place}"


def _the(who: str) -> str:
    return f"e{who[1:]}"


def _about_key(engine: Engine) -> str:
    if engine.api_key_env:
        return f"Set the environment variable {engine.api_key_env} to the right one."
    return "Name the environment variable that holds it as api_key_env in its entry."
