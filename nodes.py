"""The two nodes: widgets -> Request -> pipeline.run -> outputs."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any, ClassVar

from .qwenvl import catalog
from .qwenvl.cache import ModelCache
from .qwenvl.host import NodeWatch, memory_manager
from .qwenvl.pipeline import run
from .qwenvl.request import ATTENTIONS, QUANTIZATIONS, RANGES, RELEASES, LoadSpec, Request, Sampling

MODELS = ModelCache(memory_manager())

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
RELEASE = _choice(
    RELEASES,
    RELEASES[0],
    "When a model that is kept loaded gives its memory back: when another node needs it; when everything of this "
    "prompt is done; or at once, like keep_model_loaded off.",
)
# The picture inputs of both generations of workflows, in the order in which they are shown.
PICTURES = ("image", "image1", "image2", "image3", "image4")


def _model(names: dict[str, catalog.Model]) -> Widget:
    return _choice(
        tuple(names),
        next(iter(names)),
        "The model. One that is not on disk yet is downloaded to models/LLM; Demo-Shapes comes with the pack.",
    )


def _watch_over(node: QwenVL | Qwen) -> None:
    """Models that wait in RAM go with the node: "Free model and node cache" tells nobody but drops every node."""
    weakref.finalize(node, node.models.forget_parked).atexit = False


def _problem(model: str | None, quantization: str | None, attention_mode: str | None) -> str | None:
    """What is wrong with a list's value, if anything: saved workflows may hold one that is no longer offered.

    None stands for a value that another node will deliver.
    """
    choices = {"quantization": quantization, "attention": attention_mode}
    try:
        if model is not None:
            catalog.find(model)
        LoadSpec("", **{name: value for name, value in choices.items() if value is not None})
    except ValueError as error:
        return str(error)
    return None


def _answer(node: type[QwenVL | Qwen], question: str, widgets: dict[str, Any]) -> str:
    """Run the pipeline on a node's widgets; those that an API prompt left out have their defaults."""
    inputs = node.INPUT_TYPES()
    declared = {**inputs["required"], **inputs.get("optional", {})}
    defaults = {name: options["default"] for name, (_, options) in declared.items() if "default" in options}
    values = {**defaults, **widgets}
    request = Request(
        load=LoadSpec(values["model"], values["quantization"], values["attention_mode"]),
        text=question,
        system=values["system"],
        images={name: values[name] for name in PICTURES if values.get(name) is not None},
        video_path=values.get("video_path", "").strip(),
        sampling=Sampling(**{name: values[name] for name in SAMPLING}),
        release=values["release"] if values["keep_model_loaded"] else RELEASES[-1],
    )
    return run(request, node.models, NodeWatch(request.sampling.max_new_tokens)).text


class QwenVL:
    """Pictures, a video and a question in, an answer out."""

    DESCRIPTION = (
        "Ask a Qwen vision-language model about pictures or a video: captions, prompts, text in images, positions."
    )
    CATEGORY = "QwenVL"
    FUNCTION = "inference"
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("text",)
    OUTPUT_TOOLTIPS = (ANSWER_TOOLTIP,)
    SEARCH_ALIASES = ("caption", "describe", "vlm", "interrogate", "image to prompt")

    models: ClassVar[ModelCache] = MODELS

    def __init__(self) -> None:
        _watch_over(self)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Widget]]:
        return {
            "required": {
                "system": SYSTEM,
                "text": QUESTION,
                "model": _model(catalog.vision_models()),
                "quantization": QUANTIZATION,
                "attention_mode": ATTENTION,
                "keep_model_loaded": KEEP_LOADED,
                "bypass": BYPASS,
                **SAMPLING,
            },
            "optional": {
                "image1": PICTURE,
                "image2": PICTURE,
                "image3": PICTURE,
                "image4": PICTURE,
                "video_path": VIDEO,
                "release": RELEASE,
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, model=None, quantization=None, attention_mode=None) -> bool | str:
        return _problem(model, quantization, attention_mode) or True

    @classmethod
    def IS_CHANGED(cls, seed: int | None = None, bypass: bool | None = False, video_path: str | None = "", **_: Any):
        if seed == -1 and not bypass:
            return float("nan")  # equal to nothing, itself included: the node runs again
        return _stamp(video_path) if video_path else ""

    def inference(self, text: str, bypass: bool = False, **widgets: Any) -> tuple[str]:
        return (text,) if bypass else (_answer(type(self), text, widgets),)


class Qwen2VL(QwenVL):
    """The id and the widget order of the oldest workflows, so that they open with every value in its place."""

    DEPRECATED = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Widget]]:
        today = super().INPUT_TYPES()
        required, optional = today["required"], today["optional"]
        first = (
            "text",
            "model",
            "quantization",
            "keep_model_loaded",
            "temperature",
            "max_new_tokens",
            "seed",
        )
        return {
            "required": {name: required.pop(name) for name in first},
            "optional": {"image": PICTURE, "video_path": optional.pop("video_path"), **required, **optional},
        }


class Qwen:
    """A prompt in, an answer out."""

    DESCRIPTION = "Ask a Qwen language model: write, rewrite or enhance prompts, answer questions."
    CATEGORY = "QwenVL"
    FUNCTION = "inference"
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("text",)
    OUTPUT_TOOLTIPS = (ANSWER_TOOLTIP,)
    SEARCH_ALIASES = ("llm", "prompt enhancer", "chat")

    models: ClassVar[ModelCache] = MODELS

    def __init__(self) -> None:
        _watch_over(self)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Widget]]:
        return {
            "required": {
                "system": SYSTEM,
                "prompt": QUESTION,
                "model": _model(catalog.text_models()),
                "quantization": QUANTIZATION,
                "attention_mode": ATTENTION,
                "keep_model_loaded": KEEP_LOADED,
                "bypass": BYPASS,
                **SAMPLING,
            },
            "optional": {"release": RELEASE},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, model=None, quantization=None, attention_mode=None) -> bool | str:
        return _problem(model, quantization, attention_mode) or True

    @classmethod
    def IS_CHANGED(cls, seed: int | None = None, bypass: bool | None = False, **_: Any) -> Any:
        return float("nan") if seed == -1 and not bypass else ""

    def inference(self, prompt: str, bypass: bool = False, **widgets: Any) -> tuple[str]:
        return (prompt,) if bypass else (_answer(type(self), prompt, widgets),)


def _stamp(path: str) -> tuple[int, int] | str:
    """Changes when the file does, so that an edited video is not answered from ComfyUI's cache."""
    file = Path(path.strip())
    if not file.is_file():
        return "missing"
    state = file.stat()
    return state.st_mtime_ns, state.st_size


# The ids with a dot are those of the older packs.
NODE_CLASS_MAPPINGS = {
    "QwenVL": QwenVL,
    "Qwen": Qwen,
    "Qwen2.5VL": QwenVL,
    "Qwen2.5": Qwen,
    "Qwen2VL": Qwen2VL,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "QwenVL": "QwenVL",
    "Qwen": "Qwen",
    "Qwen2.5VL": "Qwen2.5VL",
    "Qwen2.5": "Qwen2.5",
    "Qwen2VL": "Qwen2VL (old)",
}
