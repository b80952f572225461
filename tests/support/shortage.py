"""Makes memory run out at a chosen allocation: the operator raises the error that CUDA's would."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from qwenvl.decoding.cuda_graph import Operators

MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 10.00 GiB"


class Shortage:
    """Counts the allocations of a block, in this thread and in those of pools, and makes some fail.

    Args:
        at: the number of the first one that fails, from 1 on; None fails none.
        lasting: all that follow fail as well.
        kind: the error to raise.
    """

    def __init__(self, at: int | None = None, lasting: bool = False, kind: type[Exception] | None = None) -> None:
        self._at, self._lasting = at, lasting
        self._kind = kind or getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)
        self._numbers = itertools.count(1)
        self.count = 0
        self.failed = 0

    def allocate(self) -> None:
        """Count an allocation; called for every piece of memory that an operator asks for."""
        self.count = number = next(self._numbers)
        if self._at is not None and (number >= self._at if self._lasting else number == self._at):
            self.failed += 1
            raise self._kind(MESSAGE)

    @contextmanager
    def __call__(self) -> Iterator[Shortage]:
        """Count within the block."""
        real = ThreadPoolExecutor.submit

        def submit(pool: ThreadPoolExecutor, work: Any, *args: Any, **kwargs: Any) -> Any:
            return real(pool, self._watched, work, *args, **kwargs)

        ThreadPoolExecutor.submit = submit
        try:
            with _Watched(self):
                yield self
        finally:
            ThreadPoolExecutor.submit = real

    def _watched(self, work: Any, *args: Any, **kwargs: Any) -> Any:
        with _Watched(self):
            return work(*args, **kwargs)


class _Watched(Operators):
    """A torch mode that sees the allocations; every thread needs one of its own."""

    def __init__(self, shortage: Shortage) -> None:
        super().__init__()
        self._shortage = shortage

    def ran(self, func: Any, given: tuple[Any, Any], result: Any) -> None:
        for _ in set(_storages(result)) - set(_storages(given)):
            self._shortage.allocate()


def _storages(values: Any) -> Iterator[int]:
    """Find the address of each tensor's memory. Tensors without elements and those on meta have no memory."""
    for value in tree_leaves(values):
        if isinstance(value, torch.Tensor) and value.device.type != "meta" and value.untyped_storage().nbytes():
            yield value.untyped_storage().data_ptr()


@contextmanager
def new_tensors() -> Iterator[Any]:
    """Yield a function that returns the bytes of all tensors made in the block that are still alive."""
    gc.collect()
    gc.freeze()  # what is there is looked at no more, which makes looking fast
    try:
        yield _new_bytes
    finally:
        gc.unfreeze()


def _new_bytes() -> int:
    gc.collect()
    # Not isinstance, which wakes lazy modules.
    alive = [
        value for value in gc.get_objects() if issubclass(type(value), torch.Tensor) and value.device.type != "meta"
    ]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in alive}.values())
