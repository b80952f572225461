"""Decode speed of the own step beside llama.cpp, on a CPU, in one run: python -m benchmarks.against --shape 0.6b

Both have random weights of the same shape, on which speed does not depend, and the same number of tokens before them:
bfloat16 beside bf16, 8bit beside Q8_0, 4bit beside Q4_K_M. Both read every weight once per token, so what one of them
lacks to the other is no matter of memory.

Sides take turns, the first round is thrown away, and the ratio is the median of the rounds' ratios. On one thread the
clock is the process's own time, which leaves out other programs; llama.cpp runs in the same process (xllamacpp), or
its time is counted too (--llama-bench). The wheels of xllamacpp may lack the newest instructions of a processor, which
llama_system in the last line tells; a llama-bench that was built on this machine has them. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import random_gguf
from benchmarks.llama import INSTALL, Llama, LlamaBench, with_children
from benchmarks.measure import Side, clock_for, command, device_name, rounds, spread, versions
from benchmarks.models import DECODE, SHAPES, as_loaded, build, text_prompt
from qwenvl.decoding.decoder import Decoder
from qwenvl.request import Sampling

# What each quantization of ours is beside.
KINDS = {"none": "bf16", "8bit": "Q8_0", "4bit": "Q4_K_M"}


def main() -> None:
    options = _options()
    missing = needed(options) - {name for name in needed(options) if importlib.util.find_spec(name)}
    if missing:
        sys.exit(f"Not found: {', '.join(sorted(missing))}. {INSTALL}")
    if options.llama_bench and not shutil.which(options.llama_bench):
        sys.exit(f"--llama-bench {options.llama_bench}: no such program. Give the path of llama.cpp's llama-bench.")
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        try:
            file = model_file(Path(options.folder or temporary), options.shape, KINDS[options.quantization])
        except ValueError as error:
            sys.exit(str(error))
        theirs = _llama(options, file)
        decoder, prompt = _ours(options)
        sides = {"ours": ours(decoder, prompt), "llama": theirs.side(prompt["input_ids"][0].tolist())}
        tier = sides["ours"](2).tier
        found = rounds(sides, options.tokens, options.rounds, with_children(clock_for("cpu")))
    summary = figures(found)
    for name, key in (("ours", "ours_tokens_per_s"), ("llama.cpp", "llama_tokens_per_s"), ("ratio", "ratio")):
        low, high = summary[f"{key}_range"]
        print(f"{name:9} min {low}, median {summary[key]}, max {high}")
    print(json.dumps({**_described(options), **theirs.about, "tier": tier, **summary}))


def needed(options: argparse.Namespace) -> set[str]:
    """Return the packages that this run needs beside the pack's own."""
    return {"gguf"} if options.llama_bench else {"gguf", "xllamacpp"}


def model_file(folder: Path, shape: str, kind: str) -> Path:
    """Return the path of the model for llama.cpp; it is written unless the folder has it."""
    file = folder / f"{shape}-{kind}.gguf"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        half = file.with_suffix(".part")
        random_gguf.write(half, SHAPES[shape], kind)
        half.rename(file)
    return file


def figures(found: dict[str, list[dict]]) -> dict[str, Any]:
    """Summarise rounds with the sides "ours" and "llama": median and range of each, and of their ratio per round."""
    mine, theirs = ([each["tokens_per_s"] for each in found[name]] for name in ("ours", "llama"))
    values = {
        "ours_tokens_per_s": mine,
        "llama_tokens_per_s": theirs,
        "ratio": [one / other for one, other in zip(mine, theirs, strict=True)],
    }
    summary: dict[str, Any] = {}
    for name, numbers in values.items():
        found_ = spread(numbers, 3)
        summary |= {name: found_["median"], f"{name}_range": found_["range"]}
    return summary


def ours(decoder: Decoder, inputs: dict[str, torch.Tensor]) -> Side:
    """Return a side of rounds() that continues the prompt, which is computed once, as llama.cpp does."""

    def run(tokens: int) -> Any:
        return decoder.generate(
            inputs, Sampling(max_new_tokens=tokens, do_sample=False), None, lambda rows: None, lambda: None
        )

    return run


def _ours(options: argparse.Namespace) -> tuple[Decoder, dict[str, torch.Tensor]]:
    model = as_loaded(build(SHAPES[options.shape], "cpu", torch.bfloat16), options.quantization)
    prompt = text_prompt(model, options.context)
    decoder = Decoder(model, "sdpa", decode=DECODE)
    # The model as it was built is memory that the other side's file needs.
    gc.collect()
    return decoder, prompt


def _llama(options: argparse.Namespace, file: Path) -> Any:
    if options.llama_bench:
        return LlamaBench(options.llama_bench, file, options.threads)
    return Llama(file, options.threads, options.context + options.tokens + 8)


def _described(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "command": command("benchmarks.against"),
        "date": time.strftime("%Y-%m-%d"),
        "device": device_name("cpu"),
        "versions": versions(),
        "shape": options.shape,
        "quantization": options.quantization,
        "llama_type": KINDS[options.quantization],
        "threads": options.threads,
        "context": options.context,
        "new_tokens": options.tokens,
        "rounds": options.rounds,
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="0.6b")
    add("--quantization", choices=KINDS, default="none", help="none is bfloat16")
    add("--tokens", type=int, default=64)
    add("--rounds", type=int, default=5)
    add("--threads", type=int, default=1)
    add("--context", type=int, default=64, help="tokens of the prompt, before those that are measured")
    add("--folder", help="where llama.cpp's model is kept for the next run; default: a temporary folder")
    add("--llama-bench", metavar="PROGRAM", help="measure this program instead of xllamacpp")
    return parser.parse_args()


if __name__ == "__main__":
    main()
