"""Downloads wheels for a GPU machine that has no package index: python -m benchmarks.wheels --out DIR

For Linux on x86-64 and Python 3.12 with torch, transformers and pytest: PyAV, and bitsandbytes with only the library
that fits CUDA 13 (the others are ten times as large). Versions are those of the tests. Fails if the wheels together are
larger than --most-mib.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from packaging.requirements import Requirement

PACKAGES = ("av", "bitsandbytes")
PYTHON = "3.12"
# pip needs each name: a wheel for an older glibc has an older one.
PLATFORMS = (
    *(f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17)),
    *("manylinux2014_x86_64", "manylinux1_x86_64"),
)
PINS = Path(__file__).resolve().parent.parent / "tests" / "requirements" / "common.txt"
LIBRARY = re.compile(r"bitsandbytes/libbitsandbytes_\w+\.(so|dll|dylib)$")
KEPT_LIBRARY = "bitsandbytes/libbitsandbytes_cuda130.so"
MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder; older wheels of these packages in it go")
    parser.add_argument("--most-mib", type=float, default=64, help="for all of them together")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as downloads:
        _download(Path(downloads))
        for package in PACKAGES:
            for older in options.out.glob(f"{package}-*.whl"):
                older.unlink()
        for wheel in sorted(Path(downloads).iterdir()):
            repacked(wheel, options.out)
    sys.exit(too_large(options.out, options.most_mib))


def pins(requirements: str, python: str = PYTHON) -> list[str]:
    """Return name==version of each package, from the text of a requirements file."""
    lines = (line.split("#")[0].strip() for line in requirements.splitlines())
    found = [Requirement(line) for line in lines if line and not line.startswith("-")]
    there = [item for item in found if not item.marker or item.marker.evaluate({"python_version": python})]
    return [f"{item.name}{item.specifier}" for item in there if item.name in PACKAGES]


def _download(folder: Path) -> None:
    wanted = pins(PINS.read_text(encoding="utf-8"))
    platforms = [part for platform in PLATFORMS for part in ("--platform", platform)]
    only = ["--no-deps", "--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp", *platforms]
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", *only, "-d", str(folder), *wanted], check=True)


def repacked(wheel: Path, folder: Path) -> Path:
    """Copy a wheel into the folder, without the libraries of bitsandbytes that are not needed; return its path.

    Raises:
        ValueError: it has libraries of bitsandbytes, but not the one that is kept.
    """
    smaller = folder / wheel.name
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED) as target:
        names = source.namelist()
        if any(LIBRARY.match(name) for name in names) and KEPT_LIBRARY not in names:
            raise ValueError(
                f"{wheel.name} has no {KEPT_LIBRARY}: which of its libraries fits CUDA 13 has to be looked up."
            )
        record = next(name for name in names if name.endswith(".dist-info/RECORD"))
        rows = []
        for entry in source.infolist():
            if entry.is_dir() or entry.filename == record or _is_dropped(entry.filename):
                continue
            content = source.read(entry)
            target.writestr(entry, content, zipfile.ZIP_DEFLATED)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
            rows.append(f"{entry.filename},sha256={digest},{len(content)}\n")
        target.writestr(record, "".join([*rows, f"{record},,\n"]))
    return smaller


def _is_dropped(name: str) -> bool:
    return bool(LIBRARY.match(name)) and name != KEPT_LIBRARY


def too_large(folder: Path, most_mib: float) -> str | None:
    """Print the size of each wheel; return a sentence if all together are too large, else None."""
    sizes = {wheel.name: wheel.stat().st_size / MIB for wheel in sorted(folder.glob("*.whl"))}
    for name, size in sizes.items():
        print(f"{size:6.1f} MiB  {name}")
    total = sum(sizes.values())
    print(f"{total:6.1f} MiB  together")
    if total <= most_mib:
        return None
    return f"The wheels in {folder} have {total:.1f} MiB, and {most_mib:g} MiB are allowed: take some out."


if __name__ == "__main__":
    main()
