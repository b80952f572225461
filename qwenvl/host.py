"""ComfyUI, in one place: folders, device, memory, cancel, progress and live text. Without ComfyUI, plain defaults."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

try:
    import comfy.model_management as memory
    import comfy.utils
    import folder_paths
    from comfy_execution.utils import get_executing_context
    from server import PromptServer
except ImportError:  # the command line, the tests, the benchmarks
    memory = None

MODEL_FOLDER = "LLM"
_PACK = Path(__file__).resolve().parent.parent
# A text event replaces the whole text on the node, so more of them would only cost bandwidth.
LIVE_TEXT_INTERVAL_S = 0.2


def model_roots() -> list[Path]:
    """Folders that hold model folders, the one for new downloads first.

    Without ComfyUI: its models folder if the pack lies in its custom_nodes, else one in the pack.
    """
    if memory is None:
        home = _PACK.parent.parent if _PACK.parent.name == "custom_nodes" else _PACK
        return [home / "models" / MODEL_FOLDER]
    if MODEL_FOLDER not in folder_paths.folder_names_and_paths:
        folder_paths.add_model_folder_path(MODEL_FOLDER, str(Path(folder_paths.models_dir) / MODEL_FOLDER))
    return [Path(path) for path in folder_paths.get_folder_paths(MODEL_FOLDER)]


def device() -> str | None:
    """The device that ComfyUI runs models on; None to choose one ourselves."""
    return None if memory is None else str(memory.get_torch_device())


def make_room(size: int) -> None:
    """Ask ComfyUI to move its own models out of the way until `size` bytes are free on its device."""
    if memory is not None:
        memory.free_memory(size, memory.get_torch_device())


class NodeWatch:
    """Progress bar, live text and cancel of the node that is running now."""

    def __init__(self, max_new_tokens: int) -> None:
        self._bar: Any = None
        self._node_id: str | None = None
        self._sent_at = 0.0
        if memory is not None:
            context = get_executing_context()
            self._node_id = context.node_id if context else PromptServer.instance.last_node_id
            self._bar = comfy.utils.ProgressBar(max_new_tokens, node_id=self._node_id)

    def check(self) -> None:
        """Raise ComfyUI's own interrupt if the user pressed cancel."""
        if memory is not None:
            memory.throw_exception_if_processing_interrupted()

    def update(self, new_tokens: int, text: str) -> None:
        """Called after every token with the number of them and the whole text so far."""
        self.check()
        if self._bar:
            self._bar.update_absolute(new_tokens)
        if time.monotonic() - self._sent_at >= LIVE_TEXT_INTERVAL_S:
            self._show(text)

    def end(self, text: str) -> None:
        """Called once with the final answer."""
        if self._bar:
            self._bar.update_absolute(self._bar.total)
        self._show(text)

    def _show(self, text: str) -> None:
        self._sent_at = time.monotonic()
        if self._node_id is not None:
            server = PromptServer.instance
            server.send_progress_text(text, self._node_id, server.client_id)
