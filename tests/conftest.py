"""Fixtures: the demo model, and the pack as ComfyUI loads it. Each imports what it needs: a test that has no use for
films is collected where there is no PyAV.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from comfy_double import ComfyDouble
    from engine import Served

    from qwenvl.loading.cache import ModelCache
    from qwenvl.loading.loader import ModelHandle


def pytest_addoption(parser: pytest.Parser) -> None:
    told = "what transformers warns us of, since it goes away, is an error"
    parser.addoption("--no-deprecated", action="store_true", help=told)


def pytest_configure(config: pytest.Config) -> None:
    """Warnings of Python that our own lines cause. What transformers writes to its log instead: _none_deprecated."""
    if config.getoption("--no-deprecated"):
        for kind in ("FutureWarning", "DeprecationWarning"):
            config.addinivalue_line("filterwarnings", rf"error::{kind}:qwenvl\.")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests for a GPU are skipped where there is none, and say so."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny models are faster so, and on a machine that does something else besides many times so."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _measurements_of_this_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is written to the user's folder."""
    if not find_spec("torch"):
        yield
        return
    from qwenvl.loading import precision

    file = tmp_path_factory.mktemp("measured") / "cpu.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "measurements", lambda: file)
        yield


@pytest.fixture
def by_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """4bit and 8bit as on a GPU: this CPU has no products of its own for them."""
    from qwenvl.loading import precision

    monkeypatch.setattr(precision, "why_no_form", lambda *_: "asked for by the test")


class _Deprecated(logging.Handler):
    """Keeps what is said of things that go away."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecated" in record.getMessage():
            self.said.append(record.getMessage())


@pytest.fixture(autouse=True)
def _none_deprecated(request: pytest.FixtureRequest) -> Iterator[None]:
    """With --no-deprecated a test fails in which transformers says so, which it does once in a process."""
    if not request.config.getoption("--no-deprecated"):
        yield
        return
    handler, log = _Deprecated(), logging.getLogger("transformers")
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
    assert handler.said == []


@pytest.fixture(scope="session")
def _home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def _nobody_home(_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Presets and models of whoever runs the tests are not read, and what one test leaves there no other finds."""
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(_home))
    yield
    shutil.rmtree(_home / ".config" / "qwenvl", ignore_errors=True)


@pytest.fixture(scope="session")
def demo() -> ModelHandle:
    """The shipped model, loaded once."""
    from qwenvl.loading.capabilities import machine
    from qwenvl.loading.loader import load
    from qwenvl.models import catalog
    from qwenvl.request import LoadSpec

    folder = catalog.find(catalog.DEMO).folder
    return load(LoadSpec(catalog.DEMO), folder, machine("cpu"))


@pytest.fixture
def models() -> Iterator[ModelCache]:
    """An empty cache, emptied again at the end."""
    from qwenvl.loading.cache import ModelCache

    cache = ModelCache()
    yield cache
    cache.clear()


@pytest.fixture(scope="session")
def _comfy_and_pack(tmp_path_factory: pytest.TempPathFactory) -> tuple[ComfyDouble, ModuleType]:
    from comfy_double import load_pack

    return load_pack(tmp_path_factory.mktemp("comfyui") / "models")


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
    import transformers
    from engine import Served

    from qwenvl.models import catalog

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
