"""Registration of this pack's models with ComfyUI's memory manager."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Protocol

import torch

from ..checks import printable
from . import host
from .host import model_management

_Base: Any = object if model_management is None else host.ModelPatcher


class Resident(Protocol):
    """What a memory manager has to know of one of this pack's models, in memory or not."""

    # Bytes of its weights on all devices, and when it was last used, by time.monotonic().
    size: int
    used_at: float

    @property
    def spec(self) -> Hashable:
        """The load settings, unique to the model."""

    @property
    def name(self) -> str:
        """The model's name for logs."""

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices that it is or will be on, in equal parts."""

    @property
    def is_loaded(self) -> bool:
        """True if it is on its devices now."""

    def bring(self) -> None:
        """Put it on its devices."""

    def give_way(self, for_good: bool = False) -> None:
        """Leave its devices: move to RAM if that is allowed, else (or if for_good) unload."""


def memory_manager() -> ComfyMemory | None:
    """Return the manager with which a model cache registers its models; None without ComfyUI."""
    return None if model_management is None else ComfyMemory()


class _Holder(torch.nn.Module):
    """A stand-in for the model: ComfyUI sets attributes that a transformers model refuses."""

    device: torch.device


def _holder(resident: Resident) -> _Holder:
    """Create a stand-in whose class has the model's name, because ComfyUI logs a model by its class."""
    return type(printable(resident.name, ""), (_Holder,), {})()


class _Patcher(_Base):
    """One of our models as ComfyUI's memory manager sees it: on its device, or not at all."""

    def __init__(self, resident: Resident, device: torch.device, size: int) -> None:
        super().__init__(_holder(resident), load_device=device, offload_device=torch.device("cpu"), size=size)
        self.resident = resident
        # How many of our models were used after this one. ComfyUI evicts the least completely loaded model first, so
        # reporting this many bytes too few makes it evict the least recently used one.
        self.age = 0

    def loaded_size(self) -> int:
        return self.size - self.age if self.resident.is_loaded else 0

    def current_loaded_device(self) -> torch.device:
        return self.load_device if self.resident.is_loaded else self.offload_device

    def partially_load(self, device_to: torch.device, extra_memory: int = 0, force_patch_weights: bool = False) -> int:
        self.resident.bring()
        self.model.device = device_to
        self.model.model_loaded_weight_memory = self.size
        return self.size

    def partially_unload(self, *_: Any, **__: Any) -> int:
        return 0  # no partial unloading: ComfyUI then calls detach

    def detach(self, unpatch_all: bool = True) -> Any:
        # Without unpatch_all it is only bookkeeping, which happens at every use.
        if unpatch_all:
            self.resident.give_way()
            self.model.device = self.offload_device
            self.model.model_loaded_weight_memory = 0
        return self.model


class ComfyMemory:
    """This pack's models in ComfyUI's memory manager, which makes room for them and evicts them for others."""

    def __init__(self) -> None:
        # One patcher for each device of a model. Kept here because ComfyUI holds weak references only.
        self._patchers: dict[Hashable, list[_Patcher]] = {}

    def bring(self, resident: Resident, others: list[Resident], request_bytes: int) -> None:
        """Make room for the model and request_bytes, and load the model."""
        if _in_ram(resident):
            self._free_ram(resident, [other for other in others if _in_ram(other)], request_bytes)
        if resident.spec not in self._patchers:
            places = [torch.device(device) for device in resident.devices]
            share = resident.size // len(places)
            self._patchers[resident.spec] = [_Patcher(resident, place, share) for place in places]
        newest_first = sorted(others, key=lambda other: -other.used_at)
        for age, other in enumerate([resident, *newest_first]):
            for patcher in self._patchers.get(other.spec, []):
                patcher.age = age
        model_management.load_models_gpu(
            self._patchers[resident.spec], memory_required=request_bytes, force_full_load=True
        )

    def free_memory(self, resident: Resident, request_bytes: int) -> None:
        """Free request_bytes on the model's devices by evicting other models."""
        patchers = self._patchers[resident.spec]
        own = [
            loaded
            for loaded in model_management.current_loaded_models
            if any(loaded.model is patcher for patcher in patchers)
        ]
        for patcher in patchers:
            model_management.free_memory(request_bytes, patcher.load_device, keep_loaded=own)

    def forget(self, resident: Resident) -> None:
        """Drop the patchers of an unloaded model: ComfyUI drops its entry once their stand-ins are collected."""
        self._patchers.pop(resident.spec, None)

    def reaches(self, resident: Resident) -> bool:
        """Return True if ComfyUI's "Unload Models" reaches it: older versions check one device, none checks RAM."""
        every = getattr(model_management, "get_all_torch_devices", lambda: [model_management.get_torch_device()])()
        return all(torch.device(device) in every for device in resident.devices)

    def _free_ram(self, resident: Resident, others: list[Resident], request_bytes: int) -> None:
        """Unload other models in RAM, least recently used first, until this one fits: ComfyUI frees no RAM itself."""
        needed = 0 if resident.is_loaded else resident.size
        for other in sorted(others, key=lambda other: other.used_at):
            if host.free_ram() > 1.1 * needed + request_bytes:
                return
            other.give_way(for_good=True)
            self.forget(other)


def _in_ram(resident: Resident) -> bool:
    return resident.devices == ("cpu",)
