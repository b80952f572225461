"""Driver and GPU state of NVIDIA's GPUs, read through NVML, which starts no CUDA context."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

DRIVER_FILE = Path("/proc/driver/nvidia/version")
# The bits of NVML's clock event reasons that mean a lowered clock. The lowest bit, idle, does not.
HELD_BACK = {
    0x2: "clocks that were set by hand",
    0x4: "the power limit",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "heat (driver)",
    0x40: "heat (hardware)",
    0x80: "power brake",
    0x100: "the display's clock",
}


def driver() -> str | None:
    """Return the version of the NVIDIA driver; None if no driver answers."""
    nvml, _ = _start()
    if nvml is not None:
        return _text(_ask(nvml, "nvmlSystemGetDriverVersion"))
    try:
        found = re.search(r"\d{1,9}\.\d{1,9}(\.\d{1,9})?", DRIVER_FILE.read_text())
    except OSError:
        return None
    return found.group() if found else None


def gpus() -> list[tuple[str, tuple[int, int]]]:
    """List name and compute capability of every NVIDIA GPU."""
    nvml, _ = _start()
    found = []
    for index in range(_ask(nvml, "nvmlDeviceGetCount") or 0 if nvml else 0):
        handle = _ask(nvml, "nvmlDeviceGetHandleByIndex", index)
        name, capability = (_ask(nvml, f"nvmlDeviceGet{what}", handle) for what in ("Name", "CudaComputeCapability"))
        if name and capability:
            found.append((_text(name) or "", (int(capability[0]), int(capability[1]))))
    return found


def state(uuid: str) -> tuple[dict[str, Any], str]:
    """Read clock (MHz), power (W), temperature (°C) and what holds the clock back, now, of one GPU.

    Args:
        uuid: as torch or NVML writes it.

    Returns:
        The figures, None where this GPU does not report one, and ""; or {} and the reason.
    """
    nvml, reason = _start()
    if nvml is None:
        return {}, reason
    handle = _ask(nvml, "nvmlDeviceGetHandleByUUID", uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
    if handle is None:
        return {}, "NVML does not know this GPU"
    power, limit = (_ask(nvml, f"nvmlDeviceGet{what}", handle) for what in ("PowerUsage", "EnforcedPowerLimit"))
    return {
        "clock_mhz": _ask(nvml, "nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_SM),
        "max_clock_mhz": _ask(nvml, "nvmlDeviceGetMaxClockInfo", handle, nvml.NVML_CLOCK_SM),
        "power_w": None if power is None else power / 1000,
        "power_limit_w": None if limit is None else limit / 1000,
        "temperature_c": _ask(nvml, "nvmlDeviceGetTemperature", handle, nvml.NVML_TEMPERATURE_GPU),
        "held_back_by": _held_back_by(nvml, handle),
    }, ""


def _held_back_by(nvml: Any, handle: Any) -> list[str] | None:
    # NVML renamed its throttle reasons; older drivers and packages know the old name only.
    for name in ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"):
        bits = _ask(nvml, name, handle)
        if bits is not None:
            return [reason for bit, reason in HELD_BACK.items() if bits & bit]
    return None


@lru_cache(maxsize=1)
def _start() -> tuple[Any, str]:
    """Start NVML; return it, or None and the reason. It stays open, since the next run needs it again."""
    try:
        import pynvml
    except ModuleNotFoundError:
        return None, "nvidia-ml-py is not installed (pip install nvidia-ml-py)"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return None, f"NVML does not start: {error}"
    return pynvml, ""


def _ask(nvml: Any, function: str, *arguments: Any) -> Any:
    """Call a function of NVML; None if this GPU, driver or package does not support it."""
    try:
        return getattr(nvml, function)(*arguments)
    except (AttributeError, nvml.NVMLError):
        return None


def _text(value: str | bytes | None) -> str | None:
    """Decode a text: older versions of the package return bytes."""
    return value.decode() if isinstance(value, bytes) else value
