"""What the tests of the page in a browser are given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from comfyui_scene import started

    yield from started(tmp_path_factory.mktemp("comfyui"))


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from comfyui_page import browser

    with browser() as opened:
        yield opened


@pytest.fixture
def page(server: Any, chromium: Any) -> Iterator[Any]:
    """A new browser profile with an empty workflow, and no error of ours at the end."""
    from comfyui_page import PACK, ComfyPage

    context = chromium.new_context(viewport={"width": 1400, "height": 1000})
    made = ComfyPage(context.new_page(), f"http://127.0.0.1:{server.port}")
    made.open()
    yield made
    ours = [error for error in made.errors if PACK in error]
    context.close()
    assert ours == []
