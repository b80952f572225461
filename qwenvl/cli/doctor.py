"""The report on this machine, with a short measured check, for pasting into a bug report."""

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
from ..prompting.watch import NoWatch
from ..report.diagnostics import in_words
from ..report.facts import PACKAGES, Facts, probe
from ..report.findings import findings
from ..request import LoadSpec, Request, Result, Sampling

SAMPLE = catalog.PACK / "demo" / "sample.png"
# A question, how often the sample is shown with it, and what the demo model must answer.
SCENE = "a red circle on a blue background"
SHORT = ("Describe this image.", 1, SCENE)
LONG = ("Describe each image.", 2, f"Image 1: {SCENE}; image 2: {SCENE}")
# A copy must take much longer than its launch, and be far larger than any cache.
COPIED_BYTES = {"cpu": 256 << 20, "gpu": 4 << 30}
# Free GPU memory divided by the largest copy; source and target together take twice the copy.
FREE_SHARE = 4
COPIES = 7

Say = Callable[[str], None]


def examine(model: str, say: Say, complete: bool = True) -> bool:
    """Print the report line by line; return False if something grave was found.

    Args:
        model: a name of the list; what it lacks is reported too, if it is on disk.
        complete: True if all needed packages are installed.
    """

    def show(line: str) -> None:
        say(without_home(line))

    if torch.cuda.is_available():
        torch.cuda.init()  # then the facts list torch's GPUs, in torch's order
    facts, place = probe(thorough=True), machine(host.device())
    _facts(facts, place, show)
    family = _family(model, show)
    found = findings(facts, family, family_of(family).linear_attention)
    for finding in found:
        show(f"{finding.severity}: {finding}")
    if not found and complete:
        show("nothing is missing")
    right = _measure(place, show)
    return right and all(finding.severity != "critical" for finding in found)


def without_home(text: str) -> str:
    """Replace the path of the user's home folder, which names the user, with ~."""
    home = Path.home()
    if home == Path(home.anchor):
        return text
    for written in {str(home), home.as_posix()}:
        text = re.sub(re.escape(written) + r"(?![\w.-])", "~", text)
    return text


def copy_bandwidth(device: str, size: int | None = None, clock: Callable[[], float] | None = None) -> float:
    """Measure bytes read and written per second, by the fastest of a few copies on the device.

    Args:
        size: bytes of a copy; None takes 256 MB, and on an NVIDIA or AMD GPU 4 GB, or a quarter of what is free.
        clock: returns seconds; used on devices without timing events.
    """
    size = size or _copied_bytes(device)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    if not source.is_cuda:
        return 2 * size / _fastest_by_clock(source, target, clock or time.perf_counter)
    with torch.cuda.device_of(source):
        fastest = min(_copy_by_events(source, target) for _ in range(COPIES))
    del source, target
    torch.cuda.empty_cache()  # the models need these gigabytes
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
    """Time a copy in seconds by the GPU's own events, which exclude the launch and the host's wake-up."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
    start.record()
    target.copy_(source)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def _facts(facts: Facts, place: Machine, show: Say) -> None:
    version = re.search(r'^version = "(.+)"', (catalog.PACK / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    show(f"ComfyUI_QwenVL {version[1] if version else '?'} in {catalog.PACK}")
    show(f"Python {facts.python} on {facts.system}")
    built = f"CUDA {facts.cuda}" if facts.cuda else f"ROCm {facts.hip}" if facts.hip else "no CUDA"
    show(f"torch {facts.torch} ({built}{', ' if facts.archs else ''}{' '.join(facts.archs)})")
    for gpu in facts.gpus:
        show(f"GPU {gpu.name} ({gpu.arch})")
    if facts.driver:
        show(f"NVIDIA driver {facts.driver}")
    show(", ".join(f"{name} {facts.packages.get(name, 'is not installed')}" for name in PACKAGES))
    show(f"models run on {place.device} in {str(place.dtype).removeprefix('torch.')}: {place.reason}")


def _family(model: str, show: Say) -> str:
    """Return the model's model_type; "" if the model is unknown or not on disk."""
    try:
        folder = catalog.locate(catalog.find(model), host.model_roots())
    except catalog.UnknownModelError as error:
        show(f"error: {error}")
        return ""
    if folder is None:
        show(f"{model} is not on disk, so what it lacks is not known")
        return ""
    family = read_json_object(folder / "config.json").get("model_type", "")
    show(f"{model} is a {family} model in {folder}")
    return family


def _measure(place: Machine, show: Say) -> bool:
    try:
        show(f"memory: {gigabytes(copy_bandwidth(place.device))}/s read and written by a copy on {place.device}")
        models = ModelCache()
        try:
            return _ask_demo(models, show)
        finally:
            models.clear()
    except (RuntimeError, ValueError, OSError) as error:
        show(f"critical: the demo model does not run: {error}")
        return False


def _ask_demo(models: ModelCache, show: Say) -> bool:
    """Ask three questions: the first builds everything, the second evicts its pictures, the third is measured."""
    asked = (LONG, SHORT, LONG)
    results = [_answer(models, question, times) for question, times, _ in asked]
    stats = results[-1].stats
    why = f" ({stats.decode.tier_reason})" if stats.decode.tier_reason else ""
    show(f"demo model: loaded in {results[0].stats.loaded.load_s:.1f} s; {stats}; by the {stats.decode.tier}{why}")
    figures = stats.diagnostics or {}
    for line in [*in_words(figures), *figures["not_known"]]:
        show(f"  {line}")
    wrong = [result.text for result, (_, _, right) in zip(results, asked, strict=True) if result.text != right]
    show(f"critical: the demo model answers {wrong[0]!r}" if wrong else "the demo model's answers are right")
    return not wrong


def _answer(models: ModelCache, question: str, times: int) -> Result:
    request = Request(
        load=LoadSpec(catalog.DEMO),
        text=question,
        images={f"image{number}": str(SAMPLE) for number in range(1, times + 1)},
        sampling=Sampling(do_sample=False),
        diagnostics="full",
    )
    return run(request, models, NoWatch())
