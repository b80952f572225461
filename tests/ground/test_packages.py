"""What is decided for the report and for the loader alike; test_report and test_attention see what each makes of it."""

import sys
from importlib import metadata

import pytest

from qwenvl.packages import (
    FLASH,
    has_build,
    lack_of_bitsandbytes,
    lack_of_flash,
    not_installed,
    release,
    version_of,
    why_not_imported,
    without_kernels,
)

PORTABLE = r"python_embeded\python.exe -m pip"


def test_a_lack_says_what_is_wrong_and_the_command_for_the_pip_that_is_there():
    lack = not_installed("accelerate")
    assert str(lack) == "accelerate is not installed (pip install accelerate)"
    assert lack.command(PORTABLE) == rf"{PORTABLE} install accelerate"
    assert str(lack_of_bitsandbytes("0.50", "mps")) == "bitsandbytes does not run on Apple GPUs", "nothing mends it"


@pytest.mark.parametrize(
    ("version", "device", "oldest", "what"),
    [
        (None, "cuda:0", "", "bitsandbytes is not installed"),
        (None, "cpu", "", "bitsandbytes is not installed"),
        ("0.48.2", "cpu", "0.43.1", "bitsandbytes 0.49 or later is needed on a CPU, and 0.48.2 is installed"),
        ("0.45.0", "cuda:0", "0.46.1", "bitsandbytes 0.46.1 or later is needed, and 0.45.0 is installed"),
        ("unknown", "cuda:0", "0.46.1", "bitsandbytes 0.46.1 or later is needed, and unknown is installed"),
        ("0.45.0", "cuda:0", "", None),
        ("0.46.1", "xpu:0", "0.46.1", None),
        ("0.49.0.dev0", "cpu", "", None),
    ],
)
def test_bitsandbytes_must_be_there_and_new_enough_for_the_device(version, device, oldest, what):
    lack = lack_of_bitsandbytes(version, device, oldest)
    assert (lack and lack.what) == what
    assert lack is None or "bitsandbytes" in lack.command()


@pytest.mark.parametrize(
    ("version", "toolkit", "found"),
    [
        ("0.47.0", "CUDA 12.8", True),
        ("0.47.0", "CUDA 12.9", False),
        ("0.50.0", "CUDA 12.9", True),
        ("0.50.0", "CUDA 13.0", False),
        ("0.47.0", "ROCm 6.4.43483-a187df25c", True),
        ("0.50.0", "ROCm 7", False),
        ("0.50.0", "CUDA unknown", False),
    ],
)
def test_bitsandbytes_needs_a_build_for_the_toolkit_and_from_0_50_on_one_of_its_major_version(version, toolkit, found):
    assert has_build(version, toolkit, ("cpu", "cuda128", "rocm64")) == found


def test_a_lack_of_kernels_names_what_there_are():
    assert without_kernels("0.47.0", "CUDA 13.0", ("cpu", "cuda128")).what == (
        "bitsandbytes 0.47.0 has no kernels for CUDA 13.0, only for cpu, cuda128"
    )
    assert str(without_kernels("0.47.0", "CUDA 13.0")) == (
        "bitsandbytes 0.47.0 has no kernels for CUDA 13.0 (pip install -U bitsandbytes)"
    )


@pytest.mark.parametrize(
    ("name", "version", "problem", "torch", "sentence"),
    [
        (
            "flash_attention_2",
            None,
            "",
            "",
            "flash-attn is not installed (pip install flash-attn --no-build-isolation)",
        ),
        ("flash_attention_3", None, "", "", "flash-attn-3 is not installed (build it from flash-attention/hopper)"),
        (
            "flash_attention_3",
            "3.0.0",
            "no symbol",
            "",
            "flash-attn-3 3.0.0 does not load (no symbol) (build it from flash-attention/hopper)",
        ),
        (
            "flash_attention_4",
            "4.0.0",
            "no symbol",
            "",
            "flash-attn-4 4.0.0 does not load (no symbol) "
            "(pip uninstall -y flash-attn-4 && pip install --pre flash-attn-4 --no-cache-dir)",
        ),
        (
            "flash_attention_2",
            "2.8.3+cu12torch2.7",
            "",
            "2.8.0+cu128",
            "flash-attn 2.8.3+cu12torch2.7 was built for torch 2.7, and this is torch 2.8.0+cu128 "
            "(pip uninstall -y flash-attn && pip install flash-attn --no-build-isolation --no-cache-dir)",
        ),
        ("flash_attention_2", "2.8.3+cu12torch2.8", "", "2.8.0+cu128", None),
        ("flash_attention_2", "2.8.3+cu12torch2.7", "", "", None),
        ("flash_attention_2", "2.8.3", "", "2.8.0", None),
    ],
)
def test_a_flash_attention_must_be_there_load_and_be_built_for_this_torch(name, version, problem, torch, sentence):
    lack = lack_of_flash(FLASH[name], version, problem, torch)
    assert (lack and str(lack)) == sentence


def test_the_version_is_that_of_the_first_name_that_is_installed(monkeypatch):
    assert version_of("no-such-package", "pytest") == metadata.version("pytest")
    assert version_of("no-such-package") is None
    monkeypatch.setattr(metadata, "version", lambda name: None)
    assert version_of("pytest") == "unknown", "its metadata is broken"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", ""),
        ("raise ImportError('x.so: undefined symbol\\nmore')", "x.so: undefined symbol"),
        ("raise OSError('libcudart.so.12: no such file')", "libcudart.so.12: no such file"),
        ("raise ImportError", "ImportError"),
    ],
)
def test_what_goes_wrong_at_an_import_is_told_in_a_line(content, problem, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_for_a_test.py").write_text(content)
    monkeypatch.delitem(sys.modules, "broken_for_a_test", raising=False)
    assert why_not_imported("broken_for_a_test") == problem
    monkeypatch.delitem(sys.modules, "broken_for_a_test", raising=False)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("2.9.1+cu128", (2, 9, 1)),
        ("2.13.0a0+git", (2, 13, 0)),
        ("5.2.0.dev0", (5, 2, 0)),
        ("2.9.0a0+50eac811a6.nv25.09", (2, 9, 0)),
        ("2.8.3+cu12torch2.7cxx11abiTRUE", (2, 8, 3)),
        ("570.86.15", (570, 86, 15)),
        ("12.8", (12, 8)),
        ("6.4.43483-a187df25c", (6, 4, 43483)),
    ],
)
def test_the_numbers_of_a_version_are_read_whatever_follows(text, numbers):
    assert release(text) == numbers


@pytest.mark.parametrize("text", ["", "unknown", "git-3f2a", "-", "1" * 5000, "2.9.x", None])
def test_what_is_no_version_is_older_than_any(text):
    """A broken installation has anything in its place, or nothing."""
    assert release(text) == (0,)


def test_the_first_of_several_digits_is_compared_as_a_number():
    assert release("5.10.1") > release("5.2") > release("4.57.1") > release("4.57")
