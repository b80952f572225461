"""Every widget of the nodes: its kind, its default, its range and its tooltip."""

from __future__ import annotations

from typing import Any

from . import catalog, download, presets
from .devices import device_choices
from .request import (
    AS_SET,
    ATTENTIONS,
    AUTO,
    DIAGNOSTICS,
    DOWNLOADS,
    FRAME_RANGES,
    IMAGE_MODES,
    QUANTIZATIONS,
    RANGES,
    RELEASES,
    RESOLUTIONS,
    SAMPLING_FROM,
    SYSTEM_PROMPT,
    THINKING,
    Frames,
)

ANSWER_TOOLTIP = (
    "The model's answer, without its thinking and without control tokens: a list, of one where one was asked."
)
THINKING_TOOLTIP = "What the model thought before each answer; empty where it did not."
STATS_TOOLTIP = "JSON: what was loaded and how, tokens, seconds, tokens a second, memory, the seed that was used."

# The frontend then offers fixed, increment, decrement and randomize, and saves the choice with the workflow.
AFTER_RUN = {"control_after_generate": True}

Widget = tuple[Any, dict[str, Any]]


# The page folds these away until they are asked for: a first answer needs none of them.
RARE: dict[str, Any] = {"advanced": True}


def _text(tooltip: str, default: str = "", **more: Any) -> Widget:
    return "STRING", {"multiline": True, "default": default, "tooltip": tooltip, **more}


def _switch(default: bool, tooltip: str) -> Widget:
    return "BOOLEAN", {"default": default, "tooltip": tooltip, **RARE}


def _number(name: str, default: float, step: float, tooltip: str, **more: Any) -> Widget:
    low, high = {**RANGES, **FRAME_RANGES}[name]
    kind = "INT" if isinstance(low, int) else "FLOAT"
    return kind, {"default": default, "min": low, "max": high, "step": step, "tooltip": tooltip, **more}


def _choice(names: tuple[str, ...], default: str, tooltip: str, **more: Any) -> Widget:
    return list(names), {"default": default, "tooltip": tooltip, **more}


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
    "How attention is computed. sdpa is right nearly everywhere; flash_attention_2 to 4 need packages and "
    "flex_attention needs Triton, and without them sdpa is used and the log says why; eager is slow and exact; auto "
    "lets the pack choose.",
    **RARE,
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
        **RARE,
    ),
    "top_p": _number(
        "top_p",
        0.9,
        0.05,
        "Draw only from the likeliest tokens that together reach this probability. 1 is off.",
        **RARE,
    ),
    "top_k": _number("top_k", 50, 1, "Draw only from this many of the likeliest tokens. 0 is off.", **RARE),
    "min_p": _number(
        "min_p", 0.0, 0.05, "Leave out tokens less likely than this share of the likeliest. 0 is off.", **RARE
    ),
    "repetition_penalty": _number(
        "repetition_penalty", 1.0, 0.05, "Above 1 makes tokens that already occurred less likely. 1 is off.", **RARE
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
        "tooltip": "Path of a video file. The model sees frames of it: see sample_fps and what follows it.",
        **RARE,
    },
)
# What more there is to sampling, in the order in which saved workflows hold it: append only.
MORE_SAMPLING: dict[str, Widget] = {
    "presence_penalty": _number(
        "presence_penalty",
        0.0,
        0.1,
        "Above 0 makes tokens that are in the answer already less likely. 0 is off.",
        **RARE,
    ),
    "frequency_penalty": _number(
        "frequency_penalty", 0.0, 0.1, "The same, as many times over as they are in the answer. 0 is off.", **RARE
    ),
    "no_repeat_ngram_size": _number(
        "no_repeat_ngram_size",
        0,
        1,
        "No row of so many tokens occurs twice, the question's included. 0 is off.",
        **RARE,
    ),
    "min_new_tokens": _number("min_new_tokens", 0, 1, "The answer does not end before so many tokens.", **RARE),
    "thinking_budget": _number(
        "thinking_budget",
        0,
        1,
        "A model that thinks longer than so many tokens is told to answer now; max_new_tokens then counts the answer "
        "alone. 0 is no limit.",
        **RARE,
    ),
}
_FRAMES = Frames()
FRAMES: dict[str, Widget] = {
    "fps": _number("fps", _FRAMES.fps, 0.5, "Frames a second of video_frames.", round=0.001, **RARE),
    "sample_fps": _number(
        "sample_fps",
        _FRAMES.sample_fps,
        0.05,
        "Frames a second that the model sees of a video, at least 4 in all.",
        **RARE,
    ),
    "max_frames": _number("max_frames", _FRAMES.max_frames, 1, "The most frames that it sees of a video.", **RARE),
    "max_frame_pixels": _number(
        "max_frame_pixels",
        _FRAMES.max_frame_pixels,
        1,
        "Larger frames are scaled down to so many pixels: 28 x 28 in two frames (32 x 32 with Qwen3-VL) are a token.",
        **RARE,
    ),
    "max_video_tokens": _number(
        "max_video_tokens",
        _FRAMES.max_video_tokens,
        1,
        "The most tokens of all videos together. Frames are made smaller to keep it, then fewer; the log says so.",
        **RARE,
    ),
}
# What both nodes offer besides, in the order in which saved workflows hold it: append only.
OPTIONS: dict[str, Widget] = {
    "release": _choice(
        RELEASES,
        RELEASES[0],
        "When a model that is kept loaded gives its memory back: when another node needs it; when everything of this "
        "prompt is done; or at once, like keep_model_loaded off.",
        **RARE,
    ),
    "diagnostics": _choice(
        DIAGNOSTICS,
        DIAGNOSTICS[0],
        "What a run writes to the log: a line of figures; in full also the time of each part, stalls, and the GPU's "
        "memory, clock, power and temperature; or nothing.",
        **RARE,
    ),
    **MORE_SAMPLING,
    "stop": _text("The answer ends before the first of these texts: one a line, \\n in it is a line break.", **RARE),
    "thinking": _choice(
        THINKING,
        "auto",
        "Whether a model that can do both thinks first; auto leaves it to the model. Where its chat template has no "
        "switch for it, this does nothing, and stats says so.",
    ),
    "download": _choice(
        DOWNLOADS,
        download.default_policy(),
        "Whether a model that is not on this machine may be downloaded. never makes it an error that names the folders "
        "that were searched and the command that fetches it. The variable QWENVL_DOWNLOAD sets the default.",
        **RARE,
    ),
    "device": _choice(
        device_choices(),
        AUTO,
        "Where the model runs. auto is where ComfyUI runs its models. all GPUs spreads the layers, for a model that "
        "fits on none of them alone. all GPUs and CPU leaves in RAM what fits on none, and copies it for every token: "
        "each token then takes about half a second longer for every 10 GB in RAM.",
        **RARE,
    ),
    "sampling": _choice(
        SAMPLING_FROM,
        AS_SET,
        "as set takes do_sample, temperature, top_p, top_k, min_p and repetition_penalty from the widgets above. "
        "model's own takes what the model's makers recommend in their place; what they do not name stays as set.",
        **RARE,
    ),
}
# What the QwenVL node offers after that: append only.
VISION_OPTIONS: dict[str, Widget] = {
    "image_mode": _choice(
        IMAGE_MODES,
        IMAGE_MODES[0],
        "together: one question about all pictures. one answer per image: the same question about each picture, "
        "several at a time, and a list of answers in order; videos are shown with each.",
    ),
    "image_resolution": _choice(
        tuple(RESOLUTIONS),
        "auto",
        "What pictures are scaled to, and so what they cost: up to 256, 512, 768 or 1024 tokens each (a quarter less "
        "with Qwen3-VL); auto 256 to 1024, but no more than the model was made for; original as they are, a token for "
        "28 x 28 pixels (32 x 32).",
        **RARE,
    ),
    "video": ("VIDEO", {"tooltip": "A video of ComfyUI's own kind, trimmed or not."}),
    "video_frames": ("IMAGE", {"tooltip": "A batch that is a video; fps says how fast."}),
    **FRAMES,
}
# The picture inputs of both generations of workflows, in the order in which they are shown.
PICTURES = ("image", "image1", "image2", "image3", "image4")


def stops(text: str) -> tuple[str, ...]:
    """The lines of the stop widget."""
    return tuple(line.replace("\\n", "\n") for line in text.splitlines() if line)


def model_list(models: dict[str, catalog.Model]) -> Widget:
    sizes = "\n".join(f"{model.name}: {model.size}" for model in models.values() if model.size)
    return _choice(
        tuple(models),
        next(iter(models)),
        "The model. One that is not on disk yet is downloaded to models/LLM; Demo-Shapes comes with the pack; model "
        "folders that you have are listed too, and one that ends in @ engine runs elsewhere and is asked. In memory "
        "means the weights alone, by quantization; float32, which some CPUs compute in, is twice none."
        f"\n{sizes}",
    )


def preset_list() -> Widget:
    """Read anew for every look at a node: the user's files may have changed."""
    return _choice(
        presets.names(),
        presets.NONE,
        "Put system and user text from a file around what you typed. Your own files: user/default/qwenvl/presets in "
        "ComfyUI's folder.",
    )
