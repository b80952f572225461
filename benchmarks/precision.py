"""What each precision costs the demo model in right answers: python -m benchmarks.precision [--questions N]

The ceiling is the unquantized model on the same questions. The pack leaves the vision tower unquantized; "vision too"
quantizes it for comparison. No times are measured.
Writes benchmarks/results/<date>-precision.json, and prints the same as its last line.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qwenvl.cpu import packing
from qwenvl.loading import loader, precision
from qwenvl.loading.capabilities import machine
from qwenvl.models import catalog
from qwenvl.request import LoadSpec

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "demo"))

import asking  # noqa: E402
import evaluate  # noqa: E402

# The forms of a CPU; and those of a GPU, by bitsandbytes.
ON_A_CPU = {"int8": ("8bit", 32), **{f"int4, groups of {group}": ("4bit", group) for group in packing.GROUPS}}
VARIANTS = ("none", *ON_A_CPU, "8bit", "8bit, vision too", "4bit", "4bit, vision too")
# Cases that do not have one right answer to one picture, video or text.
LEFT_OUT = ("batch equals single", "new colours in 12 draws")


class Loaded(asking.Model):
    """A model that the pack loaded, for the demo's evaluation."""

    def __init__(self, handle: loader.ModelHandle) -> None:
        self._model, self._processor = handle.model, handle.processor
        self._processor.tokenizer.padding_side = "left"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=100, help="how many each kind asks, about")
    questions = parser.parse_args().questions
    torch.set_num_threads(1)
    results = {variant: measure(variant, questions) for variant in VARIANTS}
    packages = ("torch", "transformers", "bitsandbytes")
    result = {
        "device": "cpu",
        "dtype": str(machine("cpu").dtype),
        "questions": questions,
        "versions": {name: version(name) for name in packages},
        "variants": results,
    }
    path = ROOT / "benchmarks" / "results" / f"{time.strftime('%Y-%m-%d')}-precision.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


def measure(variant: str, questions: int) -> dict[str, Any]:
    """Return the right answers by kind of question, and the bytes of the weights."""
    name, group = ON_A_CPU.get(variant, (variant.partition(", ")[0], 0))
    with quantizing(("lm_head",) if variant.endswith("vision too") else precision.UNQUANTIZED, group):
        folder = catalog.find(catalog.DEMO).folder
        handle = loader.load(LoadSpec(catalog.DEMO, name), folder, machine("cpu"))
    exam = evaluate.Exam(Loaded(handle), random.Random(2024), questions)
    scores: dict[str, asking.Score] = {}
    for case, ask in evaluate.cases(exam).items():
        if case not in LEFT_OUT:
            add(scores, case.partition(":")[0], ask())
    boxes, overlap = exam.grounding()
    add(scores, "grounding", boxes)
    for score in list(scores.values()):
        add(scores, "all", score)
    counts = {kind: score.as_json() for kind, score in scores.items()}
    print(f"{variant:20s}", {kind: count["percent"] for kind, count in counts.items()}, flush=True)
    held = packing.packed_bytes(handle.model)
    return {"weight_bytes": held, "mean_iou": round(overlap, 3), **counts}


def add(scores: dict[str, asking.Score], kind: str, score: asking.Score) -> None:
    total = scores.setdefault(kind, asking.Score())
    total.right += int(score.right)
    total.of += score.of


@contextmanager
def quantizing(kept: tuple[str, ...], group: int) -> Iterator[None]:
    """Let the loader quantize all modules but those in `kept`, within the block.

    Args:
        group: columns that share a scale in 4 bits on a CPU; 0 to quantize by bitsandbytes, as on a GPU.
    """
    before = precision.UNQUANTIZED, precision.why_no_form, packing.GROUP
    precision.UNQUANTIZED, packing.GROUP = kept, group
    if not group:
        precision.why_no_form = lambda *_: "this form is that of a GPU"
    try:
        yield
    finally:
        precision.UNQUANTIZED, precision.why_no_form, packing.GROUP = before


if __name__ == "__main__":
    main()
