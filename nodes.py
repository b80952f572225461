"""The two nodes: widgets -> Request -> pipeline.run -> outputs."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

from .qwenvl import catalog, widgets
from .qwenvl.cache import ModelCache
from .qwenvl.host import NodeWatch, memory_manager, model_roots
from .qwenvl.pipeline import run
from .qwenvl.request import RELEASES, Frames, LoadSpec, Request, Sampling

MODELS = ModelCache(memory_manager())


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
            catalog.find(model, model_roots())
        LoadSpec("", **{name: value for name, value in choices.items() if value is not None})
    except ValueError as error:
        return str(error)
    return None


def _answer(node: type[QwenVL | Qwen], question: str, given: dict[str, Any]) -> dict[str, Any]:
    """Run the pipeline on the values of a node's widgets; those that an API prompt left out have their defaults."""
    inputs = node.INPUT_TYPES()
    declared = {**inputs["required"], **inputs.get("optional", {})}
    defaults = {name: options["default"] for name, (_, options) in declared.items() if "default" in options}
    values = {**defaults, **given}
    request = Request(
        load=LoadSpec(values["model"], values["quantization"], values["attention_mode"]),
        text=question,
        system=values["system"],
        images={name: values[name] for name in widgets.PICTURES if values.get(name) is not None},
        video_path=values.get("video_path", "").strip(),
        sampling=Sampling(
            **_those(values, widgets.SAMPLING, widgets.MORE_SAMPLING), stop=widgets.stops(values["stop"])
        ),
        release=values["release"] if values["keep_model_loaded"] else RELEASES[-1],
        download=values["download"],
        diagnostics=values["diagnostics"],
        frames=Frames(**_those(values, widgets.FRAMES)),
        **_those(values, ("thinking", "image_mode", "image_resolution", "video", "video_frames")),
    )
    result = run(request, node.models, NodeWatch(request.sampling.longest))
    answers = result.answers
    return _outputs([each.text for each in answers], [each.thinking for each in answers], result.stats.to_json())


def _those(values: dict[str, Any], *names: Iterable[str]) -> dict[str, Any]:
    """The values of so many inputs, as far as the node has them."""
    return {name: values[name] for each in names for name in each if name in values}


def _outputs(texts: list[str], thinking: list[str], stats: str) -> dict[str, Any]:
    """What a node returns: its outputs, and the text that the page keeps on it."""
    return {"ui": {"text": texts}, "result": (texts, thinking, stats)}


class QwenVL:
    """Pictures, a video and a question in, an answer out."""

    DESCRIPTION = (
        "Ask a Qwen vision-language model about pictures or a video: captions, prompts, text in images, positions."
    )
    CATEGORY = "QwenVL"
    FUNCTION = "inference"
    RETURN_TYPES = ("STRING", "STRING", "STRING")
    RETURN_NAMES = ("text", "thinking", "stats")
    OUTPUT_IS_LIST = (True, True, False)
    OUTPUT_TOOLTIPS = (widgets.ANSWER_TOOLTIP, widgets.THINKING_TOOLTIP, widgets.STATS_TOOLTIP)
    # The page is told the text again where it comes from ComfyUI's cache.
    HAS_INTERMEDIATE_OUTPUT = True
    SEARCH_ALIASES = ("caption", "describe", "vlm", "interrogate", "image to prompt")

    models: ClassVar[ModelCache] = MODELS

    def __init__(self) -> None:
        _watch_over(self)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, widgets.Widget]]:
        return {
            "required": {
                "system": widgets.SYSTEM,
                "text": widgets.QUESTION,
                "model": widgets.model_list(catalog.vision_models(model_roots())),
                "quantization": widgets.QUANTIZATION,
                "attention_mode": widgets.ATTENTION,
                "keep_model_loaded": widgets.KEEP_LOADED,
                "bypass": widgets.BYPASS,
                **widgets.SAMPLING,
            },
            "optional": {
                "image1": widgets.PICTURE,
                "image2": widgets.PICTURE,
                "image3": widgets.PICTURE,
                "image4": widgets.PICTURE,
                "video_path": widgets.VIDEO,
                **widgets.OPTIONS,
                **widgets.VISION_OPTIONS,
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

    def inference(self, text: str, bypass: bool = False, **given: Any) -> dict[str, Any]:
        return _outputs([text], [""], "") if bypass else _answer(type(self), text, given)


class Qwen2VL(QwenVL):
    """The id and the widget order of the oldest workflows, so that they open with every value in its place."""

    DEPRECATED = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, widgets.Widget]]:
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
            "optional": {"image": widgets.PICTURE, "video_path": optional.pop("video_path"), **required, **optional},
        }


class Qwen:
    """A prompt in, an answer out."""

    DESCRIPTION = "Ask a Qwen language model: write, rewrite or enhance prompts, answer questions."
    CATEGORY = "QwenVL"
    FUNCTION = "inference"
    RETURN_TYPES = ("STRING", "STRING", "STRING")
    RETURN_NAMES = ("text", "thinking", "stats")
    OUTPUT_IS_LIST = (True, True, False)
    OUTPUT_TOOLTIPS = (widgets.ANSWER_TOOLTIP, widgets.THINKING_TOOLTIP, widgets.STATS_TOOLTIP)
    # The page is told the text again where it comes from ComfyUI's cache.
    HAS_INTERMEDIATE_OUTPUT = True
    SEARCH_ALIASES = ("llm", "prompt enhancer", "chat")

    models: ClassVar[ModelCache] = MODELS

    def __init__(self) -> None:
        _watch_over(self)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, widgets.Widget]]:
        return {
            "required": {
                "system": widgets.SYSTEM,
                "prompt": widgets.QUESTION,
                "model": widgets.model_list(catalog.text_models(model_roots())),
                "quantization": widgets.QUANTIZATION,
                "attention_mode": widgets.ATTENTION,
                "keep_model_loaded": widgets.KEEP_LOADED,
                "bypass": widgets.BYPASS,
                **widgets.SAMPLING,
            },
            "optional": {**widgets.OPTIONS},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, model=None, quantization=None, attention_mode=None) -> bool | str:
        return _problem(model, quantization, attention_mode) or True

    @classmethod
    def IS_CHANGED(cls, seed: int | None = None, bypass: bool | None = False, **_: Any) -> Any:
        return float("nan") if seed == -1 and not bypass else ""

    def inference(self, prompt: str, bypass: bool = False, **given: Any) -> dict[str, Any]:
        return _outputs([prompt], [""], "") if bypass else _answer(type(self), prompt, given)


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
