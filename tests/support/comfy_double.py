"""A small double of ComfyUI: the modules that the pack touches, and an executor that treats nodes as ComfyUI does.

Behaviour that the pack relies on is copied: the interrupt flag is cleared when it is raised, a progress bar reports to
a hook, values are checked against the declared ranges unless VALIDATE_INPUTS names them, results are cached by inputs
and IS_CHANGED, and nodes run in inference mode.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import weakref
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from pictures import ROOT


class InterruptProcessingException(BaseException):
    """A cancel, as ComfyUI raises it."""


class Rejected(ValueError):  # noqa: N818
    """A prompt that ComfyUI answers with HTTP 400."""


class ExecutionBlocker:
    """An output that keeps the nodes behind it from running."""

    def __init__(self, message: str | None) -> None:
        self.message = message


class ModelPatcher:
    """The interface that ComfyUI's memory manager needs of a model."""

    def __init__(self, model: Any, load_device: torch.device, offload_device: torch.device, size: int = 0) -> None:
        self.model, self.load_device, self.offload_device, self.size = model, load_device, offload_device, size
        self.model.device = offload_device
        self.model.model_loaded_weight_memory = 0

    def model_size(self) -> int:
        return self.size

    def loaded_size(self) -> int:
        return self.model.model_loaded_weight_memory

    def current_loaded_device(self) -> torch.device:
        return self.model.device


class LoadedModel:
    """An entry of the list of loaded models: it holds the patcher weakly."""

    def __init__(self, patcher: ModelPatcher) -> None:
        self._patcher = weakref.ref(patcher)
        self._holder = weakref.ref(patcher.model)
        self.device = patcher.load_device

    @property
    def model(self) -> ModelPatcher:
        return self._patcher()

    @property
    def dead(self) -> bool:
        return self._holder() is None


class Memory:
    """ComfyUI's memory manager on a device of `total` bytes: its calls, and the models it evicts, in order."""

    RESERVED = 1_200 << 20  # what ComfyUI keeps for inference and for the system

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.total = 64 << 30
        self.loaded: list[LoadedModel] = []
        self.requests: list[int] = []

    def free(self, device: torch.device | None = None) -> int:
        device = device or self.device
        return self.total - sum(patch.model.loaded_size() for patch in self._living() if patch.device == device)

    def load_models_gpu(
        self, models: list[ModelPatcher], memory_required: int = 0, force_full_load: bool = False
    ) -> None:
        self.requests.append(memory_required)
        # As ComfyUI does it: room on every device first, then one after the other.
        for patcher in models:
            known = [patch for patch in self._living() if patch.model is patcher]
            for entry in known:
                self.loaded.remove(entry)
                patcher.detach(unpatch_all=False)
        for patcher in models:
            there = patcher.current_loaded_device() == patcher.load_device
            missing = patcher.model_size() - patcher.loaded_size() if there else patcher.model_size()
            if patcher.load_device.type != "cpu":
                self.free_memory(missing * 1.1 + max(self.RESERVED, memory_required), patcher.load_device)
        for patcher in models:
            patcher.partially_load(patcher.load_device, 10**32)
            self.loaded.insert(0, LoadedModel(patcher))

    def free_memory(self, size: float, device: torch.device, keep_loaded: list[LoadedModel] = ()) -> None:
        def order(entry: LoadedModel) -> tuple[int, int]:
            return entry.model.loaded_size() - entry.model.model_size(), entry.model.model_size()

        for entry in sorted((patch for patch in self._living() if patch not in keep_loaded), key=order):
            if entry.device != device or self.free(device) > size:
                continue
            if size - self.free(device) < entry.model.loaded_size():
                entry.model.partially_unload(entry.model.offload_device, size - self.free(device))
            entry.model.detach(True)
            self.loaded.remove(entry)

    def unload_all_models(self) -> None:
        self.free_memory(1e30, self.device)

    def _living(self) -> list[LoadedModel]:
        self.loaded[:] = [entry for entry in self.loaded if not entry.dead]
        return list(self.loaded)


class ComfyDouble:
    """ComfyUI's double. Tests look at its progress, texts and memory, and set `interrupt_at` to cancel at a token."""

    def __init__(self, models_dir: Path) -> None:
        self.models_dir = models_dir
        self.node_id = "7"
        self.prompt_id = "p"
        self.executing = True
        self.interrupt_at: int | None = None
        self.cache: dict[Any, tuple] = {}
        self.memory = Memory()
        # What ComfyUI's queue is working on: number -> (priority, prompt id, graph, who queued it, what is wanted).
        self.running: dict[int, tuple[int, str, dict, dict, list]] = {}
        # As in ComfyUI beside each other: input, output, temp, user. `listen` is the option of that name.
        self.base = models_dir.parent
        self.args = SimpleNamespace(listen="127.0.0.1")
        self.reset()

    def reset(self) -> None:
        self.progress: list[tuple[int, int, str | None]] = []
        self.texts: list[tuple[str, str, str | None]] = []
        self.events: list[tuple[str, dict[str, Any], str | None]] = []
        # What the page was told of the last node.
        self.ui: dict[str, list[Any]] = {}
        self.interrupted = False
        self.interrupt_at = None
        self.cache.clear()
        self.memory.requests.clear()
        self.running.clear()
        self.args.listen = "127.0.0.1"

    def install(self) -> None:
        """Put the modules where `import` finds them."""
        for name, module in self._modules().items():
            sys.modules[name] = module
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)

    def run(self, node: type, **inputs: Any) -> list[list[Any]]:
        """Execute one node of a prompt; a result is used again as long as its inputs and IS_CHANGED are the same.

        Returns:
            Each output as the next node gets it: as a list, of one item unless the output is declared as a list.
        """
        self._validate(node, inputs)
        changed = node.IS_CHANGED(**_handed(node, inputs)) if hasattr(node, "IS_CHANGED") else None
        key = (node, tuple(sorted((name, _identity(value)) for name, value in inputs.items())), changed)
        if key not in self.cache:
            with torch.inference_mode():
                self.cache[key] = getattr(node(), node.FUNCTION)(**_handed(node, inputs))
        result = self.cache[key]
        self.ui = result.get("ui", {}) if isinstance(result, dict) else {}
        outputs = result.get("result", ()) if isinstance(result, dict) else result
        lists = getattr(node, "OUTPUT_IS_LIST", (False,) * len(outputs))
        return [list(output) if is_list else [output] for output, is_list in zip(outputs, lists, strict=True)]

    def _validate(self, node: type, inputs: dict[str, Any]) -> None:
        declared = node.INPUT_TYPES()
        own = inspect.getfullargspec(node.VALIDATE_INPUTS).args[1:] if hasattr(node, "VALIDATE_INPUTS") else []
        for name, (kind, options) in {**declared["required"], **declared.get("optional", {})}.items():
            if name not in inputs:
                if name in declared["required"]:
                    raise Rejected(f"Required input is missing: {name}")
            elif name not in own:
                _check(name, inputs[name], kind, options)
        named = {name: inputs[name] for name in own if name in inputs}
        verdict = node.VALIDATE_INPUTS(**_handed(node, named)) if own else True
        if verdict is not True:
            raise Rejected(verdict)

    def _modules(self) -> dict[str, ModuleType]:
        double = self
        folders: dict[str, tuple[list[str], set[str]]] = {}

        class ProgressBar:
            def __init__(self, total: int, node_id: str | None = None) -> None:
                self.total, self.node_id = total, node_id

            def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
                self.total = total or self.total
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

        def send_sync(event: str, data: dict[str, Any], sid: str | None = None) -> None:
            double.events.append((event, data, sid))

        server = SimpleNamespace(last_node_id="7", client_id="browser")
        server.send_progress_text, server.send_sync = send_progress_text, send_sync
        queue = SimpleNamespace(currently_running=self.running)
        server.prompt_queue = queue

        def get_executing_context() -> SimpleNamespace | None:
            context = SimpleNamespace(node_id=double.node_id, prompt_id=double.prompt_id, list_index=None)
            return context if double.executing else None

        return {
            "comfy": _module("comfy"),
            "comfy.model_management": _module(
                "comfy.model_management",
                InterruptProcessingException=InterruptProcessingException,
                throw_exception_if_processing_interrupted=throw_exception_if_processing_interrupted,
                get_torch_device=lambda: double.memory.device,
                get_free_memory=double.memory.free,
                get_total_memory=lambda _: double.memory.total,
                current_loaded_models=double.memory.loaded,
                load_models_gpu=double.memory.load_models_gpu,
                free_memory=double.memory.free_memory,
                unload_all_models=double.memory.unload_all_models,
            ),
            "comfy.model_patcher": _module("comfy.model_patcher", ModelPatcher=ModelPatcher),
            "comfy.utils": _module("comfy.utils", ProgressBar=ProgressBar),
            "comfy.cli_args": _module("comfy.cli_args", args=self.args),
            "comfy_execution": _module("comfy_execution"),
            "comfy_execution.graph_utils": _module("comfy_execution.graph_utils", ExecutionBlocker=ExecutionBlocker),
            "comfy_execution.utils": _module("comfy_execution.utils", get_executing_context=get_executing_context),
            "folder_paths": _module(
                "folder_paths",
                models_dir=str(self.models_dir),
                folder_names_and_paths=folders,
                add_model_folder_path=add_model_folder_path,
                get_folder_paths=lambda name: list(folders[name][0]),
                **{
                    f"get_{name}_directory": lambda name=name: str(double.base / name)
                    for name in ("input", "output", "temp", "user")
                },
            ),
            "server": _module("server", PromptServer=SimpleNamespace(instance=server)),
        }


def load_pack(models: Path) -> tuple[ComfyDouble, ModuleType]:
    """Return a double with that models folder, and the pack as it loads it: a package, whatever its folder is called.

    The copy of the pack that tests import as qwenvl sees no ComfyUI.
    """
    from qwenvl.comfyui import host  # noqa: F401 (before the double)

    double = ComfyDouble(models)
    double.install()
    spec = importlib.util.spec_from_file_location(
        "the_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["the_pack"] = module
    spec.loader.exec_module(module)
    return double, module


def _handed(node: type, inputs: dict[str, Any]) -> dict[str, Any]:
    """Pass lists to all methods of a node that asks for lists."""
    if not getattr(node, "INPUT_IS_LIST", False):
        return inputs
    return {name: value if isinstance(value, list) else [value] for name, value in inputs.items()}


def _identity(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_identity, value))
    return id(value) if torch.is_tensor(value) else value


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
