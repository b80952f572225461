"""Engines in custom_models.json: models that run in another process, behind an OpenAI-compatible address.

Standard library only.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ..log import log
from ..process import PROCESS
from .families import FAMILIES

# Ending of an engine's name in the lists of models.
SUFFIX = " @ engine"
# In capitals only: a key that was pasted in place of the variable's name nearly always has other characters.
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
_PRIVATE_NAMES = ("localhost", ".localhost", ".local", ".lan", ".internal", ".home.arpa")


class EngineEntryError(ValueError):
    """An entry of `engines` cannot be used. The message never quotes a value, which may be a pasted key."""


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine: its address, its model, and how to send it questions."""

    name: str
    # Including /v1, as OpenAI's own clients take it.
    base_url: str
    # The engine's name for the model.
    model: str
    # The environment variable that holds the key. The key itself is not stored.
    api_key_env: str = ""
    # If no byte comes for this long, the engine counts as stalled.
    timeout_s: float = 120.0
    # Most requests at a time.
    max_concurrency: int = 8
    vision: bool = True
    # Send a video as one file; if False, as one picture per frame.
    video_url: bool = False
    # Least and most pixels that pictures are scaled to, if the node does not set them; None: as for models here.
    pixels: tuple[int, int] | None = None
    # The model_type in the model's config.json, which engines do not report; "" if the entry does not name it.
    family: str = ""

    @property
    def place(self) -> str:
        """Host and port, for messages."""
        return urlsplit(self.base_url).netloc


def engines_of(file: str, section: object) -> tuple[Engine, ...]:
    """Read the file's `engines`, in its order. An entry with a mistake is left out, with a line in the log."""
    if not isinstance(section, dict):
        log.warning("%s: engines is ignored: it must map names to engines", file)
        return ()
    return tuple(_usable(file, section))


def _usable(file: str, section: dict[str, Any]) -> Iterator[Engine]:
    for name, entry in section.items():
        try:
            engine = _engine(name, entry)
        except EngineEntryError as error:
            log.warning("%s: engines: %r is ignored: %s", file, name, error)
        else:
            _warn_of_open_wire(engine.base_url)
            yield engine


def _engine(name: str, entry: object) -> Engine:
    if not isinstance(entry, dict):
        raise EngineEntryError("it must be an object with base_url and model")
    if unknown := sorted(set(entry) - set(_SETTINGS)):
        raise EngineEntryError(f"there is no setting {', '.join(unknown)[:200]}. There are: {', '.join(_SETTINGS)}")
    if missing := [setting for setting in ("base_url", "model") if setting not in entry]:
        raise EngineEntryError(f"{' and '.join(missing)} must be given")
    if not name.strip():
        raise EngineEntryError("it needs a name")
    values = {setting: _SETTINGS[setting](setting, value) for setting, value in entry.items()}
    return Engine(name, **values)


def _url(setting: str, value: object) -> str:
    example = "http://127.0.0.1:8000/v1"
    try:
        parts = urlsplit(value if isinstance(value, str) else "")
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # the port or the IPv6 address is not valid
        usable = False
    if not usable:
        raise EngineEntryError(f"{setting} must be an http or https address like {example}")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise EngineEntryError(f"{setting} must be a plain address like {example}; a key belongs into api_key_env")
    return str(value).rstrip("/")


def _name(setting: str, value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise EngineEntryError(f"{setting} must be a name")
    return value


def _variable(setting: str, value: object) -> str:
    if not isinstance(value, str) or (value and not _VARIABLE.fullmatch(value)):
        raise EngineEntryError(
            f"{setting} must be the name of an environment variable, in capitals like VLLM_API_KEY; never the key"
        )
    return value


def _switch(setting: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise EngineEntryError(f"{setting} must be true or false")
    return value


def _seconds(setting: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 86400:
        raise EngineEntryError(f"{setting} must be a number of seconds above 0")
    return float(value)


def _count(setting: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1024:
        raise EngineEntryError(f"{setting} must be a whole number from 1 to 1024")
    return value


def _pixels(setting: str, value: object) -> tuple[int, int]:
    pair = value if isinstance(value, list) and len(value) == 2 else [0, 0]
    low, high = (count if type(count) is int else 0 for count in pair)
    if not 0 < low <= high:
        raise EngineEntryError(f"{setting} must be two pixel counts, the lower first, like [200704, 802816]")
    return low, high


def _family(setting: str, value: object) -> str:
    if not isinstance(value, str) or value not in FAMILIES:
        raise EngineEntryError(
            f"{setting} must be the model_type in the model's config.json, one of: {', '.join(FAMILIES)}"
        )
    return value


_SETTINGS: dict[str, Callable[[str, object], Any]] = {
    "base_url": _url,
    "model": _name,
    "api_key_env": _variable,
    "timeout_s": _seconds,
    "max_concurrency": _count,
    "vision": _switch,
    "video_url": _switch,
    "pixels": _pixels,
    "family": _family,
}


def _warn_of_open_wire(base_url: str) -> None:
    parts = urlsplit(base_url)
    host = parts.hostname or ""
    # One warning is enough, however often the file changes.
    if parts.scheme == "http" and not _is_private(host) and PROCESS.is_new("open wire", base_url):
        log.warning("%s is reached by plain http: the key, the pictures and the answers can be read on the way", host)


def _is_private(host: str) -> bool:
    """Tell by its name if the host is this machine or in a private network. No name server is asked."""
    try:
        return not ipaddress.ip_address(host.partition("%")[0]).is_global
    except ValueError:
        return "." not in host or host.endswith(_PRIVATE_NAMES)
