"""What kind of engine answers, and which fields each kind passes over without a word. Standard library only.

Engines that refuse what they do not know say so themselves. The others are told by what they put into their answers and
into the list of their models; never by a name or an address that people chose.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..models.engines import Engine
from ..process import PROCESS
from .incoming import read_json

# Fields that OpenAI's own chat completions have not: an engine may pass over them.
DOUBTFUL = frozenset(
    ("top_k", "min_p", "repetition_penalty", "min_tokens", "thinking_token_budget", "chat_template_kwargs")
)
# Kind -> what it passes over, of what it is sent. A field's second name (chat.ALSO) counts as the field.
IGNORES: dict[str, frozenset[str]] = {
    "vLLM": frozenset(),
    "SGLang": frozenset(("thinking_token_budget",)),
    "llama.cpp": frozenset(("min_tokens",)),
    "LM Studio": frozenset(("min_p", "min_tokens", "thinking_token_budget", "chat_template_kwargs")),
    "Ollama": DOUBTFUL,
}
# What the list of models says of their owner.
_OWNERS = {
    "vllm": "vLLM",
    "sglang": "SGLang",
    "llamacpp": "llama.cpp",
    "library": "Ollama",
    "organization_owner": "LM Studio",
}
_LLAMA_BUILD = re.compile(r"b\d{1,9}-[0-9a-f]{6,40}")


def known(engine: Engine) -> str | None:
    """The kind; "" where it cannot be told, None where that was not tried."""
    return PROCESS.engine_kinds.get((engine.base_url, engine.model))


def remember(engine: Engine, kind: str) -> None:
    """For every later run of this process."""
    PROCESS.engine_kinds[engine.base_url, engine.model] = kind


def of_answer(server: str, fingerprint: str) -> str:
    """The kind by an answer's header Server and its system_fingerprint; "" where they do not tell. Pure."""
    if server.lower().startswith("llama.cpp") or _LLAMA_BUILD.fullmatch(fingerprint):
        return "llama.cpp"
    return "Ollama" if fingerprint == "fp_ollama" else ""


def of_models(body: str) -> str:
    """The kind by what /v1/models says; "" where that does not tell. Pure."""
    try:
        listed = read_json(body)
    except ValueError:
        return ""
    models = listed.get("data") if isinstance(listed, dict) else None
    owners = {_owner(each) for each in models} if isinstance(models, list) else set()
    # Proxies list the models of many engines.
    return _OWNERS.get(owners.pop(), "") if len(owners) == 1 else ""


def _owner(model: Any) -> str:
    owner = model.get("owned_by") if isinstance(model, Mapping) else None
    return owner if isinstance(owner, str) else ""
