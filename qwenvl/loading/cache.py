"""The cache that owns all models; together with ComfyUI's memory manager it decides which of them stay loaded."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol

import torch

from ..comfyui import host
from ..faults import is_lost_device, why_lost
from ..log import log
from ..process import PROCESS
from ..request import LoadSpec
from .devices import cancellable
from .loader import ModelHandle


def _never() -> None:
    """Never cancel."""


class Source(Protocol):
    """The source that a model is loaded from: ModelSource of source.py, or a test's replacement for it."""

    @property
    def spec(self) -> LoadSpec: ...

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices that the model will be on, in equal parts."""

    def size(self) -> int:
        """Return the bytes of its weights on its devices."""

    def load(self) -> ModelHandle:
        """Read the model."""

    def park(self, handle: ModelHandle) -> Callable[[], ModelHandle] | None:
        """Move its weights to RAM; returns a function that brings them back, or None if it has to be unloaded."""


class Resident:
    """A model that may be in memory: its source, its size, and its handle while it is loaded."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.spec: LoadSpec = source.spec
        self.size: int = source.size()
        self.handle: ModelHandle | None = None
        self.used_at = 0.0
        # time.time() when it last came to its device.
        self.loaded_at = 0.0
        self._parked: Callable[[], ModelHandle] | None = None
        # Called often while it is read; raises to cancel.
        self.check: Callable[[], None] = _never

    @property
    def name(self) -> str:
        """The model's name, as users see it."""
        return self.spec.model

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices that it is or will be on, in equal parts."""
        return self.source.devices

    @property
    def is_loaded(self) -> bool:
        """True if it is on its devices now."""
        return self.handle is not None

    def bring(self) -> None:
        """Load it onto its device, from RAM or from disk, unless it is there."""
        if self.handle is None:
            bring_back, self._parked = self._parked, None
            self.handle = bring_back() if bring_back else self._read()
            self.loaded_at = time.time()

    def _read(self) -> ModelHandle:
        # Only reading can be cancelled: a model that is half brought back from RAM could not be moved again.
        with cancellable(self.check):
            return self.source.load()

    def give_way(self, for_good: bool = False) -> None:
        """Leave the device: move to RAM if that is allowed and there is room, else unload. for_good unloads always.

        It waits for a run of another thread to end, which may use this model.
        """
        with PROCESS.turns.alone():
            if for_good:
                self._parked = None
            if self.handle is None:
                return
            start = time.perf_counter()
            device = self.handle.machine.device
            self._parked = None if for_good else self.source.park(self.handle)
            self.handle = None
            _give_back(device)
            seconds = time.perf_counter() - start
            log.info("%s %s in %.1f s", self.spec.model, "moved to RAM" if self._parked else "unloaded", seconds)

    @property
    def parked(self) -> bool:
        """True if its weights wait in RAM."""
        return self._parked is not None


class Memory(Protocol):
    """A memory manager, which decides what stays on the device."""

    def bring(self, resident: Resident, others: list[Resident], request_bytes: int) -> None:
        """Make room for the model and a request, and load the model."""

    def free_memory(self, resident: Resident, request_bytes: int) -> None:
        """Free memory for a request of a model that is loaded."""

    def forget(self, resident: Resident) -> None:
        """Note that the model was unloaded."""

    def reaches(self, resident: Resident) -> bool:
        """Return True if the manager unloads the model when it unloads everything."""


class OneAtATime:
    """The memory manager without ComfyUI: one model is unloaded before the next one is loaded."""

    def bring(self, resident: Resident, others: list[Resident], request_bytes: int) -> None:
        for other in others:
            other.give_way(for_good=True)
        resident.bring()

    def free_memory(self, resident: Resident, request_bytes: int) -> None:
        """Do nothing: no other model is loaded."""

    def forget(self, resident: Resident) -> None:
        """Do nothing: no list of models is kept here."""

    def reaches(self, resident: Resident) -> bool:
        """Return True: without ComfyUI, everything is never unloaded at once."""
        return True


class ModelCache:
    """The models by their LoadSpec, as it was asked for.

    Args:
        memory: the memory manager that decides which models stay; None takes OneAtATime.
    """

    def __init__(self, memory: Memory | None = None) -> None:
        self._memory = memory or OneAtATime()
        self._residents: dict[LoadSpec, Resident] = {}
        PROCESS.models.add(self)

    def turn(self, spec: LoadSpec, keep: bool, check: Callable[[], None] = _never) -> _Turn:
        """Return a context manager within which one run has all models of this process to itself.

        When the block fails, the frames of the error are cleared; in any case the spec's model is unloaded unless keep.
        The block must not hold a model in a variable of its own: call a function that does.

        Args:
            check: called while waiting for another run; raises to cancel.
        """
        return _Turn(self, spec, keep, check)

    def source(self, spec: LoadSpec) -> Any:
        """Return the source of a model in this cache; None if it is not in it."""
        resident = self._residents.get(spec)
        return None if resident is None else resident.source

    def get(self, source: Source, request_bytes: int = 0, check: Callable[[], None] = _never) -> ModelHandle:
        """Return the source's model on its device, loaded if necessary, with room for a request beside it.

        Args:
            check: called often while the model is read; raises to cancel.
        """
        # Keyed by what was asked for, not by what was loaded: a 4bit request that fell back to none must find its
        # model next time, instead of loading the same weights again on every run.
        spec = source.spec
        resident = self._residents.get(spec)
        if resident is None:
            resident = self._residents[spec] = Resident(source)
        others = [other for other in self._residents.values() if other is not resident]
        resident.check = check
        try:
            self._memory.bring(resident, others, request_bytes)
        finally:
            resident.check = _never
            if resident.handle is None:
                self.forget(spec)
        resident.used_at = time.monotonic()
        if resident.handle is None:
            raise RuntimeError(f"{spec.model} was loaded and taken away again before it could be used.")
        return resident.handle

    def free_memory(self, spec: LoadSpec, request_bytes: int) -> None:
        """Free memory for a request of the spec's model, which is loaded."""
        self._memory.free_memory(self._residents[spec], request_bytes)

    @property
    def held(self) -> list[LoadSpec]:
        """The models on a device now, least recently used first."""
        # list() copies first: another thread may change the dictionary.
        loaded = [resident for resident in list(self._residents.values()) if resident.handle is not None]
        return [resident.spec for resident in sorted(loaded, key=lambda resident: resident.used_at)]

    @property
    def residents(self) -> list[Resident]:
        """The models on a device or in RAM, the one loaded longest ago first. Look at them, but keep no reference."""
        present = [model for model in list(self._residents.values()) if model.handle is not None or model.parked]
        return sorted(present, key=lambda model: model.loaded_at)

    def forget(self, spec: LoadSpec, unless_used_after: float | None = None) -> None:
        """Unload one model, from its device and from RAM.

        Args:
            unless_used_after: a time.monotonic(); a model that was used after it stays.
        """
        with PROCESS.turns.alone():
            resident = self._residents.get(spec)
            if resident is None or (unless_used_after is not None and resident.used_at > unless_used_after):
                return
            del self._residents[spec]
            resident.give_way(for_good=True)
            self._memory.forget(resident)

    def forget_parked(self) -> None:
        """Unload models that wait in RAM or that the memory manager cannot unload, as soon as no run is under way.

        It never waits: it is called when a node is deleted, which a garbage collection may do in the middle of a run.
        """
        PROCESS.turns.when_idle(self._forget_parked)

    def _forget_parked(self) -> None:
        for resident in list(self._residents.values()):
            if resident.parked or not self._memory.reaches(resident):
                self.forget(resident.spec)

    def clear(self) -> None:
        """Unload all models."""
        with PROCESS.turns.alone():
            for spec in list(self._residents):
                self.forget(spec)


class _Turn:
    def __init__(self, cache: ModelCache, spec: LoadSpec, keep: bool, check: Callable[[], None]) -> None:
        self._cache = cache
        self._spec = spec
        self._keep = keep
        self._check = check

    def __enter__(self) -> None:
        PROCESS.turns.take(self._check)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None:
                _clear_frames(error)
                if self._spec not in self._cache.held:
                    # A load that failed half-way leaves reference cycles behind. Collecting them takes up to a second
                    # in a large process: it is done after the prompt, so that cancelling does not wait for it.
                    host.after_prompt("collect", gc.collect)
            if isinstance(error, RuntimeError) and is_lost_device(error):
                # Nothing that was on the device can be used again.
                for models in list(PROCESS.models):
                    models.clear()
                raise why_lost(self._spec.model, error) from error
            if not self._keep:
                self._cache.forget(self._spec)
        finally:
            PROCESS.turns.end()


def _clear_frames(error: BaseException | None) -> None:
    """Clear the frames of an error and of its causes: their variables would keep weights alive."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _give_back(device: str) -> None:
    """Return freed memory to the device, so that others can use it and ComfyUI counts it as free."""
    # transformers' models hold reference cycles: without this they would stay until the next collection.
    gc.collect()
    if empty_cache := getattr(getattr(torch, device.split(":")[0], None), "empty_cache", None):
        try:
            empty_cache()
        except RuntimeError as error:
            # A failed device fails here too; the error that came first is the one to report.
            log.warning("%s gives no memory back: %s", device, error)
