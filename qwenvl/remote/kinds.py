"""Finds out the kind of an engine, and knows which fields each kind ignores silently. Standard library only.

Some engines refuse fields that they do not know. The others are recognised by marks in their answers and in the list of
their models, never by a name or an address that a user chose.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..models.engines import Engine
from ..process import PROCESS
from .incoming import read_json

# Fields that OpenAI's own chat completions do not have: an engine may ignore them.
DOUBTFUL = frozenset(
    ("top_k", "min_p", "repetition_penalty", "min_tokens", "thinking_token_budget", "chat_template_kwargs")
)
# Kind -> the fields that it ignores. A field's second name (chat.ALSO) counts as the field.
IGNORES: dict[str, frozenset[str]] = {
    "vLLM": frozenset(),
    "SGLang": frozenset(("thinking_token_budget",)),
    "llama.cpp": frozenset(("min_tokens",)),
    "LM Studio": frozenset(("min_p", "min_tokens", "thinking_token_budget", "chat_template_kwargs")),
    "Ollama": DOUBTFUL,
}
# Owner of a model in the engine's list -> kind.
_OWNERS = {
    "vllm": "vLLM",
    "sglang": "SGLang",
    "llamacpp": "llama.cpp",
    "library": "Ollama",
    "organization_owner": "LM Studio",
}
_LLAMA_BUILD = re.compile(r"b\d{1,9}-[0-9a-f]{6,40}")


def known(engine: Engine) -> str | None:
    """Return the engine's kind; "" if it could not be found out, None if that was not tried."""
    return PROCESS.engine_kinds.get((engine.base_url, engine.model))


def remember(engine: Engine, kind: str) -> None:
    """Keep the kind for every later run of this process."""
    PROCESS.engine_kinds[engine.base_url, engine.model] = kind


def of_answer(server: str, fingerprint: str) -> str:
    """Return the kind by an answer's header Server and its system_fingerprint; "" if they do not show it. Pure."""
    if server.lower().startswith("llama.cpp") or _LLAMA_BUILD.fullmatch(fingerprint):
        return "llama.cpp"
    return "Ollama" if fingerprint == "fp_ollama" else ""


def of_models(body: str) -> str:
    """Return the kind by the body of /v1/models; "" if that does not show it. Pure."""
    try:
        listed = read_json(body)
    except ValueError:
        return ""
    models = listed.get("data") if isinstance(listed, dict) else None
    owners = {_owner(model) for model in models} if isinstance(models, list) else set()
    # Proxies list the models of many engines.
    return _OWNERS.get(owners.pop(), "") if len(owners) == 1 else ""


def _owner(model: Any) -> str:
    owner = model.get("owned_by") if isinstance(model, Mapping) else None
    return owner if isinstance(owner, str) else ""
