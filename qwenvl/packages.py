"""Which versions are installed; whether bitsandbytes and flash-attn can be had, and why not: for the report and for the
loader alike.

Each of them finds out for itself what is installed and what loads, the report without importing anything.
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

# What transformers 5 asks for.
OLDEST_ACCELERATE = "1.1"
# The first that has kernels for a CPU.
OLDEST_ON_CPU = "0.49"
# From here on a 4bit layer is one kernel when a token is made; before, it is several.
FAST_4BIT = "0.50"
# From here on it makes do with any build of the same major version of CUDA or ROCm.
ANY_MINOR = (0, 50)


@dataclass(frozen=True, slots=True)
class Lack:
    """Why a package cannot be had, and the command that mends it, with {pip} for pip; "" where none does."""

    what: str
    mend: str = ""

    def command(self, pip: str = "pip") -> str:
        """For whoever calls pip by that name."""
        return self.mend.replace("{pip}", pip)

    def __str__(self) -> str:
        return f"{self.what} ({self.command()})" if self.mend else self.what


class MissingPackageError(RuntimeError):
    """A package is not installed that is needed for what was asked."""


# Module -> its name for pip, and what cannot be had without it. The first ones are needed for every answer.
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
    """A FlashAttention: its name for pip, its module, the oldest compute capability for it, and how to get it."""

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
    """The version of the first that is installed, by its name for pip; None where none is."""
    for name in distributions:
        with suppress(importlib.metadata.PackageNotFoundError):
            # Whose metadata is broken has none.
            return importlib.metadata.version(name) or "unknown"
    return None


def why_not_imported(module: str) -> str:
    """What goes wrong when it is imported, in a line; "" where nothing does."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:
        return next(iter(str(error).splitlines()), type(error).__name__)
    return ""


def missing() -> dict[str, Lack]:
    """Module -> the sentence, for all that are needed and not installed."""
    return {name: not_installed(pip) for name, (pip, _) in NEEDED.items() if not _is_there(name)}


def require(*modules: str) -> None:
    """Raise MissingPackageError for the first that is not installed: transformers blames the model's files for it."""
    for name in modules:
        if not _is_there(name):
            raise MissingPackageError(str(not_installed(NEEDED[name][0])))


def lack_of_module(error: ModuleNotFoundError) -> str:
    """The sentence for an import that failed because something is not installed."""
    name = _name_of(error)
    return str(not_installed(NEEDED[name][0] if name in NEEDED else name)) if name else str(error)


def is_needed(error: ModuleNotFoundError) -> bool:
    """Whether it is for one of the packages that are needed; others may be a model folder's wish."""
    return _name_of(error) in NEEDED


def _name_of(error: ModuleNotFoundError) -> str:
    # Of a distribution, transformers puts a whole sentence there.
    quoted = re.search(r"'([\w-]+)", error.name or "")
    name = quoted[1] if quoted else (error.name or "").partition(".")[0]
    return next((module for module, (pip, _) in NEEDED.items() if pip == name), name)


@contextmanager
def naming_what_is_missing() -> Iterator[None]:
    """Within the block, an import that fails because something is not installed says so, and the command."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingPackageError(lack_of_module(error)) from error


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # a module without a description of itself
        return module in sys.modules


def not_installed(package: str) -> Lack:
    return Lack(f"{package} is not installed", f"{{pip}} install {package}")


def lack_of_accelerate(version: str | None, taken: bool | None = None) -> Lack | None:
    """The reason why accelerate cannot be had, or None. Pure.

    Args:
        version: of what is installed, None where nothing is.
        taken: what transformers says of it; None goes by the version.
    """
    if version is None:
        return not_installed("accelerate")
    if taken or (taken is None and release(version) >= release(OLDEST_ACCELERATE)):
        return None
    what = f"accelerate {version} is too old: {OLDEST_ACCELERATE} or later is needed"
    return Lack(what, "{pip} install -U accelerate")


def lack_of_bitsandbytes(version: str | None, device: str, oldest: str = "") -> Lack | None:
    """The reason why bitsandbytes cannot be had there, as far as its version tells, or None. Pure.

    Args:
        version: of what is installed, None where nothing is.
        device: as torch names it.
        oldest: what transformers asks for; "" where that is not known.
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
    """bitsandbytes has none for the CUDA or ROCm that torch was built for. Pure.

    Args:
        toolkit: as in CUDA 12.8.
        builds: what it has kernels for, where that is known.
    """
    others = f", only for {', '.join(builds)}" if builds else ""
    return Lack(f"bitsandbytes {version} has no kernels for {toolkit}{others}", "{pip} install -U bitsandbytes")


def has_build(version: str, toolkit: str, builds: Sequence[str]) -> bool:
    """Whether bitsandbytes has kernels for that among its builds, as in cuda128 and rocm64. Pure."""
    kind, _, number = toolkit.lower().partition(" ")
    major, minor, *_ = (*release(number), 0)
    if f"{kind}{major}{minor}" in builds:
        return True
    return release(version) >= ANY_MINOR and any(each.startswith(f"{kind}{major}") for each in builds)


def lack_of_flash(flash: Flash, version: str | None, problem: str = "", torch: str = "") -> Lack | None:
    """The reason why a FlashAttention cannot be had, or None. Pure.

    Args:
        version: of what is installed, None where nothing is.
        problem: what goes wrong when it is imported.
        torch: version of torch, to compare with the one in its name; "" where importing it has told more.
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
    """2.9.1+cu128 -> (2, 9, 1), 5.2.0.dev0 -> (5, 2, 0); (0,) of what is none, as a broken installation may have."""
    from packaging.version import Version

    try:
        # HIP puts a hash behind a hyphen, which no version may have there.
        return Version((version or "").partition("-")[0]).release
    except ValueError:
        return (0,)
