"""A pretended device that computes on the CPU: mixing its tensors with the CPU's fails, as on a GPU.

It has what a captured step needs of CUDA: graphs that repeat what was recorded, on the same memory, and copies to the
host that arrive only when they have been waited for. It needs a process of its own, because torch keeps a registered
device, and other code would then ask it for what it lacks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretended"
# What a capture does not survive.
WAITING = frozenset(("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select"))
# What takes tensors of both, on a GPU too: copies, and indices in the host's memory.
CROSSING = frozenset(("copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_"))


class Elsewhere(torch.Tensor):
    """A tensor of that device. Attributes: held, the tensor of the CPU that it stands for."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Elsewhere:
        size, strides, start = held.size(), held.stride(), held.storage_offset()
        result = torch.Tensor._make_wrapper_subclass(
            cls, size, strides=strides, storage_offset=start, dtype=held.dtype, device=torch.device(NAME, 0)
        )
        result.held = held
        return result

    @property
    def is_cuda(self) -> bool:
        """Return True, so that code for GPUs only accepts the tensor."""
        return True

    def tolist(self) -> Any:
        """Read the values on the CPU, which torch itself does not do for a subclass."""
        return self.cpu().tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return repr(self.held)

    def __format__(self, spec: str) -> str:
        return format(self.held, spec)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Device(TorchDispatchMode):
    """Catches functions that create tensors on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Numbers(TorchFunctionMode):
    """Reads the tensors in a list for torch.tensor(), which would read them past every other mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.tensor:
            args = _mapped(lambda value: value.tolist() if isinstance(value, Elsewhere) else value, args)
        return func(*args, **(kwargs or {}))


class Graph:
    """Stands in for torch.cuda.CUDAGraph.

    Attributes:
        recording: the graph that is being captured now.
        captures, replays, registered: counts of captures, replays and registered generators.
    """

    recording: Graph | None = None
    captures = replays = registered = 0

    def __init__(self) -> None:
        self._steps: list[tuple[Any, Any, Any, list[tuple[int, torch.Tensor]]]] = []

    def register_generator_state(self, generator: torch.Generator) -> None:
        Graph.registered += 1

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        Graph.recording = self

    def capture_end(self) -> None:
        Graph.recording = None
        Graph.captures += 1
        for *_, result in self._steps:
            for _, memory in result:
                # Nothing was computed yet.
                memory.fill_(True if memory.dtype == torch.bool else 77)

    def record(self, func: Any, args: Any, kwargs: Any, made: Any) -> None:
        known = {_place(tensor) for tensor in _tensors((args, kwargs))}
        fresh = [(index, tensor) for index, tensor in enumerate(_tensors(made)) if _place(tensor) not in known]
        self._steps.append((func, args, kwargs, fresh))

    def replay(self) -> None:
        """Repeat what was recorded, with the present contents of the same memory."""
        Graph.replays += 1
        # Nothing of Python's sees the operators of a graph.
        with _disable_current_modes():
            for func, args, kwargs, fresh in self._steps:
                result = _tensors(func(*args, **kwargs))
                for index, memory in fresh:
                    memory.copy_(result[index])


class Stream:
    """Stands in for torch.cuda.Stream: copies to the host are kept here until the stream is waited for."""

    copies: deque[tuple[torch.Tensor, torch.Tensor]] = deque()
    # How many have been made so far.
    done = 0

    def __init__(self, *_: Any) -> None: ...

    @property
    def device(self) -> torch.device:
        return torch.device(NAME, 0)

    def wait_stream(self, other: Any) -> None: ...


class Memory:
    """The free bytes of the device, which tests may change, and how often its cache was emptied."""

    free = 8 << 30
    emptied = 0

    @classmethod
    def empty(cls) -> None:
        cls.emptied += 1


class Event:
    """Stands in for torch.cuda.Event."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.timed, self.blocking = enable_timing, blocking

    def record(self, *_: Any) -> None:
        self._at = Stream.done + len(Stream.copies)

    def synchronize(self) -> None:
        while Stream.done < self._at:
            host, value = Stream.copies.popleft()
            host.copy_(value)
            Stream.done += 1

    def elapsed_time(self, end: Event) -> float:
        """Return two milliseconds, between any two recorded events."""
        assert self.timed and end.timed and end._at >= self._at
        return 2.0


def _tensors(values: Any) -> list[torch.Tensor]:
    """List the tensors in nested tuples, lists and dictionaries."""
    if isinstance(values, torch.Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, (tuple, list)):
        return []
    return [tensor for value in values for tensor in _tensors(value)]


def _mapped(function: Any, values: Any) -> Any:
    """Apply a function to all that is in nested tuples, lists and dictionaries. torch's own tree_map takes most of the
    time of a test."""
    if isinstance(values, (tuple, list)):
        results = [_mapped(function, value) for value in values]
        return type(values)(*results) if hasattr(values, "_fields") else type(values)(results)
    if isinstance(values, dict):
        return {key: _mapped(function, value) for key, value in values.items()}
    return function(values)


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = _tensors((args, kwargs))
    there = [entry for entry in given if isinstance(entry, Elsewhere)]
    # A number goes anywhere.
    here = [entry for entry in given if not isinstance(entry, Elsewhere) and entry.ndim]
    name = func._schema.name.removeprefix("aten::")
    if there and here and name not in CROSSING:
        raise RuntimeError(f"{name} has tensors of two devices: {NAME} and cpu")
    if there and Graph.recording and (name in WAITING or here):
        raise RuntimeError(f"{name} is not permitted when stream is capturing")
    # No memory of the host can be pinned without a driver.
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    goes_there = bool(there)
    if name == "copy_":
        goes_there = isinstance(given[0], Elsewhere)
        if there and not goes_there and (kwargs.get("non_blocking") or args[2:] == (True,)):
            Stream.copies.append((given[0], given[1].held.clone()))
            return given[0]
    elif kwargs.get("device") is not None:
        goes_there = torch.device(kwargs["device"]).type == NAME
        kwargs["device"] = torch.device("cpu") if goes_there else kwargs["device"]
    holders = {id(entry.held): entry for entry in there}
    held_args, held_kwargs = _mapped(
        lambda value: value.held if isinstance(value, Elsewhere) else value, (args, kwargs)
    )
    if name == "histc":
        # Which GPUs do for whole numbers too.
        result = func(held_args[0].float(), *held_args[1:], **held_kwargs).to(held_args[0].dtype)
    else:
        result = func(*held_args, **held_kwargs)
    if Graph.recording and goes_there:
        Graph.recording.record(func, held_args, held_kwargs, result)

    def wrapped(each: Any) -> Any:
        if not isinstance(each, torch.Tensor) or not goes_there:
            return each
        # What an operator changes in place is the same tensor afterwards.
        return holders[id(each)] if id(each) in holders else Elsewhere(each)

    return _mapped(wrapped, result)


def _cuda() -> Iterator[Any]:
    """The part of torch.cuda that a captured step uses."""
    stream = Stream()
    stand_ins = {
        "CUDAGraph": Graph,
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda *_: stream,
        "set_stream": lambda *_: None,
        "stream": lambda *_: nullcontext(),
        "device_of": lambda *_: nullcontext(),
        "graph_pool_handle": lambda: (0, 1),
        "mem_get_info": lambda *_: (Memory.free, 16 << 30),
        "empty_cache": Memory.empty,
        "synchronize": lambda *_: None,
    }
    yield from (patch(f"torch.cuda.{name}", stand_in) for name, stand_in in stand_ins.items())
    # Its random numbers come from the CPU's generators.
    generator = torch.Generator
    yield patch("torch.Generator", lambda *_: generator())
    # In inference mode there are no tensors that stand for others.
    yield patch("torch.inference_mode", lambda on=True: torch.no_grad() if on else nullcontext())


@contextmanager
def there(*models: torch.nn.Module) -> Iterator[None]:
    """Provide the device within the block, and move the models to it for good."""
    if not hasattr(torch, NAME):
        _setup_privateuseone_for_python_backend(NAME)
        # torch.autocast asks, be it only to be off.
        getattr(torch, NAME).get_amp_supported_dtype = lambda: [torch.bfloat16]
    lifts = torch._C._only_lift_cpu_tensors()
    # Otherwise torch.tensor() makes what it is given on the device itself, past every mode.
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with ExitStack() as stack:
            for context in (*_cuda(), _Device(), _Numbers()):
                stack.enter_context(context)
            for model in models:
                _move(model)
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(lifts)


def _move(model: torch.nn.Module) -> None:
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, value in tensors.items():
                if value is not None and value.device.type != NAME:
                    moved = Elsewhere(value.data)
                    weight = tensors is module._parameters
                    tensors[name] = torch.nn.Parameter(moved, requires_grad=False) if weight else moved
