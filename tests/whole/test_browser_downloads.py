"""What a node shows of a download in a real browser, from a hub on loopback: before it starts and while it runs."""

from __future__ import annotations

import re
from collections.abc import Iterator

import hub_server
import pytest
from comfyui_page import ComfyPage
from comfyui_scene import started
from comfyui_server import ENVIRONMENT, PACK, Server

# In the list of the pack with its true size; the hub of the tests has the demo model under its name.
MODEL = "Qwen2.5-VL-3B-Instruct"
WEIGHTS = "model.safetensors"
RUNNING = (
    """() => document.querySelector('.qwenvl-answer .status')?.textContent.startsWith('Downloading 1 MB of 3 MB ·')"""
)
# Every line that the box has had from now on.
RECORD = """() => {
    window.lines = [];
    new MutationObserver(() => {
        const line = document.querySelector('.qwenvl-answer .status')?.textContent;
        if (line && line !== window.lines.at(-1)) window.lines.push(line);
    }).observe(document.body, { subtree: true, childList: true, characterData: true });
}"""


@pytest.fixture(scope="module")
def hub() -> Iterator[hub_server.Hub]:
    hub = hub_server.Hub(PACK / "demo" / "model", f"Qwen/{MODEL}")
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, hub: hub_server.Hub) -> Iterator[Server]:
    base = tmp_path_factory.mktemp("comfyui")
    place = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HOME": str(base / "hf_home")}
    yield from started(base, ENVIRONMENT | place)


def ask(page: ComfyPage) -> None:
    page.ask(text="Describe this image.", model=MODEL)
    page.run_js(RECORD)
    page.queue()


def test_a_large_download_says_so_before_it_starts_and_a_cancel_fetches_nothing(
    page: ComfyPage, hub: hub_server.Hub
) -> None:
    hub.fail(silent=True)
    try:
        ask(page)
        page.wait_for_state("downloading")
        assert page.status() == "Downloading 0 MB of 7.5 GB"
        page.shot("download_before_it_starts")
        page.cancel()
        page.wait_for_state("cancelled")
        page.wait_until_idle()
    finally:
        hub.fail()
    assert page.status() == "Cancelled"
    assert hub.cdn_asked == []


def test_while_it_runs_the_node_says_how_much_and_how_long_and_it_goes_on_after_a_cancel(
    page: ComfyPage, hub: hub_server.Hub, server: Server
) -> None:
    hub.fail(drip={WEIGHTS: 1.0})
    ask(page)
    page.wait(RUNNING)
    assert re.fullmatch(r"Downloading 1 MB of 3 MB · \d+ KB/s · \d+ s left", page.status())
    page.shot("download")
    page.cancel()
    page.wait_for_state("cancelled")
    page.wait_until_idle()
    assert page.status() == "Cancelled"
    assert "Traceback" not in server.log().removeprefix(server.start_log)
    hub.fail()
    page.queue()
    page.wait_for_state("done")
    assert page.answer() == "a red circle on a blue background"
    assert re.fullmatch(r"bytes=[1-9]\d*-", hub.asked_for(WEIGHTS)[-1]), "from where it stopped"
    assert any(line.startswith("Loading ") for line in page.run_js("() => window.lines"))
