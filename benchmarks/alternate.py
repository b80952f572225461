"""Our model and memory that ComfyUI manages take turns on one GPU: python -m benchmarks.alternate COMFYUI [--turns 20]

COMFYUI is a checkout whose requirements this Python has. In every turn the demo model answers, and then ComfyUI loads a
block of tensors for which our model has to leave the GPU. Expected: the same answer every time, our model gone while
the block is there, and no more memory in use after the first turns. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

PACK = Path(__file__).resolve().parent.parent
GB = 1 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", type=Path)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--block-gb", type=float, help="default: all that is free at the start, less 1 GB")
    parser.add_argument("--cpu", action="store_true", help="only to see that this program runs")
    options = parser.parse_args()
    management, patcher = _comfyui(options.comfyui.resolve(), options.cpu)
    pack = _pack()
    device = management.get_torch_device()
    size = round(options.block_gb * GB) if options.block_gb else management.get_free_memory(device) - GB
    block = _block_class(patcher)(size, device)
    nodes = sys.modules[f"{pack.__name__}.nodes"]
    answers, turns = set(), []
    for _ in range(options.turns):
        answers.add(_answer(pack, nodes.MODELS))
        with_ours = _used(device)
        management.load_models_gpu([block])
        turns.append({"ours": with_ours, "block": _used(device), "ours_held": len(nodes.MODELS.held)})
    early = min(4, options.turns - 1)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "device": str(device) if options.cpu else torch.cuda.get_device_name(device),
        "allocator": None if options.cpu else torch.cuda.get_allocator_backend(),
        "block_bytes": size,
        "answers": sorted(answers),
        "turns_in_which_ours_went": sum(not turn["ours_held"] for turn in turns),
        "growth_bytes": {name: turns[-1][name] - turns[early][name] for name in ("ours", "block")},
        "turns": turns,
    }
    print(json.dumps(result))


def _comfyui(folder: Path, cpu: bool) -> tuple[Any, type]:
    """Return ComfyUI's memory manager, set up as its main program does, and its ModelPatcher."""
    sys.argv = ["main.py", *(["--cpu"] if cpu else [])]
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    import comfy.options
    import utils.install_util  # noqa: F401 (first, as main.py does: a later import would find another utils)

    comfy.options.enable_args_parsing()
    import comfy.model_management as management
    from comfy.model_patcher import ModelPatcher

    return management, ModelPatcher


def _pack() -> Any:
    spec = importlib.util.spec_from_file_location(
        "the_pack", PACK / "__init__.py", submodule_search_locations=[str(PACK)]
    )
    if spec is None or spec.loader is None:
        raise FileNotFoundError(PACK / "__init__.py")
    pack = sys.modules["the_pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    return pack


def _block_class(patcher: type) -> type:
    class Block(patcher):  # type: ignore[misc, valid-type]
        """A model of ComfyUI's that holds `size` bytes on the device."""

        def __init__(self, size: int, device: torch.device) -> None:
            super().__init__(torch.nn.Module(), device, torch.device("cpu"), size=size)
            self.held: torch.Tensor | None = None

        def partially_load(self, device_to: Any, *_: Any, **__: Any) -> int:
            self.held = torch.empty(self.size, dtype=torch.uint8, device=device_to)
            self.model.device, self.model.model_loaded_weight_memory = device_to, self.size
            return self.size

        def partially_unload(self, *_: Any, **__: Any) -> int:
            return 0

        def detach(self, unpatch_all: bool = True) -> Any:
            if unpatch_all:
                self.held = None
                self.model.device, self.model.model_loaded_weight_memory = self.offload_device, 0
            return self.model

    return Block


def _answer(pack: Any, models: Any) -> str:
    names = ("pipeline", "request", "prompting.watch")
    pipeline, request, watch = (sys.modules[f"{pack.__name__}.qwenvl.{name}"] for name in names)
    demo = sys.modules[f"{pack.__name__}.qwenvl.models.catalog"].DEMO
    picture = Image.new("RGB", (192, 192), "blue")
    ImageDraw.Draw(picture).ellipse([35, 35, 157, 157], fill="red")
    image = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(1, 192, 192, 3) / 255
    asked = request.Request(
        request.LoadSpec(demo),
        "Describe this image.",
        images={"image1": image},
        sampling=request.Sampling(do_sample=False, max_new_tokens=60),
    )
    return pipeline.run(asked, models, watch.NoWatch()).text


def _used(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    return total - free


if __name__ == "__main__":
    main()
