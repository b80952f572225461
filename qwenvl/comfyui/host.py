"""ComfyUI, in one place: folders, device, memory, cancel, progress and live text. Without ComfyUI, plain defaults."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..paths import are_confined
from .live import Live

try:
    import comfy.model_management as memory
except ModuleNotFoundError:  # the command line, the tests, the benchmarks
    memory = None
else:
    import comfy.utils
    import folder_paths
    from comfy.cli_args import args
    from comfy.model_patcher import ModelPatcher
    from comfy_execution.utils import get_executing_context
    from server import PromptServer

_Base: Any = object if memory is None else ModelPatcher

# The names under which ComfyUI may know folders of models that we can run; downloads go to the first.
MODEL_FOLDERS = ("LLM", "llm", "text_encoders")
_PACK = Path(__file__).resolve().parents[2]
# A text event replaces the whole text on the node, so more of them would only cost bandwidth.
LIVE_TEXT_INTERVAL_S = 0.2
# Before what a model thinks, in the live text: it is not part of the answer.
THINKING_MARK = "[thinking]"
# ComfyUI tells nobody that a prompt has ended, so its queue is looked at this often while somebody wants to know.
PROMPT_POLL_S = 0.25


def model_roots() -> list[Path]:
    """Folders that hold model folders, the one for new downloads first.

    Without ComfyUI: those of its models folder if the pack lies in its custom_nodes, else of one in the pack.
    """
    if memory is None:
        home = _PACK.parent.parent if _PACK.parent.name == "custom_nodes" else _PACK
        return [home / "models" / name for name in MODEL_FOLDERS]
    first, registered = MODEL_FOLDERS[0], folder_paths.folder_names_and_paths
    if first not in registered:
        folder_paths.add_model_folder_path(first, str(Path(folder_paths.models_dir) / first))
    paths = [path for name in MODEL_FOLDERS if name in registered for path in folder_paths.get_folder_paths(name)]
    unique: dict[Path, Path] = {}
    for path in map(Path, paths):
        unique.setdefault(path.resolve(), path)  # LLM and llm are one folder where case does not matter
    return list(unique.values())


def preset_folder() -> Path:
    """Where the user keeps presets: among the files that updates leave alone."""
    if memory is None:
        return Path.home() / ".config" / "qwenvl" / "presets"
    return Path(folder_paths.get_user_directory()) / "default" / "qwenvl" / "presets"


def reachable() -> list[Path] | None:
    """The folders that a widget may name files in; None for all: whoever queues prompts sits at this machine."""
    if memory is None or not are_confined(args.listen, getattr(args, "enable_cors_header", None)):
        return None
    return [
        Path(folder)
        for folder in (
            folder_paths.get_input_directory(),
            folder_paths.get_output_directory(),
            folder_paths.get_temp_directory(),
            folder_paths.get_user_directory(),
        )
    ]


def reading_bases() -> list[Path]:
    """What a relative path of something to read starts from, best first."""
    here = Path.cwd()
    return [here] if memory is None else [Path(folder_paths.get_input_directory()), here]


def writing_bases() -> list[Path]:
    """What a relative path of something to write starts from."""
    return [Path.cwd()] if memory is None else [Path(folder_paths.get_output_directory())]


def device() -> str | None:
    """The device that ComfyUI runs models on; None to choose one ourselves."""
    return None if memory is None else str(memory.get_torch_device())


def free_bytes(device: str) -> int:
    """What can still be allocated there: on the device, or in RAM."""
    if memory is not None:
        return int(memory.get_free_memory(torch.device(device)))
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    return free_ram()


def free_ram() -> int:
    """Bytes of RAM that can be had without swapping."""
    import psutil

    return psutil.virtual_memory().available


def memory_manager() -> ComfyMemory | None:
    """What a model cache registers its models with; None without ComfyUI."""
    return None if memory is None else ComfyMemory()


class _Holder(torch.nn.Module):
    """What ComfyUI takes for the model: it sets attributes that a transformers model refuses."""

    device: torch.device


class _Patcher(_Base):
    """One of our models as ComfyUI's memory manager sees it: on its device, or not at all."""

    def __init__(self, resident: Any, device: torch.device, size: int) -> None:
        super().__init__(_Holder(), load_device=device, offload_device=torch.device("cpu"), size=size)
        self.resident = resident
        # How many of ours were used after this one. ComfyUI evicts first what is least completely loaded, so a
        # missing byte for each makes it take the least recently used first.
        self.age = 0

    def loaded_size(self) -> int:
        return self.size - self.age if self.resident.handle is not None else 0

    def current_loaded_device(self) -> torch.device:
        return self.load_device if self.resident.handle is not None else self.offload_device

    def partially_load(self, device_to: torch.device, extra_memory: int = 0, force_patch_weights: bool = False) -> int:
        self.resident.bring()
        self.model.device = device_to
        self.model.model_loaded_weight_memory = self.size
        return self.size

    def partially_unload(self, *_: Any, **__: Any) -> int:
        return 0  # nothing by halves: ComfyUI then calls detach

    def detach(self, unpatch_all: bool = True) -> Any:
        # Without unpatch_all it is bookkeeping, which happens at every use.
        if unpatch_all:
            self.resident.give_way()
            self.model.device = self.offload_device
            self.model.model_loaded_weight_memory = 0
        return self.model


class ComfyMemory:
    """Our models among ComfyUI's own: it makes room for them, and takes them away when others need it."""

    def __init__(self) -> None:
        # ComfyUI itself holds them by weak references only.
        # One for each device that a model is on.
        self._patchers: dict[Any, list[_Patcher]] = {}

    def bring(self, resident: Any, others: list[Any], request_bytes: int) -> None:
        """Make room for the model and a request, and have the model loaded."""
        if _in_ram(resident):
            self._make_room_in_ram(resident, [other for other in others if _in_ram(other)], request_bytes)
        if resident.spec not in self._patchers:
            places = [torch.device(device) for device in resident.source.devices]
            share = resident.size // len(places)
            self._patchers[resident.spec] = [_Patcher(resident, place, share) for place in places]
        newest_first = sorted(others, key=lambda other: -other.used_at)
        for age, other in enumerate([resident, *newest_first]):
            for patcher in self._patchers.get(other.spec, []):
                patcher.age = age
        memory.load_models_gpu(self._patchers[resident.spec], memory_required=request_bytes, force_full_load=True)

    def make_room(self, resident: Any, request_bytes: int) -> None:
        """Have so many bytes free beside the model, by moving everything else."""
        patchers = self._patchers[resident.spec]
        own = [loaded for loaded in memory.current_loaded_models if any(loaded.model is each for each in patchers)]
        for patcher in patchers:
            memory.free_memory(request_bytes, patcher.load_device, keep_loaded=own)

    def forget(self, resident: Any) -> None:
        """The model is gone: ComfyUI drops its entry when the patcher's holder is no more."""
        self._patchers.pop(resident.spec, None)

    def reaches(self, resident: Any) -> bool:
        """Whether ComfyUI's "Unload Models" takes it: older versions look at one device only, none at RAM."""
        every = getattr(memory, "get_all_torch_devices", lambda: [memory.get_torch_device()])()
        return all(torch.device(device) in every for device in resident.source.devices)

    def _make_room_in_ram(self, resident: Any, others: list[Any], request_bytes: int) -> None:
        """ComfyUI frees nothing on a CPU, so models that do not fit in RAM beside each other go here."""
        needed = 0 if resident.handle is not None else resident.size
        for other in sorted(others, key=lambda other: other.used_at):
            if free_ram() > 1.1 * needed + request_bytes:
                return
            other.give_way(for_good=True)
            self.forget(other)


def _in_ram(resident: Any) -> bool:
    return resident.source.devices == ("cpu",)


def server() -> Any:
    """ComfyUI's web server; None where there is none."""
    return None if memory is None else getattr(PromptServer, "instance", None)


def when_prompt_ends(then: Callable[[], None]) -> None:
    """Call then, from another thread, when the prompt that is running now leaves ComfyUI's queue."""
    context = get_executing_context() if memory is not None else None
    if context is not None:
        when_gone({context.prompt_id}, then)


def running_prompts() -> set[str]:
    return {item[1] for item in list(PromptServer.instance.prompt_queue.currently_running.values())}


def when_gone(prompts: set[str], then: Callable[[], Any]) -> None:
    """Call then, from another thread, when none of the prompts runs any more."""

    def wait() -> None:
        while running_prompts() & prompts:
            time.sleep(PROMPT_POLL_S)
        then()

    threading.Thread(target=wait, name="qwenvl-release", daemon=True).start()


def _browser_of(prompt_id: str) -> str | None:
    """Which page queued the prompt. The server's own client_id is that of the prompt that began last."""
    server = PromptServer.instance
    for _, running, _, extra, *_ in list(server.prompt_queue.currently_running.values()):
        if running == prompt_id:
            return extra.get("client_id")
    return server.client_id


class NodeWatch:
    """Progress bar, live text and cancel of the node that is running now."""

    def __init__(self, max_new_tokens: int) -> None:
        self._bar: Any = None
        self._node_id: str | None = None
        self._browser: str | None = None
        self._sent_at = 0.0
        self._max_new_tokens = max_new_tokens
        self._live = Live()
        if memory is not None:
            context = get_executing_context()
            self._node_id = context.node_id if context else PromptServer.instance.last_node_id
            self._browser = _browser_of(context.prompt_id if context else "")
            self._bar = comfy.utils.ProgressBar(max_new_tokens, node_id=self._node_id)

    def check(self) -> None:
        """Raise ComfyUI's own interrupt if the user pressed cancel."""
        if memory is not None:
            memory.throw_exception_if_processing_interrupted()

    def report(self, done: int, total: int, text: str) -> None:
        """Called while a model is downloaded: how many of how many bytes are there, and a line that says so."""
        self._tell(done, total, text)

    def update(self, new_tokens: int, text: str, thinking: str = "") -> None:
        """Called after every token with the number of them, the whole answer so far, and the thought before it."""
        self._live.count(new_tokens, "tokens", thinking)
        self._tell(new_tokens, self._max_new_tokens, f"{THINKING_MARK} {thinking}\n\n{text}" if thinking else text)

    def advance(self, done: int, total: int | None, text: str) -> None:
        """Called with many answers: how many are finished of how many, and the latest."""
        self._live.count(done, "answers")
        self._tell(done, total, f"{done} of {total}\n\n{text}" if total else f"{done}\n\n{text}")

    def end(self, text: str) -> None:
        """Called once with the final answer."""
        if self._bar:
            self._tell(self._bar.total, self._bar.total, text, last=True)

    def _tell(self, value: int, total: int | None, text: str, last: bool = False) -> None:
        """The last one is told however soon it comes, and nothing can cancel it any more."""
        if not last:
            self.check()
        if self._bar:
            self._bar.update_absolute(value, total or self._max_new_tokens)
        now = time.monotonic()
        if not last and now - self._sent_at < LIVE_TEXT_INTERVAL_S:
            return
        self._sent_at = now
        if self._node_id is not None and self._browser is not None:
            server = PromptServer.instance
            # Sent to no page in particular, all would show it. The first is for our own widget, if it is there.
            server.send_sync("qwenvl.progress", self._live.told(self._node_id), self._browser)
            server.send_progress_text(text, self._node_id, self._browser)
