"""Which models can be asked for, and where each lives on disk. Standard library only."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .download import why_incomplete
from .log import log

PACK = Path(__file__).resolve().parent.parent
CUSTOM_MODELS = PACK / "custom_models.json"
DEMO = "Demo-Shapes (5 MB, offline)"

_VISION = (
    "Qwen3-VL-4B-Instruct",
    "Qwen3-VL-4B-Thinking",
    "Qwen3-VL-2B-Instruct",
    "Qwen3-VL-2B-Thinking",
    "Qwen3-VL-8B-Instruct",
    "Qwen3-VL-8B-Thinking",
    "Qwen3-VL-32B-Instruct",
    "Qwen3-VL-32B-Thinking",
    "Qwen2.5-VL-3B-Instruct",
    "Qwen2.5-VL-7B-Instruct",
    "Qwen2-VL-2B-Instruct",
    "Qwen2-VL-7B-Instruct",
)
_TEXT = (
    "Qwen3-4B-Instruct-2507",
    "Qwen3-4B-Thinking-2507",
    "Qwen2.5-3B-Instruct",
    "Qwen2.5-7B-Instruct",
    "Qwen2.5-14B-Instruct",
    "Qwen2.5-32B-Instruct",
)
# The keys under which this pack and the most used other one keep models in custom_models.json.
_CUSTOM_KEYS = ("hf_models", "hf_vl_models", "hf_text_models", "models")
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class UnknownModelError(ValueError):
    """A model was asked for that is in no list."""


@dataclass(frozen=True, slots=True)
class Model:
    """One entry of the list: a repository to download from, or a folder that is already there."""

    name: str
    repo_id: str = ""
    folder: Path | None = None


def vision_models() -> dict[str, Model]:
    """Name -> model, in the order of the QwenVL node's list."""
    return _listed([*_official(_VISION), Model("SkyCaptioner-V1", "Skywork/SkyCaptioner-V1")])


def text_models() -> dict[str, Model]:
    """Name -> model, in the order of the Qwen node's list."""
    return _listed(_official(_TEXT))


def find(name: str) -> Model:
    """The model of that name, whichever node lists it: a vision model answers text as well.

    Raises:
        UnknownModelError: no list has it; the message names those that do exist.
    """
    models = {**text_models(), **vision_models()}
    if name not in models:
        raise UnknownModelError(
            f"Model {name!r} is not in the list. Add it to {CUSTOM_MODELS.name}, or pick one of: {', '.join(models)}."
        )
    return models[name]


def candidates(model: Model, roots: Sequence[Path]) -> list[Path]:
    """Folders in which the model may lie, best first; the first is where a download goes."""
    if model.folder:
        return [model.folder]
    owner, last = model.repo_id.split("/")
    places = [root / f"{owner}--{last}" for root in roots]
    # LLM/<last part> is the place of the older packs. It cannot tell two owners apart, so it counts
    # only where no other entry could mean it.
    others = {**text_models(), **vision_models()}.values()
    if not any(o.repo_id != model.repo_id and o.repo_id.endswith(f"/{last}") for o in others):
        places += [root / last for root in roots]
    return places


def locate(model: Model, roots: Sequence[Path]) -> Path | None:
    """The first folder that holds the whole model, or None."""
    return next((place for place in candidates(model, roots) if why_incomplete(place) is None), None)


def _official(names: Iterable[str]) -> list[Model]:
    return [Model(name, f"Qwen/{name}") for name in names]


def _listed(builtin: list[Model]) -> dict[str, Model]:
    demo = Model(DEMO, folder=PACK / "demo" / "model")
    return {model.name: model for model in [*builtin, *_custom_models(CUSTOM_MODELS), demo]}


def _custom_models(path: Path) -> list[Model]:
    """The user's own models. A mistake in the file costs these models only, and is named in the log."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        log.warning("%s is ignored: %s", path, error)
        return []
    if not isinstance(content, dict):
        log.warning("%s is ignored: it must hold a JSON object", path)
        return []
    sections = [(key, content[key]) for key in _CUSTOM_KEYS if key in content]
    return [model for key, section in sections for model in _section(f"{path.name}: {key}", section)]


def _section(where: str, section: object) -> list[Model]:
    if not isinstance(section, dict):
        log.warning("%s is ignored: it must map names to models", where)
        return []
    models = []
    for name, entry in section.items():
        repo_id = entry.get("repo_id") if isinstance(entry, dict) else None
        if isinstance(repo_id, str) and _REPO_ID.fullmatch(repo_id):
            models.append(Model(name, repo_id))
        else:
            log.warning("%s: %r is ignored: repo_id must look like 'owner/name', got %r", where, name, repo_id)
    return models
