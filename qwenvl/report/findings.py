"""Findings: what is wrong or missing on a machine, what it costs, and the command that fixes it.

Pure functions of a machine's facts, so tests can check any machine on any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ..log import log
from ..packages import (
    FAST_4BIT,
    FLASH,
    Lack,
    has_build,
    lack_of_accelerate,
    lack_of_bitsandbytes,
    lack_of_flash,
    release,
    without_kernels,
)
from ..process import PROCESS
from .facts import Facts, Gpu, capability_of, probe

OLDEST = {"torch": (2, 4), "transformers": (4, 57, 1)}
# CUDA's major version -> the oldest driver for any of its minor versions (NVIDIA's minor version compatibility).
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
BLACKWELL_DRIVER = 570
WHEELS = "https://download.pytorch.org/whl"

Severity = Literal["critical", "warning", "info"]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong or missing. `mend` is the command that fixes it, "" if there is no fix."""

    severity: Severity
    what: str
    cost: str
    mend: str = ""

    def __str__(self) -> str:
        return f"{self.what}: {self.cost}." + (f" To mend it: {self.mend}" if self.mend else "")


def findings(facts: Facts, family: str = "", linear_attention: bool = False) -> list[Finding]:
    """List everything that is wrong or missing, the gravest first. Pure.

    Args:
        family: model_type of the model that will run, "" if unknown.
        linear_attention: True if most layers of that family are linear attention.
    """
    checks = (_too_old, _torch_without_gpu, _driver, _conv3d, _accelerate, _bitsandbytes, _flash_attn)
    found = [finding for check in checks for finding in check(facts)]
    if linear_attention:
        found += _linear_attention(facts, family)
    order = ("critical", "warning", "info")
    return sorted(found, key=lambda finding: order.index(finding.severity))


def in_a_line(facts: Facts) -> str:
    """Format Python, torch, GPUs and driver in a line. Pure."""
    parts = [f"Python {'.'.join(facts.python.split('.')[:2])}", f"torch {facts.torch}"]
    parts += [f"{gpu.name}, {gpu.arch}" for gpu in facts.gpus]
    parts += [f"driver {facts.driver}"] if facts.driver else []
    return ", ".join(parts + ([facts.other_device] if facts.other_device else []))


def startup_report() -> None:
    """Log one line about the machine, and one for each finding."""
    facts = probe()
    log.info("ready (%s)", in_a_line(facts))
    for finding in findings(facts):
        _log(finding)


def family_report(family: str, linear_attention: bool) -> None:
    """Log what a family of models lacks here to be fast, once for each family."""
    if linear_attention and PROCESS.is_new("family", family):
        for finding in _linear_attention(probe(), family):
            _log(finding)


def _log(finding: Finding) -> None:
    """Log a finding at the level of its severity, info at debug."""
    {"critical": log.critical, "warning": log.warning, "info": log.debug}[finding.severity]("%s", finding)


def _too_old(facts: Facts) -> Iterator[Finding]:
    for name, installed in {"torch": facts.torch, "transformers": facts.packages.get("transformers", "")}.items():
        if installed and release(installed) < OLDEST[name]:
            oldest = ".".join(map(str, OLDEST[name]))
            command = f'{facts.pip} install -U "{name}>={oldest}"'
            yield Finding("critical", f"{name} {installed} is too old", f"{oldest} or later is needed", command)


def _torch_without_gpu(facts: Facts) -> Iterator[Finding]:
    """Find GPUs for which this torch holds no kernels."""
    for gpu in facts.gpus:
        what = f"{gpu.name} ({gpu.arch}) is here, and torch {facts.torch} "
        if not facts.on_gpu:
            yield Finding("critical", f"{what}was built without CUDA", "models run on the CPU", _torch_for(facts, gpu))
        elif facts.hip:
            if facts.archs and gpu.arch not in facts.archs:
                yield Finding("warning", f"{what}was built for {_list(facts.archs)} only", "kernels may fail")
        elif not _serves(facts.archs, gpu):
            yield _unserved(facts, gpu, what)


def _unserved(facts: Facts, gpu: Gpu, what: str) -> Finding:
    what += f"with CUDA {facts.cuda} was built for {_list(facts.archs)} only"
    cost = "kernels fail or are compiled anew at every start"
    if gpu.capability and gpu.capability >= (10, 0):
        cost += (
            ", until a Blackwell GPU gets torch 2.7 or later, built with CUDA 12.8 or later, and driver "
            f"{BLACKWELL_DRIVER} or later"
        )
    return Finding("critical", what, cost, _torch_for(facts, gpu))


def _driver(facts: Facts) -> Iterator[Finding]:
    if not (facts.cuda and facts.driver):
        return
    oldest = OLDEST_DRIVER.get(release(facts.cuda)[0], 0)
    blackwell = any(gpu.capability and gpu.capability >= (10, 0) for gpu in facts.gpus)
    if blackwell:
        oldest = max(oldest, BLACKWELL_DRIVER)
    installed = release(facts.driver)[0]
    if installed >= oldest:
        return
    mend = f"install driver {oldest} or later (https://www.nvidia.com/drivers)"
    if installed >= (BLACKWELL_DRIVER if blackwell else OLDEST_DRIVER[12]):
        mend += f", or a torch for this driver: {_torch_for(facts, facts.gpus[0] if facts.gpus else None)}"
    what = f"NVIDIA driver {facts.driver} is older than CUDA {facts.cuda} of torch {facts.torch} needs"
    yield Finding("critical", what, "CUDA does not start, and models run on the CPU", mend)


def _conv3d(facts: Facts) -> Iterator[Finding]:
    if facts.cuda and release(facts.torch)[:2] == (2, 9):
        what = f"torch {facts.torch} computes the Conv3d of vision models 10 to 20 times too slowly"
        yield Finding("info", what, "nothing here, since this pack computes it as a matrix product")


def _accelerate(facts: Facts) -> Iterator[Finding]:
    if lack := lack_of_accelerate(facts.packages.get("accelerate")):
        cost = "models are read into RAM before they go to the GPU, and 4bit, 8bit and several GPUs cannot be had"
        yield _lacking("warning", lack, cost, facts)


def _bitsandbytes(facts: Facts) -> Iterator[Finding]:
    version, builds = facts.packages.get("bitsandbytes"), facts.bitsandbytes_builds
    device = facts.other_device or ("cuda" if facts.gpus else "cpu")
    lack = lack_of_bitsandbytes(version, device)
    if lack is None and version and facts.on_gpu and builds:
        toolkit = f"CUDA {facts.cuda}" if facts.cuda else f"ROCm {facts.hip}"
        lack = None if has_build(version, toolkit, builds) else without_kernels(version, toolkit, builds)
    if lack:
        severity: Severity = "warning" if lack.mend else "info"
        yield _lacking(severity, lack, "4bit and 8bit fall back to none", facts)
    elif version and facts.on_gpu and facts.cuda and release(version) < release(FAST_4BIT):
        what = f"bitsandbytes {version} is older than {FAST_4BIT}"
        cost = "each token of a 4bit model takes 14 kernel launches a layer more"
        yield Finding("info", what, cost, f"{facts.pip} install -U bitsandbytes")


def _flash_attn(facts: Facts) -> Iterator[Finding]:
    if not facts.on_gpu or any(gpu.capability and gpu.capability < (8, 0) for gpu in facts.gpus):
        return
    version = facts.packages.get("flash-attn")
    lack = lack_of_flash(FLASH["flash_attention_2"], version, facts.flash_attn_error, facts.torch)
    if lack:
        severity: Severity = "warning" if version else "info"
        yield _lacking(severity, lack, "attention_mode flash_attention_2 falls back to sdpa", facts)


def _lacking(severity: Severity, lack: Lack, cost: str, facts: Facts) -> Finding:
    return Finding(severity, lack.what, cost, lack.command(facts.pip))


def _linear_attention(facts: Facts, family: str) -> Iterator[Finding]:
    if not facts.on_gpu:
        return
    # flash-linear-attention is written in Triton, which torch installs on Linux only.
    triton = "triton-windows " if facts.system.startswith("Windows") and not facts.has("triton") else ""
    commands = {
        "flash-linear-attention": f"{facts.pip} install -U {triton}flash-linear-attention",
        "causal-conv1d": f"{facts.pip} install causal-conv1d --no-build-isolation",
    }
    missing = {name: command for name, command in commands.items() if not facts.has(name)}
    if missing:
        what = f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not installed"
        cost = f"the linear attention of {family} models runs in a slow loop of PyTorch"
        yield Finding("warning", what, cost, " && ".join(missing.values()))


def _torch_for(facts: Facts, gpu: Gpu | None) -> str:
    """Return the command that installs a torch for the GPU that the driver supports."""
    capability = gpu.capability if gpu else None
    driver = release(facts.driver)[0] if facts.driver else 0
    index = "cu130" if driver >= OLDEST_DRIVER[13] else "cu128"
    if capability and capability < (7, 5):
        index = "cu126"  # the last with kernels for GPUs before Turing
    names = "torch torchvision torchaudio"
    # Without uninstalling first, pip keeps an installed torch whose version is not lower.
    return f"{facts.pip} uninstall -y {names} && {facts.pip} install {names} --index-url {WHEELS}/{index}"


def _serves(archs: tuple[str, ...], gpu: Gpu) -> bool:
    """Return True if the kernels run on the GPU: those for X.y run on X.z if z >= y, those for sm_120a on 12.0 only."""
    if gpu.capability is None:
        return True
    for arch in archs:
        built = capability_of(arch) if arch.startswith("sm_") else None
        if built and built[0] == gpu.capability[0]:
            exact = arch.endswith("a")
            if built == gpu.capability or (not exact and built[1] <= gpu.capability[1]):
                return True
    return False


def _list(names: tuple[str, ...]) -> str:
    return ", ".join(names) or "no GPU"
