"""Counts the kernels that a step would launch on a GPU, without a GPU."""

from __future__ import annotations

from typing import Any

from torch.overrides import TorchFunctionMode

# Calls that start no kernel: they make views or return sizes.
VIEWS = {"view", "reshape", "chunk", "split", "transpose", "t", "expand", "__getitem__", "__get__", "size", "dim"}


class Launches(TorchFunctionMode):
    """Records the calls that start a kernel on a GPU. F.rms_norm and attention count as one kernel each."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if name not in VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))
