"""The commands that start vLLM and SGLang with the models of the lists: python -m qwenvl serve-info"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass

from ..models import catalog
from . import common

# Gigabytes of keys and values for a context of CONTEXT tokens, about the same for all of these models.
_CONTEXT_GB = 5.0
# The share of a GPU's memory that engines use for weights, keys and values.
_USED_SHARE = 0.86
# Long enough for 64 frames of a video as pictures and a long answer.
CONTEXT = 32768
# Four picture inputs and the frames of a video.
_PICTURES = 68


@dataclass(frozen=True, slots=True)
class Served:
    """One model and how to serve it."""

    repo_id: str
    vision: bool
    gpus: int
    # The model_type of its config.json; "" if unknown.
    family: str = ""

    @property
    def commands(self) -> dict[str, str]:
        """Engine -> the command that starts it; it listens on its own machine only."""
        vllm = ["vllm serve", self.repo_id, f"--host 127.0.0.1 --port 8000 --max-model-len {CONTEXT}"]
        sglang = ["python -m sglang.launch_server --model-path", self.repo_id]
        sglang.append(f"--host 127.0.0.1 --port 30000 --context-length {CONTEXT}")
        if self.vision:
            vllm.append(f"""--limit-mm-per-prompt '{json.dumps({"image": _PICTURES, "video": 1})}'""")
        if self.gpus > 1:
            vllm.append(f"--tensor-parallel-size {self.gpus}")
            sglang.append(f"--tp {self.gpus}")
        return {"vLLM": " ".join(vllm), "SGLang": " ".join(sglang)}

    def entry(self, engine: str) -> str:
        """Return the entry of custom_models.json for that engine, as JSON."""
        port = {"vLLM": 8000, "SGLang": 30000}[engine]
        entry = {"base_url": f"http://127.0.0.1:{port}/v1", "model": self.repo_id, "max_concurrency": 16}
        if not self.vision:
            entry["vision"] = False
        if self.family:
            entry["family"] = self.family
        return json.dumps({"engines": {self.repo_id.rpartition("/")[2]: entry}}, indent=1)


def served(repo_id: str, vision: bool, weights_gb: float, gpu_gb: float, family: str = "") -> Served:
    """Choose how many GPUs of gpu_gb gigabytes a model needs, a power of two up to 16."""
    gpus = 1
    while gpus < 16 and weights_gb + _CONTEXT_GB > gpus * gpu_gb * _USED_SHARE:
        gpus *= 2
    return Served(repo_id, vision, gpus, family)


def main(arguments: Sequence[str]) -> int:
    """Run the command; exit status 0 printed, 2 the model is unknown."""
    parser = common.Parser(
        prog="python -m qwenvl serve-info",
        description="Print the commands that start vLLM and SGLang with a model, each on one machine.",
    )
    parser.add_argument("model", nargs="?", help="a name of --list-models (default: all that can be downloaded)")
    parser.add_argument("--gpu-gb", type=float, default=24, help="memory of one GPU (default: %(default)s)")
    parser.add_argument("--debug", action="store_true", help="print the whole traceback of an error")
    options = parser.parse_args(arguments, argparse.Namespace(verbose=False, diagnostics=""))
    return common.status_of(lambda: _print_all(options.model, options.gpu_gb), options)


def _print_all(name: str | None, gpu_gb: float) -> int:
    see = catalog.vision_models()
    models = [catalog.find(name)] if name else {**see, **catalog.text_models()}.values()
    for model in models:
        if model.repo_id:
            # Engines hold weights as they are on disk. The size of a user's own model is unknown.
            weights_gb = model.size.disk / 1e9 if model.size else 0.0
            found = served(model.repo_id, model.name in see, weights_gb, gpu_gb, model.family)
            _print(model.name, found, with_entries=bool(name))
    return common.DONE


def _print(name: str, found: Served, with_entries: bool) -> None:
    common.say(f"{name}: {found.gpus} GPU{'s' * (found.gpus > 1)}")
    for engine, words in found.commands.items():
        common.say(f"  {engine}: {words}")
        if with_entries:
            common.say(f"  in {catalog.own_file()}: {found.entry(engine)}", "\n")
