import json
import shutil
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from nvml_double import RTX_5090, NvmlDouble
from pictures import ROOT

from qwenvl.cli import doctor
from qwenvl.cli.doctor import copy_bandwidth, examine, without_home
from qwenvl.comfyui import host
from qwenvl.models import catalog
from qwenvl.report import nvml


@pytest.fixture(autouse=True)
def started_anew():
    nvml._start.cache_clear()
    yield
    nvml._start.cache_clear()


@pytest.fixture
def report():
    """Examines this machine; returns what is told, and whether it is well."""

    def report(model=catalog.DEMO):
        lines = []
        well = examine(model, lines.append)
        return "\n".join(lines), well

    return report


def test_versions_findings_bandwidth_and_the_demo_models_answers_are_told(report):
    text, well = report()
    assert well
    assert text.startswith("ComfyUI_QwenVL 0.")
    for part in (
        f"torch {torch.__version__} (",
        "transformers ",
        "models run on ",
        "is a qwen3_vl model in ",
        "GB/s read and written by a copy on ",
        " tokens/s, ",
        "by the own step",
        "  phases: media",
        "  attention: sdpa; allowed flash",
        "the demo model's answers are right",
    ):
        assert part in text, part


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPU of this machine")
def test_a_gpu_that_torch_cannot_use_is_told_of_and_grave(report, monkeypatch):
    NvmlDouble(RTX_5090).install(monkeypatch)
    text, well = report()
    assert not well
    assert "GPU NVIDIA GeForce RTX 5090 (sm_120)\nNVIDIA driver 581.29" in text
    assert "critical: NVIDIA GeForce RTX 5090 (sm_120) is here" in text
    assert "To mend it: pip uninstall" in text


def test_a_wrong_answer_is_grave(report, monkeypatch):
    question, times, _ = doctor.SHORT
    monkeypatch.setattr(doctor, "SHORT", (question, times, "a blue square on a red background"))
    text, well = report()
    assert not well
    assert "critical: the demo model answers 'a red circle on a blue background'" in text


def test_a_damaged_demo_model_is_told_of(report, monkeypatch, tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    monkeypatch.setattr(catalog, "PACK", tmp_path)
    text, well = report()
    assert not well
    assert "critical: the demo model does not run: Demo-Shapes" in text
    assert "config.json is missing" in text


def test_nobodys_home_is_told(report, monkeypatch, tmp_path):
    """The pack under somebody's home, as it usually is."""
    monkeypatch.setattr(Path, "home", lambda: ROOT.parent)
    text, _ = report()
    assert f"in ~/{ROOT.name}\n" in text
    assert str(ROOT) not in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/al/ComfyUI", "~/ComfyUI"),
        ("'/home/al'", "'~'"),
        ("/home/alice/ComfyUI", "/home/alice/ComfyUI"),
        ("/home/al.bak", "/home/al.bak"),
    ],
)
def test_the_home_is_a_tilde_and_other_folders_stay(monkeypatch, text, shown):
    monkeypatch.setattr(Path, "home", lambda: Path("/home/al"))
    assert without_home(text) == shown


def test_a_root_as_home_hides_nothing(monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/"))
    assert without_home("/usr/lib") == "/usr/lib"


def test_the_family_of_the_chosen_model_is_told_if_it_is_on_disk(report, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_measure", lambda *_: True)
    monkeypatch.setattr(host, "model_roots", lambda: [tmp_path])
    name = "Qwen3-VL-4B-Instruct"
    text, well = report(name)
    assert well
    assert f"{name} is not on disk" in text
    folder = shutil.copytree(ROOT / "demo" / "model", tmp_path / f"Qwen--{name}")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "qwen3_5"}
    (folder / "config.json").write_text(json.dumps(config))
    assert f"{name} is a qwen3_5 model in " in report(name)[0]


def test_an_unknown_model_is_told_of_and_the_rest_goes_on(report, monkeypatch):
    monkeypatch.setattr(doctor, "_measure", lambda *_: True)
    text, _ = report("Qwen9")
    assert "error: Model 'Qwen9' is not in the list" in text


def test_the_bandwidth_of_a_copy_is_its_bytes_both_ways_over_its_time(monkeypatch):
    clock = count()  # a second passes between any two looks at it
    monkeypatch.setattr(doctor, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert copy_bandwidth("cpu", size=1000) == 2000


def test_a_copy_on_a_cpu_is_a_quarter_of_a_gigabyte():
    assert doctor._copied_bytes("cpu") == 256 << 20
