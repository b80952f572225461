"""Small and read-only file systems for tests: real ones, which only root can mount, on Linux."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

PAGE = 4096


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """Mount a file system of that many bytes in a new folder."""
    folder.mkdir()
    _mount(folder, "-t", "tmpfs", "-o", f"size={size}", "none", str(folder))
    with _unmounted(folder):
        yield folder


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Make the file system read-only within the block, for root too."""
    _mount(folder, "--bind", str(folder), str(folder))
    with _unmounted(folder):
        _mount(folder, "-o", "remount,bind,ro", str(folder))
        yield


def fill(disk: Path, but: int = 0) -> Path:
    """Write a file that leaves only that many bytes free; return its path."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):  # others may write there meanwhile
        while (free := shutil.disk_usage(disk).free) > but:
            file.write(b"\0" * (free - but))
    return filler


def _mount(folder: Path, *arguments: str) -> None:
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip(f"a file system cannot be mounted at {folder}: that takes root, on Linux")
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted at {folder}: {done.stderr.strip()}")


@contextmanager
def _unmounted(folder: Path) -> Iterator[None]:
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
