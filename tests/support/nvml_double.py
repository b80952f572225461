"""A stand-in for the module pynvml: the part of its interface that is used, on GPUs that a test describes."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from qwenvl.report import nvml

UUID = "GPU-7a5f0000-1111-2222-3333-444455556666"
RTX_5090 = {
    "nvmlDeviceGetName": "NVIDIA GeForce RTX 5090",
    "nvmlDeviceGetCudaComputeCapability": (12, 0),
    "nvmlDeviceGetClockInfo": 2400,
    "nvmlDeviceGetMaxClockInfo": 3100,
    "nvmlDeviceGetPowerUsage": 431_500,
    "nvmlDeviceGetEnforcedPowerLimit": 575_000,
    "nvmlDeviceGetTemperature": 64,
    "nvmlDeviceGetCurrentClocksEventReasons": 0x4,
}


class NVMLError(Exception):
    """The module's own error for what is not known or not supported."""


class NvmlDouble(ModuleType):
    """The answers of one GPU. A missing one is not supported by the GPU, one in `absent` not known to the package."""

    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU = 1, 0
    NVMLError = NVMLError

    def __init__(self, answers: dict[str, Any], driver: str = "581.29", broken: bool = False) -> None:
        super().__init__("pynvml")
        self.answers, self.broken, self.absent = answers, broken, set()
        self.started = 0
        self._system = {"nvmlSystemGetDriverVersion": driver, "nvmlDeviceGetCount": 1}

    def install(self, monkeypatch: Any) -> NvmlDouble:
        monkeypatch.setitem(sys.modules, "pynvml", self)
        nvml._start.cache_clear()
        return self

    def nvmlInit(self) -> None:
        self.started += 1
        if self.broken:
            raise NVMLError("NVML Shared Library Not Found")

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return f"handle {index}"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != UUID:
            raise NVMLError("Not Found")
        return "handle 0"

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvml") or name in self.absent:
            raise AttributeError(name)

        def answer(*arguments: Any) -> Any:
            if name in self._system:
                return self._system[name]
            if name not in self.answers or arguments[0] != "handle 0":
                raise NVMLError("Not Supported")
            return self.answers[name]

        return answer
