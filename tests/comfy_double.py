"""A small double of ComfyUI: the modules that the pack touches, and an executor that treats nodes as ComfyUI does.

Behaviour that the pack relies on is taken over: the interrupt flag is cleared when it is raised, a progress bar
reports to a hook, values are checked against the declared ranges unless VALIDATE_INPUTS names them, results are
cached by inputs and IS_CHANGED, and nodes run in inference mode.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch


class InterruptProcessingException(BaseException):
    """Cancel, as ComfyUI raises it."""


class Rejected(ValueError):  # noqa: N818
    """A prompt that ComfyUI answers with HTTP 400."""


class ComfyDouble:
    """Its state is what the tests look at: progress, texts, freed, and `interrupt_at` to press cancel at a token."""

    def __init__(self, models_dir: Path) -> None:
        self.models_dir = models_dir
        self.node_id = "7"
        self.executing = True
        self.interrupt_at: int | None = None
        self.cache: dict[Any, tuple] = {}
        self.reset()

    def reset(self) -> None:
        self.progress: list[tuple[int, int, str | None]] = []
        self.texts: list[tuple[str, str, str | None]] = []
        self.freed: list[tuple[int, torch.device]] = []
        self.interrupted = False
        self.interrupt_at = None
        self.cache.clear()

    def install(self) -> None:
        """Put the modules where `import` finds them."""
        for name, module in self._modules().items():
            sys.modules[name] = module
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)

    def run(self, node: type, **inputs: Any) -> tuple:
        """Execute one node of a prompt; a result is served again while nothing that decides it has changed."""
        self._validate(node, inputs)
        changed = node.IS_CHANGED(**inputs) if hasattr(node, "IS_CHANGED") else None
        key = (node, tuple(sorted((name, id(v) if torch.is_tensor(v) else v) for name, v in inputs.items())), changed)
        if key not in self.cache:
            with torch.inference_mode():
                self.cache[key] = getattr(node(), node.FUNCTION)(**inputs)
        return self.cache[key]

    def _validate(self, node: type, inputs: dict[str, Any]) -> None:
        declared = node.INPUT_TYPES()
        own = inspect.getfullargspec(node.VALIDATE_INPUTS).args[1:] if hasattr(node, "VALIDATE_INPUTS") else []
        for name, (kind, options) in {**declared["required"], **declared.get("optional", {})}.items():
            if name not in inputs:
                if name in declared["required"]:
                    raise Rejected(f"Required input is missing: {name}")
            elif name not in own:
                _check(name, inputs[name], kind, options)
        verdict = node.VALIDATE_INPUTS(**{name: inputs[name] for name in own if name in inputs}) if own else True
        if verdict is not True:
            raise Rejected(verdict)

    def _modules(self) -> dict[str, ModuleType]:
        double = self
        folders: dict[str, tuple[list[str], set[str]]] = {}

        class ProgressBar:
            def __init__(self, total: int, node_id: str | None = None) -> None:
                self.total, self.node_id = total, node_id

            def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
                double.progress.append((min(value, self.total), self.total, self.node_id))

        def throw_exception_if_processing_interrupted() -> None:
            if double.interrupted or (double.interrupt_at is not None and len(double.progress) >= double.interrupt_at):
                double.interrupted, double.interrupt_at = False, None
                raise InterruptProcessingException

        def add_model_folder_path(name: str, path: str, is_default: bool = False) -> None:
            paths, _ = folders.setdefault(name, ([], set()))
            paths.insert(0, path) if is_default else paths.append(path)

        def send_progress_text(text: str, node_id: str, sid: str | None = None) -> None:
            double.texts.append((text, node_id, sid))

        server = SimpleNamespace(last_node_id="7", client_id="browser", send_progress_text=send_progress_text)
        context = SimpleNamespace(node_id=self.node_id, prompt_id="p", list_index=None)
        return {
            "comfy": _module("comfy"),
            "comfy.model_management": _module(
                "comfy.model_management",
                InterruptProcessingException=InterruptProcessingException,
                throw_exception_if_processing_interrupted=throw_exception_if_processing_interrupted,
                get_torch_device=lambda: torch.device("cpu"),
                free_memory=lambda size, device: double.freed.append((size, device)),
            ),
            "comfy.utils": _module("comfy.utils", ProgressBar=ProgressBar),
            "comfy_execution": _module("comfy_execution"),
            "comfy_execution.utils": _module(
                "comfy_execution.utils", get_executing_context=lambda: context if double.executing else None
            ),
            "folder_paths": _module(
                "folder_paths",
                models_dir=str(self.models_dir),
                folder_names_and_paths=folders,
                add_model_folder_path=add_model_folder_path,
                get_folder_paths=lambda name: list(folders[name][0]),
            ),
            "server": _module("server", PromptServer=SimpleNamespace(instance=server)),
        }


def _module(name: str, **contents: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(contents)
    return module


def _check(name: str, value: Any, kind: Any, options: dict[str, Any]) -> None:
    if isinstance(kind, list) and value not in kind:
        raise Rejected(f"Value not in list: {name}: {value!r} not in {kind}")
    if "min" in options and value < options["min"]:
        raise Rejected(f"Value {value} smaller than min of {options['min']}: {name}")
    if "max" in options and value > options["max"]:
        raise Rejected(f"Value {value} bigger than max of {options['max']}: {name}")
