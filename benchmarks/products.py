"""Products of a weight with one and with many rows, in each form that a CPU may use: python -m benchmarks.products

Weights change from call to call, so that they come from memory and not from a cache. Figures are the best of the
rounds, because other programs only ever add time. "oneDNN off" is torch's own product, which the pack does not use: the
setting that chooses it is that of all threads of a process. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from benchmarks.measure import clock_for, command, device_name, versions
from qwenvl.cpu.choice import EIGHT, HALF, PLAIN, filled
from qwenvl.cpu.int4 import GROUPS, Int4Linear
from qwenvl.decoding.step_attention import Sdpa

# Of Qwen3-0.6B: q, k and v as one, attention's output, gate and up as one, down; and of Qwen3-VL-2B: gate and up.
SHAPES = ((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (12288, 2048))
ROWS = (1, 4, 512)
BEYOND_CACHES = 192 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        products = {f"{rows} x {columns}": measured(rows, columns, options.rounds) for rows, columns in SHAPES}
        attention = {tokens: attended(tokens, options.rounds) for tokens in (64, 1024, 4096)}
    about = {"command": command("benchmarks.products"), "date": time.strftime("%Y-%m-%d")}
    about |= {"device": device_name("cpu"), "versions": versions(), "threads": options.threads}
    print(json.dumps({**about, "ms": products, "attention_ms": attention}))


def forms() -> dict[str, Callable[[torch.Tensor, None], Any]]:
    """Return what builds each form from a weight."""
    half = {"bfloat16": HALF[PLAIN], "bfloat16, oneDNN off": Unassisted, "bfloat16, oneDNN's order": filled(4)}
    return {**half, **EIGHT, **{f"int4 in {group}s": lambda w, b, g=group: Int4Linear(w, b, g) for group in GROUPS}}


class Unassisted(torch.nn.Module):
    """torch's own product. The setting is that of the process, which has one thread of ours here."""

    def __init__(self, weight: torch.Tensor, bias: None) -> None:
        super().__init__()
        self._weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute what nn.Linear does."""
        with torch.backends.mkldnn.flags(enabled=False):
            return F.linear(x, self._weight)


def measured(rows: int, columns: int, rounds: int) -> dict[str, dict[int, float]]:
    """Return milliseconds of each form by number of rows of the input."""
    count = max(2, BEYOND_CACHES // (2 * rows * columns))
    weights = [torch.empty(rows, columns, dtype=torch.bfloat16).uniform_(-0.05, 0.05) for _ in range(count)]
    found: dict[str, dict[int, float]] = {}
    for name, build in forms().items():
        layers = [build(weight, None) for weight in weights]
        for inputs in ROWS:
            if inputs > 4 and name.endswith("off"):
                continue
            x = torch.randn(inputs, columns).bfloat16()
            few = layers if inputs < 64 else layers[:2]
            found.setdefault(name, {})[inputs] = best(lambda: [layer(x) for layer in few], rounds) / len(few)  # noqa: B023
        print(f"{rows} x {columns} {name:26}", {key: round(ms, 3) for key, ms in found[name].items()}, flush=True)
    return found


def attended(tokens: int, rounds: int) -> float:
    """Return milliseconds of a layer's attention in a step after that many tokens, in Qwen3-0.6B's sizes."""
    keys, values = ([torch.randn(1, 8, tokens, 128).bfloat16() for _ in range(28)] for _ in range(2))
    query, attend = torch.randn(1, 16, 128).bfloat16(), Sdpa()
    pairs = list(zip(keys, values, strict=True))
    return best(lambda: [attend(query, key, value, (tokens, None)) for key, value in pairs], rounds) / len(pairs)


def best(run: Callable[[], Any], rounds: int) -> float:
    """Return the milliseconds of the fastest of the rounds."""
    clock, seconds = clock_for("cpu"), []
    for _ in range(rounds):
        started = clock()
        run()
        seconds.append(clock() - started)
    return 1000 * min(seconds)


if __name__ == "__main__":
    main()
