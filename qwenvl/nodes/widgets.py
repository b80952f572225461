"""The settings as ComfyUI's widgets, with what this machine has: its devices, models and presets."""

from __future__ import annotations

from typing import Any

from ..loading.devices import device_choices
from ..models import builtin, catalog, download
from ..prompting import presets
from ..settings import OPTIONAL, REQUIRED, SETTINGS, Setting

ANSWER_TOOLTIP = (
    "The model's answer, without its thinking and without control tokens: a list, of one where one was asked."
)
THINKING_TOOLTIP = "What the model thought before each answer; empty where it did not."
STATS_TOOLTIP = "JSON: what was loaded and how, tokens, seconds, tokens a second, memory, the seed that was used."

Widget = tuple[Any, dict[str, Any]]
Inputs = dict[str, dict[str, Widget]]

# The picture inputs of older and newer workflows, in the order in which the model sees them.
PICTURES = ("image", "image1", "image2", "image3", "image4")


def widget(setting: Setting, **here: Any) -> Widget:
    """Build a setting's entry for INPUT_TYPES.

    Args:
        here: options of this machine that replace the declared ones.
    """
    options: dict[str, Any] = {"tooltip": setting.tooltip, **setting.page}
    if setting.kind not in ("IMAGE", "VIDEO"):
        options["default"] = setting.default
    if setting.span is not None:
        options["min"], options["max"] = setting.span
    if setting.rare:
        options["advanced"] = True
    choices = list(here.pop("choices", setting.choices))
    return (choices if setting.kind == "COMBO" else setting.kind), options | here


_HERE: dict[str, dict[str, Any]] = {
    "device": {"choices": device_choices()},
    "download": {"default": download.default_policy()},
}
_WIDGETS = {name: widget(setting, **_HERE.get(name, {})) for name, setting in SETTINGS.items()}
PICTURE, BYPASS = _WIDGETS["image1"], _WIDGETS["bypass"]


def inputs(models: dict[str, catalog.Model], looks: bool) -> Inputs:
    """Build INPUT_TYPES of a node that asks one of these models.

    Args:
        looks: True if the node takes pictures and videos.
    """
    # Read every time, since the user's files may have changed.
    first = (builtin.vision() if looks else builtin.text())[0]
    offered = {**_WIDGETS, "model": widget(SETTINGS["model"], choices=models, default=first.name), "preset": _presets()}
    return {
        group: {setting.name: offered[setting.name] for setting in settings if looks or not setting.looks}
        for group, settings in (("required", REQUIRED), ("optional", OPTIONAL))
    }


def stops(text: str) -> tuple[str, ...]:
    """Split the stop widget's text into lines, with \\n in a line as a line break."""
    return tuple(line.replace("\\n", "\n") for line in text.splitlines() if line)


def _presets() -> Widget:
    return widget(SETTINGS["preset"], choices=presets.names(), default=presets.NONE)
