import platform
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from nvml_double import RTX_5090, NvmlDouble

from qwenvl.report import nvml
from qwenvl.report.facts import Gpu, capability_of, probe


@pytest.fixture(autouse=True)
def started_anew():
    nvml._start.cache_clear()
    yield
    nvml._start.cache_clear()


def test_the_facts_are_those_of_this_process():
    facts = probe()
    assert (facts.torch, facts.cuda, facts.hip) == (torch.__version__, torch.version.cuda, torch.version.hip)
    assert facts.python == platform.python_version()
    assert facts.packages["transformers"] == metadata.version("transformers")
    assert "cpu" in facts.bitsandbytes_builds
    assert facts.archs == tuple(torch.cuda.get_arch_list())


def test_the_gpus_are_known_without_a_cuda_context(monkeypatch):
    NvmlDouble(RTX_5090, driver="572.16").install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: pytest.fail("this starts a context"))
    facts = probe()
    assert facts.gpus == (Gpu("NVIDIA GeForce RTX 5090", "sm_120"),)
    assert facts.driver == "572.16"


def test_where_there_is_a_context_the_gpus_are_those_that_torch_sees(monkeypatch):
    """CUDA_VISIBLE_DEVICES hides GPUs from torch, not from NVML."""
    NvmlDouble(RTX_5090).install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    seen = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, gcnArchName="")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: seen)
    assert probe().gpus == (Gpu("NVIDIA H100", "sm_90"),)


def test_a_flash_attn_that_cannot_be_imported_is_found_only_when_asked(monkeypatch, tmp_path):
    (tmp_path / "flash_attn_2_cuda.py").write_text("raise ImportError('x.so: undefined symbol: _ZN3c104cuda')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert probe().flash_attn_error == ""
    assert "flash_attn_2_cuda" not in sys.modules
    assert probe(thorough=True).flash_attn_error == "x.so: undefined symbol: _ZN3c104cuda"


def test_the_portable_python_is_called_by_its_path(monkeypatch):
    assert probe().pip == "pip"
    monkeypatch.setattr(sys, "executable", "/ComfyUI_windows_portable/python_embeded/python.exe")
    assert probe().pip == r"python_embeded\python.exe -m pip"


@pytest.mark.parametrize(
    ("arch", "capability"),
    [("sm_75", (7, 5)), ("sm_100", (10, 0)), ("sm_120a", (12, 0)), ("sm_103f", (10, 3)), ("gfx942", None)],
)
def test_an_architecture_is_read(arch, capability):
    assert capability_of(arch) == capability
