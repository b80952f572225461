"""A decode step as one CUDA graph, captured by hand.

torch.compile's graph trees fail under cudaMallocAsync, the allocator that ComfyUI sets by default.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..packages import release

WARM_UPS = 3
# With less free memory torch's unused memory is given back first: a capture takes new memory and cannot do that itself.
ROOM_BYTES = 512 << 20
# The logits of a captured step may differ from those of the same step run eagerly by this share of the largest one.
TOLERANCE = 0.02
# Operators that make the host wait for the device; a capture fails at each of them.
HOST_SYNCS = {
    *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "repeat_interleave", "bincount"),
    *("_unique2", "unique_dim", "unique_consecutive"),
}
# Operators that wait only between two devices, and operators that wait only where an index is a mask.
COPIES = frozenset(("copy_", "_to_copy"))
INDEXED = frozenset(("index", "index_put", "index_put_"))


class CaptureError(RuntimeError):
    """A step could not be captured, or the captured step gives other logits."""


class Operators(TorchDispatchMode):
    """A dispatch mode that calls ran() after each operator."""

    def ran(self, func: Any, given: tuple[Any, Any], result: Any) -> None:
        """Look at an operator, its arguments and keywords, and its result. Subclasses define it."""
        raise NotImplementedError

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:
            # In inference mode composite operators come here before they are split into their parts.
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        self.ran(func, (args, kwargs), result)
        return result


class HostSyncs(Operators):
    """A dispatch mode that lists the operators that make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def ran(self, func: Any, given: tuple[Any, Any], result: Any) -> None:
        args, _ = given
        name = func._schema.name.removeprefix("aten::")
        if name in HOST_SYNCS or (name in COPIES and _crosses(*args, result)) or (name in INDEXED and _masked(args[1])):
            self.found.append(name)


def _crosses(*values: Any) -> bool:
    return len({value.device.type for value in values if isinstance(value, torch.Tensor)}) > 1


def _masked(indices: Sequence[torch.Tensor | None]) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


class CapturedStep:
    """A decode step as one launch: it replaces tokens (B,) by the next tokens.

    Args:
        logits: computes the logits of the tokens, and stores their keys and values; a second run stores the same.
        sample: logits -> next tokens.
        count: advances the state by one token.
        tokens: (B,) int64, read and overwritten.
        state: every other tensor that the step changes, except keys and values.
        random: the generator that sample draws from.

    Attributes:
        seconds: how long warming up and capturing took.

    Raises:
        CaptureError: with the reason. The state is then as before, and the step can be run eagerly.
    """

    def __init__(
        self,
        logits: Callable[[torch.Tensor], torch.Tensor],
        sample: Callable[[torch.Tensor], torch.Tensor],
        count: Callable[[], None],
        tokens: torch.Tensor,
        state: Sequence[torch.Tensor],
        random: torch.Generator | None,
    ) -> None:
        start = time.perf_counter()
        self._logits, self._sample, self._count, self._tokens = logits, sample, count, tokens
        self._random = random
        # With another GPU as the current one the capture would use the wrong stream.
        with _as_capture_error(), torch.cuda.device_of(tokens), _restoring([tokens, *state], random) as restore:
            # Allocated before the capture: a tensor in the graph's own memory would keep that memory alive.
            self._last_logits = torch.empty_like(self._watched())
            restore()
            expected = self._warmed_up(restore)
            self._graph = self._captured()
            restore()
            self()
            self._compare(expected)
        self.seconds = time.perf_counter() - start

    def __call__(self) -> None:
        self._graph.replay()

    def _run(self) -> None:
        logits = self._logits(self._tokens)
        self._last_logits.copy_(logits)
        chosen = self._sample(logits)
        self._count()
        self._tokens.copy_(chosen)

    def _watched(self) -> torch.Tensor:
        """Run one step and return its logits; CaptureError if it waits, as a capture that fails is hard to undo."""
        with HostSyncs() as waits:
            logits = self._logits(self._tokens)
            self._sample(logits)
        if waits.found:
            raise CaptureError(f"it waits for the device in {', '.join(sorted(set(waits.found)))}")
        return logits

    def _compare(self, expected: torch.Tensor) -> None:
        expected, replayed = expected.float(), self._last_logits.float()
        # NaN or infinity on both sides is no difference here: the run reports it when it reads the token.
        unlike = replayed.isfinite() != expected.isfinite()
        expected, replayed = expected.nan_to_num(), replayed.nan_to_num().masked_fill(unlike, float("nan"))
        error = (replayed - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
        if not error <= TOLERANCE:
            raise CaptureError(f"the captured step's logits differ by {error:.2g} of the largest")

    def _warmed_up(self, restore: Callable[[], None]) -> torch.Tensor:
        """Return the logits of an eager step outside of HostSyncs, under which some operators compute differently.

        It runs on the stream of the capture, so that libraries have their workspaces there already.
        """
        if not self._tokens.is_cuda:
            raise CaptureError("it is not on a GPU")
        stream = _capture_stream(self._tokens.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._run()
                restore()
        torch.cuda.current_stream().wait_stream(stream)
        return self._last_logits.clone()

    def _captured(self) -> torch.cuda.CUDAGraph:
        device = self._tokens.device
        stream, graph, pool = _capture_stream(device), torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        _make_room(device)
        # A generator keeps tensors for its captures. Created in inference mode, they could not be used outside of it.
        with torch.inference_mode(False), _cleaned_up(stream, pool, self._random):
            _register(graph, self._random)
            with _capturing(graph, stream, pool), torch.inference_mode():
                self._run()
        return graph


@contextmanager
def _as_capture_error() -> Iterator[None]:
    """Turn every RuntimeError raised within the block into a CaptureError."""
    try:
        yield
    except CaptureError:
        raise
    except RuntimeError as error:
        raise CaptureError((str(error).splitlines() or [type(error).__name__])[0]) from error


@contextmanager
def _restoring(state: Sequence[torch.Tensor], random: torch.Generator | None) -> Iterator[Callable[[], None]]:
    """Restore the tensors and the generator after the block; yields a function that restores them within it."""
    before = [tensor.clone() for tensor in state]
    drawn = None if random is None else random.get_state()

    def restore() -> None:
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)
        if random is not None and drawn is not None:
            random.set_state(drawn)

    try:
        yield restore
    finally:
        restore()


def _make_room(device: torch.device) -> None:
    """Give back torch's unused memory, but only if little is free: it waits for the device and costs time later."""
    free, _ = torch.cuda.mem_get_info(device)
    if free < ROOM_BYTES:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def _register(graph: torch.cuda.CUDAGraph, random: torch.Generator | None) -> None:
    """Register the generator with the graph; from 2.14 on torch finds a capture's generators by itself."""
    if random is not None and release(torch.__version__) < (2, 14):
        graph.register_generator_state(random)


@contextmanager
def _capturing(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any) -> Iterator[None]:
    """Capture like torch.cuda.graph(), but without waiting, emptying the cache or, before 2.9, collecting garbage."""
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            yield
        finally:
            graph.capture_end()


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream for all captures: libraries keep megabytes of workspace for every stream they have seen."""
    return torch.cuda.Stream(device)


@contextmanager
def _cleaned_up(stream: torch.cuda.Stream, pool: Any, random: torch.Generator | None) -> Iterator[None]:
    """End the capture properly if the block raises.

    A capture that fails leaves the current stream, the allocator and the random generators, ComfyUI's too, in capture
    mode: memory would never be freed again, and no random number could be drawn.
    """
    current, whole = torch.cuda.current_stream(), False
    try:
        yield
        whole = True
    finally:
        if not whole:
            torch.cuda.set_stream(current)
            with suppress(RuntimeError):  # raised where the allocator's part had ended already
                _end_allocations(stream.device.index, pool)
            with suppress(RuntimeError):
                _capture_nothing(stream, random)


def _end_allocations(device: int, pool: Any) -> None:
    # torch has no public function for it; the second name is the one before 2.8.
    names = ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool")
    if end := next((getattr(torch._C, name) for name in names if hasattr(torch._C, name)), None):
        end(device, pool)
        torch._C._cuda_releasePool(device, pool)


def _capture_nothing(stream: torch.cuda.Stream, random: torch.Generator | None) -> None:
    """Capture a trivial step to its end: only that takes the generators of a failed capture out of capture mode."""
    graph, number = torch.cuda.CUDAGraph(), torch.zeros(1, device=stream.device)
    _register(graph, random)
    with _capturing(graph, stream, torch.cuda.graph_pool_handle()):
        number.add_(1)


class ReadLater:
    """A queue that reads tokens from the device some steps late, so that the device never waits for the host."""

    def __init__(self, batch: int, lag: int) -> None:
        self._host = [torch.empty(batch, dtype=torch.long, pin_memory=True) for _ in range(lag + 1)]
        # Blocking events let the CPU core sleep; without, it would spin for most of every token.
        self._ready = [torch.cuda.Event(blocking=True) for _ in range(lag + 1)]
        self._sent = self._taken = 0

    def send(self, tokens: torch.Tensor) -> None:
        slot = self._sent % len(self._host)
        self._host[slot].copy_(tokens, non_blocking=True)
        self._ready[slot].record(torch.cuda.current_stream(tokens.device))
        self._sent += 1

    @property
    def waiting(self) -> int:
        return self._sent - self._taken

    def take(self) -> list[int]:
        slot = self._taken % len(self._host)
        self._ready[slot].synchronize()
        self._taken += 1
        return self._host[slot].tolist()
