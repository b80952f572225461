"""ModelCache: the only owner of models. Which of them stay is decided together with ComfyUI's memory manager."""

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
    """Nothing cancels."""


class Source(Protocol):
    """Where a model comes from: source.py, or a test's stand-in for it."""

    @property
    def spec(self) -> LoadSpec: ...

    @property
    def devices(self) -> tuple[str, ...]:
        """Where it will be, in equal parts."""

    def size(self) -> int:
        """Bytes of its weights on its devices."""

    def load(self) -> ModelHandle:
        """Read it."""

    def park(self, handle: ModelHandle) -> Callable[[], ModelHandle] | None:
        """Move its weights to RAM; returns what brings them back, or None where it must go."""


class Resident:
    """A model that may be in memory: where it comes from, how large it is, and its handle while it is there."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.spec: LoadSpec = source.spec
        self.size: int = source.size()
        self.handle: ModelHandle | None = None
        self.used_at = 0.0
        # By the clock on the wall: when it last came to its device.
        self.loaded_at = 0.0
        self._parked: Callable[[], ModelHandle] | None = None
        # Called all the while it is read; raises to cancel.
        self.check: Callable[[], None] = _never

    @property
    def name(self) -> str:
        """What people call it."""
        return self.spec.model

    @property
    def devices(self) -> tuple[str, ...]:
        """Where it is or will be, in equal parts."""
        return self.source.devices

    @property
    def is_loaded(self) -> bool:
        """Whether it is on its devices now."""
        return self.handle is not None

    def bring(self) -> None:
        """Have it on its device: read from disk, or back from RAM."""
        if self.handle is None:
            bring_back, self._parked = self._parked, None
            self.handle = bring_back() if bring_back else self._read()
            self.loaded_at = time.time()

    def _read(self) -> ModelHandle:
        # Not around bring_back: a model that is half moved could not be moved again.
        with cancellable(self.check):
            return self.source.load()

    def give_way(self, for_good: bool = False) -> None:
        """Leave the device for others: to RAM where that is allowed and there is room for it, else for good.

        Another thread's run that is under way is waited for: it may be of this model.
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
        """Whether its weights wait in RAM."""
        return self._parked is not None


class Memory(Protocol):
    """Who decides what stays on the device."""

    def bring(self, resident: Resident, others: list[Resident], request_bytes: int) -> None:
        """Make room for the model and a request, and have the model loaded."""

    def free_memory(self, resident: Resident, request_bytes: int) -> None:
        """Free memory for a request of a model that is loaded."""

    def forget(self, resident: Resident) -> None:
        """The model is gone."""

    def reaches(self, resident: Resident) -> bool:
        """Whether the model goes when everything is unloaded."""


class OneAtATime:
    """Without ComfyUI: a model goes before the next one comes."""

    def bring(self, resident: Resident, others: list[Resident], request_bytes: int) -> None:
        for other in others:
            other.give_way(for_good=True)
        resident.bring()

    def free_memory(self, resident: Resident, request_bytes: int) -> None:
        """There is nothing else to move."""

    def forget(self, resident: Resident) -> None:
        """Nobody else knows of it."""

    def reaches(self, resident: Resident) -> bool:
        """There is nobody to unload everything."""
        return True


class ModelCache:
    """Models by what was asked for.

    Args:
        memory: who decides what stays.
    """

    def __init__(self, memory: Memory | None = None) -> None:
        self._memory = memory or OneAtATime()
        self._residents: dict[LoadSpec, Resident] = {}
        PROCESS.models.add(self)

    def turn(self, spec: LoadSpec, keep: bool, check: Callable[[], None] = _never) -> _Turn:
        """A with-block in which one run has all models of this process to itself.

        At its end, error or not, the frames of a failed run are cleared, and without keep the spec's model goes.
        The block must not hold a model in a variable of its own: call a function that does.

        Args:
            check: called while another run is waited for; raises to cancel.
        """
        return _Turn(self, spec, keep, check)

    def source(self, spec: LoadSpec) -> Any:
        """Where a model that is known here comes from; None for one that is not."""
        resident = self._residents.get(spec)
        return None if resident is None else resident.source

    def get(self, source: Source, request_bytes: int = 0, check: Callable[[], None] = _never) -> ModelHandle:
        """The source's model on its device, loaded where it is not, with room for a request beside it.

        Args:
            check: called all the while it is read; raises to cancel.
        """
        # Keyed by what was asked, not by what was loaded: a 4bit request that fell back must hit the
        # cache next time, not load the same weights again on every run.
        spec = source.spec
        resident = self._residents.get(spec)
        if resident is None:
            resident = self._residents[spec] = Resident(source)
        others = [each for each in self._residents.values() if each is not resident]
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
        """What is on a device now, least recently used first."""
        # A copy at once: this may be asked while another thread runs.
        loaded = [each for each in list(self._residents.values()) if each.handle is not None]
        return [each.spec for each in sorted(loaded, key=lambda each: each.used_at)]

    @property
    def residents(self) -> list[Resident]:
        """What is on a device or waits in RAM, the longest there first. To be looked at, not kept."""
        there = [each for each in list(self._residents.values()) if each.handle is not None or each.parked]
        return sorted(there, key=lambda each: each.loaded_at)

    def forget(self, spec: LoadSpec, unless_used_after: float | None = None) -> None:
        """Let one model go, from its device and from RAM.

        Args:
            unless_used_after: a time.monotonic() after which a run makes this void.
        """
        with PROCESS.turns.alone():
            resident = self._residents.get(spec)
            if resident is None or (unless_used_after is not None and resident.used_at > unless_used_after):
                return
            del self._residents[spec]
            resident.give_way(for_good=True)
            self._memory.forget(resident)

    def forget_parked(self) -> None:
        """Let go of what waits in RAM, and of what is where nobody else would unload it, as soon as no run is under
        way. Never waits: the end of a node calls it, which may come by a garbage collection in the middle of a run."""
        PROCESS.turns.when_idle(self._forget_parked)

    def _forget_parked(self) -> None:
        for resident in list(self._residents.values()):
            if resident.parked or not self._memory.reaches(resident):
                self.forget(resident.spec)

    def clear(self) -> None:
        """Let all models go."""
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
                    # What a load that failed half-way left behind in reference cycles. In a large process this takes
                    # a good part of a second, which nobody who cancels should wait for.
                    host.after_prompt("collect", gc.collect)
            if isinstance(error, RuntimeError) and is_lost_device(error):
                # Of whatever was on it nothing can be used again.
                for models in list(PROCESS.models):
                    models.clear()
                raise why_lost(self._spec.model, error) from error
            if not self._keep:
                self._cache.forget(self._spec)
        finally:
            PROCESS.turns.end()


def _clear_frames(error: BaseException | None) -> None:
    """Empty the frames of an error and of those it came from: their variables would keep weights alive."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _give_back(device: str) -> None:
    """Return freed memory to the device, so that others, ComfyUI's own count among them, see it."""
    # transformers' models hold reference cycles, so without this they would stay until the next collection.
    gc.collect()
    if empty_cache := getattr(getattr(torch, device.split(":")[0], None), "empty_cache", None):
        try:
            empty_cache()
        except RuntimeError as error:
            # A device that failed does so here too; what is wrong with it is said by whoever met it first.
            log.warning("%s gives no memory back: %s", device, error)
