"""The whole report on this machine, with a short measured check: what to paste where a problem is told of."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ..comfyui import host
from ..files.bounded_json import read_json_object
from ..loading.cache import ModelCache
from ..loading.capabilities import Machine, machine
from ..log import gigabytes
from ..models import catalog
from ..models.families import family_of
from ..pipeline import run
from ..prompting.watch import Nobody
from ..report.diagnostics import in_words
from ..report.facts import PACKAGES, Facts, probe
from ..report.findings import findings
from ..request import LoadSpec, Request, Result, Sampling

SAMPLE = catalog.PACK / "demo" / "sample.png"
# A question, how often it shows the sample, and what the demo model must answer.
SCENE = "a red circle on a blue background"
SHORT = ("Describe this image.", 1, SCENE)
LONG = ("Describe each image.", 2, f"Image 1: {SCENE}; image 2: {SCENE}")
# A copy must be long beside its launch, and far larger than any cache.
COPIED_BYTES = {"cpu": 256 << 20, "gpu": 4 << 30}
# What is free on a GPU over the size of a copy, which is there twice.
FREE_SHARE = 4
COPIES = 7

Say = Callable[[str], None]


def examine(model: str, say: Say, complete: bool = True) -> bool:
    """Tell everything, line by line; returns whether nothing grave was found.

    Args:
        model: a name of the list; what it lacks is told too, if it is on disk.
        complete: whether all packages are there that are needed.
    """

    def tell(line: str) -> None:
        say(without_home(line))

    if torch.cuda.is_available():
        torch.cuda.init()  # so that torch's GPUs are told of, in its order
    facts, place = probe(thorough=True), machine(host.device())
    _facts(facts, place, tell)
    family = _family(model, tell)
    found = findings(facts, family, family_of(family).linear_attention)
    for finding in found:
        tell(f"{finding.severity}: {finding}")
    if not found and complete:
        tell("nothing is missing")
    right = _measure(place, tell)
    return right and all(finding.severity != "critical" for finding in found)


def without_home(text: str) -> str:
    """The text with ~ for the user's folder, which names the user."""
    home = Path.home()
    if home == Path(home.anchor):
        return text
    for written in {str(home), home.as_posix()}:
        text = re.sub(re.escape(written) + r"(?![\w.-])", "~", text)
    return text


def copy_bandwidth(device: str, size: int | None = None, clock: Callable[[], float] | None = None) -> float:
    """Bytes read and written per second by the fastest of a few copies on the device.

    Args:
        size: bytes of a copy; None takes 256 MB, and on an NVIDIA or AMD GPU 4 GB, or a quarter of what is free.
        clock: in seconds, for devices without events of their own.
    """
    size = size or _copied_bytes(device)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    if not source.is_cuda:
        return 2 * size / _fastest_by_clock(source, target, clock or time.perf_counter)
    with torch.cuda.device_of(source):
        fastest = min(_copy_by_events(source, target) for _ in range(COPIES))
    del source, target
    torch.cuda.empty_cache()  # gigabytes that the models need
    return 2 * size / fastest


def _copied_bytes(device: str) -> int:
    if not torch.empty(0, device=device).is_cuda:
        return COPIED_BYTES["cpu"]
    free, _ = torch.cuda.mem_get_info(device)
    return min(COPIED_BYTES["gpu"], free // FREE_SHARE)


def _fastest_by_clock(source: torch.Tensor, target: torch.Tensor, clock: Callable[[], float]) -> float:
    synchronize = getattr(getattr(torch, source.device.type), "synchronize", lambda: None)
    fastest = float("inf")
    for _ in range(COPIES):
        synchronize()
        start = clock()
        target.copy_(source)
        synchronize()
        fastest = min(fastest, clock() - start)
    return fastest


def _copy_by_events(source: torch.Tensor, target: torch.Tensor) -> float:
    """Seconds as the GPU saw them: no launch, and no host that wakes up late."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
    start.record()
    target.copy_(source)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def _facts(facts: Facts, place: Machine, tell: Say) -> None:
    version = re.search(r'^version = "(.+)"', (catalog.PACK / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    tell(f"ComfyUI_QwenVL {version[1] if version else '?'} in {catalog.PACK}")
    tell(f"Python {facts.python} on {facts.system}")
    built = f"CUDA {facts.cuda}" if facts.cuda else f"ROCm {facts.hip}" if facts.hip else "no CUDA"
    tell(f"torch {facts.torch} ({built}{', ' if facts.archs else ''}{' '.join(facts.archs)})")
    for gpu in facts.gpus:
        tell(f"GPU {gpu.name} ({gpu.arch})")
    if facts.driver:
        tell(f"NVIDIA driver {facts.driver}")
    tell(", ".join(f"{name} {facts.packages.get(name, 'is not installed')}" for name in PACKAGES))
    tell(f"models run on {place.device} in {str(place.dtype).removeprefix('torch.')}: {place.reason}")


def _family(model: str, tell: Say) -> str:
    """The model's type; "" where that cannot be told."""
    try:
        folder = catalog.locate(catalog.find(model), host.model_roots())
    except catalog.UnknownModelError as error:
        tell(f"error: {error}")
        return ""
    if folder is None:
        tell(f"{model} is not on disk, so what it lacks is not known")
        return ""
    family = read_json_object(folder / "config.json").get("model_type", "")
    tell(f"{model} is a {family} model in {folder}")
    return family


def _measure(place: Machine, tell: Say) -> bool:
    try:
        tell(f"memory: {gigabytes(copy_bandwidth(place.device))}/s read and written by a copy on {place.device}")
        models = ModelCache()
        try:
            return _ask_demo(models, tell)
        finally:
            models.clear()
    except (RuntimeError, ValueError, OSError) as error:
        tell(f"critical: the demo model does not run: {error}")
        return False


def _ask_demo(models: ModelCache, tell: Say) -> bool:
    """The first question makes all that is made once, the second lets its pictures be forgotten, the third counts."""
    asked = (LONG, SHORT, LONG)
    made = [_answer(models, question, times) for question, times, _ in asked]
    stats = made[-1].stats
    why = f" ({stats.decode.tier_reason})" if stats.decode.tier_reason else ""
    tell(f"demo model: loaded in {made[0].stats.loaded.load_s:.1f} s; {stats}; by the {stats.decode.tier}{why}")
    figures = stats.diagnostics or {}
    for line in [*in_words(figures), *figures["not_known"]]:
        tell(f"  {line}")
    wrong = [each.text for each, (_, _, right) in zip(made, asked, strict=True) if each.text != right]
    tell(f"critical: the demo model answers {wrong[0]!r}" if wrong else "the demo model's answers are right")
    return not wrong


def _answer(models: ModelCache, question: str, times: int) -> Result:
    request = Request(
        load=LoadSpec(catalog.DEMO),
        text=question,
        images={f"image{number}": str(SAMPLE) for number in range(1, times + 1)},
        sampling=Sampling(do_sample=False),
        diagnostics="full",
    )
    return run(request, models, Nobody())
