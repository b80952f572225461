"""Access to ComfyUI: its folders, devices, server and queue. Without ComfyUI, plain defaults."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Hashable, Mapping
from pathlib import Path
from typing import Any

from ..paths import are_confined, real

# The only import of ComfyUI; the other files of this room take its names from here.
try:
    import comfy.model_management as model_management
except ModuleNotFoundError:  # the command line, the tests, the benchmarks
    model_management = None
else:
    import folder_paths
    from comfy.cli_args import args
    from comfy.model_patcher import ModelPatcher  # noqa: F401 (for memory.py)
    from comfy.utils import ProgressBar  # noqa: F401 (for progress.py)
    from comfy_execution.graph_utils import ExecutionBlocker
    from comfy_execution.utils import get_executing_context
    from server import PromptServer

# ComfyUI's names for folders that may hold models for this pack; downloads go to the first.
MODEL_FOLDERS = ("LLM", "llm", "text_encoders")
# The environment variable with the host names of reverse proxies, separated by commas.
HOSTS = "QWENVL_HOSTS"
_PACK = Path(__file__).resolve().parents[2]
# ComfyUI has no event for the end of a prompt, so its queue is polled this often while a call waits for one.
PROMPT_POLL_S = 0.25


def is_there() -> bool:
    """Return True in ComfyUI's process."""
    return model_management is not None


def model_roots() -> list[Path]:
    """List the folders that hold model folders, the one for new downloads first.

    Without ComfyUI, they are below ComfyUI's models folder if the pack lies in its custom_nodes, below
    ~/.cache/qwenvl if the package was installed (pip install .), else in the pack.
    """
    if model_management is None:
        installed = (_PACK / "qwenvl" / "shipped").is_dir()
        home = _PACK.parent.parent if _PACK.parent.name == "custom_nodes" else _PACK
        home = Path.home() / ".cache" / "qwenvl" if installed else home
        return [home / "models" / name for name in MODEL_FOLDERS]
    first, registered = MODEL_FOLDERS[0], folder_paths.folder_names_and_paths
    if first not in registered:
        folder_paths.add_model_folder_path(first, str(Path(folder_paths.models_dir) / first))
    paths = [path for name in MODEL_FOLDERS if name in registered for path in folder_paths.get_folder_paths(name)]
    unique: dict[Path, Path] = {}
    for path in map(Path, paths):
        unique.setdefault(real(path) or path, path)  # LLM and llm are one folder where case does not matter
    return list(unique.values())


def user_folder() -> Path:
    """Return the folder for the user's own presets and models, which updates do not touch."""
    if model_management is None:
        return Path.home() / ".config" / "qwenvl"
    return Path(folder_paths.get_user_directory()) / "default" / "qwenvl"


def preset_folder() -> Path:
    return user_folder() / "presets"


def own_files(name: str) -> list[Path]:
    """List the paths of a file that only the machine's owner may write, in order of reading; write to the last.

    ComfyUI's server lets any client write into the folder of the user "default", but not into folders that begin with
    "__". So if others can reach the server, only such a folder is trusted.
    """
    ours = user_folder() / name
    if model_management is None:
        return [ours]
    hidden = Path(folder_paths.get_user_directory()) / "__qwenvl" / name
    return [hidden, ours] if reachable() is None else [hidden]


def is_preset_folder(folder: Path) -> bool:
    """Return True if the real path is in the preset folder; ignores case, as some disks do."""
    presets, given = (Path(str(path).casefold()) for path in (real(preset_folder()) or preset_folder(), folder))
    return given.is_relative_to(presets)


def own_names() -> set[str]:
    """Return the host names, in lower case, of this ComfyUI, besides localhost and addresses."""
    machine = socket.gethostname().lower()
    short = machine.partition(".")[0]
    given = f"{args.listen},{os.environ.get(HOSTS, '')}" if model_management is not None else ""
    return {machine, short, f"{short}.local", *(name.strip().lower() for name in given.split(","))} - {""}


def reachable() -> list[Path] | None:
    """List the folders in which widgets may name files; None for all, if only this machine can queue prompts."""
    if model_management is None or not are_confined(args.listen, getattr(args, "enable_cors_header", None)):
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
    """List the folders that a relative path to read starts from, best first."""
    here = Path.cwd()
    return [here] if model_management is None else [Path(folder_paths.get_input_directory()), here]


def writing_bases() -> list[Path]:
    """List the folders that a relative path to write starts from."""
    return [Path.cwd()] if model_management is None else [Path(folder_paths.get_output_directory())]


def device() -> str | None:
    """Return the device that ComfyUI runs models on; None without ComfyUI."""
    return None if model_management is None else str(model_management.get_torch_device())


def free_bytes(device: str) -> int:
    """Return the bytes that can still be allocated on a device, or in RAM if it has no memory of its own."""
    import torch

    if model_management is not None:
        return int(model_management.get_free_memory(torch.device(device)))
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    return free_ram()


def free_ram() -> int:
    """Return the bytes of RAM available without swapping."""
    import psutil

    return psutil.virtual_memory().available


def total_bytes(device: str) -> int:
    """Return the bytes of memory of a device in total, or of RAM if it has none of its own."""
    import torch

    if model_management is not None:
        return int(model_management.get_total_memory(torch.device(device)))
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[1]
    import psutil

    return psutil.virtual_memory().total


def server() -> Any:
    """Return ComfyUI's web server; None without one."""
    return None if model_management is None else getattr(PromptServer, "instance", None)


def registered_nodes() -> Mapping[str, type]:
    """Return the node classes of all packs loaded so far, by id. Empty without ComfyUI."""
    if model_management is None:
        return {}
    # Looked up, not imported: ComfyUI's module is called nodes, like a file of this pack.
    return getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {})


def when_server_starts(then: Callable[[], None]) -> None:
    """Call then once all packs are loaded and the server begins to listen; never without a server."""
    app = getattr(server(), "app", None)
    if app is None:
        return

    async def begin(_: Any) -> None:
        then()

    app.on_startup.append(begin)


def nothing_to_do() -> list[Any]:
    """Return a list output that keeps the nodes behind it from running, without an error; [] without ComfyUI."""
    return [] if model_management is None else [ExecutionBlocker(None)]


def when_prompt_ends(what: Hashable, then: Callable[[], Any]) -> None:
    """Call then, from another thread, when the prompt that is running now leaves ComfyUI's queue.

    Args:
        what: the key of the call, as in when_gone.
    """
    context = get_executing_context() if model_management is not None else None
    if context is not None:
        when_gone({context.prompt_id}, what, then)


def after_prompt(what: Hashable, then: Callable[[], Any]) -> None:
    """Call then when the running prompt leaves ComfyUI's queue, or now if no prompt runs."""
    if model_management is None or get_executing_context() is None:
        then()
    else:
        when_prompt_ends(what, then)


def running_prompts() -> set[str]:
    return {item[1] for item in list(PromptServer.instance.prompt_queue.currently_running.values())}


def when_gone(prompts: Collection[str], what: Hashable, then: Callable[[], Any]) -> None:
    """Call then, from another thread, when none of the prompts runs any more.

    Args:
        what: the key of the call: of several calls with one key and the same prompts, only the last is made.
    """
    _WAITING.add(frozenset(prompts), what, then)


class _Waiting:
    """Calls to make when prompts have ended. One thread waits for all of them, and runs only while there are any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[tuple[frozenset[str], Hashable], Callable[[], Any]] = {}
        self._thread: threading.Thread | None = None

    def add(self, prompts: frozenset[str], what: Hashable, then: Callable[[], Any]) -> None:
        with self._lock:
            self._held[prompts, what] = then
            if self._thread is None:
                self._start()

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._wait, name="qwenvl-release", daemon=True)
        self._thread.start()

    def _wait(self) -> None:
        try:
            while self._do_due():
                time.sleep(PROMPT_POLL_S)
        finally:
            with self._lock:
                self._thread = None
                # After a call that raised, go on with the others.
                if self._held:
                    self._start()

    def _do_due(self) -> bool:
        """Make the calls that are due; return True if others still wait."""
        running = running_prompts()
        while then := self._next_due(running):
            then()
        with self._lock:
            return bool(self._held)

    def _next_due(self, running: set[str]) -> Callable[[], Any] | None:
        with self._lock:
            due = next((key for key in self._held if not key[0] & running), None)
            return None if due is None else self._held.pop(due)


_WAITING = _Waiting()
