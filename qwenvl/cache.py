"""ModelCache: the only owner of models."""

from __future__ import annotations

import gc
import threading
import traceback
from collections.abc import Callable
from types import TracebackType

import torch

from .loader import ModelHandle
from .log import log
from .request import LoadSpec


class ModelCache:
    """Holds one model at a time, keyed by what was asked for."""

    def __init__(self) -> None:
        self._handle: ModelHandle | None = None
        self._lock = threading.RLock()

    def turn(self, keep: bool) -> _Turn:
        """A with-block in which one run has the cache to itself.

        At its end, error or not, the frames of a failed run are cleared, and without keep the model goes.
        The block must not hold a model in a variable of its own: call a function that does.
        """
        return _Turn(self, keep)

    def get(self, spec: LoadSpec, load: Callable[[LoadSpec], ModelHandle]) -> ModelHandle:
        """The model of that spec: the one held, or what load returns, after the one held has gone."""
        # Keyed by what was asked, not by what was loaded: a 4bit request that fell back must hit the
        # cache next time, not load the same weights again on every run.
        if self._handle is None or self._handle.spec != spec:
            self.clear()
            self._handle = load(spec)
        return self._handle

    @property
    def held(self) -> LoadSpec | None:
        """What is in memory now."""
        return self._handle.spec if self._handle else None

    def clear(self) -> None:
        """Let the model go and give its memory back to the device."""
        if self._handle is None:
            return
        name, device = self._handle.spec.model, self._handle.machine.device
        self._handle = None
        # transformers models hold reference cycles, so without this they would stay until the next collection.
        gc.collect()
        if empty_cache := getattr(getattr(torch, device.split(":")[0], None), "empty_cache", None):
            empty_cache()
        log.info("unloaded %s", name)


class _Turn:
    def __init__(self, cache: ModelCache, keep: bool) -> None:
        self._cache = cache
        self._keep = keep

    def __enter__(self) -> None:
        self._cache._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None:
                _clear_frames(error)
            if not self._keep:
                self._cache.clear()
        finally:
            self._cache._lock.release()


def _clear_frames(error: BaseException | None) -> None:
    """Empty the frames of an error and of those it came from: their variables would keep weights alive."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
