"""The fastest form is measured once, and never one that computes something else."""

import json
import threading

import pytest
import torch
from torch import nn

from qwenvl.cpu import choice
from qwenvl.cpu.choice import EIGHT, FOUR, HALF, PLAIN, Choices, plain, works
from qwenvl.cpu.linear import OneDnnLinear


class Slow(nn.Module):
    """A right product that takes long."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        for _ in range(30):
            result = x @ self.weight.t()
        return result


class Wrong(nn.Module):
    """A product that costs nothing and is wrong."""

    def __init__(self, weight, bias):
        super().__init__()
        self.rows = len(weight)

    def forward(self, x):
        return x.new_zeros(len(x), self.rows)


def missing(weight, bias):
    raise AttributeError("'_OpNamespace' 'quantized' object has no attribute 'linear'")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(choice, "_BEYOND_CACHES", 1 << 20)


def test_the_faster_form_is_taken_and_remembered(tmp_path, monkeypatch):
    file = tmp_path / "new" / "cpu.json"
    assert Choices(file).fastest({"slow": Slow, PLAIN: plain}, 256, 256, torch.bfloat16) == PLAIN
    assert Choices(file).fastest({"slow": Slow, "oneDNN": OneDnnLinear}, 256, 256, torch.bfloat16) == "oneDNN"
    monkeypatch.setattr(choice, "_measured", lambda *_: pytest.fail("measured again"))
    assert Choices(file).fastest({"slow": Slow, PLAIN: plain}, 256, 256, torch.bfloat16) == PLAIN


def test_another_number_of_threads_or_shape_is_measured_anew(tmp_path):
    choices = Choices(tmp_path / "cpu.json")
    choices.fastest(HALF, 64, 64, torch.bfloat16)
    choices.fastest(HALF, 64, 128, torch.bfloat16)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        choices.fastest(HALF, 64, 64, torch.bfloat16)
    finally:
        torch.set_num_threads(before)
    assert len(json.loads((tmp_path / "cpu.json").read_text())) == 3


@pytest.mark.parametrize("bad", [Wrong, missing])
def test_a_form_that_is_wrong_or_missing_is_left_out(bad):
    assert not works(bad, torch.bfloat16)
    assert Choices(None).fastest({"bad": bad, "slow": Slow}, 64, 64, torch.bfloat16) == "slow"
    assert Choices(None).fastest({"bad": bad}, 64, 64, torch.bfloat16) == PLAIN


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_this_torch_has_every_form(dtype):
    forms = {**EIGHT, **FOUR} | (HALF if dtype == torch.bfloat16 else {})
    assert [name for name, build in forms.items() if name != PLAIN and not works(build, dtype)] == []


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1}', "[" * 10_000, "\x00"])
def test_a_file_that_holds_something_else_is_measured_over(text, tmp_path):
    file = tmp_path / "cpu.json"
    file.write_text(text)
    assert Choices(file).fastest(HALF, 64, 64, torch.bfloat16) in HALF
    assert json.loads(file.read_text())


def test_a_name_that_is_not_a_form_is_measured_over(tmp_path):
    file = tmp_path / "cpu.json"
    Choices(file).fastest(HALF, 64, 64, torch.bfloat16)
    file.write_text(file.read_text().replace(': "', ': "no such '))
    assert Choices(file).fastest(HALF, 64, 64, torch.bfloat16) in HALF


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    assert Choices(tmp_path / "file" / "cpu.json").fastest(HALF, 64, 64, torch.bfloat16) in HALF


def test_no_setting_of_torch_is_changed(tmp_path):
    def settings():
        flags = torch.backends.mkldnn.enabled, torch.backends.quantized.engine
        return flags, torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()

    before, seen = settings(), set()
    stop = threading.Event()

    def look():
        while not stop.is_set():
            seen.add((torch._C._get_mkldnn_enabled(), torch.backends.quantized.engine))

    other = threading.Thread(target=look)
    other.start()
    for ways in (HALF, EIGHT, FOUR):
        Choices(None).fastest(ways, 256, 256, torch.bfloat16)
    stop.set()
    other.join()
    assert settings() == before
    assert len(seen) == 1
