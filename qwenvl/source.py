"""Where a model comes from: its folder and its machine; what it needs, how it is read, how it is set aside."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import catalog, decode, download, host, loader
from .budget import OutOfMemoryError, is_out_of_memory, model_bytes, request_bytes, why_out_of_memory
from .capabilities import Machine, machine
from .log import log
from .request import QUANTIZATIONS, LoadSpec


def find_source(spec: LoadSpec, watch: download.Onlooker, policy: str) -> ModelSource:
    """The model's folder, downloaded if it was nowhere, and the machine that ComfyUI or torch offers for it.

    Args:
        policy: one of request.DOWNLOADS.
    """
    roots = host.model_roots()
    model = catalog.find(spec.model, roots)
    folder = catalog.locate(model, roots)
    if folder is None:
        folder = catalog.candidates(model, roots)[0]
        if not model.repo_id:
            raise loader.LoadError(f"{spec.model} is damaged: {download.why_incomplete(folder)} in {folder}.")
        if reason := download.why_forbidden(policy):
            raise download.DownloadError(
                f"{spec.model} is not on this machine, and {reason}, so it is not downloaded. Searched: "
                f"{catalog.searched(roots)}. This fetches it: {download.command(model.repo_id, folder)}"
            )
        download.fetch(model.repo_id, folder, watch)
    return ModelSource(spec, folder, machine(host.device()))


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Everything that is known of a model before it is read."""

    spec: LoadSpec
    folder: Path
    machine: Machine

    def size(self) -> int:
        """Bytes of the weights, as they will be loaded."""
        return self._size(loader.plan_load(self.spec, self.machine).quantization)

    def request_bytes(self, tokens: int, prompt_tokens: int) -> int:
        """Bytes beside the weights for a question of so many tokens, answer included."""
        return request_bytes(self.folder, self.machine.dtype, tokens, prompt_tokens)

    def load(self) -> loader.ModelHandle:
        """Read it.

        Raises:
            LoadError: what is in the folder cannot be loaded.
            OutOfMemoryError: it does not fit; everything that was read of it is free again.
        """
        try:
            return _with_decoder(loader.load(self.spec, self.folder, self.machine))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            # What was read so far is still in the frames of the error.
            traceback.clear_frames(error.__traceback__)
        gc.collect()
        raise self.out_of_memory("load", 0)

    def park(self, handle: loader.ModelHandle) -> Callable[[], loader.ModelHandle] | None:
        """Move it to RAM if it may stay there; returns what brings it back."""
        bring_back = loader.park(handle, host.free_ram())
        return None if bring_back is None else lambda: _with_decoder(bring_back())

    def out_of_memory(self, doing: str, request: int) -> OutOfMemoryError:
        """The error that says what was needed, what is free, and what would fit."""
        sizes = {each: self._size(each) for each in QUANTIZATIONS}
        return why_out_of_memory(self.spec, doing, sizes, request, host.free_bytes(self.machine.device))

    def _size(self, quantization: str) -> int:
        return model_bytes(self.folder, self.machine.dtype, quantization)


def _with_decoder(handle: loader.ModelHandle) -> loader.ModelHandle:
    decoder = decode.Decoder(handle.model, handle.plan.attention)
    if decoder.tier_reason:
        log.info("%s makes its tokens by the %s: %s", handle.spec.model, decoder.tier, decoder.tier_reason)
    handle.decoder = decoder
    return handle
