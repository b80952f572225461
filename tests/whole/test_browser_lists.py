"""What the page offers to choose from, in a real browser: nodes, models, and words of its language."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

if not os.environ.get("COMFYUI_DIR"):
    pytest.skip("Set COMFYUI_DIR to a ComfyUI checkout to test its page in a browser.", allow_module_level=True)

from comfyui_page import ComfyPage, browser
from comfyui_scene import started
from comfyui_server import Server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from started(tmp_path_factory.mktemp("comfyui"))


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as opened:
        yield opened


@pytest.fixture
def page(server: Server, chromium: Any) -> Iterator[ComfyPage]:
    """A new browser profile with an empty workflow, and no error of ours at the end."""
    context = chromium.new_context(viewport={"width": 1400, "height": 1000})
    made = ComfyPage(context.new_page(), f"http://127.0.0.1:{server.port}")
    made.open()
    yield made
    ours = [error for error in made.errors if "ComfyUI_QwenVL" in error]
    context.close()
    assert ours == []


@pytest.mark.parametrize(("words", "node_id"), [("QwenVL", "QwenVL"), ("qwen", "Qwen")])
def test_a_search_finds_the_nodes_of_today_first(page: ComfyPage, words: str, node_id: str) -> None:
    page.add_by_search(words, node_id)


def test_a_search_offers_no_id_of_older_packs(page: ComfyPage) -> None:
    page._open_search()
    page.tab.keyboard.type("Qwen", delay=20)
    page.tab.get_by_text("QwenVL Boxes").first.wait_for()
    page.shot("search")
    seen = page.run_js("() => document.body.innerText")
    assert [name for name in ("Qwen2.5VL", "Qwen2.5", "Qwen2VL") if name in seen] == []
