"""Every setting, declared once: widgets, flags, the Request, its checks and an engine's fields come from here.

Standard library only. nodes/widgets.py and cli/common.py fill in what depends on the machine: its devices, models and
presets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from .checks import in_range, one_of

QUANTIZATIONS = ("none", "4bit", "8bit")
ATTENTIONS = ("sdpa", "flash_attention_2", "eager", "auto", "flash_attention_3", "flash_attention_4", "flex_attention")
# The values of the setting device, besides the names of devices in torch.
AUTO, ALL_GPUS, ALL_GPUS_AND_CPU = "auto", "all GPUs", "all GPUs and CPU"
MAX_SEED = 2**64 - 1
# The source of temperature, top_p and the like: the widgets, or the model's makers.
SAMPLING_FROM = AS_SET, MODELS_OWN = ("as set", "model's own")
# When a model that is kept loaded gives its memory back. keep_model_loaded off means the last.
RELEASES = ("when ComfyUI needs memory", "after the prompt", "after the node")
# How much a run logs.
DIAGNOSTICS = ("summary", "full", "off")
# One question about all pictures, or the same question about each of them.
IMAGE_MODES = ("together", "one answer per image")
# Thinking before the answer; auto leaves it to the model.
THINKING = ("auto", "on", "off")
# auto downloads a model that is not on this machine.
DOWNLOADS = ("auto", "never")
# What pictures are scaled to: least and most pixels. None keeps the limits that the model was loaded with.
RESOLUTIONS: dict[str, tuple[int, int] | None] = {
    "auto": None,
    "low (256x28x28)": (128 * 28 * 28, 256 * 28 * 28),
    "medium (512x28x28)": (256 * 28 * 28, 512 * 28 * 28),
    "high (768x28x28)": (512 * 28 * 28, 768 * 28 * 28),
    "ultra (1024x28x28)": (768 * 28 * 28, 1024 * 28 * 28),
    # Unscaled, except pictures too small to be cut into patches.
    "original": (56 * 56, 1 << 40),
}
# The commands of the command line: one question, or one about each picture of a folder.
ASK, CAPTION = "ask", "caption"


@dataclass(frozen=True, slots=True)
class Setting:
    """The declaration of one setting. Its kind is ComfyUI's type: STRING, BOOLEAN, INT, FLOAT, COMBO, IMAGE, VIDEO."""

    name: str
    kind: str
    # None if the machine decides it, and for pictures and videos, which are connected.
    default: Any
    tooltip: str
    # Lowest and highest number.
    span: tuple[float, float] | None = None
    # Empty if the machine decides them.
    choices: tuple[str, ...] = ()
    # The page folds it away, since a first answer does not need it.
    rare: bool = False
    # Further options for ComfyUI's page.
    page: Mapping[str, Any] = field(default_factory=dict)
    # True for settings of the QwenVL node alone, which sees pictures and videos.
    looks: bool = False
    # The commands that have it as a flag, and the flag's help text. The help of a number is its range.
    commands: tuple[str, ...] = ()
    help: str = ""
    # Its name in the Request, if that differs.
    renamed: str = ""
    # The value that switches it off, and the engine's value for off, if that differs.
    off: Any = None
    engine_off: Any = None
    # Its field in a chat completion. It is sent unless the setting is off; with `always`, then too.
    engine: str = ""
    always: bool = False
    # Models may come with a recommended value. The setting sampling chooses; an engine would use the model's.
    makers: bool = False
    # Without effect if the likeliest token is always taken.
    drawn: bool = False

    @property
    def attribute(self) -> str:
        """Its name in the Request."""
        return self.renamed or self.name

    def check(self, value: object) -> None:
        """Raise InvalidSettingError if a number is outside of its range, or a value is not among the choices."""
        if self.span is not None:
            in_range(self.name, value, *self.span)
        elif self.choices:
            one_of(self.name, value, self.choices)

    def nearest(self, value: float) -> float:
        """Return the number in the range that is nearest to the value; whole for INT."""
        low, high = self.span or (value, value)
        inside = min(max(value, low), high)
        return int(inside) if self.kind == "INT" else float(inside)


_EVERY = (ASK, CAPTION)


def _text(name: str, tooltip: str, default: str = "", **more: Any) -> Setting:
    return Setting(name, "STRING", default, tooltip, **{"page": {"multiline": True}, **more})


def _switch(name: str, default: bool, tooltip: str, **more: Any) -> Setting:
    return Setting(name, "BOOLEAN", default, tooltip, rare=True, **more)


def _number(
    name: str, default: float, span: tuple[float, float], step: float, tooltip: str, page: Any = None, **more: Any
) -> Setting:
    kind = "INT" if isinstance(default, int) else "FLOAT"
    return Setting(
        name, kind, default, tooltip, span=span, page={"step": step, **(page or {})}, **{"commands": _EVERY, **more}
    )


def _choice(name: str, choices: tuple[str, ...], tooltip: str, **more: Any) -> Setting:
    """Declare a COMBO; its first choice is the default."""
    return Setting(name, "COMBO", choices[0], tooltip, choices=choices, **{"commands": _EVERY, **more})


# Nothing here may move: saved workflows hold the values of widgets in this order.
# fmt: off
REQUIRED = (
    _text("system", "Who the model is and how it should answer.", "You are a helpful assistant.",
        commands=_EVERY, help="the system prompt"),
    _text("text", "What to ask. Control tokens of the model in it are taken as plain text."),
    Setting("model", "COMBO", None,
        "The model. Those on this machine come first in the list; any other is downloaded to models/LLM when it runs.\n"
        "The node says how large the chosen one is and whether it fits. One that names an engine runs elsewhere.",
        commands=_EVERY, help="a name of --list-models (default: %(default)s)"),
    _choice("quantization", QUANTIZATIONS,
        "Store the weights in fewer bits: 8bit needs about half of the memory, 4bit about a third. A GPU "
        "needs bitsandbytes for it; where it cannot run, the model is loaded unquantized and the log says why."),
    _choice("attention_mode", ATTENTIONS,
        "How attention is computed. sdpa is right nearly everywhere; flash_attention_2 to 4 need packages and "
        "flex_attention needs Triton, and without them sdpa is used and the log says why; eager is slow and exact; "
        "auto lets the pack choose.",
        rare=True, renamed="attention"),
    _switch("keep_model_loaded", True,
        "Keep the model in memory for the next run. Off gives all of it back when the node ends."),
    _switch("bypass", False, "Pass the text through unchanged, without touching any model."),
    _switch("do_sample", True,
        "Draw each token at random from the likely ones. Off always takes the likeliest.",
        commands=_EVERY, makers=True),
    _number("temperature", 0.7, (0.0, 2.0), 0.05,
        "Higher is more varied, lower more predictable. 0 always takes the likeliest token.",
        rare=True, off=0.0, engine="temperature", makers=True, drawn=True),
    _number("top_p", 0.9, (0.0, 1.0), 0.05,
        "Draw only from the likeliest tokens that together reach this probability. 1 is off.",
        rare=True, off=1.0, engine="top_p", makers=True, drawn=True),
    _number("top_k", 50, (0, 200), 1, "Draw only from this many of the likeliest tokens. 0 is off.",
        rare=True, off=0, engine="top_k", engine_off=-1, makers=True, drawn=True),
    _number("min_p", 0.0, (0.0, 1.0), 0.05, "Leave out tokens less likely than this share of the likeliest. 0 is off.",
        rare=True, off=0.0, engine="min_p", makers=True, drawn=True),
    _number("repetition_penalty", 1.0, (1.0, 2.0), 0.05,
        "Above 1 makes tokens that already occurred less likely. 1 is off.",
        rare=True, off=1.0, engine="repetition_penalty", makers=True),
    _number("max_new_tokens", 512, (1, 32768), 1,
        "The answer is cut off after this many tokens. A model's thinking counts too.",
        engine="max_tokens", always=True),
    # The option makes the page offer fixed, increment, decrement and randomize, and save the choice with the workflow.
    _number("seed", -1, (-1, MAX_SEED), 1, "-1 draws a new seed on every run; any other gives the same answer again.",
        page={"control_after_generate": True}, engine="seed"),
)
# New settings go to the end.
OPTIONAL = (
    *(Setting(name, "IMAGE", None, "A picture or a batch. The model sees all pictures of all inputs, in order.",
        looks=True) for name in ("image1", "image2", "image3", "image4")),
    Setting("video_path", "STRING", "",
        "Path of a video file. The model sees frames of it: see sample_fps and what follows it.",
        rare=True, looks=True),
    _choice("release", RELEASES,
        "When a model that is kept loaded gives its memory back: when another node needs it; when everything of "
        "this prompt is done; or at once, like keep_model_loaded off.",
        rare=True, commands=()),
    _choice("diagnostics", DIAGNOSTICS,
        "What a run writes to the log: a line of figures; in full also the time of each part, stalls, and the GPU's "
        "memory, clock, power and temperature; or nothing.",
        rare=True, help="how much a run writes to the log"),
    _number("presence_penalty", 0.0, (-2.0, 2.0), 0.1,
        "Above 0 makes tokens that are in the answer already less likely. 0 is off.",
        rare=True, off=0.0, engine="presence_penalty", always=True),
    _number("frequency_penalty", 0.0, (-2.0, 2.0), 0.1,
        "Like presence_penalty, but stronger the more often a token is in the answer. 0 is off.",
        rare=True, off=0.0, engine="frequency_penalty", always=True),
    _number("no_repeat_ngram_size", 0, (0, 100), 1,
        "No sequence of this many tokens occurs twice, the question's included. 0 is off.", rare=True, off=0),
    _number("min_new_tokens", 0, (0, 32768), 1, "The answer does not end before this many tokens.",
        rare=True, off=0, engine="min_tokens"),
    _number("thinking_budget", 0, (0, 32768), 1,
        "A model that thinks longer than this many tokens is told to answer now; max_new_tokens then counts the "
        "answer alone. 0 is no limit.",
        rare=True, off=0, engine="thinking_token_budget"),
    _text("stop", "The answer ends before the first of these texts: one a line, \\n in it is a line break.",
        rare=True, commands=_EVERY, help="ends the answer; may be given several times", off=(), engine="stop"),
    _choice("thinking", THINKING,
        "Whether a model that can do both thinks first; auto leaves it to the model. Where its chat template has no "
        "switch for it, this does nothing, and stats says so.",
        help="whether the model thinks before it answers", off=THINKING[0], engine="chat_template_kwargs"),
    _choice("download", DOWNLOADS,
        "Whether a model that is not on this machine may be downloaded. never makes it an error that names the "
        "folders that were searched and the command that fetches it. The variable QWENVL_DOWNLOAD sets the default.",
        rare=True, help="whether a model that is missing may be fetched"),
    Setting("device", "COMBO", AUTO,
        "Where the model runs. auto is where ComfyUI runs its models. all GPUs spreads the layers, for a model that "
        "fits on none of them alone. all GPUs and CPU leaves in RAM what fits on none, and copies it for every "
        "token: each token then takes about half a second longer for every 10 GB in RAM.",
        rare=True, commands=_EVERY, help="where the model runs"),
    _choice("sampling", SAMPLING_FROM,
        "as set takes do_sample, temperature, top_p, top_k, min_p and repetition_penalty from the widgets above. "
        "model's own takes what the model's makers recommend in their place; what they do not name stays as set.",
        rare=True, renamed="sampling_from", help="whose sampling parameters are used"),
    _choice("image_mode", IMAGE_MODES,
        "together: one question about all pictures. one answer per image: the same question about each picture, "
        "several at a time, and a list of answers in order; videos are shown with each.",
        looks=True, commands=(ASK,)),
    _choice("image_resolution", tuple(RESOLUTIONS),
        "What pictures are scaled to, and so what they cost: up to 256, 512, 768 or 1024 tokens each (a quarter "
        "less with Qwen3-VL); auto 256 to 1024, but no more than the model was made for; original as they are, a "
        "token for 28 x 28 pixels (32 x 32).",
        rare=True, looks=True, help="what pictures are scaled to"),
    Setting("video", "VIDEO", None, "A video of ComfyUI's own kind, trimmed or not.", looks=True),
    Setting("video_frames", "IMAGE", None, "A batch that is a video; fps says how fast.", looks=True),
    _number("fps", 24.0, (0.01, 240.0), 0.5, "Frames a second of video_frames.",
        page={"round": 0.001}, rare=True, looks=True, commands=(ASK,)),
    _number("sample_fps", 1.0, (0.01, 60.0), 0.05, "Frames a second that the model sees of a video, at least 4 in all.",
        rare=True, looks=True, commands=(ASK,)),
    _number("max_frames", 64, (1, 2048), 1, "The most frames that it sees of a video.",
        rare=True, looks=True, commands=(ASK,)),
    _number("max_frame_pixels", 768 * 28 * 28, (28 * 28, 4096 * 28 * 28), 1,
        "Larger frames are scaled down to this many pixels: 28 x 28 in two frames (32 x 32 with Qwen3-VL) are a "
        "token.",
        rare=True, looks=True, commands=(ASK,)),
    _number("max_video_tokens", 8192, (256, 262144), 1,
        "The most tokens of all videos together. Frames are made smaller to keep it, then fewer; the log says so.",
        rare=True, looks=True, commands=(ASK,)),
    Setting("preset", "COMBO", None,
        "Put system and user text from a file around what you typed. Your own files: user/default/qwenvl/presets in "
        "ComfyUI's folder.",
        commands=_EVERY, help="a name of --list-presets, put around the question"),
)
# fmt: on
SETTINGS = {setting.name: setting for setting in (*REQUIRED, *OPTIONAL)}
SYSTEM_PROMPT: str = SETTINGS["system"].default


def default(name: str) -> Any:
    return SETTINGS[name].default


def settings_of(part: Any) -> list[Setting]:
    """Return the settings that are fields of a dataclass, or of an instance of one."""
    names = {member.name for member in fields(part)}
    return [setting for setting in SETTINGS.values() if setting.attribute in names]


def check(part: Any) -> None:
    """Raise InvalidSettingError if a field of a dataclass instance has a value that its setting cannot have."""
    for setting in settings_of(part):
        setting.check(getattr(part, setting.attribute))


def values_of(part: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Pick the values, by the settings' names, that are fields of the dataclass."""
    return {setting.attribute: values[setting.name] for setting in settings_of(part) if setting.name in values}
