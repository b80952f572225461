"""What ComfyUI shows of the nodes in other languages; texts.py makes the files that it reads.

Python holds the English. locales/<language>/texts.json holds what it means there, by the English text itself, so that a
text that changes in Python has no translation until somebody has looked at it. {top_p} in a translation stands for what
that input is called there. nodeDefs.json is made of both.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# For texts.py, which is run without pytest.
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

FOLDER = ROOT / "locales"
LANGUAGES = ("zh", "ja", "ko", "fr", "de", "es", "ru")

_EVERYWHERE = {"on", "off", "none", "auto", "name"}

Definitions = dict[str, Any]


@lru_cache
def english(pack: ModuleType) -> Definitions:
    """The page's table of node texts, as the classes have them. Nobody may change it."""
    table: Definitions = {}
    for name, node in pack.NODE_CLASS_MAPPINGS.items():
        shown = {"display_name": pack.NODE_DISPLAY_NAME_MAPPINGS[name], "description": node.DESCRIPTION}
        inputs = node.INPUT_TYPES()
        outputs = zip(node.RETURN_NAMES, node.OUTPUT_TOOLTIPS, strict=True)
        table[name.replace(".", "_")] = {
            **shown,
            "inputs": {
                entry: {"name": entry, "tooltip": options["tooltip"]}
                for group in ("required", "optional")
                for entry, (_, options) in inputs.get(group, {}).items()
            },
            "outputs": {
                str(place): {"name": output, "tooltip": tooltip} for place, (output, tooltip) in enumerate(outputs)
            },
        }
        if "." in name:
            # For these two the page takes the dot in an id for a step into the table.
            first, second = name.split(".")
            table.setdefault(first, {})[second] = shown
    return table


def translated(table: Any, meanings: dict[str, str]) -> Any:
    """The table in another language. A text that has no translation stays as it is."""
    if isinstance(table, dict):
        return {key: translated(value, meanings) for key, value in table.items()}
    return re.sub(r"\{(\w+)\}", lambda found: meanings.get(found[1], found[1]), meanings.get(table, table))


def choices() -> dict[str, tuple[str, ...]]:
    """Input -> what its list offers, where that is words, whatever this machine has."""
    # Not at the top: these need torch.
    from qwenvl.media.boxes import COORDINATES
    from qwenvl.media.folder import SORTS
    from qwenvl.nodes.folder_nodes import EXISTING
    from qwenvl.prompting.presets import BUILT_IN, NONE
    from qwenvl.settings import ALL_GPUS, ALL_GPUS_AND_CPU, AUTO, SETTINGS

    of_settings = {
        name: setting.choices for name, setting in SETTINGS.items() if setting.choices and name != "attention_mode"
    }
    return {
        **of_settings,
        "device": (AUTO, "cpu", ALL_GPUS, ALL_GPUS_AND_CPU),
        "preset": (NONE, *sorted(one_file.stem.replace("_", " ") for one_file in BUILT_IN.iterdir())),
        "coordinates": COORDINATES,
        "sort": SORTS,
        "existing": EXISTING,
    }


def localized(table: Definitions, meanings: dict[str, str]) -> Definitions:
    """The table in another language. A tooltip calls a choice what the list does, and what workflows hold."""
    result: Definitions = translated(table, meanings)
    offered = choices()
    for node in result.values():
        for name, shown in node.get("inputs", {}).items():
            if name in offered and "tooltip" in shown:
                labels = {choice: meanings.get(choice, choice) for choice in offered[name]}
                shown["tooltip"] = _labelled(shown["tooltip"], labels)
    return result


def _labelled(text: str, labels: dict[str, str]) -> str:
    # The short ones are words in every other sentence. Of two that begin alike the longer one is meant.
    named = [one_label for one_label, label in labels.items() if label != one_label and one_label not in _EVERYWHERE]
    choice = "|".join(re.escape(entry) for entry in sorted(named, key=len, reverse=True))
    found = rf"(?<![A-Za-z0-9_])(?:{choice})(?![A-Za-z0-9_])"
    return re.sub(found, lambda value: f"{labels[value[0]]} ({value[0]})", text) if named else text


def texts(table: Any) -> set[str]:
    """Every text of the table."""
    return set().union(*map(texts, table.values())) if isinstance(table, dict) else {table}


def meanings(language: str) -> dict[str, str]:
    return json.loads((FOLDER / language / "texts.json").read_text(encoding="utf-8"))


def made(language: str, table: Definitions) -> str:
    """What the file that ComfyUI reads must hold."""
    content = table if language == "en" else localized(table, meanings(language))
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def file(language: str) -> Path:
    return FOLDER / language / "nodeDefs.json"


def pack() -> ModuleType:
    """As ComfyUI loads it, but for ComfyUI."""
    spec = importlib.util.spec_from_file_location("pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["pack"] = module
    spec.loader.exec_module(module)
    return module
