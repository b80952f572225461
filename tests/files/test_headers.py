"""The headers of weights: read once for a load, and bounded before anything is made of them."""

import json
import shutil
import struct
import subprocess
import sys

import pytest
import tiny
from pictures import ROOT

from qwenvl.files import headers as weights
from qwenvl.files.bounded_json import HEADER
from qwenvl.files.headers import BrokenWeightsError, headers, weight_headers, weight_map
from qwenvl.loading.capabilities import machine
from qwenvl.loading.source import ModelSource
from qwenvl.models.download import why_incomplete
from qwenvl.request import LoadSpec


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(tiny.DEMO_FOLDER, tmp_path / "model")


def write(folder, header, data=b""):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)


def test_headers_are_read_once_for_a_load(folder):
    before = weights._headers.cache_info().misses
    assert why_incomplete(folder) is None
    source = ModelSource(LoadSpec("m"), folder, machine("cpu"))
    source.size()
    source.load()
    assert why_incomplete(folder) is None
    assert weights._headers.cache_info().misses == before + 1


def test_they_are_read_again_when_a_file_has_changed(folder):
    assert len(weight_headers(folder)) > 100
    told = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    write(folder, json.dumps({"a": told}).encode(), b"1234")
    assert weight_headers(folder) == {"a": told}
    assert weight_map(folder) == {"a": folder / "model.safetensors"}
    (folder / "model.safetensors").unlink()
    assert headers(folder) == {}
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}')
    (folder / "a.safetensors").write_bytes(b"")
    with pytest.raises(BrokenWeightsError, match=r"^a\.safetensors is cut short|^b\.safetensors is missing"):
        headers(folder)


MEASURE = """
import sys
sys.path.insert(0, 'tests/support')
import peak
from pathlib import Path
from qwenvl.models.download import why_incomplete
peak.begin()
before = peak.peak_mb()
told = why_incomplete(Path(sys.argv[1]))
print(peak.peak_mb() - before, told)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no getrusage on Windows")
@pytest.mark.parametrize("text", [b"[],", b"{},", b'{"a":{}},', b"1,"])
@pytest.mark.parametrize("share", [1, 30])
def test_a_header_of_nothing_but_brackets_holds_little_memory(folder, text, share):
    """Whole, as long as a header may be, and as long as what is parsed."""
    write(folder, b'{"a":[' + text * (HEADER.size // share // len(text) - 9) + b"0]}", b"1234")
    done = subprocess.run([sys.executable, "-c", MEASURE, folder], cwd=ROOT, capture_output=True, text=True, check=True)
    size, _, told = done.stdout.partition(" ")
    assert "cannot be read" in told
    assert int(size) < 300
