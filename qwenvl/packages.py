"""Checks of installed packages and versions, and why one cannot be used; shared by the report and the loader.

Both find out by themselves what is installed and what loads, the report without importing anything.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

# transformers 5 requires it.
OLDEST_ACCELERATE = "1.1"
# The first version of bitsandbytes with kernels for the CPU.
OLDEST_ON_CPU = "0.49"
# From this version on a 4bit layer takes one kernel for each token; before, several.
FAST_4BIT = "0.50"
# From this version on any build of the same major version of CUDA or ROCm will do.
ANY_MINOR = (0, 50)


@dataclass(frozen=True, slots=True)
class Lack:
    """Why a package cannot be used, and the command that fixes it, with {pip} in place of pip; "" if no command can."""

    what: str
    mend: str = ""

    def command(self, pip: str = "pip") -> str:
        """Return the fixing command with pip called by that name."""
        return self.mend.replace("{pip}", pip)

    def __str__(self) -> str:
        return f"{self.what} ({self.command()})" if self.mend else self.what


class MissingPackageError(RuntimeError):
    """A package that the request needs is not installed."""


# Module -> its name for pip, and what fails without it. The first ones are needed for every answer.
NEEDED = {
    "torch": ("torch", "nothing runs"),
    "transformers": ("transformers", "nothing runs"),
    "tokenizers": ("tokenizers", "nothing runs"),
    "huggingface_hub": ("huggingface_hub", "nothing runs"),
    "safetensors": ("safetensors", "nothing runs"),
    "numpy": ("numpy", "nothing runs"),
    "PIL": ("pillow", "nothing runs"),
    "jinja2": ("jinja2", "nothing runs"),
    "packaging": ("packaging", "nothing runs"),
    "psutil": ("psutil", "nothing runs"),
    "torchvision": ("torchvision", "models that see cannot be loaded"),
    "tqdm": ("tqdm", "transformers does not start, and no folder can be captioned"),
    "yaml": ("pyyaml", "transformers does not start, and presets cannot be read"),
    "av": ("av", "films cannot be read"),
    "aiohttp": ("aiohttp", "engines cannot be asked"),
    "json_repair": ("json-repair", "boxes that are nearly JSON cannot be read"),
}


@dataclass(frozen=True, slots=True)
class Flash:
    """A version of FlashAttention: its name for pip, module, lowest compute capability, and how to install it."""

    package: str
    module: str
    oldest: tuple[int, int]
    install: str


FLASH = {
    "flash_attention_2": Flash("flash-attn", "flash_attn", (0, 0), "{pip} install flash-attn --no-build-isolation"),
    "flash_attention_3": Flash("flash-attn-3", "flash_attn_interface", (8, 0), "build it from flash-attention/hopper"),
    "flash_attention_4": Flash("flash-attn-4", "flash_attn.cute", (9, 0), "{pip} install --pre flash-attn-4"),
}


def version_of(*distributions: str) -> str | None:
    """Return the version of the first distribution that is installed; None if none is."""
    for name in distributions:
        with suppress(importlib.metadata.PackageNotFoundError):
            # Broken metadata holds no version.
            return importlib.metadata.version(name) or "unknown"
    return None


def why_not_imported(module: str) -> str:
    """Import the module and return the first line of its error; "" if it loads."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:
        return next(iter(str(error).splitlines()), type(error).__name__)
    return ""


def missing() -> dict[str, Lack]:
    """Return module -> Lack for every needed package that is not installed."""
    return {name: not_installed(pip) for name, (pip, _) in NEEDED.items() if not _is_there(name)}


def require(*modules: str) -> None:
    """Raise MissingPackageError for the first module that is not installed: transformers blames the model's files."""
    for name in modules:
        if not _is_there(name):
            raise MissingPackageError(str(not_installed(NEEDED[name][0])))


def lack_of_module(error: ModuleNotFoundError) -> str:
    """Explain an import that failed because a package is not installed."""
    name = _name_of(error)
    return str(not_installed(NEEDED[name][0] if name in NEEDED else name)) if name else str(error)


def is_needed(error: ModuleNotFoundError) -> bool:
    """Return True if the missing module is one that this pack needs; a model folder may ask for others."""
    return _name_of(error) in NEEDED


def _name_of(error: ModuleNotFoundError) -> str:
    # For a missing distribution, transformers puts a whole sentence into error.name.
    quoted = re.search(r"'([\w-]+)", error.name or "")
    name = quoted[1] if quoted else (error.name or "").partition(".")[0]
    return next((module for module, (pip, _) in NEEDED.items() if pip == name), name)


@contextmanager
def naming_what_is_missing() -> Iterator[None]:
    """Context manager that turns a failed import into a MissingPackageError with the install command."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingPackageError(lack_of_module(error)) from error


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # a module in sys.modules whose __spec__ is None
        return module in sys.modules


def not_installed(package: str) -> Lack:
    return Lack(f"{package} is not installed", f"{{pip}} install {package}")


def lack_of_accelerate(version: str | None, taken: bool | None = None) -> Lack | None:
    """Return why accelerate cannot be used, or None. Pure.

    Args:
        version: the installed version, None if it is not installed.
        taken: True if transformers accepts it; None decides by the version.
    """
    if version is None:
        return not_installed("accelerate")
    if taken or (taken is None and release(version) >= release(OLDEST_ACCELERATE)):
        return None
    what = f"accelerate {version} is too old: {OLDEST_ACCELERATE} or later is needed"
    return Lack(what, "{pip} install -U accelerate")


def lack_of_bitsandbytes(version: str | None, device: str, oldest: str = "") -> Lack | None:
    """Return why bitsandbytes cannot be used on a device, judging by its version, or None. Pure.

    Args:
        version: the installed version, None if it is not installed.
        device: as torch names it.
        oldest: the lowest version that transformers accepts; "" if unknown.
    """
    if device.startswith("mps"):
        return Lack("bitsandbytes does not run on Apple GPUs")
    if version is None:
        return not_installed("bitsandbytes")
    needed, where = (OLDEST_ON_CPU, " on a CPU") if device == "cpu" else (oldest, "")
    if needed and release(version) < release(needed):
        what = f"bitsandbytes {needed} or later is needed{where}, and {version} is installed"
        return Lack(what, "{pip} install -U bitsandbytes")
    return None


def without_kernels(version: str, toolkit: str, builds: Sequence[str] = ()) -> Lack:
    """Describe that bitsandbytes has no kernels for the CUDA or ROCm that torch was built for. Pure.

    Args:
        toolkit: as in CUDA 12.8.
        builds: those that bitsandbytes has kernels for, empty if unknown.
    """
    others = f", only for {', '.join(builds)}" if builds else ""
    return Lack(f"bitsandbytes {version} has no kernels for {toolkit}{others}", "{pip} install -U bitsandbytes")


def has_build(version: str, toolkit: str, builds: Sequence[str]) -> bool:
    """Return True if one of bitsandbytes' builds (cuda128, rocm64) has kernels for the toolkit (CUDA 12.8). Pure."""
    kind, _, number = toolkit.lower().partition(" ")
    major, minor, *_ = (*release(number), 0)
    if f"{kind}{major}{minor}" in builds:
        return True
    return release(version) >= ANY_MINOR and any(build.startswith(f"{kind}{major}") for build in builds)


def lack_of_flash(flash: Flash, version: str | None, problem: str = "", torch: str = "") -> Lack | None:
    """Return why a version of FlashAttention cannot be used, or None. Pure.

    Args:
        version: the installed version, None if it is not installed.
        problem: the error of importing it, "" if there was no error.
        torch: version of torch, to compare with the one in the package's version; "" skips this, as after an import.
    """
    again = f"{{pip}} uninstall -y {flash.package} && {flash.install} --no-cache-dir"
    mend = again if flash.install.startswith("{pip}") else flash.install
    built_for = re.search(r"torch(\d+\.\d+)", version or "")
    if version is None:
        return Lack(f"{flash.package} is not installed", flash.install)
    if problem:
        return Lack(f"{flash.package} {version} does not load ({problem})", mend)
    if torch and built_for and release(built_for[1]) != release(torch)[:2]:
        what = f"{flash.package} {version} was built for torch {built_for[1]}, and this is torch {torch}"
        return Lack(what, mend)
    return None


def release(version: str | None) -> tuple[int, ...]:
    """Parse a version: 2.9.1+cu128 -> (2, 9, 1), 5.2.0.dev0 -> (5, 2, 0); (0,) if it is missing or not valid."""
    from packaging.version import Version

    try:
        # HIP versions end in a hyphen and a hash, which packaging rejects.
        return Version((version or "").partition("-")[0]).release
    except ValueError:
        return (0,)
