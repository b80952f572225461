"""A virtual environment in the checkout with everything that development needs, in fixed versions."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "tests" / "requirements"
# Without its dependencies: it asks for its own build of torch, which next to a CPU torch is gigabytes of CUDA.
TORCHVISION = "torchvision==0.28.0"

# PyPI's torchvision is a CUDA build. Next to a CPU torch its library does not load, and importing the rest
# of it (all that image and video processors use) fails at two operators that nothing has declared.
DECLARE_OPERATORS = """
if not _has_ops() and not hasattr(torch.ops.torchvision, "nms"):
    torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torch.library.define("torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def python(versions: str = "newest") -> Path:
    """The environment's interpreter. Makes the environment the first time, and again when what it holds changed.

    Args:
        versions: "newest" or "oldest", the transformers that the pack supports.
    """
    folder = ROOT / (".venv" if versions == "newest" else f".venv-{versions}")
    interpreter = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    files = [REQUIREMENTS / "common.txt", REQUIREMENTS / f"{versions}.txt"]
    holds = [*(file.read_text(encoding="utf-8") for file in files), TORCHVISION, DECLARE_OPERATORS, sys.version]
    stamp = hashlib.sha256("\n".join(holds).encode()).hexdigest()
    # Written last, so that a set-up that was cut off is done again.
    stamp_file = folder / "complete.txt"
    if stamp_file.is_file() and stamp_file.read_text(encoding="utf-8") == stamp:
        return interpreter
    print(f"Setting up {folder} (once; the largest part is torch) ...", file=sys.stderr)
    venv.create(folder, with_pip=True, clear=True)
    _pip(interpreter, *(option for file in files for option in ("-r", str(file))))
    _pip(interpreter, "--no-deps", TORCHVISION)
    _make_torchvision_importable(interpreter)
    stamp_file.write_text(stamp, encoding="utf-8")
    return interpreter


def _pip(interpreter: Path, *arguments: str) -> None:
    options = ["--quiet", "--disable-pip-version-check"]
    subprocess.run([interpreter, "-m", "pip", "install", *options, *arguments], check=True)


def _make_torchvision_importable(interpreter: Path) -> None:
    find = "import sysconfig, torch; print(torch.version.cuda or ''); print(sysconfig.get_paths()['purelib'])"
    found = subprocess.run([interpreter, "-c", find], check=True, capture_output=True, text=True)
    cuda, packages = found.stdout.splitlines()
    if not cuda:
        with (Path(packages) / "torchvision" / "extension.py").open("a", encoding="utf-8") as file:
            file.write(DECLARE_OPERATORS)
