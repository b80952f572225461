"""What the tests of a running ComfyUI, and of its page in a browser, are given."""

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
def viewport() -> dict[str, int]:
    """The size of the page in pixels; a file of tests may have another."""
    return {"width": 1400, "height": 1000}


@pytest.fixture
def closed(server: Any, chromium: Any, viewport: dict[str, int]) -> Iterator[Any]:
    """A tab of a new browser profile where the page is yet to open, and no error of ours at the end."""
    from comfyui_page import PACK, ComfyPage

    context = chromium.new_context(viewport=viewport)
    page = ComfyPage(context.new_page(), f"http://127.0.0.1:{server.port}")
    yield page
    ours = [error for error in page.errors if PACK in error]
    context.close()
    assert ours == []


@pytest.fixture
def page(closed: Any) -> Any:
    """A new browser profile with an empty workflow."""
    closed.open()
    return closed
