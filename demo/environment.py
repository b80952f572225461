"""Makes a virtual environment in the checkout with everything that development needs, in fixed versions.

Any Python 3 can read this file, so that a version that is too old gets a sentence.
"""

import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "tests" / "requirements"
OLDEST_PYTHON = (3, 10)
# Installed without its dependencies: it asks for its own build of torch, which adds gigabytes of CUDA to a CPU torch.
TORCHVISION = "torchvision==0.28.0"
# Settings of pip by which packages would not be installed into the environment.
_ASTRAY = ("PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_NO_DEPS", "PIP_DRY_RUN", "PIP_QUIET")

# PyPI's torchvision is a CUDA build. Next to a CPU torch its library does not load, and importing the rest
# of it (all that image and video processors use) fails at two operators that nothing has declared.
DECLARE_OPERATORS = """
if not _has_ops() and not hasattr(torch.ops.torchvision, "nms"):
    torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torch.library.define("torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


class SetupError(Exception):
    """The environment cannot be made; the message is a sentence for the user."""


def python(versions: str = "pinned") -> Path:
    """Return the environment's interpreter. Make the environment the first time, and again when its contents change.

    If that fails, the process ends with a sentence and status 1.

    Args:
        versions: transformers "pinned", "oldest" (the first that the pack supports), or "newest" (of the index).
    """
    try:
        _require_python()
        return _made(versions)
    except SetupError as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(f"{_folder(versions)} cannot be written ({error}). The checkout must lie where you may write.")
    except KeyboardInterrupt:
        sys.exit("Stopped. The same command begins again.")


def _made(versions: str) -> Path:
    folder = _folder(versions)
    interpreter = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    files = [REQUIREMENTS / "common.txt", REQUIREMENTS / f"{versions}.txt"]
    holds = [*(file.read_text(encoding="utf-8") for file in files), TORCHVISION, DECLARE_OPERATORS, sys.version]
    stamp = hashlib.sha256("\n".join(holds).encode()).hexdigest()
    # Written last, so that an interrupted set-up is done again.
    stamp_file = folder / "complete.txt"
    if not stamp_file.is_file() or stamp_file.read_text(encoding="utf-8") != stamp:
        _make(folder, interpreter, files)
        stamp_file.write_text(stamp, encoding="utf-8")
    elif versions == "newest":
        _pip(interpreter, "--quiet", "--upgrade", "-r", str(files[1]))
    return interpreter


def _folder(versions: str) -> Path:
    return ROOT / (".venv" if versions == "pinned" else f".venv-{versions}")


def _require_python() -> None:
    here = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < OLDEST_PYTHON:
        raise SetupError("Python {}.{} or later is needed, and {} is {}.".format(*OLDEST_PYTHON, sys.executable, here))
    missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    if missing:
        raise SetupError(
            f"{sys.executable} has no module {' and no module '.join(missing)}, which make the environment. On Debian "
            f"and Ubuntu: apt install python{sys.version_info[0]}.{sys.version_info[1]}-venv"
        )


def _make(folder: Path, interpreter: Path, files: list) -> None:
    import venv

    print(
        f"Setting up {folder}, once: 1.7 GB on the disk with a torch for the CPU, 5.4 GB with one for CUDA. "
        "Most of it is torch.",
        file=sys.stderr,
        flush=True,
    )
    try:
        venv.create(folder, with_pip=True, clear=True)
    except subprocess.CalledProcessError as error:
        raise SetupError(f"{sys.executable} could not make {folder}: {error}") from error
    _pip(interpreter, *(option for file in files for option in ("-r", str(file))))
    _pip(interpreter, "--no-deps", TORCHVISION)
    _make_torchvision_importable(interpreter)


def _pip(interpreter: Path, *arguments: str) -> None:
    """Install packages. pip's progress goes to standard error, with a bar if that is a terminal."""
    given = {name: value for name, value in os.environ.items() if name.upper() not in _ASTRAY}
    command = [str(interpreter), "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    # PIP_USER is 0, because a variable overrides pip's file of settings.
    done = subprocess.run(command, env={**given, "PIP_USER": "0"}, stdout=sys.stderr, check=False)
    if done.returncode:
        raise SetupError(
            f"pip could not install all that is needed; what it says is above. It takes the package index, or a mirror "
            f"that PIP_INDEX_URL names, and room on the disk of {ROOT}. The same command begins again."
        )


def _make_torchvision_importable(interpreter: Path) -> None:
    find = "import sysconfig, torch; print(torch.version.cuda or ''); print(sysconfig.get_paths()['purelib'])"
    found = subprocess.run([str(interpreter), "-c", find], capture_output=True, text=True, check=False)
    if found.returncode:
        raise SetupError(f"torch was installed and cannot be imported: {found.stderr.strip().splitlines()[-1:]}")
    cuda, packages = found.stdout.splitlines()
    if not cuda:
        with (Path(packages) / "torchvision" / "extension.py").open("a", encoding="utf-8") as file:
            file.write(DECLARE_OPERATORS)
