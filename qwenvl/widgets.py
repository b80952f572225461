"""Every widget of the nodes: its kind, its default, its range and its tooltip."""

from __future__ import annotations

from typing import Any

from . import catalog
from .request import ATTENTIONS, DIAGNOSTICS, QUANTIZATIONS, RANGES, RELEASES

SYSTEM_PROMPT = "You are a helpful assistant."
ANSWER_TOOLTIP = "The model's answer, without its thinking and without control tokens."

# The frontend then offers fixed, increment, decrement and randomize, and saves the choice with the workflow.
AFTER_RUN = {"control_after_generate": True}

Widget = tuple[Any, dict[str, Any]]


def _text(tooltip: str, default: str = "") -> Widget:
    return "STRING", {"multiline": True, "default": default, "tooltip": tooltip}


def _switch(default: bool, tooltip: str) -> Widget:
    return "BOOLEAN", {"default": default, "tooltip": tooltip}


def _number(name: str, default: float, step: float, tooltip: str, **more: Any) -> Widget:
    low, high = RANGES[name]
    kind = "INT" if isinstance(low, int) else "FLOAT"
    return kind, {"default": default, "min": low, "max": high, "step": step, "tooltip": tooltip, **more}


def _choice(names: tuple[str, ...], default: str, tooltip: str) -> Widget:
    return list(names), {"default": default, "tooltip": tooltip}


SYSTEM = _text("Who the model is and how it should answer.", SYSTEM_PROMPT)
QUESTION = _text("What to ask. Control tokens of the model in it are taken as plain text.")
QUANTIZATION = _choice(
    QUANTIZATIONS,
    "none",
    "Store the weights in fewer bits: 8bit needs about half of the memory, 4bit about a third. Needs bitsandbytes; "
    "where it cannot run, the model is loaded unquantized and the log says why.",
)
ATTENTION = _choice(
    ATTENTIONS,
    "sdpa",
    "How attention is computed. sdpa is right nearly everywhere; flash_attention_2 needs the flash-attn package and "
    "falls back to sdpa without it; eager is slow and exact; auto lets the pack choose.",
)
KEEP_LOADED = _switch(True, "Keep the model in memory for the next run. Off gives all of it back when the node ends.")
BYPASS = _switch(False, "Pass the text through unchanged, without touching any model.")
SAMPLING = {
    "do_sample": _switch(True, "Draw each token at random from the likely ones. Off always takes the likeliest."),
    "temperature": _number(
        "temperature",
        0.7,
        0.05,
        "Higher is more varied, lower more predictable. 0 always takes the likeliest token.",
    ),
    "top_p": _number(
        "top_p",
        0.9,
        0.05,
        "Draw only from the likeliest tokens that together reach this probability. 1 is off.",
    ),
    "top_k": _number("top_k", 50, 1, "Draw only from this many of the likeliest tokens. 0 is off."),
    "min_p": _number("min_p", 0.0, 0.05, "Leave out tokens less likely than this share of the likeliest. 0 is off."),
    "repetition_penalty": _number(
        "repetition_penalty", 1.0, 0.05, "Above 1 makes tokens that already occurred less likely. 1 is off."
    ),
    "max_new_tokens": _number(
        "max_new_tokens",
        512,
        1,
        "The answer is cut off after this many tokens. A model's thinking counts too.",
    ),
    "seed": _number(
        "seed", -1, 1, "-1 draws a new seed on every run; any other gives the same answer again.", **AFTER_RUN
    ),
}
PICTURE: Widget = (
    "IMAGE",
    {"tooltip": "A picture or a batch. The model sees all pictures of all inputs, in order."},
)
VIDEO: Widget = (
    "STRING",
    {
        "default": "",
        "tooltip": "Path of a video file. The model sees a frame a second, from 4 to 64 of them.",
    },
)
# What both nodes offer besides, in the order in which saved workflows hold it: append only.
OPTIONS: dict[str, Widget] = {
    "release": _choice(
        RELEASES,
        RELEASES[0],
        "When a model that is kept loaded gives its memory back: when another node needs it; when everything of this "
        "prompt is done; or at once, like keep_model_loaded off.",
    ),
    "diagnostics": _choice(
        DIAGNOSTICS,
        DIAGNOSTICS[0],
        "What a run writes to the log: a line of figures; in full also the time of each part, stalls, and the GPU's "
        "memory, clock, power and temperature; or nothing.",
    ),
}
# The picture inputs of both generations of workflows, in the order in which they are shown.
PICTURES = ("image", "image1", "image2", "image3", "image4")


def model_list(names: dict[str, catalog.Model]) -> Widget:
    return _choice(
        tuple(names),
        next(iter(names)),
        "The model. One that is not on disk yet is downloaded to models/LLM; Demo-Shapes comes with the pack.",
    )
