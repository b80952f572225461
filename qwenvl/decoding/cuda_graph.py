"""A decode step as one CUDA graph, captured by hand.

Not through torch.compile's graph trees: they fail under the cudaMallocAsync allocator, which ComfyUI sets by default.
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
# A capture takes new memory, and what torch keeps unused is not given back during one.
ROOM_BYTES = 512 << 20
# A captured step must give the logits of the same step run eagerly, within this share of the largest one.
TOLERANCE = 0.02
# Operators that make the host wait for the device, which no capture survives.
HOST_SYNCS = {
    *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "repeat_interleave", "bincount"),
    *("_unique2", "unique_dim", "unique_consecutive"),
}
# Those that do so where they go from one device to another, and those that do so where an index is a mask.
COPIES = frozenset(("copy_", "_to_copy"))
INDEXED = frozenset(("index", "index_put", "index_put_"))


class CaptureError(RuntimeError):
    """A step could not be captured, or what was captured is not the step."""


class Operators(TorchDispatchMode):
    """Sees each operator that runs, after it has."""

    def ran(self, func: Any, given: tuple[Any, Any], made: Any) -> None:
        """For subclasses: the operator, its arguments and keywords, and what came of it."""
        raise NotImplementedError

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:
            # In inference mode operators come here before they are taken apart.
            made = func.decompose(*args, **kwargs)
        if made is not NotImplemented:
            return made
        made = func(*args, **kwargs)
        self.ran(func, (args, kwargs), made)
        return made


class HostSyncs(Operators):
    """Notes the operators that make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def ran(self, func: Any, given: tuple[Any, Any], made: Any) -> None:
        args, _ = given
        name = func._schema.name.removeprefix("aten::")
        if name in HOST_SYNCS or (name in COPIES and _crosses(*args, made)) or (name in INDEXED and _masked(args[1])):
            self.found.append(name)


def _crosses(*values: Any) -> bool:
    return len({each.device.type for each in values if isinstance(each, torch.Tensor)}) > 1


def _masked(indices: Sequence[torch.Tensor | None]) -> bool:
    return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in indices)


class CapturedStep:
    """tokens (B,) -> the next tokens, in place, by one launch.

    Args:
        logits: computes the logits of the tokens, and stores what the step stores; run again it does the same again.
        sample: logits -> next tokens.
        count: advances the state by one token.
        tokens: (B,) int64, read and overwritten.
        state: every other tensor that the step changes, keys and values apart.
        random: the generator that sample draws from.

    Attributes:
        seconds: what warming up and capturing took.

    Raises:
        CaptureError: with the reason. Everything is then as it was, and the step can be run eagerly.
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
        # What is on another GPU than the current one would be captured from the wrong stream.
        with _as_capture_error(), torch.cuda.device_of(tokens), _restoring([tokens, *state], random) as restore:
            # Outside of the graph's own memory, which nobody should hold on to.
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
        """Logits of one step. A step that waits is found here: a capture that breaks off is hard to clean up."""
        with HostSyncs() as waits:
            logits = self._logits(self._tokens)
            self._sample(logits)
        if waits.found:
            raise CaptureError(f"it waits for the device in {', '.join(sorted(set(waits.found)))}")
        return logits

    def _compare(self, expected: torch.Tensor) -> None:
        expected, made = expected.float(), self._last_logits.float()
        # What is no number on both sides is the same, which whoever reads the token is told of.
        unlike = made.isfinite() != expected.isfinite()
        expected, made = expected.nan_to_num(), made.nan_to_num().masked_fill(unlike, float("nan"))
        error = (made - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
        if not error <= TOLERANCE:
            raise CaptureError(f"the captured step's logits differ by {error:.2g} of the largest")

    def _warmed_up(self, restore: Callable[[], None]) -> torch.Tensor:
        """The logits of an eager step that nobody watched: some operators compute otherwise where they are.

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
        # A generator keeps tensors for its captures. Made in inference mode, nobody could use them outside of it.
        with torch.inference_mode(False), _cleaned_up(stream, pool, self._random):
            _tell_of(graph, self._random)
            with _capturing(graph, stream, pool), torch.inference_mode():
                self._run()
        return graph


@contextmanager
def _as_capture_error() -> Iterator[None]:
    """A block in which whatever torch raises is a step that could not be captured."""
    try:
        yield
    except CaptureError:
        raise
    except RuntimeError as error:
        raise CaptureError((str(error).splitlines() or [type(error).__name__])[0]) from error


@contextmanager
def _restoring(state: Sequence[torch.Tensor], random: torch.Generator | None) -> Iterator[Callable[[], None]]:
    """A block after which the tensors and the generator are what they were; what is given restores them within it."""
    before = [each.clone() for each in state]
    drawn = None if random is None else random.get_state()

    def restore() -> None:
        for each, value in zip(state, before, strict=True):
            each.copy_(value)
        if random is not None and drawn is not None:
            random.set_state(drawn)

    try:
        yield restore
    finally:
        restore()


def _make_room(device: torch.device) -> None:
    """Only where memory is scarce: it waits for the device, and what is given back here is taken anew later."""
    free, _ = torch.cuda.mem_get_info(device)
    if free < ROOM_BYTES:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def _tell_of(graph: torch.cuda.CUDAGraph, random: torch.Generator | None) -> None:
    """From 2.14 on torch finds a capture's generators by itself, and being told of one does nothing."""
    if random is not None and release(torch.__version__) < (2, 14):
        graph.register_generator_state(random)


@contextmanager
def _capturing(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any) -> Iterator[None]:
    """What torch.cuda.graph() does, without its wait, its emptied cache and, before 2.9, its collected garbage."""
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            yield
        finally:
            graph.capture_end()


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: libraries keep a workspace of megabytes for every stream that they have seen."""
    return torch.cuda.Stream(device)


@contextmanager
def _cleaned_up(stream: torch.cuda.Stream, pool: Any, random: torch.Generator | None) -> Iterator[None]:
    """A capture that breaks off leaves the current stream, the allocator and the random generators, ComfyUI's too, in
    the middle of a capture: memory would never be freed again, and no number drawn. This ends it for them."""
    current, whole = torch.cuda.current_stream(), False
    try:
        yield
        whole = True
    finally:
        if not whole:
            torch.cuda.set_stream(current)
            with suppress(RuntimeError):  # it had ended
                _end_allocations(stream.device.index, pool)
            with suppress(RuntimeError):
                _capture_nothing(stream, random)


def _end_allocations(device: int, pool: Any) -> None:
    # Without a public name; the second is torch's before 2.8.
    names = ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool")
    if end := next((getattr(torch._C, name) for name in names if hasattr(torch._C, name)), None):
        end(device, pool)
        torch._C._cuda_releasePool(device, pool)


def _capture_nothing(stream: torch.cuda.Stream, random: torch.Generator | None) -> None:
    """The end of a capture is what brings generators back to drawing, also from one that broke off."""
    graph, number = torch.cuda.CUDAGraph(), torch.zeros(1, device=stream.device)
    _tell_of(graph, random)
    with _capturing(graph, stream, torch.cuda.graph_pool_handle()):
        number.add_(1)


class ReadLater:
    """Reads tokens from the device some steps late, so that the device never waits for the host."""

    def __init__(self, batch: int, lag: int) -> None:
        self._host = [torch.empty(batch, dtype=torch.long, pin_memory=True) for _ in range(lag + 1)]
        # Waiting for one lets the core go: otherwise it would spin for most of every token.
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
