import sys

import pytest
from nvml_double import RTX_5090, UUID, NvmlDouble

from qwenvl.report import nvml


@pytest.fixture(autouse=True)
def started_anew():
    nvml._start.cache_clear()
    yield
    nvml._start.cache_clear()


def test_clock_power_temperature_and_what_holds_the_clock_back_are_read(monkeypatch):
    NvmlDouble(RTX_5090).install(monkeypatch)
    figures, reason = nvml.state(UUID)
    assert reason == ""
    assert figures == {
        "clock_mhz": 2400,
        "max_clock_mhz": 3100,
        "power_w": 431.5,
        "power_limit_w": 575.0,
        "temperature_c": 64,
        "held_back_by": ["the power limit"],
    }


def test_torch_writes_the_uuid_without_its_kind(monkeypatch):
    NvmlDouble(RTX_5090).install(monkeypatch)
    assert nvml.state(UUID.removeprefix("GPU-")) == nvml.state(UUID)
    assert nvml.state("another") == ({}, "NVML does not know this GPU")


@pytest.mark.parametrize(
    ("bits", "held"),
    [
        (0, []),
        (0x1, []),
        (0x20 | 0x40, ["heat (driver)", "heat (hardware)"]),
        (0x88, ["hardware slowdown", "power brake"]),
    ],
)
def test_each_reason_has_a_name_and_being_idle_is_none(monkeypatch, bits, held):
    NvmlDouble({**RTX_5090, "nvmlDeviceGetCurrentClocksEventReasons": bits}).install(monkeypatch)
    assert nvml.state(UUID)[0]["held_back_by"] == held


def test_an_older_driver_or_package_is_asked_by_the_old_name(monkeypatch):
    new, old = "nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"
    answers = {name: value for name, value in RTX_5090.items() if name != new} | {old: 0x80}
    double = NvmlDouble(answers).install(monkeypatch)
    assert nvml.state(UUID)[0]["held_back_by"] == ["power brake"]
    double.absent.add(new)
    assert nvml.state(UUID)[0]["held_back_by"] == ["power brake"]


def test_what_a_gpu_does_not_tell_is_none_and_the_rest_is_there(monkeypatch):
    NvmlDouble({"nvmlDeviceGetClockInfo": 300}).install(monkeypatch)
    figures, reason = nvml.state(UUID)
    assert reason == ""
    assert figures.pop("clock_mhz") == 300
    assert set(figures.values()) == {None}


def test_the_driver_and_the_gpus_are_named(monkeypatch):
    NvmlDouble({**RTX_5090, "nvmlDeviceGetName": b"NVIDIA GeForce RTX 5090"}).install(monkeypatch)
    assert nvml.driver() == "581.29"
    assert nvml.gpus() == [("NVIDIA GeForce RTX 5090", (12, 0))]


def test_nvml_is_started_once(monkeypatch):
    double = NvmlDouble(RTX_5090).install(monkeypatch)
    nvml.driver(), nvml.gpus(), nvml.state(UUID)
    assert double.started == 1


def test_without_the_library_the_reason_is_told_and_the_kernel_names_the_driver(monkeypatch, tmp_path):
    NvmlDouble(RTX_5090, broken=True).install(monkeypatch)
    monkeypatch.setattr(nvml, "DRIVER_FILE", tmp_path / "version")
    assert nvml.state(UUID) == ({}, "NVML does not start: NVML Shared Library Not Found")
    assert nvml.gpus() == []
    assert nvml.driver() is None
    nvml.DRIVER_FILE.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 2024\n")
    assert nvml.driver() == "550.54.14"


def test_without_the_package_the_command_that_installs_it_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvml.state(UUID)[1] == "nvidia-ml-py is not installed (pip install nvidia-ml-py)"
