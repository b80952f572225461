"""The source of a model: its folder and the machine it runs on; how much memory it needs, loading it, parking it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from ..comfyui import host
from ..decoding.decoder import Decoder
from ..decoding.kv_cache import capacity_for
from ..errors import UnusableError, WrappedErrors
from ..faults import unless_out_of_memory
from ..log import gigabytes, log
from ..media.media import Video
from ..models import catalog, download
from ..models.checkpoint import read_checkpoint
from ..models.families import family_of
from ..models.trust import links_out, why_unsafe
from ..request import LoadSpec, LoadStats, Request
from ..settings import AS_SET, QUANTIZATIONS, RESOLUTIONS
from . import loader
from .budget import OutOfMemoryError, model_bytes, prompt_tokens, request_bytes, why_out_of_memory
from .capabilities import Machine
from .devices import current, machine_for
from .precision import experts_are_fused

# Bytes of a download from which on its size is reported before it begins.
LARGE_DOWNLOAD = 1_000_000_000


def find_source(spec: LoadSpec, watch: download.DownloadWatch, policy: str) -> ModelSource:
    """Find the model's folder, download it if it is nowhere, and choose the machine.

    Args:
        policy: one of settings.DOWNLOADS.

    Raises:
        InvalidSettingError: this machine has no such device.
        UnknownModelError: no model has that name.
        LoadError: the folder is damaged or unsafe.
        DownloadError: the model is not on this machine and may not be downloaded, or the download fails.
    """
    # First, because a device that does not exist should not cost a download.
    where = machine_for(spec.device, host.device())
    roots = host.model_roots()
    model = catalog.find(spec.model, roots)
    folder = catalog.locate(model, roots)
    if folder is None:
        places = catalog.candidates(model, roots)
        for place in places:
            if linked := links_out(place):  # a folder that links elsewhere is an error, and not downloaded again
                raise _not_opened(spec, place, next(iter(linked.values())))
        folder = places[0]
        if not model.repo_id:
            raise loader.LoadError(f"{spec.model} is damaged: {download.why_incomplete(folder)} in {folder}.")
        if reason := download.why_forbidden(policy):
            raise download.DownloadError(
                f"{spec.model} is not on this machine, and {reason}, so it is not downloaded. Searched: "
                f"{catalog.searched(roots)}. This fetches it: {download.command(model.repo_id, folder)}"
            )
        if model.size and model.size.disk > LARGE_DOWNLOAD:
            size = gigabytes(model.size.disk)
            watch.report(
                0, model.size.disk, f"{spec.model} is not on this machine: downloading {size}. Cancel stops it."
            )
        download.fetch(model.repo_id, folder, watch)
    if reason := why_unsafe(folder):
        raise _not_opened(spec, folder, reason)
    return ModelSource(spec, folder, where)


def _not_opened(spec: LoadSpec, folder: Path, reason: str) -> loader.LoadError:
    return loader.LoadError(f"{spec.model} is not opened: in {folder}, {reason}.")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Everything that is known of a model before its weights are read."""

    spec: LoadSpec
    folder: Path
    machine: Machine
    # Why it is computed in another dtype than the machine's usual one; "" if it is not.
    fallback: str = ""

    def size(self) -> int:
        """Return the bytes of the weights as they will be loaded."""
        return self._size(self.spec.quantization)

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices that it will be on, in equal parts."""
        return self.machine.devices

    def sampled(self, request: Request) -> Request:
        """Return the request with the sampling it asks for: its settings, or those the model's makers recommend."""
        if request.sampling_from == AS_SET:
            return request
        own = read_checkpoint(self.folder).sampling
        if not own:
            log.warning("%s recommends no sampling; using what is set instead", self.spec.model)
            return replace(request, sampling_from=AS_SET)
        return replace(request, sampling=request.sampling.with_own(own))

    def request_bytes(self, tokens: int, prompt_tokens: int) -> int:
        """Return the bytes needed beside the weights.

        Args:
            tokens: length of question and answer.
            prompt_tokens: length of the question.
        """
        return request_bytes(self.folder, self.machine.dtype, tokens, prompt_tokens)

    def load(self) -> loader.ModelHandle:
        """Read the model.

        Raises:
            LoadError: the folder's files cannot be loaded.
            OutOfMemoryError: the model does not fit; all memory that it took is free again.
        """
        handle = unless_out_of_memory(self._read)
        if handle is not None:
            return handle
        gc.collect()
        raise self.out_of_memory("load", 0)

    def _read(self) -> loader.ModelHandle:
        with current(self.machine.device):
            handle = loader.load(self.spec, self.folder, self.machine)
            if self.fallback:
                log.warning("%s", self.fallback)
                handle.plan = replace(handle.plan, fallbacks=(*handle.plan.fallbacks, self.fallback))
            with WrappedErrors(f"{self.folder} was loaded, but no decode step can be made of it", UnusableError):
                return _with_decoder(handle)

    def park(self, handle: loader.ModelHandle) -> Callable[[], loader.ModelHandle] | None:
        """Move the model to RAM if it may stay there; returns a function that brings it back, or None."""
        bring_back = loader.park(handle, host.free_ram())
        return None if bring_back is None else lambda: _with_decoder(bring_back())

    def out_of_memory(self, doing: str, request: int) -> OutOfMemoryError:
        """Return an error that names what was needed, what is free, and what would fit.

        Args:
            doing: "load" or "answer".
            request: bytes needed beside the weights.
        """
        sizes = {quantization: self._size(quantization) for quantization in QUANTIZATIONS}
        free = sum(host.free_bytes(device) for device in self.devices)
        return why_out_of_memory(self.spec, doing, sizes, request, free)

    def _size(self, quantization: str) -> int:
        """Return the bytes of the weights if that quantization were asked for, fallbacks included."""
        asked = replace(self.spec, quantization=quantization)
        plan = loader.plan_load(asked, self.machine, read_checkpoint(self.folder))
        stored = (plan.quantization, plan.expands, experts_are_fused(), plan.packed)
        return model_bytes(self.folder, self.machine.dtype, *stored)


def question_bytes(
    source: ModelSource, request: Request, pictures: Sequence[Image.Image], videos: Sequence[Video]
) -> int:
    """Estimate the bytes that a question needs beside the weights, before the model is loaded."""
    pixels = RESOLUTIONS[request.image_resolution] or loader.PICTURE_PIXELS
    tokens = prompt_tokens(request.system + request.text, pictures, videos, pixels[1])
    # The buffer of keys and values is larger than the text: its size is rounded up.
    return source.request_bytes(capacity_for(tokens + request.sampling.longest), tokens)


def load_stats(model: loader.ModelHandle, load_s: float, fallbacks: Sequence[str]) -> LoadStats:
    """Return what was loaded, and how, for the report.

    Args:
        load_s: seconds that loading took in this run.
        fallbacks: reasons for further settings that could not be used.
    """
    return LoadStats(
        model=model.spec.model,
        device=", ".join(model.machine.devices),
        dtype=str(model.machine.dtype).removeprefix("torch."),
        quantization=model.plan.quantization,
        attention=model.plan.attention,
        decode_attention=model.decoder.attention,
        fallbacks=(*model.plan.fallbacks, *fallbacks),
        load_s=load_s,
    )


def _with_decoder(handle: loader.ModelHandle) -> loader.ModelHandle:
    decoder = Decoder(handle.model, handle.plan.attention, decode=family_of(handle.family).decode)
    if decoder.tier_reason:
        log.info("%s generates by the %s: %s", handle.spec.model, decoder.tier, decoder.tier_reason)
    handle.decoder = decoder
    return handle
