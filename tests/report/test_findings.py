import logging
import re
from dataclasses import replace

import pytest

from qwenvl.models.families import family_of
from qwenvl.process import PROCESS
from qwenvl.report import findings as module
from qwenvl.report.facts import Facts, Gpu
from qwenvl.report.findings import family_report, findings, in_a_line, startup_report

# What torch's wheels were built for.
CUDA_124 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
CUDA_126 = CUDA_124
CUDA_128 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
CUDA_130 = (*CUDA_128, "compute_120")
ROCM = ("gfx906", "gfx90a", "gfx942", "gfx1030", "gfx1100")
BUILDS = ("cpu", "cuda118", "cuda124", "cuda126", "cuda128", "cuda130", "rocm64", "rocm70")
PACKAGES = {
    "transformers": "5.23.0",
    "accelerate": "1.15.0",
    "bitsandbytes": "0.50.2",
    "flash-attn": "2.8.3",
    "flash-linear-attention": "0.4.0",
    "causal-conv1d": "1.5.3",
    "triton": "3.5.0",
}

RTX_1080 = Gpu("NVIDIA GeForce GTX 1080", "sm_61")
T4 = Gpu("Tesla T4", "sm_75")
RTX_3090 = Gpu("NVIDIA GeForce RTX 3090", "sm_86")
RTX_4090 = Gpu("NVIDIA GeForce RTX 4090", "sm_89")
RTX_5090 = Gpu("NVIDIA GeForce RTX 5090", "sm_120")
SPARK = Gpu("NVIDIA GB10", "sm_121")
H100 = Gpu("NVIDIA H100 80GB HBM3", "sm_90")
B200 = Gpu("NVIDIA B200", "sm_100")
B300 = Gpu("NVIDIA B300", "sm_103")
MI300 = Gpu("AMD Instinct MI300X", "gfx942")
RX_6600 = Gpu("AMD Radeon RX 6600", "gfx1032")


def machine(*gpus, torch="2.8.0+cu128", cuda="12.8", archs=CUDA_128, driver="581.29", without=(), **more):
    """An NVIDIA machine on which all is well, but for what is given."""
    packages = {name: version for name, version in PACKAGES.items() if name not in without}
    packages |= more.pop("packages", {})
    given = {"bitsandbytes_builds": BUILDS, **more}
    return Facts(torch, cuda, None, archs, gpus, driver, packages=packages, **given)


def rocm(*gpus, **more):
    return replace(machine(*gpus, torch="2.8.0+rocm6.4", cuda=None, archs=ROCM, driver=None, **more), hip="6.4.43483")


OLD_TORCH = {"torch": "2.6.0+cu124", "cuda": "12.4", "archs": CUDA_124}
TORCH_126 = {"torch": "2.8.0+cu126", "cuda": "12.6", "archs": CUDA_126}
TORCH_130 = {"torch": "2.10.0+cu130", "cuda": "13.0", "archs": CUDA_130}
ON_CPU = {"torch": "2.13.0+cpu", "cuda": None, "archs": (), "driver": None}
FLASH = ("flash-attn",)
LINEAR = ("flash-linear-attention", "causal-conv1d")

# The machine, the family of the model, and what must be found: severity, a part of what is and of what mends it.
MACHINES = {
    "3090, matching": (machine(RTX_3090), "", []),
    "4090 runs kernels of sm_86": (machine(RTX_4090, **TORCH_126, driver="560.35"), "", []),
    "4090, CUDA 13": (machine(RTX_4090, **TORCH_130), "", []),
    "5090, matching": (machine(RTX_5090), "qwen3_5", []),
    "5090, CUDA 13": (machine(RTX_5090, **TORCH_130), "", []),
    "GB10 runs kernels of sm_120": (machine(SPARK), "", []),
    "H100, matching": (machine(H100), "", []),
    "B200, matching": (machine(B200), "", []),
    "B300 runs kernels of sm_100": (machine(B300), "", []),
    "MI300, matching": (rocm(MI300), "qwen3_5", []),
    "CPU": (machine(**ON_CPU, without=(*FLASH, *LINEAR, "triton")), "qwen3_5", []),
    "a CPU under torch for CUDA": (machine(driver=None, without=(*FLASH, *LINEAR)), "qwen3_5", []),
    "5090, torch of before Blackwell": (
        machine(RTX_5090, **OLD_TORCH, driver="572.16"),
        "",
        [("critical", "(sm_120) is here, and torch 2.6.0+cu124 with CUDA 12.4 was built for sm_50", "whl/cu128")],
    ),
    "5090, CUDA 12.6, new driver": (
        machine(RTX_5090, **TORCH_126),
        "",
        [("critical", "was built for sm_50, sm_60", "pip install torch torchvision torchaudio --index-url")],
    ),
    "5090, kernels for the other Blackwell": (
        machine(RTX_5090, archs=("sm_90", "sm_100")),
        "",
        [("critical", "sm_90, sm_100 only", "whl/cu130")],
    ),
    "GB10, kernels for 12.0 alone": (
        machine(SPARK, archs=("sm_90", "sm_120a")),
        "",
        [("critical", "(sm_121) is here", "whl/cu130")],
    ),
    "5090, kernels for 12.0 alone": (machine(RTX_5090, archs=("sm_90", "sm_120a")), "", []),
    "B200, CUDA 12.6": (machine(B200, **TORCH_126), "", [("critical", "(sm_100) is here", "whl/cu130")]),
    "5090, old driver": (
        machine(RTX_5090, driver="566.36"),
        "",
        [("critical", "driver 566.36 is older than CUDA 12.8", "install driver 570 or later")],
    ),
    "5090, driver for CUDA 12": (
        machine(RTX_5090, **TORCH_130, driver="572.16"),
        "",
        [("critical", "older than CUDA 13.0 of torch 2.10.0+cu130", "580 or later .*, or a torch for this .*cu128")],
    ),
    "H100, driver for CUDA 12": (
        machine(H100, **TORCH_130, driver="550.54.14"),
        "",
        [("critical", "driver 550.54.14", "580 or later .*, or a torch for this driver: .*cu128")],
    ),
    "4090, driver for CUDA 11": (
        machine(RTX_4090, driver="470.82"),
        "",
        [("critical", "driver 470.82", r"^install driver 525 or later \(https://www.nvidia.com/drivers\)$")],
    ),
    "1080, CUDA 12.8": (
        machine(RTX_1080),
        "",
        [("critical", "(sm_61) is here", "whl/cu126")],
    ),
    "T4 is too old for flash-attn": (machine(T4, without=FLASH), "", []),
    "3090, torch for the CPU": (
        replace(machine(RTX_3090, **ON_CPU), driver="581.29"),
        "",
        [("critical", "torch 2.13.0+cpu was built without CUDA", "whl/cu130")],
    ),
    "RX 6600 under torch for others": (
        rocm(RX_6600),
        "",
        [("warning", "(gfx1032) is here, and torch 2.8.0+rocm6.4 was built for gfx906", "^$")],
    ),
    "M3": (
        machine(
            torch="2.13.0", cuda=None, archs=(), driver=None, other_device="mps", without=FLASH, system="Darwin arm64"
        ),
        "qwen3_5",
        [("info", "bitsandbytes does not run on Apple GPUs", "^$")],
    ),
    "torch 2.9": (
        machine(RTX_4090, torch="2.9.1+cu128"),
        "",
        [("info", "torch 2.9.1+cu128 computes the Conv3d", "^$")],
    ),
    "no flash-attn": (
        machine(RTX_4090, without=FLASH),
        "",
        [("info", "flash-attn is not installed", "pip install flash-attn --no-build-isolation")],
    ),
    "flash-attn of another torch, by its version": (
        machine(RTX_4090, packages={"flash-attn": "2.8.3+cu12torch2.7cxx11abiTRUE"}),
        "",
        [("warning", "was built for torch 2.7, and this is torch 2.8.0", "pip uninstall -y flash-attn && pip install")],
    ),
    "flash-attn of this torch, by its version": (
        machine(RTX_4090, packages={"flash-attn": "2.8.3+cu12torch2.8cxx11abiTRUE"}),
        "",
        [],
    ),
    "flash-attn of another torch, by trying": (
        machine(RTX_4090, flash_attn_error="undefined symbol: _ZN3c10"),
        "",
        [("warning", "flash-attn 2.8.3 does not load (undefined symbol: _ZN3c10)", "--no-cache-dir")],
    ),
    "no accelerate": (
        machine(RTX_4090, without=("accelerate",)),
        "",
        [("warning", "accelerate is not installed", "pip install accelerate")],
    ),
    "an accelerate that transformers 5 does not take": (
        machine(RTX_4090, packages={"accelerate": "1.0.1"}),
        "",
        [("warning", "accelerate 1.0.1 is too old: 1.1 or later is needed", "pip install -U accelerate")],
    ),
    "no bitsandbytes": (
        machine(RTX_4090, without=("bitsandbytes",)),
        "",
        [("warning", "bitsandbytes is not installed", "^pip install bitsandbytes$")],
    ),
    "bitsandbytes of before CUDA 13": (
        machine(RTX_4090, **TORCH_130, packages={"bitsandbytes": "0.47.0"}, bitsandbytes_builds=("cpu", "cuda128")),
        "",
        [("warning", "bitsandbytes 0.47.0 has no kernels for CUDA 13.0, only for cpu, cuda128", "-U bitsandbytes")],
    ),
    "bitsandbytes of before one kernel for 4bit": (
        machine(RTX_4090, packages={"bitsandbytes": "0.49.2"}),
        "",
        [("info", "bitsandbytes 0.49.2 is older than 0.50", "^pip install -U bitsandbytes$")],
    ),
    "the same, where there is no CUDA": (
        machine(**ON_CPU, packages={"bitsandbytes": "0.49.2"}, without=(*FLASH, *LINEAR)),
        "",
        [],
    ),
    "the same on AMD": (rocm(MI300, packages={"bitsandbytes": "0.49.2"}), "", []),
    "bitsandbytes 0.50 takes the next CUDA": (
        machine(RTX_4090, torch="2.8.0+cu129", cuda="12.9"),
        "",
        [],
    ),
    "bitsandbytes 0.49 does not": (
        machine(RTX_4090, torch="2.8.0+cu129", cuda="12.9", packages={"bitsandbytes": "0.49.2"}),
        "",
        [("warning", "no kernels for CUDA 12.9", "-U bitsandbytes")],
    ),
    "bitsandbytes without ROCm": (
        rocm(MI300, bitsandbytes_builds=("cpu", "cuda128")),
        "",
        [("warning", "no kernels for ROCm 6.4", "-U bitsandbytes")],
    ),
    "bitsandbytes of before the CPU": (
        machine(**ON_CPU, packages={"bitsandbytes": "0.48.2"}),
        "",
        [("warning", "bitsandbytes 0.49 or later is needed on a CPU, and 0.48.2 is installed", "-U bitsandbytes")],
    ),
    "Qwen3.5 without its kernels": (
        machine(RTX_4090, without=LINEAR),
        "qwen3_5_moe",
        [
            (
                "warning",
                "flash-linear-attention and causal-conv1d are not installed",
                "^pip install -U flash-linear-attention && pip install causal-conv1d --no-build-isolation$",
            )
        ],
    ),
    "Qwen3.5 with one of its kernels": (
        machine(RTX_4090, without=LINEAR[1:]),
        "qwen3_5",
        [("warning", "causal-conv1d is not installed", "^pip install causal-conv1d --no-build-isolation$")],
    ),
    "Qwen3.5 on portable Windows": (
        machine(RTX_4090, without=(*LINEAR, "triton"), system="Windows AMD64", pip=r"python_embeded\python.exe -m pip"),
        "qwen3_5",
        [
            (
                "warning",
                "are not installed",
                r"^python_embeded\\python.exe -m pip install -U triton-windows flash-linear",
            )
        ],
    ),
    "Qwen3-VL needs no such kernels": (machine(RTX_4090, without=LINEAR), "qwen3_vl", []),
    "transformers of before Qwen3-VL": (
        machine(RTX_3090, packages={"transformers": "4.56.2"}),
        "",
        [("critical", "transformers 4.56.2 is too old", 'pip install -U "transformers>=4.57.1"')],
    ),
}


@pytest.mark.parametrize("name", MACHINES)
def test_exactly_what_is_wrong_with_a_machine_is_found_with_its_remedy(name):
    facts, family, expected = MACHINES[name]
    found = findings(facts, family, family_of(family).linear_attention)
    assert [finding.severity for finding in found] == [severity for severity, _, _ in expected], found
    for finding, (_, what, mend) in zip(found, expected, strict=True):
        assert what in finding.what
        assert finding.cost
        assert re.search(mend, finding.mend), finding.mend


def test_a_blackwell_gpu_without_kernels_is_told_all_that_it_needs():
    (finding,) = findings(MACHINES["5090, torch of before Blackwell"][0])
    assert "torch 2.7 or later, built with CUDA 12.8 or later, and driver 570 or later" in str(finding)
    assert "To mend it: pip uninstall -y torch torchvision torchaudio && pip install torch" in str(finding)


def test_the_gravest_comes_first():
    facts = machine(RTX_5090, torch="2.9.0+cu126", cuda="12.6", archs=CUDA_126, without=("bitsandbytes", *FLASH))
    assert [finding.severity for finding in findings(facts)] == ["critical", "warning", "info", "info"]


def test_torch_for_the_cpu_is_told_of_that():
    """And of nothing that only a GPU can use."""
    facts = machine(RTX_3090, RTX_4090, **ON_CPU, without=(*FLASH, *LINEAR))
    assert [finding.severity for finding in findings(facts, "qwen3_5", True)] == ["critical", "critical"]


@pytest.fixture
def started(monkeypatch, caplog):
    """Starts on a machine; returns what the log says, with the level of each line."""

    def start(facts):
        monkeypatch.setattr(module, "probe", lambda: facts)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            startup_report()
        return [(record.levelname, record.getMessage()) for record in caplog.records]

    return start


def test_one_line_when_all_is_well(started):
    ready = "[QwenVL] ready (Python 3.12, torch 2.8.0+cu128, NVIDIA GeForce RTX 5090, sm_120, driver 581.29)"
    assert started(machine(RTX_5090)) == [("INFO", ready)]
    assert len(started(machine(RTX_4090, torch="2.9.1+cu128", without=FLASH))) == 1, "what costs nothing is not told"


def test_one_more_line_for_each_thing_that_is_wrong(started):
    lines = started(machine(RTX_5090, **OLD_TORCH, without=("bitsandbytes",)))
    assert [level for level, _ in lines] == ["INFO", "CRITICAL", "WARNING"]
    assert "pip install torch" in lines[1][1]


def test_a_model_is_told_what_it_lacks_once(monkeypatch, caplog):
    monkeypatch.setattr(module, "probe", lambda: machine(RTX_4090, without=LINEAR))
    PROCESS.logged.clear()
    for family in ("qwen3_vl", "qwen3_5", "qwen3_5"):
        family_report(family, family_of(family).linear_attention)
    (record,) = caplog.records
    assert (record.levelname, "qwen3_5 models" in record.getMessage()) == ("WARNING", True)
    PROCESS.logged.clear()


def test_several_gpus_are_all_named():
    line = in_a_line(machine(RTX_3090, RTX_4090, driver=None))
    assert line == "Python 3.12, torch 2.8.0+cu128, NVIDIA GeForce RTX 3090, sm_86, NVIDIA GeForce RTX 4090, sm_89"
