"""QwenVL and Qwen: widgets -> Request -> pipeline.run -> outputs; and the list of all nodes."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from .qwenvl import paths
from .qwenvl.checks import checked, text_of
from .qwenvl.comfyui import host
from .qwenvl.comfyui.host import model_roots
from .qwenvl.comfyui.memory import memory_manager
from .qwenvl.comfyui.progress import NodeWatch
from .qwenvl.loading.cache import ModelCache
from .qwenvl.log import log
from .qwenvl.models import catalog
from .qwenvl.nodes import lists, widgets
from .qwenvl.nodes.box_node import QwenVLBoxes
from .qwenvl.nodes.folder_nodes import QwenVLLoadFolder, QwenVLSaveCaptions
from .qwenvl.pipeline import run
from .qwenvl.prompting import presets
from .qwenvl.request import Request
from .qwenvl.settings import IMAGE_MODES, RELEASES

MODELS = ModelCache(memory_manager())
SEES_NOTHING = "No picture and no video is connected: the answer is made of the text alone."


def _watch_over(node: QwenVL | Qwen) -> None:
    """Free the models parked in RAM when the node is deleted: "Free model and node cache" only drops the nodes."""
    weakref.finalize(node, node.models.forget_parked).atexit = False


def _why_unknown(node: type[QwenVL | Qwen], model: str | None) -> str | None:
    """Explain why the model is unknown and suggest close names from the node's own list; None if it is known.

    ComfyUI repeats this message for every input that VALIDATE_INPUTS names, so VALIDATE_INPUTS names the model alone.
    The model may be of the other node's list too. ComfyUI checks all other lists itself.

    Args:
        model: None if another node will deliver it.
    """
    try:
        if model is not None:
            catalog.find(model, model_roots(), node.offered)
    except ValueError as error:
        return str(error)
    return None


def _answer(node: type[QwenVL | Qwen], question: str, given: dict[str, Any]) -> dict[str, Any]:
    """Run the pipeline on the values of a node's widgets; those missing from an API prompt take their defaults."""
    inputs = node.INPUT_TYPES()
    declared = {**inputs["required"], **inputs.get("optional", {})}
    defaults = {name: options["default"] for name, (_, options) in declared.items() if "default" in options}
    values = checked(declared, {**defaults, **given})
    catalog.find(values["model"], model_roots(), node.offered)
    question = text_of("prompt" if "prompt" in declared else "text", question)
    system, question = presets.find(values["preset"]).fill(values["system"], question)
    values |= {
        "system": system,
        "text": question,
        "stop": widgets.stops(values["stop"]),
        "video_path": _video_file(values.get("video_path", "")),
        "release": values["release"] if values["keep_model_loaded"] else RELEASES[-1],
    }
    request = Request.of(values, _images(values))
    presets.require_shown(values["preset"], request.pictures_at_once, request.shows_video)
    notes = [] if request.shows_something or "image_mode" not in declared else [SEES_NOTHING]
    for note in notes:
        log.warning("%s", note)
    result = run(request, node.models, NodeWatch(request.sampling.longest))
    answers, loaded = result.answers, result.stats.loaded
    stats = replace(result.stats, loaded=replace(loaded, fallbacks=(*loaded.fallbacks, *notes))).to_json()
    return _outputs([answer.text for answer in answers], [answer.thinking for answer in answers], [stats], notes)


def _images(values: dict[str, Any]) -> dict[str, Any]:
    connected = (lists.named(name, values[name]) for name in widgets.PICTURES if values.get(name) is not None)
    return {name: picture for pictures in connected for name, picture in pictures.items()}


def _outputs(texts: list[str], thinking: list[str], stats: list[str], notes: Sequence[str] = ()) -> dict[str, Any]:
    """Build what a node returns: its outputs, and what the page shows on it."""
    extras = {"thinking": thinking if any(thinking) else [], "notes": list(notes)}
    shown = {name: lines for name, lines in extras.items() if lines}
    return {"ui": {"text": texts, **shown}, "result": (texts, thinking, stats)}


class QwenVL:
    """The node that answers a question about pictures or a video."""

    DESCRIPTION = (
        "Ask a Qwen vision-language model about pictures or a video: captions, prompts, text in images, positions."
    )
    CATEGORY = "QwenVL"
    FUNCTION = "inference"
    RETURN_TYPES = ("STRING", "STRING", "STRING")
    RETURN_NAMES = ("text", "thinking", "stats")
    # Pictures of different sizes come as a list. Without this, ComfyUI would run the node once for each of them.
    INPUT_IS_LIST = True
    OUTPUT_IS_LIST = (True, True, True)
    OUTPUT_TOOLTIPS = (widgets.ANSWER_TOOLTIP, widgets.THINKING_TOOLTIP, widgets.STATS_TOOLTIP)
    # The page gets the text again if it comes from ComfyUI's cache.
    HAS_INTERMEDIATE_OUTPUT = True
    SEARCH_ALIASES = (
        *("caption", "describe", "interrogate", "image to prompt", "image to text", "img2txt", "ocr", "tagger"),
        *("vision", "vlm", "llm", "chat", "prompt", "video to text", "qwen2.5-vl", "qwen3-vl"),
        *("反推", "打标", "图像描述"),
    )

    models: ClassVar[ModelCache] = MODELS
    offered = staticmethod(catalog.vision_models)

    def __init__(self) -> None:
        _watch_over(self)

    @classmethod
    def INPUT_TYPES(cls) -> widgets.Inputs:
        return widgets.inputs(cls.offered(model_roots()), looks=True)

    @classmethod
    def VALIDATE_INPUTS(cls, model=None) -> bool | str:
        return _why_unknown(cls, lists.first(model)) or True

    @classmethod
    def IS_CHANGED(
        cls,
        seed: int | None = None,
        bypass: bool | None = False,
        video_path: str | None = "",
        preset: str | None = None,
        **_: Any,
    ) -> Any:
        seed, bypass, video_path, preset = map(lists.first, (seed, bypass, video_path, preset))
        if seed == -1 and not bypass:
            return float("nan")  # equal to nothing, itself included: the node runs again
        return tuple(filter(None, (_stamp(video_path or ""), presets.stamp(preset)))) or ""

    def inference(self, **given: Any) -> dict[str, Any]:
        one_by_one = lists.first(given.get("image_mode", IMAGE_MODES[0])) != IMAGE_MODES[0]
        results = [self._run(**values) for values in lists.runs(given, widgets.PICTURES, together=one_by_one)]
        outputs = zip(*(result["result"] for result in results), strict=True)
        texts, thinking, stats = ([item for items in of_runs for item in items] for of_runs in outputs)
        notes = dict.fromkeys(note for result in results for note in result["ui"].get("notes", ()))
        return _outputs(texts, thinking, stats, list(notes))

    def _run(self, text: str = "", bypass: bool = False, **given: Any) -> dict[str, Any]:
        return _outputs([text], [""], [""]) if _is_on(bypass) else _answer(type(self), text, given)


class Qwen2VL(QwenVL):
    """QwenVL with the id and widget order of the oldest workflows, so that they open with every value in its place."""

    DEPRECATED = True

    @classmethod
    def INPUT_TYPES(cls) -> widgets.Inputs:
        today = super().INPUT_TYPES()
        required, optional = today["required"], today["optional"]
        first = ("text", "model", "quantization", "keep_model_loaded", "temperature", "max_new_tokens", "seed")
        return {
            "required": {name: required.pop(name) for name in first},
            "optional": {"image": widgets.PICTURE, "video_path": optional.pop("video_path"), **required, **optional},
        }


class Qwen:
    """The node that answers a text prompt."""

    DESCRIPTION = "Ask a Qwen language model: write, rewrite or enhance prompts, answer questions."
    CATEGORY = "QwenVL"
    FUNCTION = "inference"
    RETURN_TYPES = ("STRING", "STRING", "STRING")
    RETURN_NAMES = ("text", "thinking", "stats")
    OUTPUT_IS_LIST = (True, True, True)
    OUTPUT_TOOLTIPS = (widgets.ANSWER_TOOLTIP, widgets.THINKING_TOOLTIP, widgets.STATS_TOOLTIP)
    # The page gets the text again if it comes from ComfyUI's cache.
    HAS_INTERMEDIATE_OUTPUT = True
    SEARCH_ALIASES = (
        *("llm", "chat", "prompt", "prompt enhancer", "enhance", "rewrite", "translate"),
        *("language model", "text generation", "qwen2.5", "qwen3"),
        *("提示词", "扩写", "翻译"),
    )

    models: ClassVar[ModelCache] = MODELS
    offered = staticmethod(catalog.text_models)

    def __init__(self) -> None:
        _watch_over(self)

    @classmethod
    def INPUT_TYPES(cls) -> widgets.Inputs:
        declared = widgets.inputs(cls.offered(model_roots()), looks=False)
        required = {"prompt" if name == "text" else name: widget for name, widget in declared["required"].items()}
        return {**declared, "required": required}

    @classmethod
    def VALIDATE_INPUTS(cls, model=None) -> bool | str:
        return _why_unknown(cls, model) or True

    @classmethod
    def IS_CHANGED(
        cls, seed: int | None = None, bypass: bool | None = False, preset: str | None = None, **_: Any
    ) -> Any:
        return float("nan") if seed == -1 and not bypass else presets.stamp(preset)

    def inference(self, prompt: str, bypass: bool = False, **given: Any) -> dict[str, Any]:
        return _outputs([prompt], [""], [""]) if _is_on(bypass) else _answer(type(self), prompt, given)


def _is_on(bypass: Any) -> bool:
    return checked({"bypass": widgets.BYPASS}, {"bypass": bypass})["bypass"]


def _video_file(value: str) -> str:
    """Return the path of the file that the widget names; "" if the widget is empty."""
    if not text_of("video_path", value).strip():
        return ""
    return str(paths.resolve("video_path", value, host.reachable(), host.reading_bases()))


def _stamp(video_path: str) -> tuple[int, int] | str:
    """Return a value that changes with the file, so that ComfyUI does not answer an edited video from its cache."""
    try:
        file = _video_file(video_path)
        state = Path(file).stat() if file else None
    except (OSError, ValueError):
        return "missing"  # the error is raised when the node runs
    return (state.st_mtime_ns, state.st_size) if state else ""


class Qwen25VL(QwenVL):
    """QwenVL under the id that older packs gave it: their workflows open, and a node search shows QwenVL only."""

    DEPRECATED = True


class Qwen25(Qwen):
    """Qwen under the id that older packs gave it."""

    DEPRECATED = True


NODE_CLASS_MAPPINGS = {
    "QwenVL": QwenVL,
    "Qwen": Qwen,
    "Qwen2.5VL": Qwen25VL,
    "Qwen2.5": Qwen25,
    "Qwen2VL": Qwen2VL,
    "QwenVLBoxes": QwenVLBoxes,
    "QwenVLLoadFolder": QwenVLLoadFolder,
    "QwenVLSaveCaptions": QwenVLSaveCaptions,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "QwenVL": "QwenVL",
    "Qwen": "Qwen",
    "Qwen2.5VL": "Qwen2.5VL",
    "Qwen2.5": "Qwen2.5",
    "Qwen2VL": "Qwen2VL (old)",
    "QwenVLBoxes": "QwenVL Boxes",
    "QwenVLLoadFolder": "QwenVL Load Folder",
    "QwenVLSaveCaptions": "QwenVL Save Captions",
}
