"""Wheels that are carried to a machine without a package index."""

import base64
import csv
import hashlib
import zipfile

import pytest

from benchmarks.wheels import KEPT_LIBRARY, PINS, pins, repacked, too_large

RECORD = "bitsandbytes-1.0.dist-info/RECORD"


def made(folder, *libraries):
    """A wheel with these libraries, a module, and a record of all."""
    wheel = folder / "bitsandbytes-1.0-py3-none-any.whl"
    files = {f"bitsandbytes/{name}": name.encode() * 100 for name in libraries} | {
        "bitsandbytes/__init__.py": b"x = 1\n"
    }
    with zipfile.ZipFile(wheel, "w") as target:
        for name, content in files.items():
            target.writestr(name, content)
        target.writestr(RECORD, "".join(f"{name},sha256=old,{len(content)}\n" for name, content in files.items()))
    return wheel


def test_one_library_is_kept_and_the_record_is_of_what_is_there(tmp_path):
    wheel = made(
        tmp_path, *(f"libbitsandbytes_{name}.so" for name in ("cuda130", "cuda128", "rocm71", "xpu2026", "cpu"))
    )
    out = tmp_path / "out"
    out.mkdir()
    with zipfile.ZipFile(repacked(wheel, out)) as found:
        assert found.testzip() is None
        assert found.namelist() == [KEPT_LIBRARY, "bitsandbytes/__init__.py", RECORD]
        *rows, own = csv.reader(found.read(RECORD).decode().splitlines())
        assert own == [RECORD, "", ""]
        for name, digest, size in rows:
            content = found.read(name)
            hashed = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
            assert (digest, int(size)) == (f"sha256={hashed}", len(content))
        assert [row[0] for row in rows] == found.namelist()[:-1]


def test_a_wheel_without_libraries_of_that_kind_keeps_everything(tmp_path):
    wheel = made(tmp_path, "libother.so")
    out = tmp_path / "out"
    out.mkdir()
    with zipfile.ZipFile(repacked(wheel, out)) as found:
        assert found.namelist() == ["bitsandbytes/libother.so", "bitsandbytes/__init__.py", RECORD]


def test_where_the_library_has_another_name_nothing_is_carried_silently(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ValueError, match=r"has no bitsandbytes/libbitsandbytes_cuda130\.so"):
        repacked(made(tmp_path, "libbitsandbytes_cuda140.so"), out)


def test_versions_are_those_of_the_tests():
    found = pins(PINS.read_text(encoding="utf-8"))
    assert [entry.split("==")[0] for entry in found] == ["bitsandbytes", "av"]
    text = 'av==2; python_version >= "3.11"\nav==1; python_version < "3.11"\nbitsandbytes==3 # why\n-r other.txt\n\n'
    assert pins(text) == ["av==2", "bitsandbytes==3"]
    assert pins(text, "3.10") == ["av==1", "bitsandbytes==3"]


def test_sizes_are_told_and_checked_together(tmp_path, capsys):
    for name in "ab":
        (tmp_path / f"{name}-1-py3-none-any.whl").write_bytes(bytes(2 << 20))
    assert too_large(tmp_path, 4) is None
    assert "   2.0 MiB  a-1-py3-none-any.whl\n" in capsys.readouterr().out
    assert "have 4.0 MiB, and 3 MiB are allowed" in too_large(tmp_path, 3)
