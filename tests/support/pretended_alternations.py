"""The alternations of benchmarks.gpu on the pretended device: python tests/support/pretended_alternations.py

Prints a JSON object for two of them, one with time for both of its turns and one without: the figures of the turns, and
where the weights were when the block was taken and freed.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pretended
import torch

from benchmarks.gpu.alternations import alternate, figures
from benchmarks.models import SHAPES, build, prompt
from qwenvl.loading.capabilities import Machine
from qwenvl.loading.loader import LoadPlan, ModelHandle
from qwenvl.request import LoadSpec


class Watched:
    """Memory of the device that notes where the model is."""

    def __init__(self, model):
        self._model, self.seen, self.held = model, [], False

    def _look(self, what):
        devices = {weight.device.type for weight in self._model.parameters()}
        self.seen.append([what, self.held, *sorted(devices)])

    def take(self):
        self._look("take")
        self.held = True

    def free(self):
        self._look("free")
        self.held = False

    def used(self):
        return 0


def main():
    for seconds in (600, 0):
        print(json.dumps(alternated(seconds)))


def alternated(seconds):
    # That device is slow.
    model = build(replace(SHAPES["nano"], layers=4), "cpu", torch.float32)
    with pretended.there(model):
        machine = Machine(f"{pretended.NAME}:0", torch.float32, "")
        handle = ModelHandle(LoadSpec("random"), LoadPlan("none", "sdpa"), machine, model, None, None, 0.0, "qwen3_vl")
        memory = Watched(model)
        turns = alternate(handle, prompt(model, 8, 16), memory, 2, time.monotonic() + seconds, 4)
    return {"seen": memory.seen, "figures": figures(turns), "tokens": [len(turn.ids) for turn in turns]}


if __name__ == "__main__":
    main()
