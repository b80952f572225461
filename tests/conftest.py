"""Fixtures: generated pictures and videos, the demo model, and the pack as ComfyUI loads it."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import av
import numpy as np
import pytest
import torch
import transformers
from comfy_double import ComfyDouble
from engine import Served
from PIL import Image, ImageDraw

from qwenvl import catalog, host  # noqa: F401 (before the double: this copy must see no ComfyUI)
from qwenvl.cache import ModelCache
from qwenvl.capabilities import machine
from qwenvl.loader import ModelHandle, load
from qwenvl.request import LoadSpec

ROOT = Path(__file__).resolve().parent.parent

# Tiny models are faster on one thread, and on a machine that does something else besides many times so.
torch.set_num_threads(1)


def draw(shape: str, color: str, background: str, size: tuple[int, int] = (192, 192)) -> Image.Image:
    """A shape in the middle of a picture, in colours that PIL knows by name."""
    picture = Image.new("RGB", size, background)
    x, y = size[0] / 2, size[1] / 2
    r = 0.32 * min(size)
    pen = ImageDraw.Draw(picture)
    if shape == "circle":
        pen.ellipse([x - r, y - r, x + r, y + r], fill=color)
    elif shape == "square":
        pen.rectangle([x - r, y - r, x + r, y + r], fill=color)
    else:
        pen.polygon([(x, y - r), (x + r, y + 0.82 * r), (x - r, y + 0.82 * r)], fill=color)
    return picture


def image(*pictures: Image.Image) -> torch.Tensor:
    """Pictures of one size as ComfyUI's IMAGE: (B, H, W, C) float32 in [0, 1]."""
    return torch.stack([torch.from_numpy(np.asarray(picture).astype(np.float32) / 255) for picture in pictures])


def write_video(path: Path, scenes: list[Image.Image], seconds_each: float = 3.0, fps: int = 8) -> Path:
    """A video file that shows each picture in turn."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = *scenes[0].size, "yuv420p"
        for scene in scenes:
            for _ in range(round(seconds_each * fps)):
                container.mux(stream.encode(av.VideoFrame.from_image(scene)))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="session")
def demo() -> ModelHandle:
    """The shipped model, loaded once."""
    folder = catalog.find(catalog.DEMO).folder
    return load(LoadSpec(catalog.DEMO), folder, machine("cpu"))


@pytest.fixture
def models() -> Iterator[ModelCache]:
    """An empty cache, emptied again at the end."""
    cache = ModelCache()
    yield cache
    cache.clear()


@pytest.fixture(scope="session")
def _comfy_and_pack(tmp_path_factory: pytest.TempPathFactory) -> tuple[ComfyDouble, ModuleType]:
    double = ComfyDouble(tmp_path_factory.mktemp("comfyui") / "models")
    double.install()
    # As ComfyUI does it: the folder is a package, whatever its name.
    spec = importlib.util.spec_from_file_location(
        "the_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["the_pack"] = module
    spec.loader.exec_module(module)
    return double, module


@pytest.fixture
def comfy(_comfy_and_pack: tuple[ComfyDouble, ModuleType]) -> Iterator[ComfyDouble]:
    """The double of ComfyUI that the pack was loaded into, with nothing recorded yet."""
    double, module = _comfy_and_pack
    double.reset()
    yield double
    module.nodes.MODELS.clear()
    double.memory.loaded.clear()


@pytest.fixture
def pack(_comfy_and_pack: tuple[ComfyDouble, ModuleType]) -> ModuleType:
    """The pack, imported as a ComfyUI custom node."""
    return _comfy_and_pack[1]


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The demo model in `transformers serve`, which draws only where the model's own settings allow it."""
    if transformers.__version__.startswith("4."):
        pytest.skip("transformers serve of version 4 is another program")
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        pytest.skip("transformers serve needs: pip install transformers[serving], which needs Python 3.11")
    home = tmp_path_factory.mktemp("served")
    folder = shutil.copytree(catalog.PACK / "demo" / "model", home / "Demo")
    settings = folder / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"do_sample": True}))
    with Served(folder, home / "log.txt") as engine:
        yield engine
