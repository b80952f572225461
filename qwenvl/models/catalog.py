"""Which models can be asked for, and where each lives on disk. Standard library only."""

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

# The checkout; of an installed package (pip install .), where the same files are put: see pyproject.toml.
_SHIPPED = Path(__file__).resolve().parents[1] / "shipped"
PACK = _SHIPPED if _SHIPPED.is_dir() else _SHIPPED.parents[1]
# The example that ships. It is read too, but an update resets it.
CUSTOM_MODELS = PACK / "custom_models.json"
DEMO = "Demo-Shapes (5 MB, offline)"

Models = dict[str, Model]


class UnknownModelError(ValueError):
    """A model was asked for that is in no list."""


def own_file() -> Path:
    """Where the user writes models and engines of their own: no update and no uninstalling comes there."""
    return host.own_files(CUSTOM_MODELS.name)[-1]


def keep_own() -> None:
    """Copy what the user wrote into the example to the place that lasts, once; and tell of a file that is not read."""
    bring_over(CUSTOM_MODELS, own_file())
    shared = host.user_folder() / CUSTOM_MODELS.name
    if shared != own_file() and shared.exists():
        log.warning(
            "%s is not read, because others who reach this ComfyUI may write it: move it to %s", shared, own_file()
        )


def vision_models(roots: Sequence[Path] = ()) -> Models:
    """Name -> model, in the order of the QwenVL node's list: what is here, ending in the demo; what is to fetch."""
    custom = [model for model in _own_models() if _may_see(model)]
    return _listed([*builtin.vision(), *custom], roots, see=True)


def text_models(roots: Sequence[Path] = ()) -> Models:
    """Name -> model, in the order of the Qwen node's list. Those that see may be used there too, but are not listed."""
    return _listed([*builtin.text(), *_own_models()], roots, see=False)


def all_models(roots: Sequence[Path] = ()) -> Models:
    """Both lists. A user's own model wins over one of ours with that name, as in each list."""
    return {**vision_models(roots), **text_models(roots), **_by_name(_own_models())}


def find(name: str, roots: Sequence[Path] = (), offered: Callable[[Sequence[Path]], Models] | None = None) -> Model:
    """The model of that name, whichever node lists it: a vision model answers text as well.

    Args:
        offered: gives the list that whoever asks can choose from; both where it is None.

    Raises:
        UnknownModelError: no list has it; the message names those of that list that come close.
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
    """The engine that the name stands for; None for a model on this machine, and for what is in no list."""
    return next((model.engine for model in _elsewhere() if model.name == name), None)


def candidates(model: Model, roots: Sequence[Path]) -> list[Path]:
    """Folders in which the model may lie, best first; the first is where a download goes."""
    if model.engine:
        return []
    if model.folder:
        return [model.folder]
    owner, last = model.owner, model.last
    places = [root / f"{owner}--{last}" for root in roots]
    places += [root / owner / last for root in roots]
    # LLM/<last part> is the place of the older packs. It cannot tell two owners apart, so it counts
    # only where no other entry could mean it.
    if last in _sole_names(_named_ones()):
        places += [root / last for root in roots]
        places += [place for root in roots for place in sorted(root.glob(f"*/{last}")) if place not in places]
    return [*places, *in_hub_cache(model.repo_id)]


def locate(model: Model, roots: Sequence[Path]) -> Path | None:
    """The first folder that holds the whole model, or None."""
    return next((place for place in candidates(model, roots) if why_incomplete(place) is None), None)


def searched(roots: Sequence[Path]) -> str:
    """For a message: where models are looked for."""
    return ", ".join(map(str, [*roots, hub_cache()]))


def _named_ones() -> list[Model]:
    """Models that are listed wherever they lie."""
    return [*builtin.vision(), *builtin.text(), *_own_models()]


def _own_models() -> list[Model]:
    """The user's. Of two with one name that of the later file counts, in the place of the first."""
    return list(_by_name(model for file in _files() for model in custom_models(file)).values())


def _files() -> list[Path]:
    return [CUSTOM_MODELS, *host.own_files(CUSTOM_MODELS.name)]


def _sole_names(models: Iterable[Model]) -> set[str]:
    """Last parts that belong to one repository only."""
    repositories = {model.repo_id: model.last for model in models if model.repo_id}
    return {last for last, owners in Counter(repositories.values()).items() if owners == 1}


def _others(found: Iterable[tuple[Model, bool]]) -> list[tuple[Model, bool]]:
    """Of the models on this machine, those that no entry of the lists stands for."""
    named = _named_ones()
    taken = {model.name for model in named} | {model.repo_id for model in named}
    folders, sole = {model.folder for model in named}, _sole_names(named)

    def is_new(model: Model) -> bool:
        if model.folder is None:
            return model.repo_id not in taken
        return not (model.name in taken or model.folder in folders or model.folder.name in sole)

    return [(model, sees) for model, sees in found if is_new(model)]


def _here(named: Iterable[Model], found: Iterable[tuple[Model, bool]]) -> list[Model]:
    """Of the entries of a list, those that lie on this machine, as far as their folders tell without being read."""
    sole = _sole_names(_named_ones())
    repositories = {model.repo_id or model.name for model, _ in found}
    folders = {model.folder.name for model, _ in found if model.folder} & sole

    def is_here(model: Model) -> bool:
        if model.folder is not None:
            return describe(model.folder) is not None
        return model.repo_id in repositories or model.last in folders

    return [model for model in named if is_here(model)]


def _may_see(model: Model) -> bool:
    """Of a user's own model it is known only where it is a folder; one to download may see."""
    known = describe(model.folder) if model.folder else None
    return known is None or known.has_vision


def _listed(named: Sequence[Model], roots: Sequence[Path], see: bool) -> Models:
    found = list(discovered(roots))
    others = [model for model, sees in _others(found) if sees == see]
    # The first of several folders with one name counts, as ComfyUI has it with files.
    first = {model.name: model for model in reversed(others)}
    others = [first[model.name] for model in others]
    demo = Model(DEMO, folder=PACK / "demo" / "model")
    here = [*_here(named, found), *others, *_elsewhere(), demo]
    # Of two entries with one name the later one counts, in the place of the first.
    return {**_by_name(here), **_by_name(named), DEMO: demo}


def _elsewhere() -> list[Model]:
    """Models that an engine holds."""
    engines = {each.name: each for file in _files() for each in custom_engines(file)}
    return [Model(f"{name}{SUFFIX}", engine=each) for name, each in engines.items()]


def _by_name(models: Iterable[Model]) -> Models:
    return {model.name: model for model in models}
