"""Packages that are not installed: named where they are needed, and by the doctor; each in a process of its own."""

import json
import os
import subprocess
import sys

import pytest
from pictures import ROOT, draw

from qwenvl.cli import parts
from qwenvl.packages import NEEDED

RUN = """
import sys
sys.modules.update(dict.fromkeys(sys.argv[1].split()))
from qwenvl.__main__ import main
sys.exit(main(sys.argv[2:]))
"""
SAMPLE = str(ROOT / "demo" / "sample.png")
ENGINE = {"engines": {"studio": {"base_url": "http://127.0.0.1:9/v1", "model": "m"}}}


def ran(lacking, *arguments, home):
    """The command line in a Python that cannot find those modules."""
    given = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(home), "USERPROFILE": str(home)}
    return subprocess.run(
        [sys.executable, "-c", RUN, lacking, *arguments], env=given, capture_output=True, text=True, check=False
    )


@pytest.fixture
def folder(tmp_path):
    """With a picture and a film that is none, and a home whose user has an engine."""
    draw("circle", "red", "blue").save(tmp_path / "a.png")
    (tmp_path / "film.mp4").write_bytes(b"no film")
    own = tmp_path / ".config" / "qwenvl" / "custom_models.json"
    own.parent.mkdir(parents=True)
    own.write_text(json.dumps(ENGINE))
    return tmp_path


@pytest.mark.parametrize(
    ("module", "name", "asked"),
    [
        ("yaml", "pyyaml", ["hi", "--preset", "describe briefly"]),
        ("PIL", "pillow", ["--image", SAMPLE, "What is this?"]),
        ("av", "av", ["--video", "film.mp4", "What happens?"]),
        ("aiohttp", "aiohttp", ["hi", "--model", "studio @ engine"]),
        ("torchvision", "torchvision", ["--image", SAMPLE, "What is this?"]),
        ("tokenizers", "tokenizers", ["hi"]),
        ("transformers", "transformers", ["hi"]),
        ("safetensors", "safetensors", ["hi"]),
        ("numpy", "numpy", ["hi"]),
        ("jinja2", "jinja2", ["hi"]),
        ("torch", "torch", ["hi"]),
        ("tqdm", "tqdm", ["caption", ".", "--prompt", "What is this?"]),
    ],
)
def test_what_is_missing_is_named_where_it_is_needed(folder, module, name, asked):
    asked = [str(folder) if part == "." else str(folder / part) if part == "film.mp4" else part for part in asked]
    done = ran(module, *asked, home=folder)
    assert done.returncode == 2
    assert f"{name} is not installed (pip install {name})" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["caption", "--help"], ["doctor", "--help"], ["--list-models"]])
def test_help_and_lists_need_none_of_them(tmp_path, arguments):
    done = ran(" ".join(NEEDED), *arguments, home=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_the_doctor_names_all_that_are_missing_and_needs_none_of_them(tmp_path):
    done = ran(" ".join(NEEDED), "doctor", home=tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    *told, last = done.stdout.splitlines()
    names = [pip for pip, _ in NEEDED.values()]
    assert [line.split()[1] for line in told] == names
    assert [line.rpartition(": ")[2] for line in told] == [f"pip install {name}" for name in names]
    assert last == "the rest of the report needs what is missing"


def test_the_doctor_measures_what_runs_without_the_missing_part(tmp_path):
    done = ran("av aiohttp", "doctor", home=tmp_path)
    assert done.returncode == 1
    assert "av is not installed: films cannot be read. To mend it: pip install av" in done.stdout
    assert "aiohttp is not installed" in done.stdout
    assert "the demo model's answers are right" in done.stdout
    assert "nothing is missing" not in done.stdout


def test_an_import_that_fails_for_another_reason_is_no_missing_part(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwenvl.cli.doctor", None)
    monkeypatch.delattr(sys.modules["qwenvl.cli"], "doctor", raising=False)
    with pytest.raises(ModuleNotFoundError):
        parts.examine("any", lambda line: None)
