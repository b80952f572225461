"""The lists of models that a user can choose from, and their folders on disk. Standard library only."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ..checks import shown, text_of
from ..comfyui import host
from ..log import log
from . import builtin
from .builtin import Model
from .custom import bring_over, custom_engines, custom_models
from .discovery import describe, discovered, hub_cache, in_hub_cache
from .download import why_incomplete
from .engines import SUFFIX, Engine

# An installed package (pip install .) has the checkout's files in `shipped`: see pyproject.toml.
_SHIPPED = Path(__file__).resolve().parents[1] / "shipped"
PACK = _SHIPPED if _SHIPPED.is_dir() else _SHIPPED.parents[1]
# The example file of the pack. It is read too, but an update resets it.
CUSTOM_MODELS = PACK / "custom_models.json"
DEMO = "Demo-Shapes (5 MB, offline)"

Models = dict[str, Model]


class UnknownModelError(ValueError):
    """The model that was asked for is in no list."""


def own_file() -> Path:
    """Return the file for the user's own models and engines, which no update and no uninstalling touches."""
    return host.own_files(CUSTOM_MODELS.name)[-1]


def keep_own() -> None:
    """Copy the user's entries in the example file to own_file(), once; warn of a file that is not read."""
    bring_over(CUSTOM_MODELS, own_file())
    shared = host.user_folder() / CUSTOM_MODELS.name
    if shared != own_file() and shared.exists():
        log.warning(
            "%s is not read, because others who reach this ComfyUI may write it: move it to %s", shared, own_file()
        )


def vision_models(roots: Sequence[Path] = ()) -> Models:
    """Return the QwenVL node's list, {name: model}: models on this machine, the demo last, then models to download."""
    custom = [model for model in _own_models() if _may_see(model)]
    return _listed([*builtin.vision(), *custom], roots, see=True)


def text_models(roots: Sequence[Path] = ()) -> Models:
    """Return the Qwen node's list, {name: model}. Models that read pictures can be used there, but are not listed."""
    return _listed([*builtin.text(), *_own_models()], roots, see=False)


def all_models(roots: Sequence[Path] = ()) -> Models:
    """Join both lists. A user's own model replaces one of ours with the same name, as in each list."""
    return {**vision_models(roots), **text_models(roots), **_by_name(_own_models())}


def find(name: str, roots: Sequence[Path] = (), offered: Callable[[Sequence[Path]], Models] | None = None) -> Model:
    """Find the model of that name in both lists: a vision model answers text as well.

    Args:
        offered: returns the list that the caller can choose from; None for both lists.

    Raises:
        UnknownModelError: no list has it; the message suggests similar names of the caller's list.
    """
    models = all_models(roots)
    if text_of("model", name) not in models:
        choices = models if offered is None else offered(roots)
        holding = [known for known in choices if name.lower() in known.lower()]
        close = (holding or difflib.get_close_matches(name, choices, 5, 0.3) or list(choices))[:5]
        raise UnknownModelError(
            f"Model {shown(name)} is not in the list, and no model folder has that name. Put its folder into "
            f"{roots[0] if roots else 'models/LLM'}, add it to {own_file()}, or pick another, as "
            f"{', '.join(close)}."
        )
    return models[name]


def engine(name: str) -> Engine | None:
    """Return the engine with that name; None for a model on this machine or an unknown name."""
    return next((model.engine for model in _elsewhere() if model.name == name), None)


def candidates(model: Model, roots: Sequence[Path]) -> list[Path]:
    """List the folders in which the model may lie, best first; a download goes to the first."""
    if model.engine:
        return []
    if model.folder:
        return [model.folder]
    owner, last = model.owner, model.last
    places = [root / f"{owner}--{last}" for root in roots]
    places += [root / owner / last for root in roots]
    # LLM/<last part> is the place of the older packs. It does not name the owner, so it counts only if the last part
    # belongs to one entry.
    if last in _sole_names(_named_ones()):
        places += [root / last for root in roots]
        places += [place for root in roots for place in sorted(root.glob(f"*/{last}")) if place not in places]
    return [*places, *in_hub_cache(model.repo_id)]


def locate(model: Model, roots: Sequence[Path]) -> Path | None:
    """Return the first folder that holds the complete model, or None."""
    return next((place for place in candidates(model, roots) if why_incomplete(place) is None), None)


def searched(roots: Sequence[Path]) -> str:
    """Name the folders in which models are looked for, for a message."""
    return ", ".join(map(str, [*roots, hub_cache()]))


def _named_ones() -> list[Model]:
    """List the models that have an entry, on this machine or not."""
    return [*builtin.vision(), *builtin.text(), *_own_models()]


def _own_models() -> list[Model]:
    """List the user's models. If two files have one name, the later file's model counts, in the place of the first."""
    return list(_by_name(model for file in _files() for model in custom_models(file)).values())


def _files() -> list[Path]:
    return [CUSTOM_MODELS, *host.own_files(CUSTOM_MODELS.name)]


def _sole_names(models: Iterable[Model]) -> set[str]:
    """Return the last parts of names that belong to one repository only."""
    repositories = {model.repo_id: model.last for model in models if model.repo_id}
    return {last for last, owners in Counter(repositories.values()).items() if owners == 1}


def _others(found: Iterable[tuple[Model, bool]]) -> list[tuple[Model, bool]]:
    """Return the models on this machine that have no entry."""
    named = _named_ones()
    taken = {model.name for model in named} | {model.repo_id for model in named}
    folders, sole = {model.folder for model in named}, _sole_names(named)

    def is_new(model: Model) -> bool:
        if model.folder is None:
            return model.repo_id not in taken
        return not (model.name in taken or model.folder in folders or model.folder.name in sole)

    return [(model, sees) for model, sees in found if is_new(model)]


def _here(named: Iterable[Model], found: Iterable[tuple[Model, bool]]) -> list[Model]:
    """Return the entries that lie on this machine, as far as the folders' names and descriptions show."""
    sole = _sole_names(_named_ones())
    repositories = {model.repo_id or model.name for model, _ in found}
    folders = {model.folder.name for model, _ in found if model.folder} & sole

    def is_here(model: Model) -> bool:
        if model.folder is not None:
            return describe(model.folder) is not None
        return model.repo_id in repositories or model.last in folders

    return [model for model in named if is_here(model)]


def _may_see(model: Model) -> bool:
    """Tell if a user's model may read pictures. That is known for a folder; a model to download is assumed to."""
    known = describe(model.folder) if model.folder else None
    return known is None or known.has_vision


def _listed(named: Sequence[Model], roots: Sequence[Path], see: bool) -> Models:
    found = list(discovered(roots))
    others = [model for model, sees in _others(found) if sees == see]
    # The first of several folders with one name counts, as for ComfyUI's files.
    first = {model.name: model for model in reversed(others)}
    others = [first[model.name] for model in others]
    demo = Model(DEMO, folder=PACK / "demo" / "model")
    here = [*_here(named, found), *others, *_elsewhere(), demo]
    # If two entries have one name, the later one counts, in the place of the first.
    return {**_by_name(here), **_by_name(named), DEMO: demo}


def _elsewhere() -> list[Model]:
    """List the models of engines."""
    engines = {entry.name: entry for file in _files() for entry in custom_engines(file)}
    return [Model(f"{name}{SUFFIX}", engine=entry) for name, entry in engines.items()]


def _by_name(models: Iterable[Model]) -> Models:
    return {model.name: model for model in models}
